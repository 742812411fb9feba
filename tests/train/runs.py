"""What tests of training share: the command, what a run leaves, a run as a kill leaves it, and TRL's bare trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dpo_cli.cli import app
from typer.testing import CliRunner, Result

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def dpo_cli(command: str, recipe: Path, runs: Path, *settings: str, options: tuple[str, ...] = ()) -> Result:
    """Run a command in this process, each of `settings` by `--set`."""
    every = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(app, [command, str(recipe), "--runs-dir", str(runs), *every, *options])


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train" / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def record(run: Path) -> dict[str, Any]:
    """What the manifest keeps of the training."""
    return dict(json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"]["train"])


def weights(run: Path) -> bytes:
    return (run / "train" / "adapter" / "adapter_model.safetensors").read_bytes()


def cut_short(run: Path, step: int) -> None:
    """Leave a finished run as a kill after that step leaves it: a checkpoint, the log, a manifest that says running."""
    for checkpoint in (run / "train" / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "train" / "adapter")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"]["train"]["status"] = "running"
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def trl_trainer(
    folder: Path, model: Any, tokenizer: Any, rows: Any, *mixins: type, evaluation: Any = None, **arguments: Any
) -> Any:
    """TRL's DPOTrainer as a script has it, on a CPU, with these classes before it."""
    import datasets
    import torch
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    common: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip

    def dataset(some: Any) -> Any:
        if isinstance(some, dict):
            return {name: dataset(one) for name, one in some.items()}
        return datasets.Dataset.from_list(some) if isinstance(some, list) else some

    trainer: Any = type("Trainer", (*mixins, DPOTrainer), {})(
        model=model,
        args=DPOConfig(**common | arguments),
        train_dataset=dataset(rows),
        eval_dataset=dataset(evaluation),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a trainer's log without what tells the time."""
    timed = ("runtime", "per_second", "total_flos")
    return [{name: value for name, value in row.items() if not any(word in name for word in timed)} for row in history]


def leave_start(trainer: Any) -> None:
    """Move a policy away from its reference, where every loss would be the same number."""
    import torch

    noise = torch.Generator().manual_seed(2)
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)


def batch_of(trainer: Any) -> Any:
    """All its rows as one batch."""
    return trainer.data_collator([trainer.train_dataset[n] for n in range(len(trainer.train_dataset))])


def step(trainer: Any) -> tuple[float, dict[str, Any], dict[str, float]]:
    """One training step on all rows: its loss, its gradients, and what TRL is to log, an entry each."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.training_step(trainer.model, batch_of(trainer))
    grads = {name: one.grad.clone() for name, one in trainer.model.named_parameters() if one.grad is not None}
    logged = trainer._metrics["train"].items()
    assert all(len(values) == 1 for _, values in logged)
    return loss.item(), grads, {name: values[0] for name, values in logged}
