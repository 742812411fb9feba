"""Prompts that are the same or nearly: MinHash proposes, the texts themselves decide, the order of rows plays no part.

Texts are cut into shingles (5 characters, 3 where Han characters prevail). MinHash with 16 bands of 8 rows proposes 95
in 100 of the pairs at Jaccard similarity 0.8 (1 - (1 - s^8)^16; Leskovec et al., Mining of Massive Datasets, 3.4), and
each proposal is checked on the texts.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from dpo_cli.language import mostly_han
from dpo_cli.prepare.funnel import Entry, RowStore, row_id
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.recipe.sections import NearDuplicate
from dpo_cli.records import CandidateSet

BANDS, ROWS = 16, 8
SHINGLE, SHINGLE_HAN = 5, 3
MAX_CHARS = 20_000  # of a prompt, compared; what differs only further on is a near-duplicate anyway
MAX_LEADERS = 1000  # unlike texts that one band may hold before the rest of it is let go
CACHED = 200  # texts whose shingles are kept while they may be needed again, 160 kB each at most
MAX_TRIES = 4  # of them that a text is checked against: prompts with a long text in common fill a band by thousands

# Odd factors by which the values of a band are joined to one key.
_JOIN = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

# One system turn under all prompts, often longer than they are, would make them all alike: it counts as its hash.
_SYSTEM = re.compile("^system:[^\x1f]*")


def _shingles(text: str) -> NDArray[np.uint64]:
    """A number for each run of characters of a normalised text; texts cut differently have none in common."""
    text = _SYSTEM.sub(lambda turn: f"{hash64(turn[0]):x}", text)
    size = SHINGLE_HAN if mostly_han(text) else SHINGLE
    codes = np.frombuffer(text[:MAX_CHARS].ljust(size, "\0").encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    wide, count = codes.astype(np.uint64), len(codes) - size + 1
    rolled = wide[:count]
    for offset in range(1, size):
        rolled = rolled * np.uint64(0x100000001B3) + wide[offset : offset + count]
    return rolled


def _band_keys(text: str) -> NDArray[np.uint64]:
    shingles = _shingles(text)
    digest = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], num_perm=BANDS * ROWS, seed=0)
    values = np.array(digest.to_rows()[0], dtype=np.uint64).reshape(BANDS, ROWS)
    keys: NDArray[np.uint64] = (values * _JOIN).sum(axis=1, dtype=np.uint64)
    return keys


def _shared(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    both = np.concatenate([one, other])
    both.sort(kind="stable")  # for two runs in order, just a merge
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


class Sketches:
    """The band keys of every different text added, 128 bytes each; the texts themselves are not kept."""

    def __init__(self) -> None:
        self._seen: dict[int, None] = {}
        self._keys = array("Q")

    def add(self, hashed: int, text: str) -> None:
        """Sketch a normalised text with this hash, once."""
        if hashed not in self._seen:
            self._seen[hashed] = None
            self._keys.frombytes(_band_keys(text).tobytes())

    def clusters(self, text_of: Callable[[int], str], similarity: float) -> list[list[int]]:
        """Return the hashes of texts that belong together, lowest first; every hash is in one cluster, alone or not.

        Args:
            text_of: gives back the normalised text with a hash.
            similarity: least Jaccard similarity of two texts that belong together; clusters are chains of such.
        """
        table = np.frombuffer(self._keys, dtype=np.uint64).reshape(-1, BANDS)
        hashes = np.array(list(self._seen), dtype=np.uint64)
        order = np.argsort(hashes)  # from here on a text is its place in the order of hashes
        table, hashes = table[order], hashes[order]
        union = _Union(lambda text: text_of(int(hashes[text])), len(hashes), similarity)
        for band in range(BANDS):
            order = np.argsort(table[:, band], kind="stable")
            column = table[order, band]
            edges = np.flatnonzero(np.diff(column, prepend=~column[:1], append=~column[-1:]))
            for place in np.flatnonzero(np.diff(edges) > 1):  # texts with the same key
                union.join_all(order[edges[place] : edges[place + 1]].tolist(), table)
        found: dict[int, list[int]] = defaultdict(list)
        for text, hashed in enumerate(hashes.tolist()):
            found[union.root(text)].append(hashed)
        return list(found.values())


class _Union:
    """Disjoint sets of texts, which are joined where they are similar."""

    def __init__(self, text_of: Callable[[int], str], count: int, similarity: float) -> None:
        self._parent = list(range(count))
        self._unlike: set[tuple[int, int]] = set()
        self._similarity = similarity
        self._shingles = lru_cache(CACHED)(lambda text: np.unique(_shingles(text_of(text))))

    def root(self, text: int) -> int:
        parent = self._parent
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    def _join(self, one: int, other: int) -> bool:
        """Whether two texts are in one set, now that they have been compared."""
        low, high = sorted((self.root(one), self.root(other)))
        if low == high:
            return True
        if (one, other) in self._unlike:
            return False
        if _shared(self._shingles(one), self._shingles(other)) < self._similarity:
            self._unlike.add((one, other))
            return False
        self._parent[high] = low
        return True

    def join_all(self, members: list[int], table: NDArray[np.uint64]) -> None:
        """Compare texts that share a band key, each with those unlike each other so far."""
        leaders: list[int] = []
        for member in members:
            nearest = leaders
            if len(leaders) > MAX_TRIES:  # those that share most bands with it
                shared = (table[leaders] == table[member]).sum(axis=1)
                nearest = [leaders[place] for place in np.argsort(-shared, kind="stable")[:MAX_TRIES]]
            if not any(self._join(leader, member) for leader in nearest) and len(leaders) < MAX_LEADERS:
                leaders.append(member)


def drop_duplicates(
    entries: list[Entry], sketches: Sketches, store: RowStore[CandidateSet], filters: Any
) -> dict[str, int]:
    """Drop duplicates and near-duplicates, give every entry its cluster, and count them for the report.

    Of a cluster stays what would be kept, from the first source, of the lowest hash: the order of rows plays no part.
    """

    def preference(entry: Entry) -> tuple[bool, int, int, int]:
        return entry.drop is not None, entry.rank, entry.hash, entry.content

    same: dict[int, list[Entry]] = defaultdict(list)  # by the prompt's hash, the one to keep first
    for entry in sorted(entries, key=preference):
        same[entry.hash].append(entry)
    similarity = (filters.near_duplicate or NearDuplicate()).similarity
    stats = Counter[str]()
    # Clusters are found even where they stay in: both halves of one must not end up on two sides of the split.
    for hashes in sketches.clusters(lambda hashed: prompt_key(store.get(same[hashed][0].place).prompt), similarity):
        everyone = [entry for hashed in hashes for entry in same[hashed]]
        best = min(everyone, key=preference)
        stats["cross_source"] += len({entry.source for entry in everyone}) > 1
        stats["largest_cluster"] = max(stats["largest_cluster"], len(everyone))
        for entry in everyone:
            first = same[entry.hash][0]
            entry.cluster = hashes[0]
            stats["exact"] += entry is not first
            stats["near"] += entry is first and first is not best
            if entry is not first and filters.duplicate:
                entry.drop = ("duplicate", f"same prompt as {row_id(first.source, first.hash)} of {first.source}")
            elif first is not best and filters.near_duplicate:
                entry.drop = ("near_duplicate", f"near {row_id(best.source, best.hash)} of {best.source}")
    return {name: stats[name] for name in ("exact", "near", "cross_source", "largest_cluster")}
