"""What can be wrong before the first step: each is one block that names the place and the fix, with its exit code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke
from dpo_cli.cli import app
from dpo_cli.train.checkpoints import saved
from safetensors.torch import load_file, save_file
from tests import mounts, program
from tests.train.runs import SMOKE, cut_short, dpo_cli, log, weights
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Run `dpo-cli train` on the smoke recipe with some settings, in one folder of runs."""
    runs = tmp_path_factory.mktemp("runs")

    def go(*settings: str) -> Result:
        return dpo_cli("train", SMOKE, runs, "train.max_steps=1", *settings, options=("--quiet",))

    return go


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return shutil.copytree(smoke.resolve("builtin:tiny-qwen3"), tmp_path / "model")


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content), encoding="utf-8")


def said(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    assert "where:" in result.stderr and "fix:" in result.stderr
    return result.stderr


def test_a_tokenizer_without_a_chat_template(train: Callable[..., Result], model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    message = said(train(f"model.id={model}"))
    assert "no chat template" in message and "model.id" in message


def test_a_base_that_is_no_causal_language_model(train: Callable[..., Result], model: Path) -> None:
    edit(model / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    message = said(train(f"model.id={model}"))
    assert "can't load the model" in message and "AutoModelForCausalLM" in message


def test_a_folder_without_weights(train: Callable[..., Result], model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in said(train(f"model.id={model}"))


@pytest.mark.parametrize("setting", ["train.fp16=true", "model.dtype=float16"])
def test_float16_on_a_cpu(train: Callable[..., Result], setting: str) -> None:
    message = said(train(setting))
    assert "needs a GPU" in message and setting.split("=")[0] in message


def test_lora_on_layers_that_are_not_there(train: Callable[..., Result]) -> None:
    message = said(train("lora.target_modules=[w_proj]"))
    assert "w_proj" in message and "lora.target_modules" in message


def test_quantised_weights_against_the_recipe(train: Callable[..., Result], model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    message = said(train(f"model.id={model}"))
    assert "quantised" in message and "model.load_in_4bit: true" in message


# ------------------------------------------------------------------------------------ a run that was cut short


def trainer(project: Any, model: Path | str, **more: Any) -> Callable[..., Result]:
    """`dpo-cli train` on the small project with a local model: four steps, a checkpoint after every second."""
    train: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    train |= {"gradient_accumulation_steps": 1, "learning_rate": 0.005, **more}
    options = [f"train.{name}={json.dumps(value)}" for name, value in train.items()]
    options += [f"model.id={model}", "model.load_in_4bit=false", "lora.r=8", "lora.dropout=0.0"]

    def go(*settings: str, force: bool = False) -> Result:
        runs = project.run.parent
        return dpo_cli("train", project.recipe, runs, *options, *settings, options=("--force",) if force else ())

    return go


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "demo"


@pytest.fixture
def train_again(project: Any, kept: Path) -> Callable[..., Result]:
    """`dpo-cli train` on the small project, in which it has come to its end once."""
    train = trainer(project, "builtin:tiny-qwen3")
    if kept.is_dir():
        shutil.copytree(kept, project.run)
    else:
        assert train().exit_code == 0
        shutil.copytree(project.run, kept)
    return train


def logged(run: Path) -> list[dict[str, Any]]:
    """The rows of the log, in what a resumed run has to give again (TRL counts its tokens anew)."""
    keep = ("step", "loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate")
    return [{key: row[key] for key in keep} for row in log(run)]


def change_template(model: Path) -> str:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# another #}", encoding="utf-8")
    return "model/chat_template.jinja has changed"


def change_weights(model: Path) -> str:
    with open(model / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    return "model/model.safetensors has changed"


def assert_is_not_resumed(project: Any, train: Callable[..., Result], reason: str) -> None:
    message = said(train())
    assert "something else that was cut short" in message and reason in message and "--fresh" in message
    assert not (project.run / "train" / "adapter").exists()
    assert "train.beta is 0.3, was 0.1" in said(train("train.beta=0.3")), "each change is named, also a key"


@pytest.mark.slow
@pytest.mark.parametrize("change", [change_template, change_weights])
def test_a_run_of_another_model_is_not_resumed(project: Any, model: Path, change: Callable[[Path], str]) -> None:
    train = trainer(project, model)
    assert train().exit_code == 0
    cut_short(project.run, step=2)
    assert_is_not_resumed(project, train, change(model))


def test_a_run_of_other_data_is_not_resumed(project: Any, train_again: Callable[..., Result]) -> None:
    cut_short(project.run, step=2)
    project.write_rows(40, seed=1)
    assert_is_not_resumed(project, train_again, "rows/a.jsonl has changed")


# ------------------------------------------------------------------------------------------------ nothing to learn

TEMPLATES = {
    "without answers": "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "with empty answers": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.mark.parametrize("method", ["dpo", *(pytest.param(one, marks=pytest.mark.slow) for one in ("kto", "simpo"))])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_leaves_the_answers_out(project: Any, model: Path, template: str, method: str) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
    message = said(trainer(project, model)(f"train.method={method}"))
    assert "so there is nothing to learn" in message and "--preview" in message
    manifest = json.loads((project.run / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["stages"]) == ["prepare"]


@pytest.mark.parametrize("steps", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_gradients_that_are_zero_from_the_start(project: Any, model: Path, steps: int) -> None:
    """Attention that goes nowhere, and a LoRA on nothing else: said at any step, and at the end of a short run."""
    weights = load_file(model / "model.safetensors")
    dead = {name: value * 0 if "o_proj" in name else value for name, value in weights.items()}
    save_file(dead, model / "model.safetensors", metadata={"format": "pt"})
    done = trainer(project, model, max_steps=steps)("lora.target_modules=[q_proj]")
    message = said(done)
    assert "nothing is learned: the gradient is 0" in message and f"after {min(steps, 3)} steps" in message
    assert not (project.run / "train" / "adapter").exists()


# ------------------------------------------------------------------------------------------- a run that is finished


def state(run: Path) -> dict[str, bytes]:
    """Everything that training wrote and the pairs it read, but what tells the time."""
    files = [path for name in ("train/adapter", "train/checkpoints", "data") for path in (run / name).rglob("*")]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


def test_a_finished_run_is_not_replaced_but_goes_on_for_more_steps(project: Any, model: Path) -> None:
    train = trainer(project, model, save_steps=1, save_total_limit=3)
    assert train().exit_code == 0
    before, rows = state(project.run), log(project.run)
    checkpoints = project.run / "train" / "checkpoints"
    assert [path.name for path in saved(checkpoints)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]

    for other in (["train.beta=0.3"], ["train.beta=0.3", "data.filters.tie=false"], ["train.max_steps=2"]):
        message = said(train(*other))
        assert "holds a finished run of something else" in message and other[0].split("=")[0] in message
        assert "--set name=demo-2" in message and "--fresh" in message
        assert state(project.run) == before
    assert "holds a finished run" in said(train("train.beta=0.3", force=True)) and state(project.run) == before

    longer = train("train.max_steps=6")
    assert longer.exit_code == 0, longer.output
    assert "on from step 4 of the finished run" in longer.stdout
    assert "learning rate 1.67e-03 at step 5: the schedule is laid out anew" in longer.stdout
    after = log(project.run)
    assert after[:4] == rows and [row["step"] for row in after] == [1, 2, 3, 4, 5, 6]
    # A third of the linear schedule is left at step 5, whose row tells the rate of the next.
    assert [row["learning_rate"] for row in after[4:]] == pytest.approx([0.005 / 3, 0.005 / 6])
    metrics = json.loads((project.run / "train" / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["steps"], metrics["resumed_from"], metrics["final"]) == (6, 4, after[-1])
    assert metrics["pairs_per_second"] * metrics["seconds"] == pytest.approx(2 * 2, rel=0.05), "of these two steps"
    assert train("train.max_steps=6").stdout.count("nothing has changed") == 2
    expected = logged(project.run), weights(project.run)

    for step in (5, 4):  # killed after a step of the continuation, and before its first
        cut_short(project.run, step=step)
        again = train("train.max_steps=6")
        assert f"resumed from step {step}" in again.stdout, again.output
        assert (logged(project.run), weights(project.run)) == expected


@pytest.mark.slow
def test_the_best_adapter_of_a_copied_run_is_its_own(project: Any, model: Path) -> None:
    """Cut short after its last step, and copied: the folder that it came from must not be asked."""
    train = trainer(project, model, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=9)
    stopping = ["engine.early_stopping={metric: eval_rewards/margins, patience: 9}", "data.eval_fraction=0.4"]
    assert train(*stopping).exit_code == 0
    best = json.loads((project.run / "train" / "metrics.json").read_text(encoding="utf-8"))["best"]["step"]
    expected = weights(project.run)
    copies = {step: shutil.copytree(project.run, project.folder / "runs" / f"copy-{step}") for step in (4, 3)}
    harmed = project.run / "train" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    harmed.write_bytes(b"of another folder")
    for step, copy in copies.items():
        cut_short(copy, step=step)
        done = train(*stopping, f"name={copy.name}")
        assert done.exit_code == 0, done.output
        assert weights(copy) == expected


@pytest.mark.parametrize("free", [20, pytest.param(300, marks=pytest.mark.slow)], ids=["adapter", "optimizer"])
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(tmp_path: Path, model: Path, free: int) -> None:
    """Really full, while a part of checkpoint-4 is written; later there is space again."""
    whole, disk, after = (tmp_path / name for name in ("whole", "disk", "after"))
    disk.mkdir()
    options = ["train.max_steps=4", "train.save_steps=2", "train.logging_steps=1", f"model.id={model}"]
    options += ["data.total=40", "data.eval_size=8"]
    command = ["train", str(SMOKE), *(part for option in options for part in ("--set", option)), "--quiet"]
    assert CliRunner().invoke(app, [*command, "--runs-dir", str(whole)]).exit_code == 0
    expected = logged(whole / "smoke"), weights(whole / "smoke")
    cut_short(whole / "smoke", step=2)

    done = program.run_python(mounts.SCRIPT, "full", disk, whole, after, free, *command, "--runs-dir", disk)
    mounts.skip_where_refused(done.returncode)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: No space left on device") and "Traceback" not in done.stderr
    assert "where:" in done.stderr and "fix:   free some disk space" in done.stderr

    shutil.rmtree(after / "smoke" / "train" / "checkpoints" / "checkpoint-4", ignore_errors=True)
    again = CliRunner().invoke(app, [*command[:-1], "--runs-dir", str(after)])
    assert again.exit_code == 0 and "resumed from step 2" in again.stdout, again.output
    assert (logged(after / "smoke"), weights(after / "smoke")) == expected


def test_a_run_folder_that_may_only_be_read(project: Any, train_again: Callable[..., Result]) -> None:
    """A read-only mount, which root can't write to either."""
    cut_short(project.run, step=2)
    command = ("train", "demo.yaml", "--set", "model.id=builtin:tiny-qwen3")
    done = program.run_python(mounts.SCRIPT, "readonly", project.run, *command)
    mounts.skip_where_refused(done.returncode)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Read-only file system") and "Traceback" not in done.stderr
    assert "runs/demo" in done.stderr


# ------------------------------------------------------------------------------------ batches that do not divide


def test_batch_settings_that_do_not_divide_lose_no_pair(project: Any, model: Path) -> None:
    """Five pairs: the last step, or the only one, has what is left, and each pair weighs the same in its step."""
    figures = {}
    for pairs, times in ((1, 1), (3, 4), (2, 2), (16, 1)):
        train = trainer(project, model, max_steps=-1, per_device_train_batch_size=pairs)
        done = train("data.total=5", f"train.gradient_accumulation_steps={times}", f"name=batch-{pairs}-{times}")
        assert done.exit_code == 0, done.output
        run = project.folder / "runs" / f"batch-{pairs}-{times}"
        metrics, figures[pairs, times] = json.loads((run / "train" / "metrics.json").read_text("utf-8")), log(run)
        assert metrics["pairs_per_second"] * metrics["seconds"] == pytest.approx(5, rel=0.05)
    assert [len(rows) for rows in figures.values()] == [5, 1, 2, 1]
    assert len({rows[-1]["num_tokens"] for rows in figures.values()}) == 1, "every pair was seen, and none twice"
    assert figures[3, 4][0]["grad_norm"] == pytest.approx(figures[16, 1][0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("half", [pytest.param("", marks=pytest.mark.slow), '{"best_glob'])
def test_a_checkpoint_whose_last_file_is_half_written_is_none(
    project: Any, train_again: Callable[..., Result], half: str
) -> None:
    """A full disk or a lost power leaves `trainer_state.json` there, but not whole."""
    expected = logged(project.run), weights(project.run)
    cut_short(project.run, step=4)
    (project.run / "train" / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text(half, encoding="utf-8")
    done = train_again()
    assert "resumed from step 2" in done.stdout, done.output
    assert (logged(project.run), weights(project.run)) == expected


def test_a_run_cut_short_after_its_last_step_takes_no_step_more(
    project: Any, train_again: Callable[..., Result]
) -> None:
    """As a full disk leaves it where only the adapter no longer fits."""
    expected = logged(project.run), weights(project.run)
    cut_short(project.run, step=4)
    done = train_again()
    assert done.exit_code == 0, done.output
    assert (logged(project.run), weights(project.run)) == expected


def test_pairs_that_trl_would_leave_out_are_counted_and_named(train: Callable[..., Result]) -> None:
    message = said(train("data.filters.too_long=false", "model.max_length=24"))
    assert re.search(r"the prompts of \d+ of \d+ pairs fill all 24 tokens: [0-9a-f]{16}, ", message), message
    assert "model.max_length" in message
