"""Checkpoints: which ones are whole and which stay, where a training starts or resumes, and its log up to there.

A checkpoint is whole where its files have the sizes and hashes that were written into it last (`files.json`). One that
is not is passed over for the one before it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli import processes
from dpo_cli.disk import read_json, remove, sha256, write_json, write_text
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.reads import recipe_keys
from dpo_cli.run import GO_ON, Reason, Run

SEAL = "files.json"


@dataclass(frozen=True)
class Start:
    """Where a training starts: at a checkpoint, or at nothing; with remarks on the choice for a person."""

    checkpoint: Path | None = None
    longer: bool = False  # from the end of a finished run, for more steps
    remarks: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0


def start_of(recipe: Recipe, run: Run, another: str | None = None, prepared: bool = True) -> Start:
    """Where `train` starts: a run that was cut short after its last whole checkpoint, a finished one for more steps.

    Args:
        another: the command that trains this recipe under another name.
        prepared: the pairs are those of this recipe; if not, what is wrong with `data/` alone may still be put right.

    Raises:
        DpoError: another recipe, other settings or other inputs than those of the run that is here, finished or not;
            or no checkpoint of it is whole.
    """
    record = run.record("train")
    if not record:
        return Start()
    results = [one for one in run.stale("train", recipe) if one.stage == "train"]
    changes = run.changes("train", recipe) + [one for one in results if one.kind == "edited"]
    if not prepared:
        changes = [one for one in changes if not one.name.startswith("data/")]
    before = record.get("processes", 1)
    if before != processes.count():  # the pairs of a step are dealt out to them
        changes.append(Reason(f"{processes.count()} processes, were {before}", "setting", "train"))
    finished = record["status"] == "complete"
    if finished and changes and all(one.name in GO_ON for one in changes):
        return _longer(recipe, run, changes, another)
    if changes and (finished or saved(run.checkpoints)):
        raise _refusal(run, changes, finished, another)
    # Of a finished run whose adapter or log was deleted, the last checkpoint gives it again.
    return _last_whole(run.checkpoints) if results or not finished else Start()


def _longer(recipe: Recipe, run: Run, changes: list[Reason], another: str | None) -> Start:
    """`start_of` where nothing but the number of steps is other than in the finished run."""
    then, now = run.record("train")["recipe"], recipe_keys(recipe, "train")
    epochs, steps = GO_ON
    if now[steps] > 0:
        last = max((step_of(one) for one in saved(run.checkpoints)), default=0)
        more = now[steps] > max(then[steps], last)
    else:
        more = then[steps] <= 0 and now[epochs] > then[epochs]
    if not more:
        raise _refusal(run, changes, True, another)
    try:
        start = _last_whole(run.checkpoints)
    except DpoError as error:
        start = Start(remarks=[error.message])
    if start.remarks or start.checkpoint is None or not is_last(start.checkpoint):
        why_not = "; ".join(start.remarks) or "its last checkpoint is gone, or it ended early"
        raise _refusal(run, changes, True, another, f"; more steps can't go on from it: {why_not}")
    return Start(start.checkpoint, longer=True)


def _refusal(run: Run, changes: list[Reason], finished: bool, another: str | None, why_not: str = "") -> DpoError:
    named = list(dict.fromkeys(one.text for one in changes))
    more = f" (and {len(named) - 5} more)" if named[5:] else ""
    keep = "keep it" if finished else "undo the change to go on with it"
    elsewhere = f"train under another name: {another}" if another else "train under another name (--set name=…)"
    holds = "a finished run of something else" if finished else "a run of something else that was cut short"
    return DpoError(
        f"{run.folder} holds {holds}: {'; '.join(named[:5])}{more}{why_not}",
        where=str(run["train"]),
        hint=f"{keep}; or {elsewhere}; or start over in its place with --fresh",
    )


# ------------------------------------------------------------------------------------------------ the folder itself


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9]\d*", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint to disk, and call it whole: the size and sha256 of each of its files."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / SEAL:
            _flush(path)
            files[path.relative_to(checkpoint).as_posix()] = [path.stat().st_size, sha256(path)]
    write_json(checkpoint / SEAL, files)
    _flush(checkpoint)


def damage(checkpoint: Path) -> str | None:
    """Why a training can't go on from a checkpoint; None where it can."""
    try:
        files = dict(read_json(checkpoint / SEAL))
    except (FileNotFoundError, ValueError, TypeError):
        return "it was cut off while it was written"
    for name, known in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if [path.stat().st_size, sha256(path)] != known:
            return f"{name} has changed"
    if not any("optim" in name for name in files):  # optimizer.pt, or the shards of DeepSpeed and FSDP
        return "it holds no optimizer state (train.save_only_model)"
    return None


def rotate(folder: Path, limit: int | None, best: int | None) -> None:
    """Remove the oldest checkpoints, by step, until `limit` are left; the last one and the best one always stay."""
    there = saved(folder)
    removable = [path for path in there[:-1] if step_of(path) != best]
    for path in removable[: max(len(there) - limit, 0)] if limit else []:
        remove(path)


def is_last(checkpoint: Path, continued_from: Sequence[int] = ()) -> bool:
    """Whether nothing is left to train; `continued_from`: last steps of a run that then went on for more."""
    state = _state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"] and state["global_step"] not in continued_from)


def best_checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of the best step, in this run's folder; a DpoError where it is gone, or not whole."""
    best = folder / f"checkpoint-{step}"
    why_not = damage(best) if best.is_dir() else "it is gone"
    if why_not:
        raise DpoError(
            f"step {step} was the best, and its checkpoint can't be used: {why_not}",
            where=str(best),
            hint="put it back, or start over with --fresh",
        )
    return best


def start_log(log: Path, checkpoints: Path, start: Start, limit: int | None = None) -> None:
    """Begin `log.jsonl`, or cut it back to the step that is gone on from, with the checkpoints after it.

    `limit` of them stay: a kill may have come before the older ones were removed.
    """
    for later in saved(checkpoints):
        if step_of(later) > start.step:
            remove(later)
    if start.checkpoint is None:
        log.unlink(missing_ok=True)
        return
    state = _state(start.checkpoint)
    rotate(checkpoints, limit, state.get("best_global_step"))
    write_text(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in state["log_history"]))


def _last_whole(folder: Path) -> Start:
    """The last whole checkpoint, and what was passed over; a DpoError where none is whole, though some once were."""
    passed, lost = list[str](), False
    for checkpoint in reversed(saved(folder)):
        why_not = damage(checkpoint)
        if why_not is None:
            return Start(checkpoint, remarks=[f"{one}: going on from {checkpoint.name}" for one in passed])
        passed.append(f"{checkpoint.name} can't be used ({why_not})")
        lost = lost or (checkpoint / SEAL).is_file()
    if lost:
        raise DpoError(
            f"the run can't go on: {'; '.join(passed)}",
            where=str(folder),
            hint="put it back, or start over with --fresh",
        )
    return Start(remarks=[f"{one}: starting over" for one in passed])


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _state(checkpoint: Path) -> dict[str, Any]:
    """What transformers keeps of the training."""
    return dict(read_json(checkpoint / "trainer_state.json"))
