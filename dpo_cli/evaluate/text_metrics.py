"""What sampled answers are like, base against tuned: length, repetition, diversity, language, refusals. No torch here.

Language and refusal are the heuristics that `prepare` goes by: scripts and phrases, not what is meant.
Thinking counts nowhere but in the KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy

from dpo_cli.families import MARKERS
from dpo_cli.language import language
from dpo_cli.refusal import refuses
from dpo_cli.stats import Figure, bootstrap, bootstrap_mean, share_change, wilson

if TYPE_CHECKING:
    from dpo_cli.evaluate.samples import Sample
    from dpo_cli.inference import Answer

HEAD = 200  # tokens of each answer that diversity is measured on: it falls with length, which is measured beside it
REPETITIVE = 0.5  # 4-grams that stood there before


def repetition(ids: Sequence[int]) -> float:
    """1 - unique / all runs of 4 tokens, 0..1; 0 for fewer than 4 tokens."""
    total = len(ids) - 3
    return 1 - len(set(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))) / total if total > 0 else 0.0


def language_match(prompt: str, answer: str) -> bool | None:
    """Whether both are in one language, see `language`; None where one has no words.

    A prompt that asks for a translation is a mismatch to it.
    """
    spoken = language(prompt), language(answer)
    return None if "und" in spoken else spoken[0] == spoken[1]


def valid(prompt: str, text: str, ids: Sequence[int], finished: bool) -> bool:
    """Whether an answer ended and says something, in the prompt's language, without repeating itself or markers."""
    return (
        finished
        and bool(text.strip())
        and language_match(prompt, text) is not False
        and repetition(ids) <= REPETITIVE
        and not MARKERS.search(text)
    )


def distinct_2(rows: Sequence[Sequence[int]]) -> float:
    """Unique / all pairs of neighbouring tokens in the first 200 tokens of every answer (Li et al. 2016), 0..1.

    NaN where there is no pair.
    """
    pairs = [pair for row in rows for pair in pairwise(row[:HEAD])]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def sample_metrics(samples: Sequence[Sample], seed: int) -> dict[str, Figure]:
    """The `samples` figures of `eval/metrics.json`; of each X, X_base, X_tuned and X_change (tuned - base, paired).

    kl: nats a token of the tuned model's answers, from the tuned model to its reference, all tokens alike.
    kl_total: nats an answer, the mean over answers.
    length_ratio: exp(mean(log tuned tokens - log base tokens)).
    tokens: of an answer, with its end token. truncated: share that was cut at `eval.max_new_tokens`.
    repetitive: share of answers with a `repetition` above ½. valid_rate: share of answers that are `valid`.
    distinct_2: see there; of all the answers together, and without an interval.
    language_match: share of answers in the prompt's language, where both have words. refusal: share of refusals.

    Args:
        samples: one a prompt.
    """

    def match(prompt: str, answer: Answer) -> float:
        found = language_match(prompt, answer.text)
        return math.nan if found is None else float(found)

    shares: dict[str, Callable[[str, Answer], float]] = {
        "valid_rate": lambda prompt, answer: valid(prompt, answer.text, answer.answer_ids, answer.finished),
        "truncated": lambda _, answer: not answer.finished,
        "repetitive": lambda _, answer: repetition(answer.answer_ids) > REPETITIVE,
        "language_match": match,
        "refusal": lambda _, answer: refuses(answer.text),
    }
    answers = {"base": [one.base for one in samples], "tuned": [one.tuned for one in samples]}
    figures = {}
    for name, measure in shares.items():
        found = {
            side: [float(measure(one.prompt[-1]["content"], answer)) for one, answer in zip(samples, some, strict=True)]
            for side, some in answers.items()
        }
        for side, values in found.items():
            known = [value for value in values if not math.isnan(value)]
            figures[f"{name}_{side}"] = wilson(sum(known), len(known))
        figures[f"{name}_change"] = share_change(found["base"], found["tuned"])
    base, tuned = ([float(len(one.answer_ids)) for one in some] for some in answers.values())
    ratios = [math.log(max(after, 1) / max(before, 1)) for before, after in zip(base, tuned, strict=True)]
    kl, positions = [one.kl_total for one in samples], [float(len(one.ids)) for one in answers["tuned"]]
    figures |= {
        "kl": bootstrap([kl, positions], lambda nats, tokens: nats.sum(-1) / tokens.sum(-1), seed),
        "kl_total": bootstrap_mean(kl, seed),
        "length_ratio": bootstrap([ratios], lambda logs: numpy.exp(logs.mean(-1)), seed),
        "tokens_base": bootstrap_mean(base, seed),
        "tokens_tuned": bootstrap_mean(tuned, seed),
        "tokens_change": bootstrap_mean([after - before for before, after in zip(base, tuned, strict=True)], seed),
    }
    before, after = (distinct_2([one.answer_ids for one in some]) for some in answers.values())
    for side, value in (("base", before), ("tuned", after), ("change", after - before)):
        rounded = round(value, 6) if math.isfinite(value) else None
        figures[f"distinct_2_{side}"] = Figure(value=rounded, low=None, high=None, n=len(samples))
    return figures
