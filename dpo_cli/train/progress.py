"""What a person sees of a training run, what `log.jsonl` keeps of it, and how it is asked to stop."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_cli import machine, processes
from dpo_cli.progress import Step, clock, drawn
from dpo_cli.show import one_line

SHOWN = (("loss", "loss", ".4f"), ("accuracy", "rewards/accuracies", ".3f"), ("margin", "rewards/margins", "+.3f"))
ROWS = 10  # that a training leaves on a terminal, where one line keeps changing meanwhile


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

    On a terminal that is a live line and a row every tenth of the run, elsewhere one line a log row. The callback also
    logs the last step, and saves and ends the training where `stop` was asked for. It is a context, which the live
    lines end with. `patience`: after how many evaluations without gain transformers stops early.
    """

    def __init__(self, log: Path, stop: StopAfterStep, quiet: bool, patience: int | None = None) -> None:
        self.log, self.stop, self.quiet, self.patience = log, stop, quiet, patience
        self.every_row = not (drawn() and sys.stdout.isatty())
        self.row: dict[str, Any] = {}
        self.tenth = 0  # of the run, which the last row was of
        self.live, self.evaluation = ExitStack(), ExitStack()
        self.evaluated: Step | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *problem: object) -> None:
        self.evaluation.close()
        self.live.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step
        done, total = state.global_step, state.max_steps
        step = Step("training", quiet=self.quiet, total=total, done=done, named=False, forks=True)
        self.step = self.live.enter_context(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.asked = processes.any_of(self.stop.asked)  # else one process saves, and waits for the others for ever
        if state.global_step >= state.max_steps:
            control.should_log = True  # else the last rows between two logging steps are never seen
        elif self.stop.asked:
            control.should_save = control.should_training_stop = True
        self.step.advance()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluated is None:
            batches = len(kwargs["eval_dataloader"])
            step = Step("evaluating the held-out rows", quiet=self.quiet, total=batches, named=False, forks=True)
            self.evaluated = self.evaluation.enter_context(step)
        self.evaluated.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluation.close()
        self.evaluated = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if "train_runtime" in row or not state.is_world_process_zero:
            return  # the summary at the end; metrics.json has its figures
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if "loss" in row:
            self.row = row
            self.step.note = self._figures(row, SHOWN[:2])
            tenth = ROWS * state.global_step // state.max_steps
            if not self.quiet and (self.every_row or tenth > self.tenth):
                self.tenth = tenth
                print(self._line(state), flush=True)
        elif "eval_loss" in row and not self.quiet:
            print(f"  step {state.global_step}, held out:" + self._figures(row, SHOWN, "eval_"), flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.close()
        early = self.patience and state.global_step < state.max_steps and not self.stop.asked
        if early and not self.quiet:
            times = "one evaluation" if self.patience == 1 else f"{self.patience} evaluations"
            print_remark(
                f"stopped at step {state.global_step} of {state.max_steps}: {args.metric_for_best_model} has not "
                f"improved for {times}; the adapter of step {state.best_global_step} is kept"
            )

    def _line(self, state: Any) -> str:
        seconds = time.monotonic() - self.began
        done = max(state.global_step - self.first_step, 1)
        left = seconds / done * (state.max_steps - state.global_step)
        width = len(str(state.max_steps))
        text = f"  step {state.global_step:>{width}}/{state.max_steps}"
        return f"{text}{self._figures(self.row, SHOWN)}  {peak_memory() / 1e9:.1f} GB  {clock(left)} left"

    def _figures(self, row: dict[str, Any], shown: tuple[tuple[str, str, str], ...], prefix: str = "") -> str:
        named = ((name, row.get(prefix + key), form) for name, key, form in shown)
        return "".join(f"  {name} {value:{form}}" for name, value, form in named if value is not None)


def print_remark(text: str) -> None:
    """A remark in its own lines, at most 80 columns wide."""
    lines = textwrap.wrap(one_line(text), 80, initial_indent="  ! ", subsequent_indent="    ")
    print("\n".join(lines), flush=True)


def peak_memory() -> int:
    """The most memory this process held, in bytes: on the GPU where there is one, else resident."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else machine.peak_memory()
