"""The two backends are one experiment: the Unsloth path, on a stand-in for the package, against the plain one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import backends, models
from dpo_cli.errors import DpoError
from dpo_cli.recipe import load
from tests import program
from tests.train.runs import SMOKE, cut_short, record

HERE = Path(__file__).parent
UNSLOTH = {"PYTHONPATH": str(HERE / "unsloth_double"), "UNSLOTH_ALLOW_CPU": "1"}


@pytest.fixture(scope="module", autouse=True)
def unsloth_imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process that has the stand-in imported, to be forked."""
    with program.server(tmp_path_factory.mktemp("server"), os.environ | UNSLOTH):
        yield


def train(
    runs: Path,
    *settings: str,
    unsloth: bool,
    dead: bool = False,
    steps: Path | None = None,
    options: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if steps:
        environment["DOUBLE_STEPS"] = str(steps)
    if unsloth:
        environment |= UNSLOTH
    if dead:
        environment["DOUBLE_DEAD_BITSANDBYTES"] = "1"
    settings = (
        f"engine.backend={'unsloth' if unsloth else 'hf'}",
        "train.max_steps=4",
        "train.logging_steps=1",
        "data.total=64",
        "data.eval_size=16",
        *settings,
    )
    given = [part for setting in settings for part in ("--set", setting)]
    return program.run("train", SMOKE, "--runs-dir", runs, *given, *options, timeout=None, env=environment)


def losses(runs: Path) -> list[float]:
    lines = (runs / "smoke" / "train" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_same_recipe_gives_the_same_losses_on_both_backends_and_resumes(tmp_path: Path) -> None:
    """Order, LoRA's init and every argument: Unsloth's other defaults (seed, batch, optimizer …) must not get in."""
    assert train(tmp_path / "plain", unsloth=False).returncode == 0
    done = train(tmp_path, "train.save_steps=2", unsloth=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing warns, in particular not that Unsloth came too late"
    assert "backend unsloth" in done.stdout and "dropping unknown" not in done.stdout
    whole = losses(tmp_path)
    # Attention under a mask sums in another order than ours.
    assert whole == pytest.approx(losses(tmp_path / "plain"), abs=5e-6)
    run = tmp_path / "smoke"
    assert record(run)["backend"] == "unsloth"
    assert record(run)["engine"]["shared_prefix"] is True, "through the hook that Unsloth has for it"
    # TRL adds a copy of a PeftModel's adapter; saved with a checkpoint, it would be restored and not the policy.
    assert not list((run / "train").rglob("ref"))
    cut_short(run, step=2)
    done = train(tmp_path, "train.save_steps=2", unsloth=True)
    assert "resumed from step 2" in done.stdout, done.stderr
    assert losses(tmp_path) == whole


def test_4_bit_that_came_out_16_bit_is_an_error(tmp_path: Path) -> None:
    done = train(tmp_path, "model.load_in_4bit=true", unsloth=True, dead=True)
    assert done.returncode == 1
    assert "4-bit" in done.stderr and "model.load_in_4bit" in done.stderr and "bitsandbytes" in done.stderr


@pytest.mark.slow
def test_unsloth_trains_4_bit_weights_that_leave_a_layer_in_16(tiny_model: Path, tmp_path: Path) -> None:
    """As in its "dynamic" repositories, whose config names such layers; Unsloth makes a dict of that config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = tmp_path / "dynamic"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"],
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, dtype=torch.float32)
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    done = train(tmp_path, f"model.id={folder}", "model.load_in_4bit=true", unsloth=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.parametrize("asked", ["null", "true"])
@pytest.mark.slow
def test_unsloth_is_told_of_the_checkpointing_that_was_planned(asked: str, tmp_path: Path) -> None:
    """It takes the way that the model was loaded over the trainer's arguments."""
    settings = (f"train.gradient_checkpointing={asked}", "train.max_steps=2")
    done = train(tmp_path, *settings, unsloth=True, steps=tmp_path / "steps")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    on = asked == "true"  # the plan needs none for so small a model
    assert record(tmp_path / "smoke")["engine"]["gradient_checkpointing"] is on
    assert set((tmp_path / "steps").read_text().split()) == {str(on)}


@pytest.mark.slow  # test_training.py has who is imported first
def test_a_plan_is_timed_on_unsloth(tmp_path: Path) -> None:
    done = train(tmp_path, unsloth=True, options=("--plan",))
    assert (done.returncode, done.stderr) == (0, "")
    assert "backend unsloth" in done.stdout and "Time: about" in done.stdout


def test_weights_that_the_folder_lacks_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """transformers would draw them at random, and Unsloth loads without asking what was missing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "renamed"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = train(tmp_path, f"model.id={folder}", unsloth=True)
    assert done.returncode == 1
    assert "model.layers.1.mlp.up_proj.weight" in done.stderr and "model.layers.1.mlp.up.weight" in done.stderr


def test_unsloth_that_is_not_installed_is_refused_with_a_fix(tmp_path: Path) -> None:
    done = program.run("train", SMOKE, "--runs-dir", tmp_path, "--set", "engine.backend=unsloth")
    assert done.returncode == 1
    assert "Unsloth is not installed" in done.stderr and "engine.backend: auto" in done.stderr


def test_the_backend_is_the_one_asked_for_or_unsloth_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(backend: str) -> str:
        return backends.choose_backend(load(SMOKE, [f"engine.backend={backend}"])).name

    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen(one) for one in ("auto", "unsloth", "hf")] == ["unsloth", "unsloth", "hf"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    assert [chosen(one) for one in ("auto", "unsloth", "hf")] == ["hf", "unsloth", "hf"]
    # A card that fails: what a CPU would do is done there only where nothing was installed for the card.
    monkeypatch.setattr(backends, "cuda_problem", lambda: DpoError("the driver is too old"))
    with pytest.raises(DpoError, match="too old"):
        chosen("auto")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert chosen("auto") == "hf"


@pytest.mark.parametrize(("capability", "rows"), [((8, 9), "64"), ((12, 0), "64"), ((8, 0), None), ((9, 0), None)])
def test_cards_with_little_shared_memory_get_small_tiles(
    capability: tuple[int, int], rows: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(os.environ, "PG_FLEX_BF16_BLOCK_M", "")
    del os.environ["PG_FLEX_BF16_BLOCK_M"]
    backends.before_unsloth()
    assert os.environ.get("PG_FLEX_BF16_BLOCK_M") == rows


def test_auto_is_float16_where_training_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models, "best_dtype", lambda: torch.bfloat16)
    dtypes = [models.resolve_dtype(load(SMOKE, ["model.dtype=auto", f"train.fp16={on}"])) for on in ("true", "false")]
    assert dtypes == [torch.float16, torch.bfloat16]
