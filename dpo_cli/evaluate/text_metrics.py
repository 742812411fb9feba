"""What sampled answers are like, base against tuned: length, repetition, diversity, language, refusals. No torch here.

Language and refusal are the heuristics that `prepare` goes by: scripts and phrases, not what is meant.
Thinking counts nowhere but in the KL.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
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

Rows = Sequence[Sequence[int]]


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


def valid(prompt: str, answer: Answer | SimpleNamespace) -> bool:
    """Whether an answer ended and says something, in the prompt's language, without repeating itself or markers."""
    return (
        answer.finished
        and bool(answer.text.strip())
        and language_match(prompt, answer.text) is not False
        and repetition(answer.answer_ids) <= REPETITIVE
        and not MARKERS.search(answer.text)
    )


def distinct_2(rows: Rows) -> float:
    """Unique / all pairs of neighbouring tokens in the first 200 tokens of every answer (Li et al. 2016), 0..1.

    NaN where there is no pair.
    """
    heads = [numpy.asarray(row[:HEAD], dtype=numpy.int64) for row in rows]
    pairs = numpy.concatenate([numpy.empty(0, numpy.int64), *(head[:-1] << 32 | head[1:] for head in heads)])
    return len(numpy.unique(pairs)) / len(pairs) if len(pairs) else math.nan


def compression(rows: Rows) -> float:
    """Raw / zlib-compressed bytes of the first 200 tokens of every answer (Shaib et al. 2024, arXiv 2403.00553).

    Higher is less diverse. Token ids as 4-byte integers, so that Chinese and English are alike. NaN without any.
    """
    raw = b"".join(numpy.asarray(row[:HEAD], dtype="<i4").tobytes() for row in rows)
    return len(raw) / len(zlib.compress(raw)) if raw else math.nan


def sample_metrics(samples: Sequence[Sample], seed: int) -> dict[str, Figure]:
    """The `samples` figures of `eval/metrics.json`; of each X, X_base, X_tuned and X_change (tuned - base, paired).

    kl: nats a token of the tuned model's answers, from the tuned model to its reference, all tokens alike.
    kl_total: nats an answer, the mean over answers.
    length_ratio: exp(mean(log tuned tokens - log base tokens)).
    tokens: of an answer, with its end token. truncated: share that was cut at `eval.max_new_tokens`.
    repetition: see `repetition`. repetitive: share of answers above ½. valid_rate: share of answers that are `valid`.
    distinct_2, compression: see there; of all the answers together, and without an interval.
    language_match: share of answers in the prompt's language, where both have words. refusal: share of refusals.

    Args:
        samples: one a prompt.
    """

    def match(prompt: str, answer: Answer) -> float:
        found = language_match(prompt, answer.text)
        return math.nan if found is None else float(found)

    shares: dict[str, Callable[[str, Answer], float]] = {
        "valid_rate": valid,
        "truncated": lambda _, answer: not answer.finished,
        "repetitive": lambda _, answer: repetition(answer.answer_ids) > REPETITIVE,
        "language_match": match,
        "refusal": lambda _, answer: refuses(answer.text),
    }
    means: dict[str, Callable[[str, Answer], float]] = {
        "tokens": lambda _, answer: len(answer.answer_ids),
        "repetition": lambda _, answer: repetition(answer.answer_ids),
    }
    kl = [sample.kl_total for sample in samples]
    positions = [float(len(sample.tuned.ids)) for sample in samples]
    ratios = [math.log(max(len(one.tuned.answer_ids), 1) / max(len(one.base.answer_ids), 1)) for one in samples]
    figures = {
        "kl": bootstrap([kl, positions], lambda nats, tokens: nats.sum(-1) / tokens.sum(-1), seed),
        "kl_total": bootstrap_mean(kl, seed),
        "length_ratio": bootstrap([ratios], lambda logs: numpy.exp(logs.mean(-1)), seed),
    }
    for name, measure in (shares | means).items():
        base, tuned = (
            [float(measure(one.prompt[-1]["content"], getattr(one, side))) for one in samples]
            for side in ("base", "tuned")
        )
        for side, values in (("base", base), ("tuned", tuned)):
            known = [value for value in values if not math.isnan(value)]
            figures[f"{name}_{side}"] = (
                wilson(sum(known), len(known)) if name in shares else bootstrap_mean(known, seed)
            )
        differences = [after - before for before, after in zip(base, tuned, strict=True)]
        figures[f"{name}_change"] = share_change(base, tuned) if name in shares else bootstrap_mean(differences, seed)
    for name, statistic in (("distinct_2", distinct_2), ("compression", compression)):
        before, after = (statistic([getattr(one, side).answer_ids for one in samples]) for side in ("base", "tuned"))
        for side, found in (("base", before), ("tuned", after), ("change", after - before)):
            rounded = round(found, 6) if math.isfinite(found) else None
            figures[f"{name}_{side}"] = Figure(value=rounded, low=None, high=None, n=len(samples))
    return figures
