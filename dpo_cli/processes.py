"""Several processes of one run, as `accelerate launch` starts them: the main one writes, the others follow it.

Started alone, a process is the main one and nothing here costs anything.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# The others wait while the main process downloads and prepares; torch would give up after ten minutes.
PATIENCE = timedelta(hours=6)


def count() -> int:
    """Processes of this run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """The one process that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def stop_signals() -> list[int]:
    """Ctrl-C, SIGTERM, and the hang-up of a terminal or connection that closes, unless `nohup` switched it off."""
    found: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def leave_terminal(number: int) -> None:
    """After a hang-up nothing can be shown any more, and trying to must not cost the results."""
    if number == getattr(signal, "SIGHUP", None):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, for all of them; the others wait. It must pickle.

    An error in the main process ends that one, and the launcher then ends the others.
    """
    if count() == 1:
        return work()
    (_, utils), box = _joined(), [work() if is_main() else None]
    utils.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in one of the processes; all of them have to ask at the same point."""
    return any(_from_all(flag))


def least(number: int) -> int:
    """Return the smallest of the processes' numbers, for all of them; all have to ask at the same point."""
    return min(_from_all(number))


def _from_all(value: T) -> list[T]:
    return [value] if count() == 1 else list(_joined()[1].gather_object([value]))


def leave() -> None:
    """End the process group, once all have come to the end of the command: one that ends with its threads may abort."""
    if count() > 1:
        state, _ = _joined()
        state.wait_for_everyone()
        state.destroy_process_group()


def _joined() -> tuple[Any, Any]:
    """Accelerate's state and its utilities, once the processes know each other."""
    from accelerate import PartialState, utils

    return PartialState(cpu=not utils.is_cuda_available(), timeout=PATIENCE), utils
