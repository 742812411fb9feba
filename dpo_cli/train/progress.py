"""What a person sees of a training run, what `log.jsonl` keeps of it, and how it is asked to stop."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_cli import machine, processes
from dpo_cli.show import one_line

SHOWN = (("loss", "loss", ".4f"), ("accuracy", "rewards/accuracies", ".3f"), ("margin", "rewards/margins", "+.3f"))


class StopAfterStep:
    """Within it the first Ctrl-C, SIGTERM or hang-up asks for a stop after the step at hand; a second stops at once."""

    asked = False

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self._ask) for number in processes.stop_signals()}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        processes.leave_terminal(number)
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)


class Progress(TrainerCallback):
    """Writes TRL's log rows to `log.jsonl` as they come, and shows how the training stands.

    On a terminal that is one line that keeps changing, elsewhere one line a log row. The callback also logs the last
    step, and saves and ends the training where `stop` was asked for.
    """

    def __init__(self, log: Path, stop: StopAfterStep, quiet: bool) -> None:
        self.log, self.stop, self.quiet = log, stop, quiet
        self.live = sys.stdout.isatty()
        self.row: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.asked = processes.any_of(self.stop.asked)  # else one process saves, and waits for the others for ever
        if state.global_step >= state.max_steps:
            control.should_log = True  # else the last rows between two logging steps are never seen
        elif self.stop.asked:
            control.should_save = control.should_training_stop = True
        if self.live and not self.quiet:
            print(f"\r{self._line(state):<79}", end="", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if "train_runtime" in row:
            return  # the summary at the end; metrics.json has its figures
        if not state.is_world_process_zero:
            return
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if "loss" in row:
            self.row = row
            if not self.quiet and not self.live:
                print(self._line(state), flush=True)
        elif "eval_loss" in row and not self.quiet:
            text = f"  step {state.global_step}, held out:" + self._figures(row, "eval_")
            print(f"\r{text:<79}" if self.live else text, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.live and not self.quiet:
            print(f"\r{self._line(state):<79}")

    def _line(self, state: Any) -> str:
        seconds = time.monotonic() - self.began
        done = max(state.global_step - self.first_step, 1)
        left = seconds / done * (state.max_steps - state.global_step)
        width = len(str(state.max_steps))
        text = f"  step {state.global_step:>{width}}/{state.max_steps}"
        return f"{text}{self._figures(self.row)}  {peak_memory() / 1e9:.1f} GB  {_clock(left)} left"

    def _figures(self, row: dict[str, Any], prefix: str = "") -> str:
        named = ((name, row.get(prefix + key), form) for name, key, form in SHOWN)
        return "".join(f"  {name} {value:{form}}" for name, value, form in named if value is not None)


def print_remark(text: str) -> None:
    """A remark of the watchdog in its own lines, at most 80 columns wide, over a live line if there is one."""
    lines = textwrap.wrap(one_line(text), 80, initial_indent="  ! ", subsequent_indent="    ")
    if sys.stdout.isatty():
        lines[0] = f"\r{lines[0]:<79}"  # all of the live line is written over, however short the first line is
    print("\n".join(lines), flush=True)


def peak_memory() -> int:
    """The most memory this process held, in bytes: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return machine.peak_memory()


def _clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{round(seconds) % 60:02}" if hours else f"{minutes}:{round(seconds) % 60:02}"
