"""What goes wrong outside of the program: files, disks, interrupts. One clear block, and nothing half-written."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import disk
from dpo_cli.cli import app
from typer.testing import CliRunner, Result

Cli = Callable[..., subprocess.CompletedProcess[str]]
Spawn = Callable[..., subprocess.Popen[str]]
Invoke = Callable[..., Result]
Stuck = Callable[[], subprocess.Popen[str]]


BEGINS = re.compile(r"(prepare: [^\n]*\n)?")


@pytest.fixture
def invoke() -> Invoke:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_block(done: Result, code: int, *parts: str) -> None:
    """On stdout at most the line that a command begins with, and one short block on stderr with all of `parts`."""
    assert done.exit_code == code and BEGINS.fullmatch(done.stdout), done.output
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 6
    for part in parts:
        assert part in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("command", ["check", "prepare", "train", "eval", "export"])
def test_a_missing_recipe(project: Any, invoke: Invoke, command: str) -> None:
    assert_one_block(invoke(command, "dmeo.yaml"), 2, "no recipe at dmeo.yaml", "demo.yaml")
    assert not (project.folder / "runs").exists()


# ---------------------------------------------------------------------------------------------------------- the data


def assert_nothing_made_but_recipe(project: Any) -> None:
    assert set(project.contents()) <= {"recipe.yaml"}
    assert project.leftovers() == []


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_data_set(project: Any, invoke: Invoke, text: str) -> None:
    (project.rows / "a.jsonl").write_text(text, encoding="utf-8")
    done = invoke("prepare", "demo.yaml")
    assert_one_block(done, 1, "rows has no rows", "demo.yaml:5  data.sources[0].id", "fix:")
    assert_nothing_made_but_recipe(project)


def test_data_of_which_nothing_is_left(project: Any, invoke: Invoke) -> None:
    path = project.write_rows(20)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({**row, "rejected": row["chosen"]}) + "\n" for row in rows), encoding="utf-8")
    done = invoke("prepare", "demo.yaml")
    assert_one_block(done, 1, "nothing is left of 20 prompts: 20 identical", "data.sources", "fix:")
    assert_nothing_made_but_recipe(project)


def test_bad_new_data_leave_the_old_results_whole(project: Any, invoke: Invoke) -> None:
    invoke("prepare", "demo.yaml")
    before = project.contents()
    good = project.rows / "a.jsonl"
    kept = good.read_bytes()
    good.write_text("", encoding="utf-8")
    assert invoke("prepare", "demo.yaml").exit_code == 1
    assert project.contents() == before
    good.write_bytes(kept)
    assert "nothing to do" in invoke("prepare", "demo.yaml").stdout


def test_a_hub_source_without_network(project: Any, invoke: Invoke) -> None:
    done = invoke("prepare", "demo.yaml", "--set", "data.sources.0.id=nobody/nothing")
    assert_one_block(done, 1, "nobody/nothing", "data.sources[0].id", "HF_HUB_OFFLINE")
    assert_nothing_made_but_recipe(project)


# ---------------------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every write of a file of the run end in a real ENOSPC, for it goes to /dev/full; "" for none any more."""
    full = [""]

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        there = full[0] and path.name == f".{full[0]}.new"
        return open("/dev/full" if there else path, *arguments, **options)

    monkeypatch.setattr(disk, "open", opened, raising=False)
    return lambda name: full.__setitem__(0, name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["recipe.yaml", "manifest.json"])
def test_a_disk_that_is_full_at_the_end(project: Any, invoke: Invoke, full_for: Any, name: str) -> None:
    """The results are in place, but the manifest no longer fits: they must not count as complete."""
    full_for(name)
    done = invoke("prepare", "demo.yaml", "--quiet")
    assert_one_block(done, 1, "No space left on device", "runs/demo", "free some disk space")
    assert not (project.run / "manifest.json").exists()
    assert "train has not been run" in invoke("eval", "demo.yaml").stderr
    full_for("")
    again = invoke("prepare", "demo.yaml")
    assert again.exit_code == 0
    assert "nothing to do" not in again.stdout
    assert project.leftovers() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_later_leaves_the_manifest_whole(project: Any, invoke: Invoke, full_for: Any) -> None:
    invoke("prepare", "demo.yaml")
    before = (project.run / "manifest.json").read_bytes()
    full_for("manifest.json")
    assert invoke("prepare", "demo.yaml", "--set", "data.total=5").exit_code == 1
    assert (project.run / "manifest.json").read_bytes() == before
    full_for("")
    assert "nothing to do" not in invoke("prepare", "demo.yaml").stdout, "what lies there is not what this asks for"


@pytest.mark.parametrize("kilobytes", [8, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 20))])
def test_a_file_that_may_not_grow(project: Any, dpo_cli: Cli, kilobytes: int) -> None:
    """A limit on file sizes, as a quota or an old file system sets it, hits in the middle of a file."""
    dpo_cli("prepare", "demo.yaml")
    before = project.contents()
    project.write_rows(100, seed=3)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

    done = dpo_cli("prepare", "demo.yaml", preexec_fn=limit)
    assert done.returncode == 1 and BEGINS.fullmatch(done.stdout)
    assert done.stderr.startswith("error: File too large")
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.contents() == before
    assert dpo_cli("prepare", "demo.yaml").returncode == 0


# --------------------------------------------------------------------------------------------------- an interruption


# The real program, held where it is about to write its second file of results: train.jsonl lies there, eval.jsonl does
# not. Python's audit hook shows each file as it is opened, so nothing has to be timed.
HELD = """
import sys
from dpo_cli.cli import main

def hold(event, details):
    if event == "open" and str(details[0]).endswith("eval.jsonl") and "w" in (details[1] or ""):
        print("in the middle", flush=True)
        sys.stdin.read()

sys.addaudithook(hold)
main()
"""


@pytest.fixture
def stuck_prepare(spawn: Spawn) -> Stuck:
    """Start a `prepare` that certainly is in the middle, and stays there."""

    def go() -> subprocess.Popen[str]:
        process = spawn("-c", HELD, "prepare", "demo.yaml", "--force", "--quiet", forked=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        return process

    return go


@pytest.mark.parametrize(
    ("number", "done_before"),
    [
        pytest.param(signal.SIGINT, True, id="SIGINT over old results"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM for the first time"),
        pytest.param(signal.SIGINT, False, id="SIGINT for the first time", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, id="SIGTERM over old results", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_prepare(
    project: Any, stuck_prepare: Stuck, dpo_cli: Cli, number: signal.Signals, done_before: bool
) -> None:
    if done_before:
        dpo_cli("prepare", "demo.yaml")
    before = project.contents()
    process = stuck_prepare()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("error: interrupted")
    assert len(err.splitlines()) == 1
    assert_old_results_whole(project, before, done_before)
    assert project.leftovers() == []
    again = dpo_cli("prepare", "demo.yaml")
    assert again.returncode == 0
    assert ("nothing to do" in again.stdout) == done_before


def assert_old_results_whole(project: Any, before: dict[str, bytes], done_before: bool) -> None:
    after = project.contents()
    if done_before:
        assert after == before
    else:
        assert set(after) <= {"recipe.yaml"}
