"""The program's commands on the smoke recipe's data, few of them, on a pretended card or on the CPU."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pretend_cuda.pretended import Card
from tests.pretend_cuda.pretended_torch import pretending
from tests.train.runs import SMOKE, dpo_cli, log, record
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

SMALL = (
    "data.total=24", "data.eval_size=6", "model.max_length=192", "model.dtype=float32", "engine.backend=hf",
    "engine.token_budget=400", "train.max_steps=2", "train.logging_steps=1", "train.save_strategy=no",
    "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1", "eval.prompts=3",
    "eval.max_new_tokens=8",
)  # fmt: skip
FIGURES = ("loss", "grad_norm", "eval_loss", "rewards/margins", "eval_en_rewards/margins")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@dataclass
class Runs:
    """A folder of runs, and what the commands have written there."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "smoke"

    def go(self, command: str, *settings: str, card: Card | None = None) -> str:
        """Run a command on the smoke recipe, on a card or on the CPU; what it prints. It has to end well."""
        with pretending(card) if card else nullcontext():
            done = dpo_cli(command, SMOKE, self.folder, *SMALL, *settings, options=("--debug",))
        assert not (card and card.refused), card
        assert done.exit_code == 0, done.output
        return done.output

    def read(self, path: str) -> Any:
        return json.loads((self.run / path).read_text(encoding="utf-8"))

    @property
    def engine(self) -> dict[str, Any]:
        """What training chose, as the manifest keeps it."""
        return dict(record(self.run)["engine"])

    def figures(self) -> list[list[float]]:
        """Those of the training's log that the CPU's have to equal."""
        rows = log(self.run)
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        return [[row[key] for key in FIGURES if key in row] for row in rows]

    def copy(self, folder: Path) -> Runs:
        return Runs(shutil.copytree(self.folder, folder))


def small_card(monkeypatch: pytest.MonkeyPatch, error: Exception, too_large: Callable[[Any], bool]) -> None:
    """Have the model raise where a batch is too large."""
    forward = Qwen3Model.forward

    def on_small_card(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if too_large(input_ids):
            raise error
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", on_small_card)
