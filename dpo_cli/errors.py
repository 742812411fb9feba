"""The one kind of error a person is meant to read: what is wrong, where, and the edit or command that fixes it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from dpo_cli.show import one_line

FAILED = 1  # a stage failed, or its input is missing or stale
USAGE = 2  # the command line or the recipe is wrong
UNVERIFIED = 3  # a verification failed
INTERRUPTED = 130  # Ctrl-C, as shells count it (128 + SIGINT)


class DpoError(Exception):
    """An error with a place and a fix.

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
        super().__init__(without_secrets(message))
        self.message = without_secrets(message)
        self.where = where and without_secrets(where)
        self.hint = hint and without_secrets(hint)
        self.details = [without_secrets(line) for line in details]
        self.exit_code = exit_code

    def __str__(self) -> str:
        """The block as printed; what came from outside can't look like a line of it."""
        lines = [self.message, *(f"  {detail}" for detail in self.details)]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  fix:   {self.hint}")
        return "\n".join(map(one_line, lines))


# Keys of well-known services, which people paste into the wrong place.
SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[\w-]{4,}|hf_(?!transfer|xet|hub|home)[A-Za-z0-9]{4,}|gh[opsu]_\w{4,}|gsk_\w{4,}"
    r"|glpat-[\w-]{4,}|xox[abp]-[\w-]{4,}|AKIA[A-Z0-9]{8,})"
)


def without_secrets(text: str) -> str:
    """`text` with whatever looks like the key of a service replaced by `…`."""
    return SECRET.sub("…", text)


def first_line(error: BaseException) -> str:
    """The first line of what a library raised; the name of its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(word: str, known: list[str]) -> str | None:
    """The known word nearest to `word`, or None where nothing is near; of the same first number where there are such.

    So q4_0 is near q4_k_s, and not q8_0.
    """
    number = re.findall(r"\d+", word)[:1]
    same = [one for one in known if not number or re.findall(r"\d+", one)[:1] == number]
    return next(iter(nearest(word, same or known, 1)), None)


def with_nearest(sentence: str, word: str, known: list[str]) -> str:
    """Add to a sentence the known word that may be meant, where there is one."""
    near = did_you_mean(word, known)
    return f"{sentence}; did you mean {near}?" if near else sentence


def nearest(word: str, known: list[str], count: int) -> list[str]:
    """Up to `count` known words that may be meant by `word`, the nearest first, upper and lower case alike."""
    lower = {one.lower(): one for one in known}
    return [lower[one] for one in difflib.get_close_matches(word[:100].lower(), list(lower), n=count, cutoff=0.6)]


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join(", ".join(words).rsplit(", ", 1))
