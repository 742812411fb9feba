"""What is seen while a step takes long: a live line on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpo_cli import progress
from dpo_cli.progress import Step, clock
from dpo_cli.train import progress as of_training
from dpo_cli.train.progress import Progress, StopAfterStep
from tests import program

SMOKE = Path(__file__).parents[1] / "recipes" / "smoke.yaml"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.shown(True):
        yield


def on_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Make stderr a terminal of 80 columns; in the test itself, for pytest sets its own before each."""
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_off_a_terminal_a_step_is_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with Step("loading a model", total=3) as step:
        step.advance(2)
    with Step("reading rows", named=False):
        pass
    with Step("judging", quiet=True):
        pass
    assert capsys.readouterr() == ("  loading a model\n", "")


def test_nothing_is_shown_unless_a_command_asks_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with progress.shown(False), Step("loading a model"):
        pass
    with progress.shown(True):
        progress.show_live_only()
        with Step("loading a model"):
            pass
    assert capsys.readouterr() == ("", "")


def test_what_keeps_the_hubs_bars_away_ends_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable would else be that of every command after it, where several run in one process."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.delenv(name, raising=False)
    with progress.shown(False):
        assert os.environ[name] == "1"
    assert name not in os.environ
    monkeypatch.setenv(name, "0")
    with progress.shown(False):
        assert os.environ[name] == "0", "what the user has set stays"
    assert os.environ[name] == "0"


def test_on_a_terminal_a_line_counts_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with Step("answering [b]40[/b] prompts :smile: \x1b[2J", total=40, done=20) as step:
        step.note = ", [x]"
        step.advance(10)
    drawn = screen.getvalue()
    assert "answering [b]40[/b] prompts :smile: \\x1b[2J" in drawn and "30/40, [x]" in drawn and "0:00 left" in drawn
    assert drawn.endswith("\x1b[2K")  # the line is erased


def test_rows_whose_number_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with Step("reading", unit="rows") as step:
        step.count += 1200
        step.at(0.5)
    assert "1,200 rows" in screen.getvalue() and "/s" in screen.getvalue()


def test_a_step_within_another_has_the_line_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with Step("rating the answers", total=4) as outer:
        outer.advance()
        with Step("downloading a model", live=False):  # whose library draws bars of its own
            before = len(screen.getvalue())
            outer.advance()
            print("a bar", file=sys.stderr)
            assert screen.getvalue()[before:] == "a bar\n"
        outer.advance(2)
    assert "4/4" in screen.getvalue()


def test_a_terminal_that_can_not_draw_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with Step("loading a model"):
        pass
    assert (capsys.readouterr().out, screen.getvalue()) == ("  loading a model\n", "")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def on_a_terminal(folder: Path, *arguments: str) -> str:
    """What a command draws on a terminal of 80 columns."""
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = program.start(*arguments, stdout=its, stderr=its, stdin=its, cwd=folder, env=environment)
    os.close(its)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    assert process.wait() == 0, drawn.decode()
    return drawn.decode()


def test_a_training_on_a_terminal_leaves_a_row_every_tenth(tmp_path: Path) -> None:
    settings = ("max_steps=20", "logging_steps=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=1")
    options = [part for setting in settings for part in ("--set", f"train.{setting}")]
    drawn = on_a_terminal(tmp_path, "train", str(SMOKE), *options, "--set", "data.total=24")
    for name in ("loading builtin:tiny-qwen3", "tokenizing 24 pairs", "computing the reference", "training"):
        assert name in drawn, name
    assert drawn.index("train: dpo of builtin:tiny-qwen3") < drawn.index("importing torch, transformers and TRL")
    lines = [CONTROL.sub("", line).rstrip("\r") for line in drawn.split("\n")]
    rows = [line.split("\r")[-1] for line in lines if "GB" in line]
    assert [int(row.split()[1].split("/")[0]) for row in rows] == list(range(2, 21, 2))
    assert all(re.fullmatch(r"  step [\d /]+  loss .*  accuracy .*  margin .* GB  \d+:\d\d left", row) for row in rows)
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h")  # the cursor comes back


# ------------------------------------------------------------------------------------------------------- of a training


def state(step: int, **more: Any) -> Any:
    return SimpleNamespace(
        global_step=step, max_steps=8, best_global_step=2, is_world_process_zero=True,
        log_history=[{"loss": 0.5, "step": step}], **more,
    )  # fmt: skip


def training(folder: Path, patience: int | None = None) -> Progress:
    return Progress(folder / "log.jsonl", StopAfterStep(), quiet=False, patience=patience)


def test_what_is_left_is_by_the_steps_of_this_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([100.0, 106.0])
    monkeypatch.setattr(of_training, "time", SimpleNamespace(monotonic=times.__next__))
    with training(tmp_path) as shown:
        shown.on_train_begin(None, state(5), None)  # resumed
        shown.on_log(None, state(6), None)
    assert "step 6/8" in (said := capsys.readouterr().out) and "0:12 left" in said


def test_only_a_run_that_early_stopping_ended_is_said_to_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: Any = SimpleNamespace(metric_for_best_model="eval_loss")
    for step, patience, asked in ((8, 2, False), (6, 2, True), (6, None, False)):
        shown = training(tmp_path, patience)
        shown.stop.asked = asked
        shown.on_train_end(arguments, state(step), None)
    assert capsys.readouterr().out == ""
    training(tmp_path, 2).on_train_end(arguments, state(6), None)
    assert "stopped at step 6 of 8" in capsys.readouterr().out


def test_a_stop_that_another_process_was_asked_for_ends_this_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would wait for the others' next step for ever, while they save."""
    monkeypatch.setattr("dpo_cli.processes.any_of", lambda flag: True)
    control: Any = SimpleNamespace(should_save=False, should_training_stop=False)
    with training(tmp_path) as shown:
        shown.on_train_begin(None, state(2), None)
        shown.on_step_end(None, state(3), control)
    assert control.should_save and control.should_training_stop and shown.stop.asked


def test_a_second_signal_stops_at_once_and_after_it_all_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    stop = StopAfterStep()
    with pytest.raises(KeyboardInterrupt), stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked and "stopping after this step" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
