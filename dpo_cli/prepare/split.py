"""Which prompts are held out, and which of the rest make up the mix: by hash, so that nothing moves as data grow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dpo_cli.prepare.funnel import Entry
from dpo_cli.prepare.text import hash64
from dpo_cli.recipe import Recipe

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


FLOOR, MOST = 50, 0.2  # prompts: at least 50 are held out, or 20 % where that is fewer


def held_below(clusters: Iterable[int], fraction: float) -> int:
    """Return the 64-bit hash below which a prompt is held out, by the lowest hash of its cluster.

    That is `fraction` of all hashes; where these are under FLOOR prompts, or under the share MOST if that is fewer, as
    many as that (the lowest), unless the recipe asks for MOST or more.
    """
    below, ordered = int(fraction * 2.0**64), sorted(set(clusters))
    least = min(FLOOR, int(MOST * len(ordered))) if fraction < MOST else 0
    return max(below, ordered[least - 1] + 1) if least else below


def split(recipe: Recipe, rows: list[Chosen]) -> Mix:
    """Hold rows out by the hash of their cluster, and take the mix from the others, those of lowest hash first.

    Quotas per source count before shares per language, and nobody fills another's gap; a language without a share
    gets nothing. At most `data.eval_size` rows are held out, each language with its share.
    """
    data = recipe.data
    below = held_below((entry.cluster for entry, _, _ in rows), data.eval_fraction)
    outside = sorted((row for row in rows if row[0].cluster < below), key=lambda row: row[0].cluster)
    free = [row for row in rows if row[0].cluster >= below]
    quotas = {source.label: source.quota for source in data.sources if source.quota is not None}
    ordered = sorted(free, key=lambda row: hash64(recipe.seed, row[2]))
    train = _fitting(ordered, quotas, lambda entry: entry.source, others=math.inf)
    held, wanted = outside, dict[str, int]()
    if data.languages is None:
        train, held = train[: data.total], held[: data.eval_size]
    else:
        wanted = _wanted(_languages(train), data.total, data.languages)
        train = _fitting(train, wanted, lambda entry: entry.language)
        held = _fitting(held, _counts(data.eval_size, data.languages), lambda entry: entry.language)
    over = _languages(free) - _languages(train)
    return Mix(train, held, wanted, {"held out": _languages(outside), "over a source's quota": over})


def _languages(rows: list[Chosen]) -> Counter[str]:
    return Counter(entry.language for entry, _, _ in rows)


def _fitting(
    rows: list[Chosen], room: Mapping[str, int], name: Callable[[Entry], str], others: float = 0
) -> list[Chosen]:
    """The first rows that find room under their name; names without a room have `others`."""
    used, taken = Counter[str](), []
    for row in rows:
        key = name(row[0])
        if used[key] < room.get(key, others):
            used[key] += 1
            taken.append(row)
    return taken


def _wanted(there: Counter[str], total: int | None, shares: Mapping[str, float]) -> dict[str, int]:
    """Rows per language; without a total as many as the shares allow: the scarcest that there is sets the size."""
    if total is not None:
        return _counts(total, shares)
    size = min((there[name] / share for name, share in shares.items() if there[name]), default=0.0)
    return {name: int(size * share + 1e-9) for name, share in shares.items()}


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` cut up by shares that sum to 1; what rounding leaves goes to the largest remainders."""
    exact = {name: total * share for name, share in shares.items()}
    whole = {name: int(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[: total - sum(whole.values())]:
        whole[name] += 1
    return whole
