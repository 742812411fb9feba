"""How often a training step waits for a GPU and copies to it, counted on a pretended one, by who asked for it.

`python -m tests.pretend_cuda.waits` prints the table of tests/benchmarks/RESULTS.md.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.pretend_cuda.card_runs import Runs
from tests.pretend_cuda.pretended import Card
from transformers import Trainer, TrainerCallback, trainer

OFF = ("engine.shared_prefix=off", "engine.token_budget=off")
ALONE = "engine.token_budget=32"  # fewer than any pair has: each is a pass of its own


@dataclass(frozen=True)
class Step:
    """From the end of one optimizer step to the end of the next, nothing logged: waits and copies by package."""

    waits: dict[str, float]
    copies: dict[str, float]
    passes: int

    def minus(self, other: Step, share: float = 1.0) -> Step:
        """What is left of it without so many of the other."""

        def left(one: dict[str, float], less: dict[str, float]) -> dict[str, float]:
            return {name: one.get(name, 0) - share * less.get(name, 0) for name in sorted({*one, *less})}

        return Step(left(self.waits, other.waits), left(self.copies, other.copies), self.passes - other.passes)


@dataclass(frozen=True)
class Counted:
    """A step of one micro-batch by TRL alone; what a pass of a token budget adds, and what its step has beside them."""

    stock: Step
    each_pass: Step
    beside: Step


def step_of(runs: Runs, pairs: int, *settings: str) -> Step:
    """The second optimizer step of a training with so many pairs a step."""
    card, passes, ends = Card(), [0], list[tuple[Counter[str], Counter[str], int]]()
    forward_and_backward = Trainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        return forward_and_backward(self, *args, **kwargs)

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            waits, copies = Counter[str](), Counter[str]()
            for found, by in ((card.waits, waits), (card.copies, copies)):
                for one, times in found.items():
                    by[one.by] += times
            ends.append((waits, copies, passes[0]))

    with (
        patch.object(Trainer, "training_step", counted),
        patch.object(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Ends]),
    ):
        size, steps = f"train.per_device_train_batch_size={pairs}", ("train.max_steps=3", "train.logging_steps=100")
        runs.go("train", size, *steps, *settings, card=card)
    before, after = ends[0], ends[1]
    return Step(dict(after[0] - before[0]), dict(after[1] - before[1]), after[2] - before[2])


def count(prepared: Runs, folder: Path) -> Counted:
    """Train three times, in copies of the prepared runs in a folder."""
    stock = step_of(prepared.copy(folder / "stock"), 4, *OFF)
    two, four = (step_of(prepared.copy(folder / f"{pairs} passes"), pairs, ALONE) for pairs in (2, 4))
    assert (stock.passes, two.passes, four.passes) == (1, 2, 4)
    two_more = four.minus(two)
    each = two_more.minus(two_more, 0.5)
    return Counted(stock, each, two.minus(each, 2))


def table(counted: Counted) -> str:
    """As Markdown, the packages side by side."""
    rows = {
        "TRL's step, one micro-batch": counted.stock,
        "each pass of a token budget": counted.each_pass,
        "a step, beside its passes": counted.beside,
    }
    names = sorted({name for step in rows.values() for name in (*step.waits, *step.copies)} - {"ours"})

    def cell(by: dict[str, float]) -> str:
        parts = [f"{name.replace('ours', 'dpo-cli')} {by[name]:g}" for name in ("ours", *names) if by.get(name)]
        return f"{sum(by.values()):g}" + (f": {', '.join(parts)}" if parts else "")

    lines = ["| | waits for the GPU | blocking copies to it |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {cell(one.waits)} | {cell(one.copies)} |" for name, one in rows.items())])


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(Path(scratch) / "prepared")
        runs.go("prepare")
        print(
            date.today(),
            ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate")),
        )
        print(table(count(runs, Path(scratch))))
