"""Loss and perplexity of the held-out answers that are to be learned, under the tuned model and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from dpo_cli import models
from dpo_cli.evaluate.pairs import Scored
from dpo_cli.inference import answer_logps, encode
from dpo_cli.records import Answered, Pair
from dpo_cli.stats import Figure, bootstrap, wilson


@dataclass(frozen=True)
class ScoredAnswer:
    """One held-out answer: its tokens with the end token, and log-probabilities in nats, summed over them."""

    language: str
    tokens: int
    policy: float
    reference: float


def as_pair(one: Answered) -> Pair:
    """A pair of the answer with itself, for what only looks at prompts or chosen answers."""
    common = {name: value for name, value in vars(one).items() if name != "answer"}
    return Pair(chosen=one.answer, rejected=one.answer, **common)


def score_answers(
    model: Any,
    tokenizer: Any,
    answers: Sequence[Answered],
    pairs: Sequence[Pair],
    scored: Sequence[Scored],
    max_length: int,
    batch_size: int,
) -> list[ScoredAnswer]:
    """Every answer under the tuned model and under its reference; the chosen ones of scored pairs are taken from there.

    An answer whose prompt alone fills `max_length` is left out, as TRL leaves it out.
    """
    of_pairs = {one.id: one for one in scored}
    known = {_key(pair.prompt, pair.chosen): of_pairs[pair.id] for pair in pairs if pair.id in of_pairs}
    found, others = [], []
    for one in answers:
        pair = known.get(_key(one.prompt, one.answer))
        if pair:
            found.append(ScoredAnswer(one.language, pair.chosen_tokens, pair.policy_chosen, pair.reference_chosen))
        else:
            others.append((one, encode(tokenizer, as_pair(one), max_length)[0]))
    others = [(one, row) for one, row in others if row.start < max_length]
    rows = [row for _, row in others]
    policy = answer_logps(model, rows, batch_size)
    with models.as_reference(model):
        reference = answer_logps(model, rows, batch_size)
    return found + [
        ScoredAnswer(one.language, len(after), sum(after), sum(before))
        for (one, _), after, before in zip(others, policy, reference, strict=True)
    ]


def answer_metrics(scored: Sequence[ScoredAnswer], seed: int) -> dict[str, Figure]:
    """The `answers` figures of `eval/metrics.json`.

    loss: mean negative log-probability of an answer token, in nats; perplexity: exp of it; each `_base` (the
    reference), `_tuned` and `_change`, tuned - base.
    """
    tokens, base, tuned = ([float(getattr(one, name)) for one in scored] for name in ("tokens", "reference", "policy"))

    def loss(sums: Any, counts: Any) -> Any:
        return -sums.sum(-1) / numpy.maximum(counts.sum(-1), 1)

    def perplexity(sums: Any, counts: Any) -> Any:
        return numpy.exp(loss(sums, counts))

    figures: dict[str, Figure] = {}
    for name, of in (("loss", loss), ("perplexity", perplexity)):
        figures |= {
            f"{name}_base": bootstrap([base, tokens], of, seed),
            f"{name}_tuned": bootstrap([tuned, tokens], of, seed),
            f"{name}_change": bootstrap(
                [tuned, base, tokens], lambda after, before, counts, of=of: of(after, counts) - of(before, counts), seed
            ),
        }
    return figures


def auroc(good: Sequence[ScoredAnswer], bad: Sequence[ScoredAnswer]) -> dict[str, Figure]:
    """How often a good answer gained more than a bad one to another prompt of its language: the area under the ROC.

    Answers to different prompts: it counts too how gains differ by prompt. Wilson's interval, as if each answer had met
    but one of the other kind, which is wider than the area's own. Empty where no language has both.
    """
    won, count = 0.0, 0
    for language in {one.language for one in good} & {one.language for one in bad}:
        more, less = (
            numpy.array([one.policy - one.reference for one in some if one.language == language])
            for some in (good, bad)
        )
        met = min(len(more), len(less))
        won += met * float(((more[:, None] > less) + (more[:, None] == less) / 2).mean())
        count += met
    return {"auroc": wilson(won, count)} if count else {}


def _key(prompt: Any, answer: Any) -> str:
    return repr((prompt, answer))
