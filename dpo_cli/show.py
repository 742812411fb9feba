"""Text from outside on a terminal: what a terminal would obey is shown escaped, and markup as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Controls (C0 but tab and line feed, DEL, C1), line and paragraph separators, directional embeddings, overrides and
# isolates, and halves of surrogate pairs, which stand for bytes of a file name that is not UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape what a terminal obeys instead of showing, such as ESC as `\x1b`; lines stay lines."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Make one visible line of a text, so that no part of it looks like a line of ours."""
    return visible(" ".join(text.splitlines())) if "\n" in text or "\r" in text else visible(text)


def takes_unicode() -> bool:
    """Whether stdout has every character; what is read by a program must come without loss where it has not."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text as `visible`, on stdout where no other stream is named."""
    print(visible(text), file=file, flush=True)


def terminal(**options: Any) -> Console:
    """A rich console for texts as they are: `visible`, no [markup] and no :emoji: in them, no colours of its own."""
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
    from rich.segment import Segment

    class Visible:
        def __init__(self, content: Any) -> None:
            self.content = content

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for text, style, control in console.render(self.content, options):
                yield Segment(text if control else visible(text), style, control)

    class Hook:
        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return [Visible(one) for one in renderables]

    console = Console(markup=False, emoji=False, highlight=False, **options)
    console.push_render_hook(Hook())  # type: ignore[arg-type]
    return console


@contextmanager
def bar(what: str, total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar that goes when it is done, none where stderr is no terminal; yields what moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)
