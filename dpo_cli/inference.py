"""What the long loops of `eval` share: batches that shrink to the GPU's memory, and a bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from dpo_cli.errors import DpoError
from dpo_cli.machine import ran_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], Result],
    too_large: Callable[[Item], DpoError],
) -> Iterator[Result]:
    """`work` on all the items, `size` at once, and from where memory runs out half as many.

    Raises:
        DpoError: `too_large(item)`, where not even that one alone fits.
    """
    import torch

    begin = 0
    while begin < len(items):
        batch, error = items[begin : begin + size], None
        try:
            result = work(batch)
        except (RuntimeError, MemoryError) as found:
            if not ran_out_of_memory(found):
                raise
            error = found.with_traceback(None)  # which would keep the failed batch's tensors alive
        if error:
            if len(batch) == 1:
                raise too_large(batch[0]) from error
            torch.cuda.empty_cache()
            size = len(batch) // 2
            continue
        yield result
        begin += len(batch)


@contextmanager
def bar(what: str, total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A bar that goes when it is done, none where stderr is no terminal; yields what moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)
