"""The listwise losses against loops that follow the paper's formulas, against DPO, and by finite differences."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dpo_cli.train.listwise import LOSSES
from torch.nn.functional import logsigmoid

Slow = Callable[[list[float], list[float]], float]


def slow_list_mle(scores: list[float], labels: list[float]) -> float:
    """Draw the answers one after the other, the best first, each from those that are worse and itself."""
    total = 0.0
    for mine, label in zip(scores, labels, strict=True):
        worse = [score for score, other in zip(scores, labels, strict=True) if other < label]
        total -= math.log(math.exp(mine) / (math.exp(mine) + sum(map(math.exp, worse))))
    return total


def slow_softmax(scores: list[float], labels: list[float]) -> float:
    negatives = [score for score, label in zip(scores, labels, strict=True) if label < max(labels)]
    positives = [score for score, label in zip(scores, labels, strict=True) if label == max(labels)]
    losses = [-math.log(math.exp(one) / (math.exp(one) + sum(map(math.exp, negatives)))) for one in positives]
    return sum(losses) / len(losses)


def slow_lambda(scores: list[float], labels: list[float]) -> float:
    """Sort by score, look up the places, and go through the pairs."""
    answers = list(zip(scores, labels, strict=True))
    ranked = sorted(answers, key=lambda answer: (-answer[0], answer[1]))
    total = 0.0
    for (s_i, psi_i), (s_j, psi_j) in itertools.permutations(answers, 2):
        if psi_i > psi_j:
            tau_i, tau_j = ranked.index((s_i, psi_i)) + 1, ranked.index((s_j, psi_j)) + 1
            swap = abs((2**psi_i - 1) - (2**psi_j - 1)) * abs(1 / math.log(1 + tau_i) - 1 / math.log(1 + tau_j))
            total += swap * math.log(1 + math.exp(-(s_i - s_j)))
    return total


def slow_pairs(loss: Callable[[float], float]) -> Slow:
    """A loss of the distance of each pair with unequal labels, the better one first."""

    def slow(scores: list[float], labels: list[float]) -> float:
        answers = itertools.permutations(zip(scores, labels, strict=True), 2)
        return sum(loss(s_i - s_j) for (s_i, psi_i), (s_j, psi_j) in answers if psi_i > psi_j)

    return slow


def slow_points(loss: Callable[[float, float], float]) -> Slow:
    return lambda scores, labels: sum(map(loss, scores, labels))


def cross_entropy(score: float, label: float) -> float:
    chance = 1 / (1 + math.exp(-score))
    return -label * math.log(chance) - (1 - label) * math.log(1 - chance)


SLOW: dict[str, Slow] = {
    "lambda": slow_lambda,
    "list_mle": slow_list_mle,
    "softmax": slow_softmax,
    "pair_logistic": slow_pairs(lambda distance: math.log(1 + math.exp(-distance))),
    "pair_hinge": slow_pairs(lambda distance: max(0.0, 1 - distance)),
    "point_mse": slow_points(lambda score, label: (label - score) ** 2),
    "point_sigmoid": slow_points(cross_entropy),
}


def lists(seed: int) -> list[tuple[list[float], list[float]]]:
    """Scores and labels of lists of one to seven answers, with ties in either, and in both."""
    rng = random.Random(seed)
    made = []
    for count in (1, 2, 2, 3, 4, 4, 5, 7):
        scores = [rng.choice((0.0, round(rng.gauss(0, 2), 3))) for _ in range(count)]
        made.append((scores, [rng.choice((0.0, 0.25, 0.5, 0.8, 1.0)) for _ in range(count)]))
    return made


def padded(some: list[tuple[list[float], list[float]]], rubbish: float = 0.0) -> tuple[Any, Any, Any]:
    """Lists of any length as tensors [B, K]; `rubbish` stands where there is no answer."""
    longest = max(len(scores) for scores, _ in some)

    def column(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor([one + [rubbish] * (longest - len(one)) for one in values], dtype=torch.float64)

    present = [[place < len(scores) for place in range(longest)] for scores, _ in some]
    return column([scores for scores, _ in some]), column([labels for _, labels in some]), torch.tensor(present)


every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_equals_the_paper_s_formula_in_plain_loops(name: str) -> None:
    some = [one for seed in range(5) for one in lists(seed)]
    expected = [SLOW[name](scores, labels) for scores, labels in some]
    assert LOSSES[name](*padded(some)).tolist() == pytest.approx(expected, abs=1e-12)


@every_loss
def test_what_stands_where_no_answer_is_plays_no_part(name: str) -> None:
    some = lists(0)
    clean = LOSSES[name](*padded(some))
    assert LOSSES[name](*padded(some, rubbish=9.0)).tolist() == clean.tolist()
    scores, labels, present = padded(some)
    scores = scores.masked_fill(~present, 50.0).requires_grad_()
    LOSSES[name](scores, labels, present).sum().backward()
    assert scores.grad is not None and not scores.grad[~present].any() and scores.grad.isfinite().all()


@pytest.mark.parametrize("name", ["list_mle", "softmax", "pair_logistic"])
def test_two_answers_are_dpo(name: str) -> None:
    scores = torch.tensor([[0.3, -0.4], [-2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[0.9, 0.2], [1.0, 0.0], [0.5, 0.4]], dtype=torch.float64)
    expected = -logsigmoid(scores[:, 0] - scores[:, 1])
    found = LOSSES[name](scores, labels, torch.ones_like(scores, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_two_answers_are_dpo_in_lambda_times_the_weight_of_the_swap() -> None:
    scores = torch.tensor([[0.3, -0.4], [-2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.4]], dtype=torch.float64)
    places = 1 / math.log(2) - 1 / math.log(3)
    gains = torch.tensor([1.0, 1.0, 2**0.5 - 2**0.4], dtype=torch.float64)
    found = LOSSES["lambda"](scores, labels, torch.ones_like(scores, dtype=torch.bool))
    torch.testing.assert_close(found, -gains * places * logsigmoid(scores[:, 0] - scores[:, 1]))


@every_loss
def test_gradients_by_finite_differences(name: str) -> None:
    # No two scores so near that a step of the differences changes the order, which lambda's weights depend on.
    scores, labels, present = padded([([0.3, -1.2, 2.0, 0.9], [1.0, 0.5, 0.5, 0.0]), ([0.1, 0.7], [0.2, 0.9])])
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: LOSSES[name](given, labels, present), (scores,))


@every_loss
def test_scores_too_large_for_exp_are_no_trouble(name: str) -> None:
    scores = torch.tensor([[-800.0, 900.0, 0.0]], requires_grad=True)
    loss = LOSSES[name](scores, torch.tensor([[1.0, 0.5, 0.0]]), torch.ones(1, 3, dtype=torch.bool)).sum()
    loss.backward()
    assert scores.grad is not None and loss.isfinite() and scores.grad.isfinite().all()
