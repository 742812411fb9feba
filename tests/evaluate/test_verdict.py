"""The verdict: its table, each state at its boundary, and its sentence; every warning with and without its cause."""

from __future__ import annotations

from typing import Any

import pytest
from dpo_cli.evaluate.verdict import pairs_needed, verdict, warnings
from dpo_cli.stats import Figure, wilson


def figure(value: float | None, low: float | None = None, high: float | None = None, n: int = 200) -> Figure:
    return Figure(value=value, low=low, high=high, n=n)


EVEN, STILL = figure(0.5, 0.43, 0.57), figure(0.0, -0.02, 0.02)
SHARES = ("truncated", "repetitive", "language_match", "refusal", "valid_rate")
SAMPLES = {
    "length_ratio": figure(1.0, 0.9, 1.1),
    **{f"{name}_{side}": figure(0.1, 0.06, 0.15) for name in SHARES for side in ("base", "tuned")},
    **{f"{name}_change": STILL for name in SHARES},
}
JUDGE = {
    "win_rate": figure(0.7, 0.63, 0.76),
    "length_adjusted_win_rate": figure(0.68, 0.61, 0.75),
    "position_consistency": figure(0.8, 0.74, 0.85),
    "calibration": figure(0.7, 0.6, 0.78, n=100),
    "asked": 200,
    "failures": 0,
    "cut": 0,
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
        "baselines": {"majority": EVEN, "shortcut": None},
        "samples": SAMPLES,
        "judge": None,
        "sets": {},
    }
    return {**metrics, **changes}


def accuracy(low: float, high: float, n: int = 200) -> dict[str, Any]:
    return {"pairs": {"reward_accuracy": figure((low + high) / 2, low, high, n)}}


def sampled(name: str, low: float, high: float) -> dict[str, Any]:
    return {"samples": {**SAMPLES, name: figure((low + high) / 2, low, high)}}


def judged(low: float, high: float, adjusted: tuple[float, float] | None = None) -> dict[str, Any]:
    rates = {"win_rate": (low, high), "length_adjusted_win_rate": adjusted or (low, high)}
    return {"judge": JUDGE | {name: figure(sum(ends) / 2, *ends) for name, ends in rates.items()}}


SILENT = {"judge": JUDGE | {name: figure(None, n=0) for name in ("win_rate", "length_adjusted_win_rate")}}
PRICE = sampled("repetitive_change", 0.01, 0.2)
BROKEN = sampled("valid_rate_change", -0.5, -0.26)
DRIFTED = {"pairs": {"chosen_drift_per_token": figure(-0.7, -0.9, -0.51)}}
NOUGHT = figure(0.0, 0.0, 0.0)
STILL_MODEL = {
    "pairs": {"reward_accuracy": figure(0.5, 0.3, 0.7, 12), "chosen_drift": NOUGHT, "rejected_drift": NOUGHT}
}


@pytest.mark.parametrize(
    ("kind", "states"),
    [
        ("better", {}),
        ("better", judged(0.501, 0.8)),
        ("better", SILENT),
        ("better", sampled("valid_rate_change", -0.2, 0.0)),
        ("better", sampled("truncated_change", 0.0, 0.2)),
        ("better", sampled("language_match_change", -0.2, 0.0)),
        ("better", sampled("length_ratio", 1.25, 1.5)),
        ("better", sampled("length_ratio", 0.6, 0.8)),
        ("better", accuracy(0.501, 0.62)),
        ("learned_at_a_price", PRICE),
        ("learned_at_a_price", {**PRICE, **judged(0.45, 0.6)}),
        ("learned_at_a_price", sampled("truncated_change", 0.001, 0.2)),
        ("learned_at_a_price", sampled("language_match_change", -0.2, -0.001)),
        ("learned_at_a_price", sampled("length_ratio", 1.26, 1.5)),
        ("learned_at_a_price", sampled("length_ratio", 0.6, 0.79)),
        ("learned_at_a_price", DRIFTED),
        ("learned_at_a_price", {"samples": None, **DRIFTED}),
        ("learned_at_a_price", {**sampled("length_ratio", 1.01, 1.2), **judged(0.6, 0.8, (0.5, 0.7))}),
        ("better", {**sampled("length_ratio", 0.99, 1.2), **judged(0.6, 0.8, (0.5, 0.7))}),
        ("worse", accuracy(0.3, 0.499)),
        ("worse", BROKEN),
        ("worse", judged(0.3, 0.499)),
        ("too_little_to_tell", judged(0.6, 0.8, (0.3, 0.45))),
        ("not_learned", accuracy(0.42, 0.599)),
        ("not_learned", STILL_MODEL),
        ("not_learned", {"pairs": {"longer_wins": figure(0.74, 0.7, 0.78)}}),
        ("not_learned", {"pairs": {"longer_wins": figure(0.26, 0.2, 0.3)}}),  # always taking the shorter one
        ("not_learned", {"baselines": {"majority": figure(0.74)}}),
        ("not_learned", {**PRICE, "baselines": {"majority": figure(0.74)}}),
        ("too_little_to_tell", accuracy(0.42, 0.6)),
        ("too_little_to_tell", accuracy(0.5, 0.62)),
        ("too_little_to_tell", {**accuracy(0.42, 0.7), **PRICE}),
        ("too_little_to_tell", judged(0.5, 0.7)),
        ("too_little_to_tell", {**sampled("length_ratio", 1.01, 1.2), **judged(0.45, 0.6)}),  # nothing won by length
        ("too_little_to_tell", {"samples": None}),
    ],
)
def test_the_kind_follows_from_what_the_intervals_show(kind: str, states: dict[str, Any]) -> None:
    said = verdict(found(**states))
    assert said["kind"] == kind, said
    assert (said["pairs_needed"] is not None) <= (kind == "too_little_to_tell")
    for reason in said["reasons"]:
        assert reason in said["sentence"]


def test_a_price_is_named_with_what_it_was_before_and_after() -> None:
    samples = {
        **SAMPLES,
        "truncated_base": figure(0.0, 0.0, 0.02),
        "truncated_tuned": figure(0.4, 0.3, 0.5),
        "truncated_change": figure(0.4, 0.3, 0.5),
        "length_ratio": figure(1.62, 1.5, 1.75),
    }
    said = verdict(found(samples=samples))
    assert said["sentence"] == (
        "Learned, at a price: 80% of 200 held-out prompts moved towards the chosen answer (95% interval 74% to 85%; "
        "50% before training, 50% by always taking the longer answer); more answers do not end (0% → 40%); "
        "answers are ×1.6 as long."
    )


def test_the_judge_has_the_last_word() -> None:
    assert verdict(found(**judged(0.63, 0.77)))["reasons"][-1] == (
        "the judge prefers its answers (win rate 70%, 63% to 77%, over 200 prompts; with length taken out 70%, "
        "63% to 77%)"
    )
    assert "the judge prefers the base's answers" in verdict(found(**judged(0.2, 0.4)))["sentence"]
    for rates in ((0.6, 0.8, (0.3, 0.45)), (0.4, 0.6)):
        assert "not distinguishable from the base's" in verdict(found(**judged(*rates)))["sentence"]
    assert verdict(found(**SILENT))["reasons"][-1] == "the judge gave no verdict on any of 200 prompts"
    assert "judge" not in verdict(found(judge=JUDGE | {"asked": 0}))["sentence"], "no samples, so it was not asked"


def test_too_little_says_how_many_prompts_would_tell() -> None:
    said = verdict(found(**accuracy(0.46, 0.66, n=100)))
    assert said["pairs_needed"] == 540 and said["sentence"].endswith("About 540 held-out prompts would tell.")
    of_judge = verdict(found(**judged(0.48, 0.76)))
    assert of_judge["pairs_needed"] == pairs_needed(figure(0.62))
    of_both = verdict(found(**accuracy(0.46, 0.66, n=100), **judged(0.48, 0.76)))
    assert of_both["pairs_needed"] == 540, "the preference comes first"
    assert verdict(found(**accuracy(0.3, 0.7)))["pairs_needed"] is None, "no effect to show"


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"),
    [
        ("better", "loss_change", -0.3, -0.01),
        ("worse", "loss_change", 0.01, 0.3),
        ("not_learned", "loss_change", -0.3, 0.1),
        ("better", "auroc", 0.51, 0.7),
        ("worse", "auroc", 0.3, 0.49),
        ("not_learned", "auroc", 0.42, 0.59),
        ("too_little_to_tell", "auroc", 0.42, 0.72),
    ],
)
def test_without_pairs_the_answers_say_it(kind: str, name: str, low: float, high: float) -> None:
    answers = {"loss_base": figure(1.2), "loss_tuned": figure(1.0), "loss_change": STILL}
    answers[name] = figure((low + high) / 2, low, high)
    said = verdict(found() | {"pairs": None, "answers": answers})
    assert said["kind"] == kind
    assert said["pairs_needed"] == (pairs_needed(answers[name]) if kind == "too_little_to_tell" else None)


@pytest.mark.parametrize("share", [0.53, 0.35])
def test_that_many_prompts_show_the_effect_four_times_in_five(share: float) -> None:
    import numpy

    count = pairs_needed(figure(share))
    assert count is not None
    wins = numpy.random.default_rng(0).binomial(count, share, 2000)
    outside = [not one["low"] <= 0.5 <= one["high"] for one in (wilson(int(won), count) for won in wins)]  # type: ignore[operator]
    assert 0.76 <= sum(outside) / len(outside) <= 0.9


# ------------------------------------------------------------------------------------------------------------ warnings


def language(low: float, high: float, n: int = 200) -> dict[str, Any]:
    return {"languages": {"zh": {"pairs": {"reward_accuracy": figure((low + high) / 2, low, high, n)}}}}


def shortcut(value: float) -> dict[str, Any]:
    return {"baselines": {"majority": EVEN, "shortcut": {**figure(value, value, value), "name": "markdown"}}}


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
    (
        "the chosen answers became less likely (−60 nats",
        {"pairs": {"chosen_drift": figure(-60, -90, -40), **DRIFTED["pairs"]}},
        {},
    ),
    ("few held-out pairs in zh (29)", language(0.6, 0.9, 29), language(0.6, 0.9, 30)),
    ("in zh the accuracy is not distinguishable from 50%", language(0.5, 0.7), language(0.51, 0.7)),
    ("in zh the accuracy is below 50%", language(0.3, 0.49), language(0.51, 0.7)),
    ("betting on markdown alone is right in 75.0% of the training pairs", shortcut(0.75), shortcut(0.73)),
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
    ("3 of 200 prompts got no verdict", {"judge": JUDGE | {"failures": 3}}, {"judge": JUDGE}),
    ("cut short in 4 of 200 prompts", {"judge": JUDGE | {"cut": 4}}, {"judge": JUDGE}),
    (
        "keeps to its verdict in only 59% of the prompts",
        {"judge": JUDGE | {"position_consistency": figure(0.59, 0.5, 0.7)}},
        {"judge": JUDGE | {"position_consistency": figure(0.6, 0.5, 0.7)}},
    ),
    (
        "in 55% of 100 held-out pairs, not clearly better than chance",
        {"judge": JUDGE | {"calibration": figure(0.55, 0.5, 0.6, n=100)}},
        {"judge": JUDGE | {"calibration": figure(0.55, 0.51, 0.6, n=100)}},
    ),
]


@pytest.mark.parametrize(("says", "cause", "none"), CASES, ids=[case[0] for case in CASES])
def test_a_warning_comes_with_its_cause_alone(says: str, cause: dict[str, Any], none: dict[str, Any]) -> None:
    said = warnings(found(**cause))
    assert len(said) == 1 and says in said[0]
    assert warnings(found(**none)) == []


def test_a_good_run_and_one_pair_of_everything_warn_of_little() -> None:
    """Figures of one unit have no interval; a reward model's judgments have no order."""
    assert warnings(found(judge=JUDGE | {"position_consistency": None})) == []
    alone = {name: {**one, "low": None, "high": None, "n": 1} for name, one in SAMPLES.items()}
    silent = JUDGE | {"position_consistency": figure(None, n=0), "calibration": figure(None, n=0)}
    assert warnings(found(samples=alone, judge=silent)) == []


def test_a_shortcut_that_an_accuracy_near_chance_can_not_owe_to_is_not_named() -> None:
    near = {"reward_accuracy": figure(0.55, 0.49, 0.6)}
    assert warnings(found(pairs=near, **shortcut(0.9))) == []
