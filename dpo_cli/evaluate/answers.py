"""Loss and perplexity of the held-out answers to be learned, each scored as a pair of it with itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from dpo_cli.evaluate.pairs import Scored
from dpo_cli.records import Answered, Pair
from dpo_cli.stats import Figure, bootstrap, wilson


def as_pair(one: Answered) -> Pair:
    """Pair an answer with itself, for what only looks at prompts or chosen answers."""
    common = {name: value for name, value in vars(one).items() if name != "answer"}
    return Pair(chosen=one.answer, rejected=one.answer, **common)


def answer_metrics(scored: Sequence[Scored], seed: int) -> dict[str, Figure]:
    """The `answers` figures of `eval/metrics.json`.

    loss: mean negative log-probability of an answer token, in nats; perplexity: exp of it; each `_base` (the
    reference), `_tuned` and `_change`, tuned - base.
    """
    columns = [[float(getattr(one, f"{name}_chosen")) for one in scored] for name in ("policy", "reference")]
    columns.append([float(one.chosen_tokens) for one in scored])

    def loss(sums: Any, counts: Any) -> Any:
        return -sums.sum(-1) / numpy.maximum(counts.sum(-1), 1)

    def perplexity(sums: Any, counts: Any) -> Any:
        return numpy.exp(loss(sums, counts))

    figures: dict[str, Figure] = {}
    for name, of in (("loss", loss), ("perplexity", perplexity)):
        sides: dict[str, Callable[..., Any]] = {
            "base": lambda after, before, counts, of=of: of(before, counts),
            "tuned": lambda after, before, counts, of=of: of(after, counts),
            "change": lambda after, before, counts, of=of: of(after, counts) - of(before, counts),
        }
        figures |= {f"{name}_{side}": bootstrap(columns, statistic, seed) for side, statistic in sides.items()}
    return figures


def auroc(good: Sequence[Scored], bad: Sequence[Scored]) -> dict[str, Figure]:
    """How often a good answer gained more than a bad one to another prompt of its language: the area under the ROC.

    Answers to different prompts: it counts too how gains differ by prompt. Wilson's interval, as if each answer had met
    but one of the other kind, which is wider than the area's own. Empty where no language has both.
    """
    won, count = 0.0, 0
    for language in {one.language for one in good} & {one.language for one in bad}:
        more, less = (
            numpy.array([one.chosen_drift for one in some if one.language == language]) for some in (good, bad)
        )
        met = min(len(more), len(less))
        won += met * float(((more[:, None] > less) + (more[:, None] == less) / 2).mean())
        count += met
    return {"auroc": wilson(won, count)} if count else {}
