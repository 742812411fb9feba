"""Log-probabilities of the held-out answers under the tuned model and its reference, and what follows from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dpo_cli import models
from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError
from dpo_cli.inference import answer_logps, encode
from dpo_cli.recipe import Recipe
from dpo_cli.records import Answered, Pair, SetPair, read_jsonl
from dpo_cli.run import Run
from dpo_cli.stats import Figure, bootstrap, bootstrap_mean, opposite, share, share_change, unit_means, wilson, win

BINS = 24
COLUMNS = (
    "chosen_tokens", "rejected_tokens", "chosen_drift", "rejected_drift", "policy_chosen", "policy_rejected",
    "reference_chosen", "reference_rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """One held-out pair: log-probabilities in nats, summed over the answer's tokens with its end token.

    `policy` is the tuned model, `reference` what it started from: the base alone, or with `model.adapter`. Pairs of one
    `prompt` share its hash.
    """

    id: str
    language: str
    source: str
    chosen_tokens: int
    rejected_tokens: int
    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float
    prompt: str = ""

    @property
    def unit(self) -> str:
        """What figures count: the prompt, of which there may be several pairs."""
        return self.prompt or self.id

    @property
    def chosen_drift(self) -> float:
        """log π(chosen) - log π_ref(chosen): how much likelier the chosen answer became, in nats."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_drift(self) -> float:
        return self.policy_rejected - self.reference_rejected


def score_pairs(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    lists: Sequence[Sequence[Pair]],
    max_length: int,
    batch_size: int,
) -> list[list[Scored]]:
    """Score lists of pairs under the tuned model and under its reference, one base in memory; an answer only once.

    A pair whose prompt alone fills `max_length` has no answer left to score and is left out, as TRL leaves it out.

    Args:
        batch_size: answers at once, at most.

    Raises:
        DpoError: a log-probability is no finite number, or nothing fits into memory.
    """
    encoded = [[(pair, encode(tokenizer, pair, max_length)) for pair in pairs] for pairs in lists]
    encoded = [[(pair, rows) for pair, rows in some if rows[0].start < max_length] for some in encoded]
    rows = [row for some in encoded for _, both in some for row in both]
    policy = iter(answer_logps(model, rows, batch_size))
    with models.as_reference(model):
        reference = iter(answer_logps(model, rows, batch_size))
    return [[_scored(pair, *islice(policy, 2), *islice(reference, 2)) for pair, _ in some] for some in encoded]


def _scored(pair: Pair, *logps: Sequence[float]) -> Scored:
    """A pair with per-token log-probabilities: chosen and rejected under the policy, then under the reference."""
    sums = [sum(one) for one in logps]
    if not all(map(math.isfinite, sums)):
        raise DpoError(
            "the model gives a held-out answer a log-probability that is no number",
            where=f"pair {pair.id}",
            hint="model.dtype: bfloat16 or float32 where it is float16; else the adapter's weights are broken",
        )
    prompt = hashlib.sha256(json.dumps(pair.prompt).encode()).hexdigest()[:16]
    tokens = len(logps[0]), len(logps[1])
    return Scored(pair.id, pair.language, pair.source, *tokens, sums[0], sums[1], sums[2], sums[3], prompt)


def pair_metrics(scored: Sequence[Scored], beta: float, seed: int) -> dict[str, Figure]:
    """The `pairs` figures of `eval/metrics.json`. In shares a tie counts ½, so an untrained adapter stands at 0.5.

    Where a prompt has several pairs (`data.pairs.pick: all`), each prompt counts once, with the mean of its pairs.

    reward_accuracy: share of pairs whose implicit reward β (log π - log π_ref) is higher for chosen.
    reward_accuracy_per_token: the same with rewards divided by length.
    margin: mean of β (chosen drift - rejected drift), in nats.
    chosen_drift, rejected_drift: log π - log π_ref, in nats; `_per_token`: divided by the answer's length.
    ranking_accuracy_base, ranking_accuracy_tuned: share of pairs whose chosen answer has the higher mean
        log-probability per token; base is the reference.
    ranking_accuracy_change: tuned - base on the same pairs, -1..1.
    longer_wins: share of pairs whose chosen answer has more tokens: what a model gets that only learned length.
    """
    column = {name: numpy.array([getattr(pair, name) for pair in scored], float) for name in COLUMNS}
    chosen, rejected = column["chosen_drift"], column["rejected_drift"]
    lengths = numpy.maximum(column["chosen_tokens"], 1), numpy.maximum(column["rejected_tokens"], 1)
    units = [pair.unit for pair in scored]
    base, tuned = (
        _wins(column[f"{model}_chosen"] / lengths[0], column[f"{model}_rejected"] / lengths[1])
        for model in ("reference", "policy")
    )

    def mean(values: Any) -> Figure:
        return bootstrap_mean(unit_means(values, units), seed)

    return {
        "reward_accuracy": share(_wins(chosen, rejected), units),
        "reward_accuracy_per_token": share(_wins(chosen / lengths[0], rejected / lengths[1]), units),
        "margin": mean(beta * (chosen - rejected)),
        "chosen_drift": mean(chosen),
        "rejected_drift": mean(rejected),
        "chosen_drift_per_token": mean(chosen / lengths[0]),
        "rejected_drift_per_token": mean(rejected / lengths[1]),
        "ranking_accuracy_base": share(base, units),
        "ranking_accuracy_tuned": share(tuned, units),
        "ranking_accuracy_change": share_change(unit_means(base, units), unit_means(tuned, units)),
        "longer_wins": share(_longer(scored), units),
    }


def by_name(
    scored: Sequence[Scored], names: Sequence[str | None], beta: float, seed: int
) -> dict[str, dict[str, dict[str, Figure]]]:
    """Name -> {"pairs": `pair_metrics`} of the pairs that have it; None is no name."""
    groups: dict[str, list[Scored]] = {}
    for pair, name in zip(scored, names, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(pair)
    return {name: {"pairs": pair_metrics(some, beta, seed)} for name, some in sorted(groups.items())}


def grouped_metrics(scored: Sequence[Scored], beta: float, seed: int) -> dict[str, Any]:
    """`pair_metrics` of all pairs and of their groups, under the names they have in `eval/metrics.json`.

    Returns:
        pairs: of all.
        languages, sources: name -> {"pairs"}.
        histogram: of the reward margins in nats. See `histogram`.
    """
    return {
        "pairs": pair_metrics(scored, beta, seed),
        "languages": by_name(scored, [pair.language for pair in scored], beta, seed),
        "sources": by_name(scored, [pair.source for pair in scored], beta, seed),
        "histogram": histogram([beta * (pair.chosen_drift - pair.rejected_drift) for pair in scored]),
    }


def baselines(scored: Sequence[Scored], prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What can be had without a model, to set beside its accuracy.

    Args:
        scored: the held-out pairs.
        prepared: `data/report.json`.

    Returns:
        majority: share of held-out pairs that a bet by language gets right: on the longer or on the shorter answer,
            whichever was chosen more often in the training pairs (those count characters); ½ where they say neither.
        shortcut: the best rule of thumb of the audit, with its figure on the *training* pairs and its `name`; None
            where none was measured. A rule that is wrong more often than right counts as its opposite, "not <rule>",
            but for the model that usually wins, whose losing is no rule. Best by the interval's lower end, so that no
            rule wins by a handful of pairs.
    """
    learned, units = prepared["length"]["languages"], [pair.unit for pair in scored]
    wins = []
    for pair, longer in zip(scored, _longer(scored), strict=True):
        known = learned.get(pair.language, {}).get("value")
        wins.append(0.5 if known is None or known == 0.5 else longer if known > 0.5 else 1 - longer)
    rules = []
    for name, figure in prepared["shortcuts"].items():
        if figure["value"] is None:
            continue
        if figure["value"] < 0.5 and name != "model":
            name, figure = f"not {name}", opposite(figure)
        rules.append({"name": name, **{key: figure[key] for key in ("value", "low", "high", "n")}})
    best = max(rules, key=lambda rule: rule["low"], default=None)
    return {"majority": share(wins, units), "shortcut": best}


def histogram(margins: Sequence[float]) -> dict[str, Any]:
    """24 bins of equal width, 12 on either side of 0, so that none has both right and wrong pairs.

    Returns:
        edges: 25, in nats; counts: 24, a value at an edge counts above it; right: margins above 0.
    """
    widest = max(map(abs, margins), default=0.0) or 1.0
    counts, edges = numpy.histogram(margins, widest * numpy.linspace(-1, 1, BINS + 1))
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": counts.tolist(),
        "right": sum(margin > 0 for margin in margins),
    }


def _longer(scored: Sequence[Scored]) -> list[float]:
    """1 where the longer answer was chosen, 0 where the shorter one, ½ where they are equally long."""
    return _wins([pair.chosen_tokens for pair in scored], [pair.rejected_tokens for pair in scored])


def _wins(one: Iterable[float], other: Iterable[float]) -> list[float]:
    return [win(a, b) for a, b in zip(one, other, strict=True)]


# ------------------------------------------------------------------------------------------- answers without a rejected


def as_pair(one: Answered) -> Pair:
    """Pair an answer with itself, for what only looks at prompts or chosen answers."""
    common = {name: value for name, value in vars(one).items() if name != "answer"}
    return Pair(chosen=one.answer, rejected=one.answer, **common)


def answer_metrics(good: Sequence[Scored], bad: Sequence[Scored], seed: int) -> dict[str, Figure]:
    """The `answers` figures of `eval/metrics.json`, of answers to be learned and of bad ones.

    loss: mean negative log-probability of a good answer's token, in nats; perplexity: exp of it; each `_base` (the
        reference), `_tuned` and `_change`, tuned - base.
    auroc: see there.
    """
    before, after = ([getattr(one, f"{model}_chosen") for one in good] for model in ("reference", "policy"))
    counts = [float(one.chosen_tokens) for one in good]

    def loss(sums: Any, counts: Any) -> Any:
        return -sums.sum(-1) / numpy.maximum(counts.sum(-1), 1)

    def perplexity(sums: Any, counts: Any) -> Any:
        return numpy.exp(loss(sums, counts))

    def change(before: Any, after: Any, counts: Any, of: Any) -> Any:
        return of(after, counts) - of(before, counts)

    figures: dict[str, Figure] = {}
    for name, of in (("loss", loss), ("perplexity", perplexity)):
        figures[f"{name}_base"] = bootstrap([before, counts], of, seed)
        figures[f"{name}_tuned"] = bootstrap([after, counts], of, seed)
        figures[f"{name}_change"] = bootstrap([before, after, counts], partial(change, of=of), seed)
    return figures | auroc(good, bad)


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


# ------------------------------------------------------------------------------------------- test sets, `eval.sets`


def read_sets(recipe: Recipe, run: Run) -> list[SetPair]:
    """The pairs of all test sets; `source` is the set's name."""
    return [SetPair(**row) for row in read_jsonl(run["sets"] / "pairs.jsonl")] if recipe.eval.sets else []


def set_metrics(recipe: Recipe, run: Run, scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """The `sets` figures of `eval/metrics.json`, by the sets' names.

    Returns:
        in, kept, dropped: prompts of the set, as in data/report.json. overlap: how many of those kept are, or nearly
            are, prompts that were trained on.
        pairs: as of the held-out pairs. languages, subsets: name -> {"pairs"}, where there are several; a subset is
            what the set itself calls a part of it.
    """
    subsets, how = {pair.id: pair.subset for pair in read_sets(recipe, run)}, (recipe.train.reward_scale, recipe.seed)

    def groups(some: Sequence[Scored], names: Sequence[str | None]) -> dict[str, Any]:
        return by_name(some, names, *how) if len({*names} - {None}) > 1 else {}

    found = {}
    for name, counts in read_json(run["sets"] / "report.json").items() if subsets else ():
        some = [one for one in scored if one.source == name]
        found[name] = {
            **{key: counts[key] for key in ("in", "kept", "dropped", "overlap")},
            "pairs": pair_metrics(some, *how),
            "languages": groups(some, [one.language for one in some]),
            "subsets": groups(some, [subsets[one.id] for one in some]),
        }
    return found
