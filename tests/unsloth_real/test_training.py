"""`dpo-cli train` through Unsloth's loader, adapters, kernels and trainer, compared with plain TRL."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

Train = Callable[..., Any]
# Float32, and kernels that sum in another order than PyTorch's.
CLOSE = 2e-5


@dataclass
class Seen:
    """What was seen of a training from inside."""

    shared: list[Any] = field(default_factory=list)
    # Forwards of the first decoder layer: those of the step that is tried before step 1, and of all that follow.
    layer: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    trainer: Any = None
    made: tuple[bool, bool, Any] | None = None  # its model after the constructor: training, checkpointed, by what way
    probed: bool = False  # Unsloth has noticed the forwards before train()


def checkpointed(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def watched() -> Iterator[Seen]:
    from dpo_cli.train import engine, preflight, shared_prefix, trainer

    seen, phase = Seen(), ["before"]

    def choose(recipe: Any, made: Any, *arguments: Any) -> Any:
        def count(*_: Any) -> None:
            seen.layer[phase[0]] += 1

        seen.trainer, model = made, made.model
        seen.made = model.training, checkpointed(model), model._unsloth_gradient_checkpointing
        model.get_base_model().model.layers[0].register_forward_pre_hook(count)
        chosen = real_choose(recipe, made, *arguments)
        phase[0] = "preflight"  # which tries the longest rows on a GPU
        preflight.seconds_of(made, [made.train_dataset[0]])
        phase[0], seen.probed = "train", model._unsloth_pretrain_marker["seen"]
        return chosen

    def install(*arguments: Any) -> Any:
        seen.shared.append(real_install(*arguments))
        return seen.shared[-1]

    real_choose, real_install = engine.choose, shared_prefix.install
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        patch.setenv("UNSLOTH_COMPILE_DISABLE", "0")  # else Unsloth does not look for runs before train()
        patch.setattr(trainer, "choose", choose)
        patch.setattr(shared_prefix, "install", install)
        yield seen
    seen.warnings += [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def shared(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Seen]:
    """Three steps with the shared prefix, after a preflight; checkpointing is left to the plan, which needs none."""
    with watched() as seen:
        run = train(tmp_path_factory.mktemp("shared"), "engine.shared_prefix=on")
    assert run.result.exit_code == 0, run.result.output
    return run, seen


def losses_of_trl(plain: Path, method: str) -> list[float]:
    lines = (plain / f"plain-{method}" / "demo" / "train" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_prompt_is_shared_and_losses_are_trls(shared: tuple[Any, Seen], plain: Path) -> None:
    run, seen = shared
    assert run.record["backend"] == "unsloth" and run.record["engine"]["shared_prefix"] is True
    [prefix] = seen.shared
    assert 0 < prefix.stream_tokens < prefix.padded_tokens
    assert len(run.losses) == 3
    assert run.losses == pytest.approx(losses_of_trl(plain, "dpo"), abs=CLOSE)


def test_without_checkpointing_a_layer_runs_once_a_pass(shared: tuple[Any, Seen]) -> None:
    """Two forwards a step, the policy's and the reference's; with checkpointing the backward makes it three."""
    run, seen = shared
    assert run.record["engine"]["gradient_checkpointing"] is False
    assert seen.layer["preflight"] == 2
    assert seen.layer["train"] == 3 * 2
    assert not checkpointed(seen.trainer.model)


@pytest.fixture(scope="module")
def dynamic(train: Train, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Seen]:
    """A step with checkpointing on 4-bit weights that leave a layer in 16 bits, as Unsloth's "dynamic" ones do."""
    weights = (f"model.id={plain / 'model-4bit'}", "model.load_in_4bit=true")
    settings = ("train.gradient_checkpointing=true", "train.max_steps=1")
    with watched() as seen:
        run = train(tmp_path_factory.mktemp("dynamic"), *weights, *settings)
    assert run.result.exit_code == 0, run.result.output
    return run, seen


def test_with_checkpointing_the_preflight_runs_as_training_does(dynamic: tuple[Any, Seen]) -> None:
    run, seen = dynamic
    assert run.record["engine"]["gradient_checkpointing"] is True
    assert (seen.layer["preflight"], seen.layer["train"]) == (3, 3)


def test_weights_in_4_bit_with_a_layer_in_16_train(dynamic: tuple[Any, Seen]) -> None:
    """Unsloth keeps their config as a dict."""
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

    run, seen = dynamic
    config = seen.trainer.model.config.quantization_config
    assert isinstance(config, dict) and "model.layers.1.mlp" in config["llm_int8_skip_modules"]
    first, second, *_ = seen.trainer.model.get_base_model().model.layers
    assert isinstance(first.mlp.up_proj.base_layer, Linear4bit)
    assert type(second.mlp.up_proj.base_layer) is torch.nn.Linear
    assert run.record["engine"]["shared_prefix"] is True
    assert run.losses == [pytest.approx(math.log(2), abs=1e-6)]


def test_a_made_trainer_leaves_its_model_as_for_inference(shared: tuple[Any, Seen]) -> None:
    """As in the stand-in: so the preflight would try no checkpointing, were nothing done about it."""
    _, seen = shared
    assert seen.made == (False, False, True)  # "unsloth" is True for texts below 512 tokens


def test_training_takes_the_models_checkpointing_over_the_arguments(
    shared: tuple[Any, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the stand-in."""

    class Stop(Exception):
        pass

    def stop(use_gradient_checkpointing: Any) -> None:
        raise Stop(use_gradient_checkpointing)

    model = shared[1].trainer.model
    monkeypatch.setattr(model, "_unsloth_gradient_checkpointing", "the model's")
    monkeypatch.setattr(model, "for_training", stop)
    with pytest.raises(Stop, match="the model's"):
        shared[1].trainer.train()


def test_nothing_frightens_for_nothing(shared: tuple[Any, Seen]) -> None:
    run, seen = shared
    assert seen.probed, "the preflight is a run before train(), of which Unsloth would warn"
    assert not [warning for warning in seen.warnings if "Unsloth" in warning]
    # That training stays in float32 is true of the card that is played here.
    assert not [line for line in run.result.output.splitlines() if "Unsloth:" in line and "float32" not in line]
    assert "warning" not in run.result.stderr


def test_a_resume_gives_the_same_losses(shared: tuple[Any, Seen], train: Train, tmp_path: Path) -> None:
    run, _ = shared
    assert not list((run.folder / "train").rglob("ref")), "no copy of the adapter is saved"
    # As a kill after step 2 leaves it.
    shutil.copytree(run.folder, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "train" / "checkpoints" / "checkpoint-3")
    manifest = json.loads((tmp_path / "demo" / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"]["train"]["status"] = "running"
    (tmp_path / "demo" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    again = train(tmp_path, "engine.shared_prefix=on")
    assert "resumed from step 2" in again.result.output
    assert again.losses == run.losses


@pytest.mark.parametrize("method", ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simpo", "orpo"))])
def test_other_methods_go_through_unsloths_trainers_to_the_same_losses(
    method: str, train: Train, plain: Path, tmp_path: Path
) -> None:
    run = train(tmp_path, f"train.method={method}", "train.max_steps=2")
    assert run.result.exit_code == 0, run.result.output
    assert run.losses == pytest.approx(losses_of_trl(plain, method), abs=CLOSE)


def test_4_bit_that_came_out_16_bit_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where bitsandbytes is broken, Unsloth prints a line and loads 16 bits; as in the stand-in."""
    from unsloth.models import loader

    monkeypatch.setattr(loader, "ALLOW_BITSANDBYTES", False)
    run = train(tmp_path, "model.load_in_4bit=true")
    assert run.result.exit_code == 1
    assert "the model was to be in 4-bit" in run.result.stderr


def test_weights_that_the_folder_lacks_are_refused(train: Train, plain: Path, tmp_path: Path) -> None:
    """transformers would draw them at random, and Unsloth hides its report."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(plain / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    run = train(tmp_path, f"model.id={tmp_path / 'model'}")
    assert run.result.exit_code == 1
    assert "lack 1 tensors" in run.result.stderr and "model.layers.1.mlp.up_proj.weight" in run.result.stderr
    assert "model.layers.1.mlp.up.weight" in run.result.stderr
