"""The one kind of error a person is meant to read: what is wrong, where, and the edit or command that mends it."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.show import one_line

FAILED = 1  # a stage failed, or its input is missing or stale
USAGE = 2  # the command line or the recipe is wrong
UNVERIFIED = 3  # a verification failed
INTERRUPTED = 130  # Ctrl-C, as shells count it (128 + SIGINT)


class DpoError(Exception):
    """An error with a place and a mend.

    Args:
        message: what is wrong, in one sentence.
        where: file, line, key or row it is about.
        hint: the command or edit that fixes it.
        details: lines of their own below the message.
        exit_code: what the process ends with (`FAILED`, `USAGE`, `UNVERIFIED` or `INTERRUPTED`).
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        exit_code: int = FAILED,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.details = details
        self.exit_code = exit_code

    def __str__(self) -> str:
        """The block as printed; what came from outside can't look like a line of it."""
        lines = [self.message, *(f"  {detail}" for detail in self.details)]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  fix:   {self.hint}")
        return "\n".join(map(one_line, lines))


def did_you_mean(word: str, known: list[str]) -> str | None:
    """The known word nearest to `word`, or None where nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join(", ".join(words).rsplit(", ", 1))
