"""What a long step shows while it runs: one live line on a terminal, elsewhere its name on a line of its own.

The live line is on stderr and goes when its step ends, so that what stays is what the commands say on stdout.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dpo_cli.show import one_line, say

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY = 0.1  # seconds between two looks at a count

_shown = False  # the commands ask for it
_open: list[Step] = []  # the steps that are running, the innermost last: only that one is drawn


@contextmanager
def shown(on: bool) -> Iterator[None]:
    """Have steps shown within this, or not: neither ours nor what huggingface_hub downloads."""
    global _shown
    _shown = on
    hides = not on and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    if hides:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    try:
        yield
    finally:
        _shown = False
        if hides:
            os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)


def show_live_only() -> None:
    """Name no steps where there is no terminal, for what is printed is an answer."""
    global _shown
    _shown = drawn()


def drawn() -> bool:
    """Whether steps are shown, and on a terminal."""
    return _shown and on_terminal()


class Step:
    """A step that takes long, by its name; a context, in which `advance` or `at` tell how far it is.

    Attributes:
        count: units that are done.
        note: what is shown beside the count.
    """

    def __init__(
        self,
        name: str,
        *,
        quiet: bool = False,
        total: int | None = None,
        done: int = 0,
        unit: str = "",
        live: bool = True,
        named: bool = True,
        forks: bool = False,
    ) -> None:
        """Say what the step is.

        Args:
            quiet: show nothing.
            total: units of the whole step, `done` of them before it begins.
            unit: what is counted where `at` tells the share and nobody knows the total, such as "rows".
            live: False where a library draws bars of its own; the name is a plain line then, on a terminal too.
            named: whether the name is a line where there is no terminal.
            forks: whether processes may be forked meanwhile; then no thread draws, which could hold a lock as they are.
        """
        self.name, self.total, self.unit = one_line(name), total, unit
        self.count, self.note = done, ""
        self._done, self._quiet, self._named, self._forks = done, quiet or not _shown, named, forks
        self._live = live and not quiet and drawn()
        self._bar: Progress | None = None
        self._began = self._drawn = 0.0

    def __enter__(self) -> Step:
        if _open and _open[-1]._bar:
            _open[-1]._bar.stop()
        _open.append(self)
        self._began = time.monotonic()
        if self._live:
            from dpo_cli.terminal import live_line

            self._bar = live_line(self.name, bool(self.total or self.unit), self._forks)
            self._bar.start()
        elif not self._quiet and (self._named or on_terminal()):
            say(f"  {self.name}")
        return self

    def __exit__(self, *problem: object) -> None:
        if self._bar:
            self._bar.stop()
        _open.remove(self)
        if _open and _open[-1]._bar:
            _open[-1]._bar.start()

    def advance(self, units: int = 1) -> None:
        """So many more of `total` are done."""
        self.count += units
        if self.total:
            self.at(self.count / self.total)

    def at(self, share: float) -> None:
        """The step is at `share`, 0..1."""
        now = time.monotonic()
        if self._bar is None or (now - self._drawn < EVERY and share < 1):
            return
        self._drawn, seconds = now, now - self._began
        before = self._done / self.total if self.total else 0.0
        shown = f"{self.count:,}/{self.total:,}" if self.total else f"{self.count:,} {self.unit}"
        rate = "" if self.total else f", {self.count / max(seconds, EVERY):,.0f}/s"
        left = f"  {clock(seconds * (1 - share) / (share - before))} left" if share > before else ""
        note = f"{shown}{rate}{self.note}{left}"
        self._bar.update(self._bar.task_ids[0], completed=share, note=note, refresh=self._forks)


def on_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be drawn anew."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def clock(seconds: float) -> str:
    """Write a duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
