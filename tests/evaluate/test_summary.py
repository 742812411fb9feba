"""What the report shows beside the figures: the curves of training, and answers to look at."""

from __future__ import annotations

from typing import Any

import pytest
from dpo_cli.evaluate.samples import Sample
from dpo_cli.evaluate.summary import curves, examples
from dpo_cli.inference import Answer


def test_curves_are_what_training_logged_at_its_steps() -> None:
    log = [
        {"step": 5, "loss": 0.69, "rewards/accuracies": 0.5},
        {"step": 5, "eval_loss": 0.7},
        {"step": 10, "loss": 0.4, "rewards/accuracies": 0.9, "grad_norm": 3.0},
        {"step": 10, "train_runtime": 4.0, "rewards/accuracies": 1.0},  # TRL adds what it has not logged yet
    ]
    assert curves(log) == [
        {"key": "loss", "points": [[5, 0.69], [10, 0.4]], "held_out": [[5, 0.7]]},
        {"key": "rewards/accuracies", "points": [[5, 0.5], [10, 0.9]]},
    ]
    assert curves([]) == []
    several = [{"step": 5, "loss": 0.69}, {"step": 5, "eval_en_loss": 0.6}, {"step": 5, "eval_zh_loss": 0.8}]
    assert curves(several)[0]["held_out"] == [[5, pytest.approx(0.7)]]


@pytest.fixture
def samples() -> list[Sample]:
    answers = (Answer("base", [1, 2], True), Answer("tuned", [3, 4, 5], False, thought=1))
    return [Sample(f"p{n}", "en", "s", [{"role": "user", "content": f"{n}?"}], *answers, 0.0) for n in range(30)]


def ids(some: list[dict[str, Any]], kind: str) -> list[str]:
    return [one["id"] for one in some if one["kind"] == kind]


def test_by_the_judge_two_that_won_and_one_that_lost_are_shown_and_a_seeded_choice_of_the_rest(
    samples: list[Sample],
) -> None:
    scores = {f"p{n}": n / 28 for n in range(29)}  # p29 got no verdict
    shown = examples(samples, scores, {}, seed=1)
    assert ids(shown, "changed") == ["p28", "p27", "p0"]
    drawn = ids(shown, "random")
    assert len(set(drawn)) == 2 and not set(drawn) & set(ids(shown, "changed"))
    assert shown == examples(samples, scores, {}, seed=1)
    assert drawn != ids(examples(samples, scores, {}, seed=2), "random")


def test_ties_changed_nothing(samples: list[Sample]) -> None:
    assert ids(examples(samples, {"p0": 0.5, "p1": 1.0, "p2": 0.25}, {}, seed=0), "changed") == ["p1", "p2"]


def test_without_a_judge_those_whose_reward_changed_most_are_shown(samples: list[Sample]) -> None:
    margins = {"p4": -3.0, "p7": 2.0, "p9": 1.0, "p11": 0.5}
    assert ids(examples(samples, {}, margins, seed=0), "changed") == ["p4", "p7", "p9"]


def test_an_example_has_all_that_is_shown_of_it(samples: list[Sample]) -> None:
    [one] = examples(samples[:1], {}, {"p0": 1.0}, seed=0)
    assert one == {
        "kind": "changed",
        "id": "p0",
        "language": "en",
        "prompt": [{"role": "user", "content": "0?"}],
        "score": None,
        "answers": {
            "base": {"text": "base", "tokens": 2, "finished": True, "score": None},
            "tuned": {"text": "tuned", "tokens": 2, "finished": False, "score": None},  # its thought is not counted
        },
    }
    assert examples([], {}, {}, seed=0) == []
