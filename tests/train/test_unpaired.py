"""The order of KTO's rows, and when one label outweighs the other."""

from __future__ import annotations

import pytest
from dpo_cli.train.unpaired import imbalance, order
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 5))
def test_every_row_once_and_the_same_for_the_same_seed(labels: list[bool], seed: int) -> None:
    made = order(labels, seed)
    assert sorted(made) == list(range(len(labels)))
    assert made == order(tuple(labels), seed)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_every_stretch_has_its_share_of_both_labels(labels: list[bool], seed: int) -> None:
    made, share = order(labels, seed), sum(labels) / len(labels)
    good = 0
    for number, index in enumerate(made, 1):
        good += labels[index]
        assert abs(good - share * number) <= 1


@given(st.integers(4, 40), st.integers(0, 5))
def test_a_pairs_two_rows_stand_half_the_data_apart(pairs: int, seed: int) -> None:
    made = order([True, False] * pairs, seed)
    place = {index: number for number, index in enumerate(made)}
    apart = [abs(place[2 * pair] - place[2 * pair + 1]) for pair in range(pairs)]
    assert min(apart) >= pairs - 3


def test_another_seed_is_another_order() -> None:
    labels = [True, False] * 20
    assert order(labels, 1) != order(labels, 2)
    assert order(labels, 1) != list(range(40)), "shuffled"


@pytest.mark.parametrize(
    ("good", "bad", "desirable", "undesirable", "told"),
    [
        (50, 50, 1.0, 1.0, None), (133, 100, 1.0, 1.0, None), (100, 133, 1.0, 1.0, None),
        (200, 100, 1.0, 1.0, "undesirable_weight: 2"), (100, 300, 1.0, 1.0, "desirable_weight: 3"),
        (200, 100, 1.0, 2.0, None), (200, 100, 1.0, 1.5, None), (100, 300, 3.0, 1.0, None),
        (5, 0, 1.0, 1.0, "KTO needs both"), (0, 5, 1.0, 1.0, "all 5 rows are undesirable"),
    ],
)  # fmt: skip
def test_the_papers_rule_on_weights(
    good: int, bad: int, desirable: float, undesirable: float, told: str | None
) -> None:
    said = imbalance([True] * good + [False] * bad, desirable, undesirable)
    assert said is None if told is None else told in str(said)
    if said and "set train." in said:
        name, weight = said.split("set train.")[1].split(": ")
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable} | {name: float(weight)}
        assert imbalance([True] * good + [False] * bad, *weights.values()) is None, "the proposal mends it"
