"""What a run that was cut short left behind: its last whole checkpoint, and the log up to there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dpo_cli import processes
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run, replace


def checkpoint_to_resume(recipe: Recipe, run: Run) -> Path | None:
    """The last whole checkpoint of a run that was cut short; None to start over.

    Raises:
        DpoError: it was made from another recipe or other data.
    """
    state = run.state("train", recipe)
    if state.kind != "cut_short":
        return None
    checkpoint = _last_checkpoint(run.checkpoints)
    changed = run.changes("train", recipe)
    before = run.record("train").get("processes", 1)
    if before != processes.count():  # the pairs of a step are dealt out to them
        changed.append(f"{processes.count()} processes, were {before}")
    if checkpoint and changed:
        raise DpoError(
            f"a run of something else was cut short here: {'; '.join(changed[:5])}",
            where=str(run.checkpoints),
            hint="undo the change to go on with it, or start over with --fresh",
        )
    return checkpoint


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def start_log(log: Path, checkpoints: Path, checkpoint: Path | None) -> None:
    """Begin `log.jsonl`, or cut it back to the checkpoint's step, with the checkpoints after it."""
    if checkpoint is None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        log.unlink(missing_ok=True)
        return
    step = step_of(checkpoint)
    for later in checkpoints.glob("checkpoint-*"):
        if step_of(later) > step:
            shutil.rmtree(later)
    rows = [line for line in log.read_text(encoding="utf-8").splitlines() if _logged_until(line, step)]
    aside = log.with_suffix(".new")
    aside.write_text("".join(line + "\n" for line in rows), encoding="utf-8")
    replace(aside, log)


def is_last(checkpoint: Path) -> bool:
    """Whether nothing is left to train: the run was cut short between its last step and its end."""
    state = _state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])


def _last_checkpoint(folder: Path) -> Path | None:
    """Its last file is trainer_state.json, so without a whole one a checkpoint was cut off while being written."""
    whole = [path for path in folder.glob("checkpoint-*") if _state(path).get("global_step") == step_of(path)]
    return max(whole, key=step_of, default=None)


def _state(checkpoint: Path) -> dict[str, Any]:
    """What transformers keeps of the training; empty where that is not whole."""
    try:
        return dict(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def _logged_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError):
        return False  # a line that was cut off in the middle
