"""Where a training sets in: which checkpoints are whole, which stay, and which runs are not to be replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import FAILED, DpoError
from dpo_cli.recipe import Recipe, load
from dpo_cli.run import Run
from dpo_cli.train.checkpoints import (
    SEAL,
    Start,
    best_checkpoint,
    damage,
    is_last,
    rotate,
    saved,
    seal,
    start_log,
    start_of,
    step_of,
)

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make(folder: Path, step: int, last: int = 20, sealed: bool = True, files: tuple[str, ...] = FILES) -> Path:
    """A checkpoint as a training of `last` steps leaves it."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in files:
        (checkpoint / name).write_text(f"{name} of step {step}", encoding="utf-8")
    state = {"global_step": step, "max_steps": last, "log_history": [{"step": one} for one in range(1, step + 1)]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    if sealed:
        seal(checkpoint)
    return checkpoint


def steps(folder: Path) -> list[int]:
    return [step_of(one) for one in saved(folder)]


# ------------------------------------------------------------------------------------------------------------- whole


def flip(path: Path) -> None:
    """One bit, at the same size and time."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [flip, remove])
def test_a_checkpoint_is_whole_only_with_every_file_as_it_was_saved(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    for step, name in enumerate(FILES, 1):
        checkpoint = make(tmp_path, step)
        assert damage(checkpoint) is None
        harm(checkpoint / name)
        assert damage(checkpoint) == f"{name} {'is missing' if harm is remove else 'has changed'}"


def test_a_checkpoint_that_was_killed_before_its_end_is_not_whole(tmp_path: Path) -> None:
    assert damage(make(tmp_path, 4, sealed=False)) == "it was cut off while it was written"
    torn = make(tmp_path, 6)
    (torn / SEAL).write_text('{"optimizer.pt": [1', encoding="utf-8")
    assert damage(torn) == "it was cut off while it was written"


def test_a_checkpoint_is_on_disk_before_it_is_called_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, flushed, fsync = make(tmp_path, 4, sealed=False), list[str](), os.fsync

    def watched(handle: int) -> None:
        if not (checkpoint / SEAL).exists():
            flushed.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    seal(checkpoint)
    assert {*FILES} <= {*flushed} and damage(checkpoint) is None


def test_a_checkpoint_to_go_on_from_has_an_optimizer_and_its_shards_count(tmp_path: Path) -> None:
    """Else Adam would start anew and the learning rate jump."""
    without = make(tmp_path, 2, files=("adapter_model.safetensors",))
    assert "no optimizer state (train.save_only_model)" in str(damage(without))
    shards = make(tmp_path, 4, sealed=False, files=("adapter_model.safetensors",))
    (shards / "global_step4").mkdir()
    (shards / "global_step4" / "zero_pp_rank_0_optim_states.pt").write_text("x", encoding="utf-8")
    seal(shards)
    assert damage(shards) is None
    flip(shards / "global_step4" / "zero_pp_rank_0_optim_states.pt")
    assert damage(shards) is not None


def test_odd_names_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    names = ("checkpoint-6.bak", "checkpoint-", "checkpoint-x", "checkpoint-06", "old-checkpoint-6")
    make(tmp_path, 2)
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file", encoding="utf-8")
    assert steps(tmp_path) == [2]
    rotate(tmp_path, 1, None)
    start_log(tmp_path / "log.jsonl", tmp_path, Start())
    assert all((tmp_path / name).is_dir() for name in names) and steps(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(2, None, [8, 10]), (1, None, [10]), (None, None, [2, 4, 8, 10]), (9, None, [2, 4, 8, 10]), (2, 2, [2, 10]),
     (1, 2, [2, 10]), (2, 10, [8, 10]), (3, 4, [4, 8, 10]), (2, 3, [8, 10])],
)  # fmt: skip
def test_the_newest_by_step_stay_whatever_their_times(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    """The clock was set back: what was written last has the oldest date."""
    for age, step in enumerate((2, 4, 8, 10)):
        checkpoint = make(tmp_path, step)
        os.utime(checkpoint, (2_000_000_000 - 1000 * age,) * 2)
    rotate(tmp_path, limit, best)
    assert steps(tmp_path) == left


def test_the_best_checkpoint_is_this_folders(tmp_path: Path) -> None:
    make(tmp_path / "here", 4)
    assert best_checkpoint(tmp_path / "here", 4) == tmp_path / "here" / "checkpoint-4"
    with pytest.raises(DpoError, match="step 2 was the best, and its checkpoint can't be used: it is gone"):
        best_checkpoint(tmp_path / "here", 2)
    remove(tmp_path / "here" / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.raises(DpoError, match=r"adapter_model\.safetensors is missing"):
        best_checkpoint(tmp_path / "here", 4)


# ------------------------------------------------------------------------------------------------------------ the log


def test_log_and_checkpoints_are_cut_back_to_where_the_training_sets_in(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {one}}}\n' for one in range(1, 8)) + '{"step": 8, "lo', "utf-8")
    for step in (2, 3, 4, 6):
        make(tmp_path, step)
    start_log(log, tmp_path, Start(tmp_path / "checkpoint-4"), limit=2)  # a kill came before checkpoint-2 was removed
    assert [json.loads(line)["step"] for line in log.read_text("utf-8").splitlines()] == [1, 2, 3, 4]
    assert steps(tmp_path) == [3, 4]


# ------------------------------------------------------------------------------------------- a run that is here already

RECIPE = """\
model: {id: nobody/none}
data: {sources: [{id: rows.jsonl}]}
train: {max_steps: 20, save_total_limit: 2}
"""


class Project:
    """A recipe whose stages are stand-ins that write a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "demo.yaml").write_text(RECIPE, encoding="utf-8")
        (folder / "rows.jsonl").write_text("{}\n", encoding="utf-8")

    @property
    def run(self) -> Run:
        return Run(
            self.folder / "runs" / "demo", {"prepare": lambda recipe: {"rows/rows.jsonl": self.folder / "rows.jsonl"}}
        )

    def recipe(self, *settings: str) -> Recipe:
        return load(self.folder / "demo.yaml", list(settings))

    def go(self, stage: str, *names: str, recipe: Recipe | None = None, text: str = "made") -> None:
        with self.run.lock(), self.run.stage(stage, recipe or self.recipe()) as draft:
            for name in names:
                (draft.folder / name).parent.mkdir(exist_ok=True)
                (draft.folder / name).write_text(text, encoding="utf-8")

    def finish(self, *settings: str, at: int = 20, of: int = 20) -> None:
        recipe = self.recipe(*settings)
        self.go("prepare", "train.jsonl", "eval.jsonl", recipe=recipe)
        make(self.run.checkpoints, at - 2, of)
        make(self.run.checkpoints, at, of)
        self.go("train", "adapter/weights.bin", "log.jsonl", "metrics.json", recipe=recipe)

    def cut_short(self, *settings: str) -> None:
        recipe = self.recipe(*settings)
        self.go("prepare", "train.jsonl", "eval.jsonl", recipe=recipe)
        self.run.write_record("train", recipe, self.run.started("train", recipe))

    def start(self, *settings: str, prepared: bool = True) -> Start:
        return start_of(self.recipe(*settings), self.run, "dpo-cli train demo.yaml --set name=demo-2", prepared)

    def refused(self, *settings: str, prepared: bool = True) -> str:
        with pytest.raises(DpoError) as caught:
            self.start(*settings, prepared=prepared)
        assert caught.value.exit_code == FAILED
        assert "--fresh" in str(caught.value)
        return str(caught.value)


@pytest.fixture
def demo(tmp_path: Path) -> Project:
    return Project(tmp_path / "home")


def test_a_finished_run_with_nothing_changed_is_not_in_the_way(demo: Project) -> None:
    assert demo.start() == Start()
    demo.finish()
    assert demo.start() == demo.start(prepared=False) == Start()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("train.beta=0.3", "train.beta is 0.3, was 0.1"),
        ("lora.r=8", "lora.r is 8, was 32"),
        ("seed=7", "seed is 7, was 42"),
        ("data.filters.tie=false", "data.filters.tie"),
        ("train.max_steps=10", "train.max_steps is 10, was 20"),
        ("train.max_steps=-1", "train.max_steps is -1, was 20"),
        ("model.id=nobody/other", "model.id"),
    ],
)
def test_a_finished_run_of_something_else_is_refused(demo: Project, setting: str, named: str, prepared: bool) -> None:
    demo.finish()
    message = demo.refused(setting, prepared=prepared)
    assert f"runs/demo holds a finished run of something else: {named}" in message
    assert "keep it; or train under another name: dpo-cli train demo.yaml --set name=demo-2" in message


def test_a_finished_run_of_other_inputs_is_refused(demo: Project) -> None:
    demo.finish()
    (demo.folder / "rows.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert "something else: rows/rows.jsonl has changed" in demo.refused(prepared=False)
    demo.go("prepare", "train.jsonl", "eval.jsonl", text="anew")
    assert "data/train.jsonl has changed" in demo.refused()


def test_an_adapter_that_somebody_changed_is_refused(demo: Project) -> None:
    demo.finish()
    (demo.run.adapter / "weights.bin").write_text("mine", encoding="utf-8")
    assert "train/adapter/weights.bin has been changed" in demo.refused()


def test_pairs_that_are_gone_are_made_again_first(demo: Project) -> None:
    """Made again to the same bytes, they change nothing."""
    demo.finish()
    shutil.rmtree(demo.run["prepare"])
    assert demo.start(prepared=False) == Start()
    demo.go("prepare", "train.jsonl", "eval.jsonl")
    assert demo.run.fresh("train", demo.recipe())


@pytest.mark.parametrize("lost", ["adapter/weights.bin", "log.jsonl", "metrics.json"])
def test_results_that_were_deleted_come_again_from_the_last_checkpoint(demo: Project, lost: str) -> None:
    demo.finish()
    (demo.run["train"] / lost).unlink()
    assert not demo.run.fresh("train", demo.recipe())
    start = demo.start()
    assert start.step == 20 and not start.longer
    assert start.checkpoint is not None and is_last(start.checkpoint)


# --------------------------------------------------------------------------------------------------------- more steps


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["train.max_steps=20"], ["train.max_steps=30"]),
        (["train.max_steps=-1"], ["train.max_steps=-1", "train.num_train_epochs=2"]),
        (["train.max_steps=-1"], ["train.max_steps=21"]),
    ],
)
def test_more_steps_go_on_from_the_last_one(demo: Project, then: list[str], now: list[str]) -> None:
    demo.finish(*then)
    start = demo.start(*now)
    assert (start.step, start.longer, start.remarks) == (20, True, [])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["train.max_steps=20"], ["train.num_train_epochs=2"]),  # which max_steps overrules
        (["train.max_steps=-1"], ["train.max_steps=20"]),
        (["train.max_steps=-1", "train.num_train_epochs=3"], ["train.max_steps=-1", "train.num_train_epochs=2"]),
        (["train.max_steps=20"], ["train.max_steps=30", "train.beta=0.3"]),
    ],
)
def test_no_more_steps_or_something_else_too_is_refused(demo: Project, then: list[str], now: list[str]) -> None:
    demo.finish(*then)
    assert "a finished run of something else" in demo.refused(*now)


def test_more_steps_need_the_last_checkpoint(demo: Project) -> None:
    demo.finish()
    flip(demo.run.checkpoints / "checkpoint-20" / "optimizer.pt")
    assert "can't go on from it: checkpoint-20 can't be used (optimizer.pt has changed)" in demo.refused(
        "train.max_steps=30"
    )
    shutil.rmtree(demo.run.checkpoints)
    assert "its last checkpoint is gone" in demo.refused("train.max_steps=30")


def test_a_run_that_early_stopping_ended_has_no_more_steps(demo: Project) -> None:
    demo.finish(at=9, of=20)
    assert "ended early" in demo.refused("train.max_steps=30")


# ------------------------------------------------------------------------------------------------------------ cut short


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said(demo: Project) -> None:
    demo.cut_short()
    for step in (2, 4, 6):
        make(demo.run.checkpoints, step)
    flip(demo.run.checkpoints / "checkpoint-6" / "optimizer.pt")
    start = demo.start()
    assert start.step == 4
    assert start.remarks == ["checkpoint-6 can't be used (optimizer.pt has changed): going on from checkpoint-4"]


def test_where_no_checkpoint_is_whole_any_more_nothing_is_thrown_away(demo: Project) -> None:
    demo.cut_short()
    make(demo.run.checkpoints, 2)
    remove(demo.run.checkpoints / "checkpoint-2" / "optimizer.pt")
    assert "checkpoint-2 can't be used (optimizer.pt is missing)" in demo.refused()


def test_a_first_checkpoint_that_was_never_whole_starts_over(demo: Project) -> None:
    demo.cut_short()
    make(demo.run.checkpoints, 2, sealed=False)
    start = demo.start()
    assert start.checkpoint is None and "starting over" in start.remarks[0]


@pytest.mark.parametrize("prepared", [True, False])
def test_a_run_cut_short_of_something_else_is_refused_before_its_pairs_go(demo: Project, prepared: bool) -> None:
    demo.cut_short()
    make(demo.run.checkpoints, 2)
    assert demo.start(prepared=prepared).step == 2
    for setting, named in (("data.total=5", "data.total is 5"), ("train.max_steps=30", "train.max_steps is 30")):
        message = demo.refused(setting, prepared=prepared)
        assert f"a run of something else that was cut short: {named}" in message and "undo the change" in message


def test_other_processes_are_another_run(demo: Project, monkeypatch: Any) -> None:
    demo.finish()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes, were 1" in demo.refused()
