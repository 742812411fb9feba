"""Losses over a prompt's whole list of answers: LiPO (Liu et al. 2024, arXiv 2402.01878).

An answer y_i of K has a score s_i = beta x log(pi(y_i | x) / pi_ref(y_i | x)) and a label psi_i, higher for better. Of
the labels, `list_mle`, `softmax` and the `pair_` losses see the order alone. Answers with equal labels are never
compared, and the order in which a list stands plays no part. With two answers, `list_mle`, `softmax` and
`pair_logistic` are DPO's sigmoid loss, `lambda` is that times a weight.

All take `scores`, `labels` (floats) and `present` (bool: which answers there are), each [..., K], and return the loss
of each list, [...]: but for the `point_` losses, 0 where no answer is better than another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def better(labels: Tensor, present: Tensor) -> Tensor:
    """[..., K, K], bool: the first answer is better than the second."""
    there = present[..., :, None] & present[..., None, :]
    return there & (labels[..., :, None] > labels[..., None, :])


def list_mle(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """The list's negative log-likelihood under Plackett and Luce, the paper's list MLE where all labels differ.

    -sum_i log(exp s_i / (exp s_i + sum over psi_j < psi_i of exp s_j))
    """
    return _first_among_worse(scores, better(labels, present)).sum(-1)


def softmax(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """The best answer against all others: -log(exp s_best / sum_j exp s_j); of several best ones the mean."""
    above = better(labels, present)
    best = present & ~above.any(-2)
    losses = _first_among_worse(scores, above).masked_fill(~best, 0.0)
    return losses.sum(-1) / best.sum(-1).clamp(min=1)


def lambda_rank(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """LiPO-lambda: DPO's loss for every pair, weighted by what swapping the two would change in the list's DCG.

    sum over psi_i > psi_j of |G_i - G_j| x |1/D(tau_i) - 1/D(tau_j)| x log(1 + exp(s_j - s_i)), where the gain G is
    2^psi - 1, the discount D is log(1 + tau), and tau is an answer's place by its score, 1 for the highest. The weights
    are constants for the gradient. Of equal scores, as all are before the first step, the worse answer is placed first.
    """
    above = better(labels, present)
    with torch.no_grad():
        first, second = scores[..., :, None], scores[..., None, :]
        before = (first > second) | ((first == second) & above.transpose(-1, -2))
        place = 1 + (before & present[..., :, None]).sum(-2)
        gain, discounted = torch.exp2(labels) - 1, 1 / torch.log1p(place.to(scores.dtype))
        weight = _difference(gain).abs() * _difference(discounted).abs()
    return (weight * softplus(-_difference(scores))).masked_fill(~above, 0.0).sum((-1, -2))


def pair_logistic(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """DPO's loss for every pair of the list: sum over psi_i > psi_j of log(1 + exp(s_j - s_i))."""
    return softplus(-_difference(scores)).masked_fill(~better(labels, present), 0.0).sum((-1, -2))


def pair_hinge(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """SLiC's loss for every pair of the list: sum over psi_i > psi_j of max(0, 1 - (s_i - s_j))."""
    return (1 - _difference(scores)).clamp(min=0).masked_fill(~better(labels, present), 0.0).sum((-1, -2))


def point_mse(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Each answer alone, its score towards its label: sum of (psi_i - s_i)^2."""
    return (labels - scores).square().masked_fill(~present, 0.0).sum(-1)


def point_sigmoid(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Each answer alone, its label as a probability: -sum of psi_i log sigma(s_i) + (1 - psi_i) log sigma(-s_i)."""
    losses = binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
    return losses.masked_fill(~present, 0.0).sum(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lambda": lambda_rank,
    "list_mle": list_mle,
    "softmax": softmax,
    "pair_logistic": pair_logistic,
    "pair_hinge": pair_hinge,
    "point_mse": point_mse,
    "point_sigmoid": point_sigmoid,
}
PER_TOKEN = tuple(f"{name}_norm" for name in LOSSES)  # the same, of scores that are divided by the answer's tokens
LOSS_TYPES = (*LOSSES, *PER_TOKEN)


def _first_among_worse(scores: Tensor, above: Tensor) -> Tensor:
    """[..., K]: -log of the share of exp s_i in itself and all that is worse; 0 where nothing is."""
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    among = scores[..., None, :].expand(above.shape).masked_fill(~(above | itself), -torch.inf)
    return among.logsumexp(-1) - scores


def _difference(values: Tensor) -> Tensor:
    """[..., K, K]: of the first and the second."""
    return values[..., :, None] - values[..., None, :]
