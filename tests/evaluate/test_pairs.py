"""Held-out pairs: log-probabilities against a plain forward, figures against ones worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
from dpo_cli import backends, models
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.pairs import (
    Scored,
    answer_metrics,
    auroc,
    baselines,
    grouped_metrics,
    histogram,
    pair_metrics,
    score_pairs,
)
from dpo_cli.inference import HEAD_CHUNK, Tokens, answer_logps, encode
from dpo_cli.recipe import Recipe
from dpo_cli.records import Pair
from hypothesis import given, settings
from hypothesis import strategies as st

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)

PAIRS = {
    "reward_accuracy", "reward_accuracy_per_token", "margin", "chosen_drift", "rejected_drift",
    "chosen_drift_per_token", "rejected_drift_per_token", "ranking_accuracy_base", "ranking_accuracy_tuned",
    "ranking_accuracy_change", "longer_wins",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- log-probabilities


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The tiny Qwen3 with a LoRA whose B is not 0, so that it differs from its reference; and the tokenizer."""
    import torch

    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"id": "builtin:tiny-qwen3", "load_in_4bit": False, "dtype": "float32", "max_length": 256},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
            "data": {"sources": [{"id": "x"}]},
        }
    )
    model, tokenizer = models.load_for_training(recipe, backends.Backend("hf", "a test"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval(), tokenizer


@pytest.fixture
def intact(loaded: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """`loaded`, whose weights a test may change."""
    model, _ = loaded
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    yield loaded
    model.load_state_dict(before)


def rows() -> list[Tokens]:
    """Ragged ones in no order; one answer of a single token, one longer than the head computes at once."""
    shapes = [(9, 20), (3, 40), (30, 31), (12, 12 + HEAD_CHUNK + 5), (1, 4), (20, 60)]
    return [
        Tokens([(7 * row + 13 * place) % 2000 for place in range(end)], start)
        for row, (start, end) in enumerate(shapes)
    ]


def plain_logps(model: Any, row: Tokens) -> list[float]:
    """The definition: one row alone, every position, softmax over all."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return [
        float(logits[place - 1].double().log_softmax(-1)[row.ids[place]]) for place in range(row.start, len(row.ids))
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_probabilities_are_those_of_each_row_alone(loaded: tuple[Any, Any], batch_size: int) -> None:
    found = answer_logps(loaded[0], rows(), batch_size)
    for row, logps in zip(rows(), found, strict=True):
        assert logps == pytest.approx(plain_logps(loaded[0], row), abs=2e-5)


def test_no_float32_copy_of_a_whole_batch_of_logits_is_made(loaded: tuple[Any, Any]) -> None:
    """At a vocabulary of 152,000, 8 answers of 1,000 tokens would take 5 GB, twice."""
    import copy

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = {torch.float32: 0, torch.bfloat16: 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype in largest:
                largest[result.dtype] = max(largest[result.dtype], result.numel())
            return result

    model = copy.deepcopy(loaded[0]).to(torch.bfloat16)
    vocabulary = model.config.vocab_size
    long = [Tokens([(row + place) % 2000 for place in range(200)], 20) for row in range(4)]
    with Watch():
        answer_logps(model, long, batch_size=4)
    assert largest[torch.bfloat16] >= 4 * 180 * vocabulary  # the logits of the batch, so that something was watched
    assert largest[torch.float32] == HEAD_CHUNK * vocabulary


def pair(number: int, prompt: str, chosen: str, rejected: str, **options: Any) -> Pair:
    turns = [
        [{"role": role, "content": text}]
        for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
    ]
    values: dict[str, Any] = dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    return Pair(id=f"p{number}", **values, **({"language": "en", "source": "s"} | thinking | options))


def test_a_pair_is_scored_with_what_the_data_say_of_it(loaded: tuple[Any, Any]) -> None:
    """Its log-probabilities under both models: tests/evaluate/test_agreement.py."""
    pairs = [
        pair(0, "Name a colour.", "Blue, as the sky.", "No."),
        pair(1, "说一种颜色。", "蓝色，像天空一样。", "不知道。", language="zh", source="t"),
    ]
    [scored] = score_pairs(*loaded, [pairs], 256, batch_size=3)
    said = [(one.id, one.language, one.source, one.prompt != scored[0].prompt) for one in scored]
    assert said == [("p0", "en", "s", False), ("p1", "zh", "t", True)]


def test_what_is_too_long_is_cut_and_a_pair_without_an_answer_left_is_left_out(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    whole = pair(0, "Name a colour.", "Blue, as the sky above the harbour of the island.", "No.")
    endless = pair(1, "Name " + "many " * 80 + "colours.", "Blue.", "No.")
    chosen, _ = encode(tokenizer, whole, 256)
    assert score_pairs(model, tokenizer, [[whole]], chosen.start, batch_size=4) == [[]], "not one token is left"
    nothing, [one] = score_pairs(model, tokenizer, [[endless], [whole, endless]], chosen.start + 4, batch_size=4)
    assert (nothing, one.id, one.chosen_tokens) == ([], "p0", 4)
    assert one.policy_chosen == pytest.approx(sum(plain_logps(model, chosen)[:4]), abs=1e-4)


def test_a_broken_adapter_is_an_error_that_names_the_pair(intact: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = intact
    broken = next(weight for name, weight in model.named_parameters() if "lora_B" in name)
    torch.nn.init.constant_(broken, math.nan)
    with pytest.raises(DpoError, match="no number") as caught:
        score_pairs(model, tokenizer, [[pair(7, "Hello?", "Yes.", "No.")]], 256, batch_size=2)
    assert caught.value.where == "pair p7"


# ----------------------------------------------------------------------------------------------------------- figures


def scored(number: int = 0, **values: Any) -> Scored:
    names = [f"{model}_{side}" for model in ("policy", "reference") for side in ("chosen", "rejected")]
    known: dict[str, Any] = {
        "id": f"p{number}",
        "language": "en",
        "source": "s",
        "chosen_tokens": 10,
        "rejected_tokens": 10,
    }
    return Scored(**(known | dict.fromkeys(names, -10.0) | values))


BY_HAND = [
    # drift +2 over 4 tokens, -3 over 2: gained; ranks -2 < -1 before, -1.5 > -2.5 after
    scored(0, chosen_tokens=4, rejected_tokens=2, policy_chosen=-6, reference_chosen=-8, policy_rejected=-5,
           reference_rejected=-2),
    # drift +2 over 10, +1 over 2: gained in sum, lost per token (.2 < .5); ranks -1 > -2 before, -.8 > -1.5 after
    scored(1, chosen_tokens=10, rejected_tokens=2, policy_chosen=-8, reference_chosen=-10, policy_rejected=-3,
           reference_rejected=-4),
    # drift -1 over 5, +1 over 5: lost; ranks -1 = -1 before, -1.2 < -.8 after
    scored(2, chosen_tokens=5, rejected_tokens=5, policy_chosen=-6, reference_chosen=-5, policy_rejected=-4,
           reference_rejected=-5),
    # nothing moved; ranks -2 < -1 before and after
    scored(3, chosen_tokens=5, rejected_tokens=10),
]  # fmt: skip


def test_pair_metrics_by_hand() -> None:
    figures = pair_metrics(BY_HAND, beta=0.5, seed=1)
    assert figures.keys() == PAIRS
    assert {figure["n"] for figure in figures.values()} == {4}
    values = {name: figure["value"] for name, figure in figures.items()}
    assert values == pytest.approx(
        {
            "reward_accuracy": (1 + 1 + 0 + 0.5) / 4,
            "reward_accuracy_per_token": (1 + 0 + 0 + 0.5) / 4,
            "margin": 0.5 * (5 + 1 - 2 + 0) / 4,
            "chosen_drift": (2 + 2 - 1 + 0) / 4,
            "rejected_drift": (-3 + 1 + 1 + 0) / 4,
            "chosen_drift_per_token": (2 / 4 + 2 / 10 - 1 / 5 + 0) / 4,
            "rejected_drift_per_token": (-3 / 2 + 1 / 2 + 1 / 5 + 0) / 4,
            "ranking_accuracy_base": (0 + 1 + 0.5 + 0) / 4,
            "ranking_accuracy_tuned": (1 + 1 + 0 + 0) / 4,
            "ranking_accuracy_change": (1 + 0 - 0.5 + 0) / 4,
            "longer_wins": (1 + 1 + 0.5 + 0) / 4,
        },
        abs=1e-6,
    )


def test_prompts_count_where_they_repeat() -> None:
    """Six pairs of two prompts: n is 2, each prompt weighs the same, and no interval is narrower than of two pairs."""
    alike = [scored(number, policy_chosen=-9, prompt="a") for number in range(5)]
    figures = pair_metrics([*alike, scored(5, policy_chosen=-12, prompt="b")], beta=1.0, seed=1)
    two = pair_metrics([scored(0, policy_chosen=-9), scored(1, policy_chosen=-12)], beta=1.0, seed=1)
    assert {figure["n"] for figure in figures.values()} == {2}
    assert figures["reward_accuracy"]["value"] == 0.5
    assert figures["margin"]["value"] == figures["chosen_drift"]["value"] == (1 - 2) / 2
    for name, figure in figures.items():
        assert figure["value"] == two[name]["value"]
        assert figure["low"] <= two[name]["low"] and figure["high"] >= two[name]["high"]  # type: ignore[operator]
    found = grouped_metrics([*alike, scored(5, prompt="b")], beta=1.0, seed=1)
    assert found["languages"]["en"]["pairs"]["margin"]["n"] == found["sources"]["s"]["pairs"]["margin"]["n"] == 2
    assert baselines(alike, {"length": {"languages": {}}, "shortcuts": {}})["majority"]["n"] == 1


def test_no_pairs_give_figures_of_nothing() -> None:
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    found = grouped_metrics([], beta=0.1, seed=1)
    assert found["pairs"] == dict.fromkeys(PAIRS, nothing)
    assert found["languages"] == found["sources"] == {}
    assert sum(found["histogram"]["counts"]) == found["histogram"]["right"] == 0
    assert baselines([], REPORT)["majority"] == nothing


def many(count: int = 40) -> list[Scored]:
    """Pairs of two languages and sources; the longer the answers, the more was gained."""
    return [
        scored(
            number,
            language="zh" if number % 5 == 0 else "en",
            source="b" if number % 2 else "a",
            chosen_tokens=2 * number + 3,
            policy_chosen=number - 30.5,
        )
        for number in range(count)
    ]


def test_groups_are_the_figures_of_their_pairs_alone() -> None:
    pairs = many()
    found = grouped_metrics(pairs, beta=0.1, seed=3)
    assert found.keys() == {"pairs", "languages", "sources", "histogram"}
    assert found["pairs"] == pair_metrics(pairs, 0.1, 3)
    assert found["languages"].keys() == {"en", "zh"}
    assert found["languages"]["zh"] == {"pairs": pair_metrics([p for p in pairs if p.language == "zh"], 0.1, 3)}
    assert found["sources"]["b"] == {"pairs": pair_metrics([p for p in pairs if p.source == "b"], 0.1, 3)}
    json.dumps(found, allow_nan=False)  # plain Python numbers throughout


@steady
@given(st.lists(st.floats(-1e4, 1e4) | st.just(0.0) | st.floats(-1e-9, 1e-9), max_size=60))
def test_every_margin_is_in_one_bin_and_none_holds_both_signs(margins: list[float]) -> None:
    found = histogram(margins)
    edges, counts = found["edges"], found["counts"]
    assert (len(edges), len(counts)) == (25, 24)
    assert edges == sorted(set(edges)) and 0.0 in edges
    assert sum(counts) == len(margins)
    zero = edges.index(0.0)
    assert sum(counts[:zero]) == sum(margin < 0 for margin in margins)
    assert found["right"] == sum(margin > 0 for margin in margins)


REPORT: dict[str, Any] = {
    "length": {
        "languages": {
            "en": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 90, "differs": 88},
            "zh": {"value": 0.4, "low": 0.3, "high": 0.5, "n": 90, "differs": 88},
            "fr": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 90, "differs": 88},
        }
    },
    "shortcuts": {
        "length": {"value": 0.6, "low": 0.55, "high": 0.65, "n": 400, "differs": 390},
        "markdown": {"value": 0.3, "low": 0.26, "high": 0.35, "n": 400, "differs": 200},
        "refusal": {"value": 1.0, "low": 0.44, "high": 1.0, "n": 3, "differs": 3},
        "language_match": {"value": None, "low": None, "high": None, "n": 0, "differs": 0},
        "model": {"value": 0.1, "low": 0.05, "high": 0.2, "n": 100, "differs": 100},
    },
}


def test_majority_bets_in_each_language_as_its_training_pairs_went() -> None:
    longer, shorter = {"chosen_tokens": 9, "rejected_tokens": 3}, {"chosen_tokens": 3, "rejected_tokens": 9}
    pairs = [
        *(scored(n, language="en", **longer) for n in range(3)),  # 3 of 4 right: bets on the longer
        scored(3, language="en", **shorter),
        *(scored(n, language="zh", **shorter) for n in (4, 5)),  # 2 of 2: bets on the shorter
        scored(6, language="zh"),  # equally long: ½
        scored(7, language="fr", **longer),  # the training pairs say neither: ½
        scored(8, language="de", **longer),  # nor of a language they lack
    ]
    found = baselines(pairs, REPORT)
    assert found["majority"]["value"] == pytest.approx((3 + 2 + 1.5) / 9, abs=1e-6)
    assert found["majority"]["n"] == 9


def test_the_best_shortcut_may_be_a_rule_turned_round_and_is_none_of_luck() -> None:
    """Refusal was right three times of three, and the model that usually wins is no bet on its losing."""
    best = {"name": "not markdown", "value": 0.7, "low": 0.65, "high": 0.74, "n": 400}
    assert baselines(BY_HAND, REPORT)["shortcut"] == best
    known = {name: figure for name, figure in REPORT["shortcuts"].items() if name == "language_match"}
    assert baselines(BY_HAND, REPORT | {"shortcuts": known})["shortcut"] is None


def test_loss_and_perplexity_are_of_all_tokens_and_changes_are_tuned_less_base() -> None:
    figures = answer_metrics(BY_HAND[:2], [], seed=1)  # 14 tokens: -18 nats before, -14 after
    values = {name: figure["value"] for name, figure in figures.items()}
    perplexity = math.exp(18 / 14), math.exp(1)
    assert values == pytest.approx(
        {
            "loss_base": 18 / 14, "loss_tuned": 1, "loss_change": 1 - 18 / 14,
            "perplexity_base": perplexity[0], "perplexity_tuned": perplexity[1],
            "perplexity_change": perplexity[1] - perplexity[0],
        },
        abs=1e-5,
    )  # fmt: skip


def answers(language: str, *gains: float) -> list[Scored]:
    return [scored(language=language, policy_chosen=gain, reference_chosen=0.0) for gain in gains]


def test_the_area_under_the_roc_is_by_language_and_ties_count_half() -> None:
    found = auroc(answers("en", 2.0, 1.0), answers("en", 1.0, 0.0, 3.0))
    assert found["auroc"]["value"] == pytest.approx((2 + 1.5) / 6) and found["auroc"]["n"] == 2
    # Chinese gains are all higher, good or bad: within each language they say nothing.
    apart = auroc(answers("en", 1.0) + answers("zh", 9.0), answers("en", 1.0) + answers("zh", 9.0))
    assert apart["auroc"]["value"] == 0.5
    assert auroc(answers("en", 1.0), answers("zh", 0.0)) == auroc([], []) == {}


def test_its_interval_holds_the_area_that_answers_were_drawn_from() -> None:
    random = numpy.random.default_rng(0)
    inside = []
    for _ in range(300):
        some = [answers("en", *random.normal(at, 1, 30)) for at in (0.7436, 0.0)]
        figure = auroc(*some)["auroc"]
        assert figure["low"] is not None and figure["high"] is not None
        inside.append(figure["low"] < 0.7005 < figure["high"])  # of two normals 0.7436 apart
    assert sum(inside) >= 0.95 * len(inside)
