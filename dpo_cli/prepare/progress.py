"""A progress bar with a rate, for whatever takes longer than two seconds."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from dpo_cli.show import one_line

PATIENCE = 2.0  # seconds before a bar shows
EVERY = 0.1  # seconds between two looks at it


class Progress:
    """Bars on stderr, one a stage; none where `quiet` is set or stderr is no terminal.

    `stage` opens a stage, `tick` moves it; `count` is how many units it has done, for the rate.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.count = 0
        self._bar: Any = None
        self._name = self._unit = ""
        self._began = self._looked = 0.0

    def stage(self, name: str, unit: str) -> None:
        self.close()
        self._name, self._unit, self.count = name, unit, 0
        self._began = self._looked = time.monotonic()

    def tick(self, share: float) -> None:
        """The stage is at `share`, 0..1."""
        now = time.monotonic()
        if self.quiet or now - self._looked < EVERY or now - self._began < PATIENCE:
            return
        self._looked = now
        if self._bar is None:
            console = Console(stderr=True)
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
            self._bar.add_task(one_line(self._name), total=1.0, rate="")
            self._bar.start()
        rate = f"{self.count:,} {self._unit}, {self.count / (now - self._began):,.0f}/s"
        self._bar.update(self._bar.task_ids[0], completed=share, rate=rate)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()
