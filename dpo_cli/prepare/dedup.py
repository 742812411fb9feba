"""Prompts that are nearly the same: MinHash proposes, the texts themselves decide, the order of rows plays no part.

Texts are cut into shingles (5 characters, 3 where Han characters prevail). MinHash with 16 bands of 8 rows proposes 95
in 100 of the pairs at Jaccard similarity 0.8 (1 - (1 - s^8)^16; Leskovec et al., Mining of Massive Datasets, 3.4), and
each proposal is checked on the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from dpo_cli.language import mostly_han

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BANDS, ROWS = 16, 8
SHINGLE, SHINGLE_HAN = 5, 3
MAX_CHARS = 20_000  # of a prompt, compared; what differs only further on is a near-duplicate anyway
BATCH_CHARS = 100_000  # so that one batch's arrays stay in the processor's cache
MAX_LEADERS = 1000  # unlike texts that one band may hold before the rest of it is let go
CACHED = 200  # texts whose shingles are kept while they may be needed again, 160 kB each at most
MAX_TRIES = 4  # of them that a text is checked against: prompts with a long text in common fill a band by thousands


def _shingle_size(text: str) -> int:
    return SHINGLE_HAN if mostly_han(text) else SHINGLE


def _rolled(text: str, size: int) -> NDArray[np.uint64]:
    """A number for each run of `size` characters, different for different runs."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    rolled = np.zeros(len(codes) - size + 1, dtype=np.uint64)
    for offset in range(size):
        rolled = rolled * np.uint64(0x100000001B3) + codes[offset : offset + len(rolled)]
    return rolled


def _shingles(text: str) -> NDArray[np.uint64]:
    """The different shingles of a normalised text, in order; those of texts cut differently have none in common."""
    import numpy as np

    size = _shingle_size(text)
    found = np.sort(_rolled(text[:MAX_CHARS].ljust(size, "\0"), size))
    return found[np.flatnonzero(np.diff(found, prepend=~found[:1]))]


def _shared(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    import numpy as np

    both = np.concatenate([one, other])
    both.sort(kind="stable")  # for two runs in order, just a merge
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def jaccard(one: str, other: str) -> float:
    """Shared over all shingles of two normalised texts, 0..1; 0 where they are cut differently."""
    return _shared(_shingles(one), _shingles(other))


@dataclass
class Sketches:
    """The band keys of every text added, 128 bytes each; the texts themselves are not kept."""

    _waiting: dict[int, list[str]] = field(default_factory=lambda: {SHINGLE: [], SHINGLE_HAN: []})
    _places: dict[int, list[int]] = field(default_factory=lambda: {SHINGLE: [], SHINGLE_HAN: []})
    _chars: int = 0
    _done: list[tuple[list[int], NDArray[np.uint64]]] = field(default_factory=list)
    count: int = 0

    def add(self, text: str) -> None:
        """Sketch one normalised text."""
        size = _shingle_size(text)
        self._waiting[size].append(text[:MAX_CHARS])
        self._places[size].append(self.count)
        self._chars += min(len(text), MAX_CHARS)
        self.count += 1
        if self._chars > BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        for size, texts in self._waiting.items():
            if texts:
                self._done.append((self._places[size], _band_keys(texts, size)))
        self._waiting = {size: [] for size in self._waiting}
        self._places = {size: [] for size in self._places}
        self._chars = 0

    def keys(self) -> NDArray[np.uint64]:
        """Shape (texts, BANDS), in the order of `add`."""
        import numpy as np

        self._flush()
        table = np.zeros((self.count, BANDS), dtype=np.uint64)
        for places, keys in self._done:
            table[places] = keys
        return table


def _band_keys(texts: list[str], size: int) -> NDArray[np.uint64]:
    """The BANDS keys of each text: hashes of ROWS MinHash values each."""
    import numpy as np

    padded = [text.ljust(size, "\0") for text in texts]
    lengths = np.array([len(text) for text in padded])
    rolled = _rolled("".join(padded), size)
    ends = np.cumsum(lengths)
    inside = np.ones(ends[-1], dtype=bool)
    for back in range(1, size):
        inside[ends - back] = False  # shingles that would reach into the next text
    rolled = rolled[inside[: len(rolled)]]
    rolled ^= rolled >> np.uint64(29)
    rolled *= np.uint64(0xBF58476D1CE4E5B9)
    shingles = (rolled >> np.uint64(32)).astype(np.uint32)
    starts = np.concatenate([[0], np.cumsum(lengths - size + 1)[:-1]])

    draw = np.random.Generator(np.random.PCG64(0))  # the same permutations always
    factors = draw.integers(0, 2**31, BANDS * ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    shifts = draw.integers(0, 2**32, BANDS * ROWS, dtype=np.uint32)
    keys = np.full((len(texts), BANDS), np.uint64(size), dtype=np.uint64)
    permuted = np.empty_like(shingles)
    for number in range(BANDS * ROWS):
        np.multiply(shingles, factors[number], out=permuted)
        permuted += shifts[number]
        least = np.minimum.reduceat(permuted, starts).astype(np.uint64)
        band = keys[:, number // ROWS]
        band ^= least + np.uint64(0x9E3779B97F4A7C15) + (band << np.uint64(6)) + (band >> np.uint64(2))
    return keys


def clusters(
    keys: NDArray[np.uint64], hashes: Sequence[int], text_of: Callable[[int], str], similarity: float
) -> list[int]:
    """For each text the index of its cluster's first member by `hashes`; alone, a text is its own.

    Args:
        keys: shape (texts, BANDS), from `Sketches`.
        hashes: a distinct number per text; texts are compared in its order, so theirs doesn't matter.
        text_of: gives back the normalised text at an index.
        similarity: least Jaccard similarity of two texts that belong together; clusters are chains of such.
    """
    import numpy as np

    parent = list(range(len(hashes)))
    unlike: set[tuple[int, int]] = set()
    shingles = lru_cache(CACHED)(lambda index: _shingles(text_of(index)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(index: int, other: int) -> bool:
        one, two = root(index), root(other)
        if one == two:
            return True
        pair = (min(index, other), max(index, other))
        if pair in unlike:
            return False
        if _shared(shingles(index), shingles(other)) < similarity:
            unlike.add(pair)
            return False
        low, high = (one, two) if hashes[one] < hashes[two] else (two, one)
        parent[high] = low
        return True

    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        column = keys[order, band]
        edges = np.flatnonzero(np.diff(column, prepend=~column[:1], append=~column[-1:]))
        starts = np.flatnonzero(np.diff(edges) > 1)
        for start, end in zip(edges[starts], edges[starts + 1], strict=True):
            leaders: list[int] = []
            for member in sorted(order[start:end].tolist(), key=lambda index: hashes[index]):
                nearest = leaders
                if len(leaders) > MAX_TRIES:  # those that share most bands with it
                    shared = (keys[leaders] == keys[member]).sum(axis=1)
                    nearest = [leaders[place] for place in np.argsort(-shared, kind="stable")[:MAX_TRIES]]
                if not any(join(leader, member) for leader in nearest) and len(leaders) < MAX_LEADERS:
                    leaders.append(member)
    return [root(index) for index in range(len(hashes))]
