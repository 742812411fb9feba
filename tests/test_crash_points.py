"""Killed at any file operation inside a run's folder, the same command again gives what it gives uninterrupted.

Every `open` for writing, mkdir, rename, link and remove under the folder is a point to be killed at. A child is forked
for each point, so that what is imported is imported once.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.cli import app
from dpo_cli.recipe import Recipe, load
from dpo_cli.run import Run
from typer.testing import CliRunner

POINTS = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def killed_at(folder: Path, point: int, work: Callable[[], Any]) -> bool:
    """Do `work` in a child that is killed before the `point`-th operation in `folder`; False where it ended first."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            count = itertools.count(1)

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                if event == "open":
                    counts = isinstance(arguments[0], str) and bool(arguments[2] & WRITES)
                else:
                    counts = event in POINTS
                if not counts:
                    return
                inside = Path(os.fsdecode(arguments[0])).absolute().is_relative_to(folder)
                in_a_tree = event in ("os.remove", "os.rmdir") and arguments[1] >= 0  # rmtree goes by open folders
                if (inside or in_a_tree) and next(count) == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def contents(folder: Path) -> dict[str, bytes]:
    """All that lies in a run, but what tells the time."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock",)]
    return {path.relative_to(folder).as_posix(): _timeless(path) for path in paths}


def _timeless(path: Path) -> bytes:
    if path.name == "manifest.json":
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        kept = {name: [one["status"], one["fingerprint"], sorted(one["outputs"])] for name, one in stages.items()}
        return json.dumps(kept, sort_keys=True).encode()
    if path.name == "log.jsonl":  # TRL counts its tokens anew when it resumes
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        told = [{key: row[key] for key in row if key != "num_tokens"} for row in rows]
        return json.dumps(told, sort_keys=True).encode()  # in a checkpoint's state they are sorted
    if path.name in ("metrics.json", "report.json", "report.md", "files.json", "trainer_state.json"):
        return b"it has seconds or tokens in it"
    return path.read_bytes()


def every_point(
    before: Path, folder: Path, work: Callable[[], Any], points: Iterable[int], look: Callable[[], Any] = lambda: None
) -> Iterator[int]:
    """Each point that is reached, with the run killed there and `work` done once more; `folder` begins as `before`.

    `look` is called between the two.
    """
    for point in points:
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, folder)
        if not killed_at(folder, point, work):
            return
        look()
        work()
        yield point


# Stand-ins for the stages, and what each writes.
OUTPUTS = {
    "prepare": ("train.jsonl", "eval.jsonl"),
    "train": ("adapter/weights.bin", "result.bin"),
    "eval": ("result.bin",),
    "export": ("merged/model.bin", "result.bin"),
}


def write(run: Run, recipe: Recipe, stage: str, text: str) -> None:
    with run.lock(), run.stage(stage, recipe) as draft:
        for name in OUTPUTS[stage]:
            (draft.folder / name).parent.mkdir(exist_ok=True)
            (draft.folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "again"),
    [
        pytest.param(stage, again, marks=[] if (stage, again) == ("train", True) else pytest.mark.slow)
        for stage in OUTPUTS
        for again in (False, True)
    ],
)
def test_a_stage_killed_anywhere_leaves_old_results_or_new_ones(tmp_path: Path, stage: str, again: bool) -> None:
    """Each file operation of `Run`: for the first time, and in the place of other results with a person's own file."""
    (tmp_path / "demo.yaml").write_text("model: {id: a/b}\ndata: {sources: [{id: rows.jsonl}]}\n", encoding="utf-8")
    recipe, run, before = load(tmp_path / "demo.yaml"), Run(tmp_path / "runs" / "demo"), tmp_path / "before"
    for one in list(OUTPUTS)[: list(OUTPUTS).index(stage) + again]:
        write(run, recipe, one, "first")
    if again:
        (run[stage] / "own.txt").write_text("a person's own", encoding="utf-8")
    if run.folder.exists():
        shutil.copytree(run.folder, before)

    def work() -> None:
        write(run, recipe, stage, "anew")

    def look() -> None:
        with run.lock():  # clears up
            found = {path: path.read_text("utf-8") for path in run[stage].rglob("*") if path.name in names}
        assert not again or len(found) == len(names), "something is gone, though the new one is not there"
        assert set(found.values()) <= {"first", "anew"}

    work()
    expected, names = contents(run.folder), {Path(name).name for name in OUTPUTS[stage]}
    reached = 0
    for point in every_point(before, run.folder, work, itertools.count(1), look):
        assert contents(run.folder) == expected, f"killed at operation {point}"
        assert run.fresh(stage, recipe)
        reached = point
    assert reached > 8


def call(*arguments: object) -> None:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output


def test_prepare_killed_anywhere(project: Any) -> None:
    call("prepare", project.recipe)
    expected = contents(project.run)
    before = shutil.copytree(project.run, project.folder / "before")
    reached = []
    for point in every_point(
        before, project.run, lambda: call("prepare", project.recipe, "--force"), (2, 9, 14, 18, 22, 25, 27)
    ):
        assert contents(project.run) == expected, f"killed at operation {point}"
        reached.append(point)
    assert len(reached) > 4


TRAIN = (
    "train.max_steps=3", "train.save_steps=1", "train.logging_steps=1", "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=1", "model.id=builtin:tiny-qwen3", "model.load_in_4bit=false", "lora.r=8",
    "lora.dropout=0.0", "train.save_total_limit=2",
)  # fmt: skip


@pytest.mark.parametrize("points", [(30, 60), pytest.param((1, 4, 12, 75, 80), marks=pytest.mark.slow)])
def test_train_killed_anywhere(project: Any, points: Iterable[int]) -> None:
    """In the place of a finished run of another rate: from its first clearing up to its last rename."""
    settings = [part for setting in TRAIN for part in ("--set", setting)]
    call("train", project.recipe, *settings, "--set", "train.learning_rate=0.001", "--quiet")
    before = shutil.copytree(project.run, project.folder / "before")
    fresh = [True]

    def work() -> None:
        call("train", project.recipe, *settings, "--quiet", *(["--fresh"] if fresh else []))

    work()
    expected = contents(project.run)
    reached = []
    for point in points:
        shutil.rmtree(project.run)
        shutil.copytree(before, project.run)
        if not killed_at(project.run, point, work):
            break
        record = json.loads((project.run / "manifest.json").read_text(encoding="utf-8"))["stages"].get("train", {})
        fresh[:] = [] if record.get("recipe", {}).get("train.learning_rate") != 0.001 else [True]
        assert not fresh or contents(project.run / "train") == contents(before / "train"), "a record of what is gone"
        work()
        fresh[:] = [True]
        assert contents(project.run) == expected, f"killed at operation {point}"
        reached.append(point)
    assert len(reached) > 1
