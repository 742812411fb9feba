"""What is said of sampled answers, by hand where it can be counted, and how often the intervals hold the truth."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from dpo_cli.evaluate.samples import Sample
from dpo_cli.evaluate.text_metrics import distinct_2, language_match, repetition, sample_metrics, valid
from dpo_cli.inference import Answer

X = ("tokens", "truncated", "repetitive", "distinct_2", "language_match", "refusal", "valid_rate")


def sample(base: Answer, tuned: Answer, *, prompt: str = "What is a falcon?", kl: float = 0.0) -> Sample:
    return Sample("a", "en", "s", [{"role": "user", "content": prompt}], base, tuned, kl)


def answer(ids: Sequence[int], text: str = "A bird of prey.", *, finished: bool = True, thought: int = 0) -> Answer:
    return Answer(text, list(ids), finished, thought)


# -------------------------------------------------------------------------------------------------------- of one answer


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3], 0.0),
        ([7] * 10, 1 - 1 / 7),  # 7 runs, all the same
        ([1, 2, 3, 4] * 3, 1 - 4 / 9),  # 9 runs, of 4 kinds
        (list(range(50)), 0.0),
    ],
)
def test_repetition_by_hand(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("prompt", "reply", "match"),
    [  # the fifth: loan words are no other language
        ("What is a falcon?", "A bird of prey.", True),
        ("What is a falcon?", "一种猛禽。", False),
        ("什么是隼？", "隼是一种猛禽。", True),
        ("什么是隼？", "A bird of prey.", False),
        ("用 Python 写一个快速排序", "可以使用 numpy 的 sort 函数来完成。", True),
        ("1 + 1 = ?", "2", None),  # no words
    ],
)
def test_an_answer_is_in_its_prompts_script(prompt: str, reply: str, match: bool | None) -> None:
    assert language_match(prompt, reply) is match


# --------------------------------------------------------------------------------------------------- of all the answers


def test_distinct_2_counts_pairs_over_the_corpus_but_not_over_the_ends_of_answers() -> None:
    # 1 2, 2 3 | 1 2, 2 9: four pairs, three kinds
    assert distinct_2([[1, 2, 3], [1, 2, 9]]) == pytest.approx(3 / 4)
    assert math.isnan(distinct_2([[1], []]))
    # Only the first 200 tokens count, for it falls with length: longer answers would look duller.
    assert distinct_2([[*range(200), *[5] * 300]]) == 1


@pytest.mark.parametrize(
    ("said", "is_valid"),
    [
        (answer(range(9)), True),
        (answer(range(9), "42"), True),
        (answer(range(9), finished=False), False),
        (answer([1], " \n"), False),
        (answer(range(9), "一种猛禽。"), False),
        (answer([7] * 20, "bird bird bird"), False),
        (answer([7] * 5), True),  # one of its two runs of 4 stood there before: ½, and not above it
        (answer(range(9), "A bird.<|im_start|>user"), False),
        (answer(range(9), "a < b, [1] and |x| > 0 are fine"), True),
    ],
)
def test_a_valid_answer_ended_says_something_in_the_language_without_repetition_and_markers(
    said: Answer, is_valid: bool
) -> None:
    assert valid("What is a falcon?", said.text, said.ids, said.finished) == is_valid


# -------------------------------------------------------------------------------------------------------------- figures


def test_every_figure_is_there_even_without_samples() -> None:
    names = {"kl", "kl_total", "length_ratio"} | {f"{x}_{side}" for x in X for side in ("base", "tuned", "change")}
    for samples in ([], [sample(answer([1, 2]), answer([1, 2]))]):
        figures = sample_metrics(samples, 0)
        assert set(figures) == names
        assert all(figure["n"] == len(samples) for figure in figures.values())
    assert all(figure["value"] is None for figure in sample_metrics([], 0).values())


def test_figures_by_hand() -> None:
    samples = [
        sample(answer(range(10)), answer(range(20)), kl=4.0),
        sample(answer(range(10)), answer([7] * 20, "我不能提供。", finished=False), kl=2.0),
        sample(answer(range(40)), answer(range(10), "42"), kl=0.0),
    ]
    figures = sample_metrics(samples, 0)
    value = {name: figure["value"] for name, figure in figures.items()}
    assert value["kl"] == pytest.approx(6 / 50)  # nats over tokens, all alike
    assert value["kl_total"] == pytest.approx(2)
    assert value["length_ratio"] == pytest.approx(1)  # 2 · 2 · ¼, the cube root
    assert value["tokens_base"] == pytest.approx(20)
    assert value["tokens_tuned"] == pytest.approx(50 / 3)
    assert value["truncated_tuned"] == value["truncated_change"] == pytest.approx(1 / 3)
    assert value["repetitive_change"] == pytest.approx(1 / 3)
    assert value["refusal_tuned"] == pytest.approx(1 / 3)
    assert value["valid_rate_base"] == 1 and value["valid_rate_tuned"] == pytest.approx(2 / 3)
    assert value["distinct_2_base"] == pytest.approx(39 / 57)  # 0 1, 1 2, … 38 39
    assert value["distinct_2_tuned"] == pytest.approx(20 / 47)  # 0 1, … 18 19 and 7 7
    assert value["distinct_2_change"] == pytest.approx(20 / 47 - 39 / 57, abs=1e-6)
    # "42" has no words: it is left out on its own side, and its prompt out of the paired change.
    assert [figures[f"language_match_{side}"]["n"] for side in ("base", "tuned", "change")] == [3, 2, 2]
    assert value["language_match_tuned"] == pytest.approx(1 / 2)
    assert value["language_match_change"] == pytest.approx(-1 / 2)


def test_thinking_counts_in_the_kl_alone() -> None:
    figures = sample_metrics([sample(answer([1, 2, 3, 4]), answer([9] * 16 + [1, 2, 3, 4], thought=16), kl=10.0)], 0)
    assert figures["kl"]["value"] == pytest.approx(10 / 20)
    for name, value in {
        "length_ratio": 1.0,
        "tokens_tuned": 4.0,
        "repetitive_tuned": 0.0,
        "distinct_2_tuned": 1,
    }.items():
        assert figures[name]["value"] == value
    unended = sample_metrics([sample(answer([1, 2]), answer([9] * 8, "", finished=False, thought=8))], 0)
    assert unended["tokens_tuned"]["value"] == 0
    assert unended["distinct_2_tuned"]["value"] is None


def test_changes_are_paired_over_prompts() -> None:
    """Prompts differ a lot in length and the models by one token: unpaired, no 50 prompts would show it."""
    rng = random.Random(0)
    lengths = [rng.randrange(5, 400) for _ in range(50)]
    samples = [sample(answer(range(n)), answer(range(n + 1 + n % 2))) for n in lengths]
    figures = sample_metrics(samples, 0)
    low, high = figures["tokens_change"]["low"], figures["tokens_change"]["high"]
    assert low is not None and high is not None and 1 <= low < high <= 2
    assert sample_metrics(samples, 0) == figures
