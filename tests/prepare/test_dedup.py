"""Duplicates across sources, near-duplicates by similarity, and clusters that no order of rows can change."""

from __future__ import annotations

import random
from typing import Any

import pytest
from dpo_cli.prepare.dedup import Sketches
from dpo_cli.prepare.text import hash64, normalise, prompt_key
from tests.prepare import kit


def found(texts: list[str], similarity: float = 0.8) -> set[frozenset[str]]:
    """The clusters of two and more."""
    sketches, by_hash = Sketches(), {hash64(text): text for text in texts}
    for hashed, text in by_hash.items():
        sketches.add(hashed, text)
    groups = sketches.clusters(by_hash.__getitem__, similarity)
    assert sorted(hashed for group in groups for hashed in group) == sorted(by_hash)
    return {frozenset(by_hash[hashed] for hashed in group) for group in groups if len(group) > 1}


def jaccard(one: str, other: str) -> float:
    """Of runs of 5 characters, in Chinese of 3."""
    size = 5 if one.isascii() else 3
    runs = [{text[start : start + size] for start in range(len(text) - size + 1)} for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def edited(text: str, rng: random.Random) -> str:
    """One word, or in Chinese one character, is another."""
    units: list[str] = text.split(" ") if " " in text else list(text)
    place = rng.randrange(1, len(units) - 1)
    units[place] = "otherwise" if " " in text else "异"
    return (" " if " " in text else "").join(units)


@pytest.mark.parametrize(("language", "words"), [("en", 40), ("zh", 40)])
def test_one_word_edits_are_found(language: str, words: int) -> None:
    """Of one-word edits in prompts of 40 words nearly all, and of different prompts none."""
    rng = random.Random(0)
    originals = [kit.sentence(n, language, words) for n in range(300)]
    copies = [edited(text, rng) for text in originals]
    pairs = [(normalise(one), normalise(other)) for one, other in zip(originals, copies, strict=True)]
    near = [pair for pair in pairs if jaccard(*pair) >= 0.8]
    assert len(near) > 290
    groups = found([text for pair in pairs for text in pair])
    assert all(len(group) == 2 and jaccard(*group) >= 0.8 for group in groups)
    assert sum(frozenset(pair) in groups for pair in near) >= 0.97 * len(near)


def test_a_long_text_in_common_costs_no_square_of_the_prompts() -> None:
    """Few-shot prompts: they share whole bands, and each may be checked against a few others only."""
    shots = kit.sentence("shots", words=150)
    texts = [normalise(f"{shots} {kit.sentence(n, words=45)}") for n in range(600)]
    copies = [text + "please" for text in texts[:30]]
    by_hash = {hash64(text): text for text in [*texts, *copies]}
    read = 0

    def text_of(hashed: int) -> str:
        nonlocal read
        read += 1
        return by_hash[hashed]

    sketches = Sketches()
    for hashed, text in by_hash.items():
        sketches.add(hashed, text)
    groups = [{by_hash[hashed] for hashed in group} for group in sketches.clusters(text_of, 0.9)]
    assert sum(any({text, text + "please"} <= group for group in groups) for text in texts[:30]) >= 29
    assert len(groups) >= 590
    assert read < 30 * len(by_hash)  # 16 bands, and each text and a few others in each


def test_templated_prompts_are_no_duplicates() -> None:
    asks = ("Write a haiku about the {}.", "What is the history of the {}?", "请写一首关于{}的诗。")
    texts = [normalise(ask.format(word)) for ask in asks for word in kit.WORDS["en"]]
    assert found(texts) == set()


@pytest.mark.parametrize("system", ["You answer briefly and never guess. " * 20, "你只回答关于产品的问题。" * 20])
def test_a_system_turn_under_all_prompts_makes_them_no_duplicates(system: str) -> None:
    asks = ["How do I return a parcel?", "Where is my invoice?", "怎么修改收货地址？", "你们周末营业吗？"]
    whole: list[list[Any]] = [[{"role": "system", "content": system}, {"role": "user", "content": ask}] for ask in asks]
    assert found([prompt_key(one) for one in whole]) == set()
    again = [[one, {**asked, "content": asked["content"] * 9 + end}] for one, asked in whole[:2] for end in ("", "a")]
    assert len(found([prompt_key(one) for one in again])) == 2, "what is asked is still compared"


def test_clusters_do_not_depend_on_order() -> None:
    rng = random.Random(1)
    texts = [kit.sentence(n, "en", 40) for n in range(60)]
    texts += [edited(rng.choice(texts), rng) for _ in range(60)] + ["", "a", "abcd", "x" * 30_000, "x" * 30_001]
    texts = sorted(set(map(normalise, texts)))
    once = found(texts)
    assert once
    for _ in range(5):
        rng.shuffle(texts)
        assert found(texts) == once


def test_the_first_source_wins_across_sources(prepared: Any) -> None:
    """Exact and near-duplicates are dropped from the later source, unless the earlier row goes for itself."""
    rows = [kit.plain(n) for n in range(20)]
    again = [{**row, "instruction": row["instruction"].upper() + "!!"} for row in rows[:10]]
    long = [{**kit.plain(n), "instruction": kit.sentence(n, words=50)} for n in range(100, 110)]
    near = [{**row, "instruction": edited(row["instruction"], random.Random(n))} for n, row in enumerate(long)]
    near[0]["completions"][0]["response"] += " Confidence: 80%"
    tie, better = (kit.plain("tie", ratings=ratings) for ratings in ("33", "51"))
    made = prepared({"first": [*rows, *long, tie], "second": [*again, *near, better]})
    assert made.dropped("first") == {"duplicate": 1}
    assert made.dropped("second") == {"duplicate": 10, "near_duplicate": 10}
    assert made.source("second")["edits"] == {}  # of what is dropped as a duplicate none are counted
    twins = made.report["duplicates"]
    assert (twins["exact"], twins["near"], twins["cross_source"], twins["largest_cluster"]) == (11, 10, 21, 2)


def test_duplicates_may_stay() -> None:
    """Switched off, copies stay with ids of their own, and on one side of the split."""
    rows = [{**kit.plain((n, copy)), "instruction": kit.sentence(n)} for n in range(60) for copy in range(3)]
    stay: Any = {"filters": {"duplicate": False, "near_duplicate": False}, "eval_fraction": 0.3}
    made = kit.run_rows(rows, **stay)
    assert kit.run_rows(rows[::-1], **stay).rows == made.rows
    assert made.source()["kept"] == 180 == len({row["id"] for row in made.rows})
    sides = [{row["prompt"][0]["content"] for row in side} for side in (made.train, made.held)]
    assert not sides[0] & sides[1] and all(sides)


def test_near_duplicates_share_a_side_even_where_they_stay() -> None:
    rng = random.Random(2)
    originals = [kit.sentence(n, words=50) for n in range(80)]
    rows = [kit.ultrafeedback(text, [kit.sentence((text, k)) for k in (1, 2)], ["5", "1"]) for text in originals]
    rows += [{**row, "instruction": edited(row["instruction"], rng)} for row in rows]
    made = kit.run_rows(rows, filters={"near_duplicate": False}, eval_fraction=0.3)
    assert made.source()["kept"] == 160
    held = [normalise(row["prompt"][0]["content"]) for row in made.held]
    assert held
    for row in made.train:
        text = normalise(row["prompt"][0]["content"])
        assert all(jaccard(text, other) < 0.8 for other in held)
