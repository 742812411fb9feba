"""Which prompts are held out, and which of the rest make up the mix: by hash, so that nothing moves as data grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dpo_cli.prepare.funnel import Entry

Chosen = tuple[Entry, tuple[int, ...], str]  # a row to write: its prompt, which of the candidates, and its id


@dataclass(frozen=True)
class Mix:
    """The rows to train on and those held out.

    Attributes:
        wanted: training rows per language that the mix asked for; empty without shares.
        outside: kept rows by language that could not train, by why not.
    """

    train: list[Chosen]
    held: list[Chosen]
    wanted: dict[str, int]
    outside: dict[str, Counter[str]]


@dataclass(frozen=True)
class Choice:
    """A row that could be written: `place` says where, `order` is the hash that ranks it."""

    place: int
    order: int
    language: str
    source: str


FLOOR, MOST = 50, 0.2  # prompts: at least 50 are held out, or 20 % where that is fewer


def held_below(clusters: Iterable[int], fraction: float) -> int:
    """The 64-bit hash below which a prompt is held out, by the lowest hash of its cluster.

    That is `fraction` of all hashes; where these are under FLOOR prompts, or under the share MOST if that is fewer, as
    many as that (the lowest), unless the recipe asks for MOST or more by itself.
    """
    below, ordered = int(fraction * 2.0**64), sorted(set(clusters))
    least = min(FLOOR, int(MOST * len(ordered))) if fraction < MOST else 0
    return max(below, ordered[least - 1] + 1) if least else below


def counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` cut up by shares that sum to 1; what rounding leaves goes to the largest remainders."""
    exact = {name: total * share for name, share in shares.items()}
    whole = {name: int(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[: total - sum(whole.values())]:
        whole[name] += 1
    return whole


def mix(
    choices: Iterable[Choice], total: int | None, shares: Mapping[str, float] | None, quotas: Mapping[str, int]
) -> tuple[list[Choice], dict[str, int]]:
    """The rows of lowest order that fit the quotas, first per source, then per language; and how many were wanted.

    With `shares`, `total` is cut up by them and nobody fills another's gap. Without a total the mix is as large as the
    shares allow: the scarcest language that there is sets the size. A language outside the shares gets nothing.
    """
    room = dict(quotas)
    pool = []
    for choice in sorted(choices, key=lambda choice: (choice.order, choice.place)):
        if room.get(choice.source, 1) > 0:
            pool.append(choice)
            if choice.source in room:
                room[choice.source] -= 1
    if shares is None:
        return pool[:total], {}
    there = Counter(choice.language for choice in pool)
    if total is None:
        present = {language: there[language] / share for language, share in shares.items() if there[language]}
        scarce = min(present, key=lambda language: present[language], default=None)
        wanted = (
            {language: int(present[scarce] * share + 1e-9) for language, share in shares.items()}
            if scarce
            else dict.fromkeys(shares, 0)
        )
    else:
        wanted = counts(total, shares)
    return _lowest(pool, wanted), wanted


def hold(choices: Sequence[Choice], size: int, shares: Mapping[str, float] | None) -> list[Choice]:
    """At most `size` held-out rows, the lowest order first, in each language its share."""
    ordered = sorted(choices, key=lambda choice: (choice.order, choice.place))
    return ordered[:size] if shares is None else _lowest(ordered, counts(size, shares))


def _lowest(ordered: Iterable[Choice], wanted: Mapping[str, int]) -> list[Choice]:
    room, taken = dict(wanted), []
    for choice in ordered:
        if room.get(choice.language, 0) > 0:
            room[choice.language] -= 1
            taken.append(choice)
    return taken
