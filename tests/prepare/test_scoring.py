"""Scores as the recipe words them, the traps of the public data sets, and which candidates meet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare import scoring
from dpo_cli.recipe import PairPolicy, ScoreWeights
from dpo_cli.records import Candidate, CandidateSet
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prepare import kit

WEIGHTS = tuple(ScoreWeights().model_dump().items())
UF, HS = scoring.ULTRAFEEDBACK, scoring.HELPSTEER2
BOUNDED = settings(derandomize=True, deadline=None, max_examples=150)


def test_scale_trap() -> None:
    """A 1 is the second worst on 0..4 and the worst on 1..5, never the best."""
    assert scoring.score(dict.fromkeys(dict(WEIGHTS), 1), HS, WEIGHTS) == 0.25
    assert scoring.score({name: "1" for name, *_ in UF}, UF, WEIGHTS) == 0.0
    assert scoring.score({name: "5" for name, *_ in UF}, UF, WEIGHTS) == 1.0


def test_overwrite_trap() -> None:
    """Honesty and truthfulness both count towards correctness: neither replaces the other."""
    base = {"helpfulness": "3", "instruction_following": "3"}
    scores = {
        (honesty, truth): scoring.score({**base, "honesty": honesty, "truthfulness": truth}, UF, WEIGHTS)
        for honesty, truth in itertools.product("15", "15")
    }
    assert scores["1", "5"] == scores["5", "1"] == pytest.approx((0.4 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5) / 0.9)
    assert scores["1", "1"] < scores["1", "5"] < scores["5", "5"]  # type: ignore[operator]


@pytest.mark.parametrize(
    "missing", ["N/A", "", None, "6", "0", -1, True, float("nan"), 10**400, [9], {"a": 1}, "5 stars"]
)
def test_na_trap(missing: Any) -> None:
    """N/A, junk and what is off the scale are as if they weren't there: not 0, and not the middle."""
    known: dict[str, Any] = {"helpfulness": "5", "truthfulness": "5", "instruction_following": "5"}
    assert scoring.score({**known, "honesty": missing}, UF, WEIGHTS) == 1.0
    nothing = dict.fromkeys(("helpfulness", "truthfulness", "honesty"), missing)
    assert scoring.score({**known, **nothing}, UF, WEIGHTS) is None


def test_weights_are_renormalised_over_what_is_there() -> None:
    only = scoring.score({"correctness": 4, "verbosity": 0}, HS, WEIGHTS)
    assert only == pytest.approx(0.4 / 0.45, abs=1e-6)
    assert scoring.score({"coherence": 4, "complexity": 4, "verbosity": 4}, HS, WEIGHTS) is None


def test_lists_of_annotations_count_as_their_mean() -> None:
    assert scoring.rating([4, 4, 1], 0, 4) == pytest.approx(0.75)
    assert scoring.rating([4, "N/A"], 0, 4) is None


ratings = st.sampled_from(["1", "2", "3", "4", "5", "N/A"])
candidate_lists = st.lists(
    st.tuples(st.text("abc ", min_size=1, max_size=6), st.none() | st.integers(0, 20).map(lambda n: n / 20)),
    min_size=2,
    max_size=6,
)


@BOUNDED
@given(st.tuples(ratings, ratings, ratings, ratings), st.permutations(range(4)))
def test_score_is_on_0_to_1_and_order_of_ratings_plays_no_part(values: tuple[str, ...], order: list[int]) -> None:
    names = [name for name, *_ in UF]
    score = scoring.score(dict(zip(names, values, strict=True)), UF, WEIGHTS)
    shuffled = scoring.score({names[place]: values[place] for place in order}, UF, WEIGHTS)
    assert score == shuffled
    assert score is None or 0 <= score <= 1
    if score is not None:
        for place, value in enumerate(values):
            if value.isdigit() and value != "5":
                better = scoring.score({**dict(zip(names, values, strict=True)), names[place]: "5"}, UF, WEIGHTS)
                assert better is not None and better >= score


@BOUNDED
@given(candidate_lists, st.sampled_from(["best_worst", "best_random", "all"]), st.integers(0, 3), st.randoms())
def test_chosen_never_scores_below_rejected(found: list[Any], pick: Any, seed: int, rng: Any) -> None:
    """Whatever is picked, and the same texts meet whatever order the candidates came in."""

    def met(several: list[Any]) -> list[tuple[Candidate, Candidate]]:
        item = CandidateSet([], [Candidate(text, score or 0.0) for text, score in several], source="s")
        pairs = scoring.pick(item, PairPolicy(pick=pick), seed, 7)
        return [(item.candidates[chosen], item.candidates[rejected]) for chosen, rejected in pairs]

    pairs = met(found)
    assert len(pairs) == (len(found) * (len(found) - 1) // 2 if pick == "all" else 1)
    for chosen, rejected in pairs:
        assert (chosen.score or 0) >= (rejected.score or 0)
        if chosen.score == rejected.score:
            assert len(chosen.text) <= len(rejected.text)  # of equals, the shorter is chosen
    shuffled = rng.sample(found, len(found))
    assert sorted(map(repr, met(shuffled))) == sorted(map(repr, pairs))


def test_picks() -> None:
    """best_worst takes the ends, best_random the best and something lower, all every order that scores tell."""
    rows = [kit.plain(n, ratings=("2", "5", "4", "1")) for n in range(60)]
    ends = kit.run_rows(rows)
    assert {(row["score_chosen"], row["score_rejected"]) for row in ends.rows} == {(1.0, 0.0)}
    drawn = kit.run_rows(rows, pairs={"pick": "best_random"})
    assert {row["score_chosen"] for row in drawn.rows} == {1.0}
    assert {row["score_rejected"] for row in drawn.rows} == {0.0, 0.25, 0.75}
    every = kit.run_rows(rows, pairs={"pick": "all"}, eval_size=1000)
    assert len(every.rows) == 360 == len({row["id"] for row in every.rows})
    assert every.source()["kept"] == 60 and every.funnel_holds()


def test_margin_and_least_chosen_score() -> None:
    rows = [kit.plain(n, ratings=ratings) for n, ratings in enumerate([("5", "4"), ("3", "1"), ("4", "1"), ("3", "3")])]
    made = kit.run_rows(rows, pairs={"min_margin": 0.4, "min_chosen_score": 0.6})
    assert made.dropped() == {"margin": 1, "low_chosen": 1, "tie": 1}
    assert made.rows[0]["margin"] == 0.75
    free = kit.run_rows(rows, filters={"margin": False, "tie": False, "low_chosen": False}, pairs={"min_margin": 1.0})
    assert free.source()["kept"] == 4


def test_sources_without_scores_pass_the_score_filters() -> None:
    rows = [kit.pair(n) for n in range(9)]
    made = kit.run_rows(rows, pairs={"min_margin": 0.9, "min_chosen_score": 0.9})
    assert made.source()["kept"] == 9
    assert {(row["margin"], row["score_chosen"], row["score_rejected"]) for row in made.rows} == {(None, None, None)}


@pytest.mark.parametrize(
    ("written", "number"),
    [("90%", 0.9), (" 12,5 % ", 0.125), ("７５％", 0.75), ("0,8", 0.8), ("%", None), ("1e400", None), (True, None)],
)
def test_numbers_as_people_write_them(written: Any, number: float | None) -> None:
    assert scoring.number(written) == number


def test_answers_that_raters_do_not_agree_on_can_be_left_out() -> None:
    """HelpSteer2's `disagreements` folder: lists of ratings 0..4; each prompt here has three answers."""
    rows = [
        kit.helpsteer2(kit.sentence(n), kit.sentence((n, text)), rating=2, helpfulness=ratings)
        for n in range(8)
        for text, ratings in (("good", [4, 4, 3]), ("doubtful", [0, 4, 4]), ("poor", [0, 1, 1]))
    ]
    layout = {"layout": "helpsteer2"}
    off = kit.run_rows(rows, layout, format="ranked", eval_fraction=1e-9)
    assert all(len(row["candidates"]) == 3 for row in off.rows)
    on = kit.run_rows(rows, layout, format="ranked", eval_fraction=1e-9, filters={"disagreement": {"max_spread": 1}})
    assert all(len(row["candidates"]) == 2 for row in on.rows) and len(on.rows) == 8
    assert on.source()["answers_dropped"]["disagreement"] == 8
    strict = {"disagreement": 0.5, "tie": False}
    with pytest.raises(DpoError, match="8 disagreement"):
        kit.run_rows(rows, layout, eval_fraction=1e-9, filters=strict)
