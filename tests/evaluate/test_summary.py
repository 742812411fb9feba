"""What a reader should know and see of the figures: every warning with and without its cause, curves, examples."""

from __future__ import annotations

from typing import Any

import pytest
from dpo_cli.evaluate.samples import Sample
from dpo_cli.evaluate.summary import curves, examples, warnings
from dpo_cli.inference import Answer
from dpo_cli.stats import Figure


def figure(value: float | None, low: float | None = None, high: float | None = None, n: int = 200) -> Figure:
    return Figure(value=value, low=low, high=high, n=n)


EVEN, STILL = figure(0.5, 0.43, 0.57), figure(0.0, -0.02, 0.02)
SAMPLES = {
    "length_ratio": figure(1.0, 0.9, 1.1),
    **{
        f"{name}_{side}": STILL if side == "change" else figure(0.1, 0.06, 0.15)
        for name in ("truncated", "repetitive", "language_match", "refusal")
        for side in ("base", "tuned", "change")
    },
}
JUDGE = {
    "win_rate": figure(0.7, 0.63, 0.76),
    "length_adjusted_win_rate": figure(0.68, 0.61, 0.75),
    "position_consistency": figure(0.8, 0.74, 0.85),
    "calibration": figure(0.7, 0.6, 0.78, n=100),
    "failures": 0,
    "cut": 0,
    "asked": 200,
}


def found(**changes: Any) -> dict[str, Any]:
    """metrics.json of a good run, as far as verdict and warnings read it; nothing to warn of."""
    pairs = {
        "reward_accuracy": figure(0.8, 0.74, 0.85),
        "longer_wins": EVEN,
        "chosen_drift": figure(2.0, 1.5, 2.5),
        "rejected_drift": figure(-2.0, -2.5, -1.5),
        "chosen_drift_per_token": figure(0.1, 0.05, 0.15),
    }
    metrics: dict[str, Any] = {
        "pairs": {**pairs, **changes.pop("pairs", {})},
        "languages": {"en": {"pairs": {"reward_accuracy": figure(0.8, 0.74, 0.85)}}},
        "baselines": {"longer_wins": EVEN, "majority": EVEN, "shortcut": None},
        "samples": None,
        "judge": None,
        "sets": {},
    }
    return {**metrics, **changes}


# ------------------------------------------------------------------------------------------------------------ warnings


def language(low: float, high: float, n: int = 200) -> dict[str, Any]:
    return {"languages": {"zh": {"pairs": {"reward_accuracy": figure((low + high) / 2, low, high, n)}}}}


def shortcut(value: float) -> dict[str, Any]:
    return {"baselines": {"majority": EVEN, "shortcut": {**figure(value, value, value), "name": "markdown"}}}


def sampled(name: str, low: float, high: float) -> dict[str, Any]:
    return {"samples": {**SAMPLES, name: figure((low + high) / 2, low, high)}}


def judged(**changes: Any) -> dict[str, Any]:
    return {"judge": JUDGE | changes}


NOUGHT = figure(0.0, 0.0, 0.0)
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # what is said, its cause, and what is just no cause
    (
        "the adapter changes nothing",
        {"pairs": {"chosen_drift": NOUGHT, "rejected_drift": NOUGHT}},
        {"pairs": {"chosen_drift": NOUGHT}},
    ),
    (
        "the chosen answers became less likely (−0.5 nats",
        {"pairs": {"chosen_drift": figure(-0.5, -0.94, -0.06)}},
        {"pairs": {"chosen_drift": figure(-0.5, -1, 0)}},
    ),
    ("few held-out pairs in zh (29)", language(0.6, 0.9, 29), language(0.6, 0.9, 30)),
    ("in zh the accuracy is not distinguishable from 50%", language(0.5, 0.7), language(0.51, 0.7)),
    ("in zh the accuracy is below 50%", language(0.3, 0.49), language(0.51, 0.7)),
    ("betting on markdown alone is right in 75.0% of the training pairs", shortcut(0.75), shortcut(0.74)),
    (
        "do not end (10% → 10%): it may have unlearned",
        sampled("truncated_change", 0.01, 0.1),
        sampled("truncated_change", 0, 1),
    ),
    ("answers repeat themselves", sampled("repetitive_change", 0.01, 0.1), sampled("repetitive_change", 0, 0.1)),
    (
        "fewer answers are in the prompt's language",
        sampled("language_match_change", -0.1, -0.01),
        sampled("language_match_change", -0.1, 0),
    ),
    ("more answers refuse", sampled("refusal_change", 0.01, 0.1), sampled("refusal_change", 0, 0.1)),
    ("answers are ×1.30 as long", sampled("length_ratio", 1.26, 1.34), sampled("length_ratio", 1.25, 1.35)),
    (
        "2 of 30 prompts of bench were trained on",
        {"sets": {"bench": {"overlap": 2, "kept": 30}}},
        {"sets": {"bench": {"overlap": 0, "kept": 30}}},
    ),
    ("3 of 200 prompts got no verdict", judged(failures=3), judged()),
    ("cut short in 4 of 200 prompts", judged(cut=4), judged()),
    (
        "keeps to its verdict in only 59% of the prompts",
        judged(position_consistency=figure(0.59, 0.5, 0.7)),
        judged(position_consistency=figure(0.6, 0.5, 0.7)),
    ),
    (
        "in 55% of 100 held-out pairs, not clearly better than chance",
        judged(calibration=figure(0.55, 0.5, 0.6, n=100)),
        judged(calibration=figure(0.55, 0.51, 0.6, n=100)),
    ),
]


@pytest.mark.parametrize(("says", "cause", "none"), CASES, ids=[case[0] for case in CASES])
def test_a_warning_comes_with_its_cause_alone(says: str, cause: dict[str, Any], none: dict[str, Any]) -> None:
    said = warnings(found(**cause))
    assert len(said) == 1 and says in said[0]
    assert warnings(found(**none)) == []


def test_a_good_run_and_one_pair_of_everything_warn_of_little() -> None:
    """Figures of one unit have no interval; a reward model's judgments have no order."""
    assert warnings(found(samples=SAMPLES, judge=JUDGE | {"position_consistency": None})) == []
    alone = {name: {**one, "low": None, "high": None, "n": 1} for name, one in SAMPLES.items()}
    silent = JUDGE | {"position_consistency": figure(None, n=0), "calibration": figure(None, n=0)}
    assert warnings(found(samples=alone, judge=silent)) == []


def test_a_shortcut_that_an_accuracy_near_chance_can_not_owe_to_is_not_named() -> None:
    near = {"reward_accuracy": figure(0.55, 0.49, 0.6)}
    assert warnings(found(pairs=near, **shortcut(0.9))) == []


# -------------------------------------------------------------------------------------------------- curves and examples


def test_curves_are_what_training_logged_at_its_steps() -> None:
    log = [
        {"step": 5, "loss": 0.69, "rewards/accuracies": 0.5},
        {"step": 5, "eval_loss": 0.7},
        {"step": 10, "loss": 0.4, "rewards/accuracies": 0.9, "grad_norm": 3.0},
        {"step": 10, "train_runtime": 4.0},
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


@pytest.mark.parametrize(
    ("scores", "changed"),
    [
        ({"p0": 0.5, "p1": 1.0, "p2": 0.25}, ["p1", "p2"]),
        ({"p0": 0.0, "p1": 0.25, "p2": 0.125, "p3": 0.4}, ["p0", "p2", "p1"]),
        ({"p0": 1.0, "p1": 0.75, "p2": 0.8, "p3": 0.6}, ["p0", "p2", "p1"]),
    ],
)
def test_ties_changed_nothing_and_one_side_makes_up_for_the_other(
    samples: list[Sample], scores: dict[str, float], changed: list[str]
) -> None:
    assert ids(examples(samples, scores, {}, seed=0), "changed") == changed


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
