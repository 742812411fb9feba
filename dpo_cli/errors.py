"""The one kind of error a person is meant to read: what is wrong, where, and the edit or command that mends it."""

from __future__ import annotations

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
        exit_code: what the process ends with (`FAILED`, `USAGE`, `UNVERIFIED` or `INTERRUPTED`).
    """

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, exit_code: int = FAILED
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  fix:   {self.hint}")
        return "\n".join(lines)


def did_you_mean(word: str, known: list[str]) -> str | None:
    """The known word nearest to `word`, or None where nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join(", ".join(words).rsplit(", ", 1))
