"""What rich draws on a terminal: Markdown, answers side by side, the live line of a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.markdown import Markdown, TableElement
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dpo_cli.show import visible


class _Visible:
    """What is printed, as `visible` shows it."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.content, options):
            yield Segment(text if control else visible(text), style, control)


class _Hook:
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(one) for one in renderables]


class _Table(TableElement):
    """A table without the empty lines that stand for its edges."""

    def __rich_console__(self, *where: Any) -> Iterator[Table]:
        for one in super().__rich_console__(*where):
            assert isinstance(one, Table)
            one.show_edge = False
            yield one


class _Page(Markdown):
    elements: ClassVar = {**Markdown.elements, "table_open": _Table}


def terminal(**options: Any) -> Console:
    """A rich console for texts as they are: `visible`, no [markup] and no :emoji: in them, no colours of its own."""
    console = Console(markup=False, emoji=False, highlight=False, **options)
    console.push_render_hook(_Hook())  # type: ignore[arg-type]
    return console


def print_markdown(text: str) -> None:
    """Print Markdown on the terminal, laid out for its width."""
    terminal().print(_Page(text))


def print_answers(prompt: str, base: Sequence[Any], tuned: Sequence[Any]) -> None:
    """Print a prompt and the answers of both models (`inference.Answer`), each two side by side."""
    console = terminal()
    console.print(Text(prompt, style="bold"))
    for number, (one, other) in enumerate(zip(base, tuned, strict=True), 1):
        console.print(Rule(f"answer {number} of {len(base)}", style="dim"))
        print_side_by_side({"base": one, "tuned": other})


def print_side_by_side(answers: Mapping[str, Any]) -> None:
    """Print answers to one prompt in columns, each below the name of its model."""
    table = Table(box=None, padding=(0, 1), expand=True, pad_edge=False)
    for name, answer in answers.items():
        ended = "" if answer.finished else ", cut off"
        table.add_column(f"{name} ({len(answer.answer_ids)} tokens{ended})", ratio=1, overflow="fold")
    table.add_row(*(Text(answer.text) for answer in answers.values()))
    terminal().print(table)


def live_line(name: str, counted: bool, still: bool) -> Progress:
    """Make the live line of a step: with a bar and a note where something is counted, else with the time so far.

    A still one is drawn when it is updated; others by a thread, too.
    """
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
    if counted:
        columns += [BarColumn(bar_width=16), TextColumn("{task.fields[note]}", markup=False)]
    elif not still:
        columns.append(TimeElapsedColumn())
    # What is printed meanwhile goes above the line; where stdout is a file it must still get there.
    line = Progress(
        *columns,
        console=Console(stderr=True, markup=False, emoji=False, highlight=False),
        transient=True,
        auto_refresh=not still,
        redirect_stdout=sys.stdout.isatty(),
    )
    line.add_task(name, total=1.0, note="")
    return line
