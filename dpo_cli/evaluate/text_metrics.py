"""What sampled answers are like, base against tuned: length, repetition, diversity, language, refusals. No torch here.

Language and refusal are heuristics: they look at scripts and at phrases, not at what is meant. Thinking counts nowhere
but in the KL.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dpo_cli.language import HAN_WORDS, han_characters
from dpo_cli.stats import Figure, bootstrap, bootstrap_mean, share_change, student, wilson

if TYPE_CHECKING:
    from dpo_cli.evaluate.samples import Sample
    from dpo_cli.inference import Answer

HEAD = 200  # tokens of each answer that diversity is measured on: it falls with length, which is measured beside it
OPENING = 200  # characters in which a refusal shows
GROUPS = 25  # of prompts, for the jackknife

Rows = Sequence[Sequence[int]]


# ------------------------------------------------------------------------------------------------------ of one answer


def repetition(ids: Sequence[int]) -> float:
    """1 - unique / all runs of 4 tokens, 0..1; 0 for fewer than 4 tokens."""
    total = len(ids) - 3
    return 1 - len(set(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))) / total if total > 0 else 0.0


_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`", re.DOTALL)
_LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f]{2,}")  # a single letter is a variable more often than a word


def language_match(prompt: str, answer: str) -> bool | None:
    """Whether both are mostly in Han characters, or both mostly in Latin script; None where one has no words.

    A heuristic: it counts words outside code, a Han character as 0.6 of one, and a prompt that asks for a translation
    is a mismatch to it.
    """
    shares = [_han_share(text) for text in (prompt, answer)]
    if None in shares:
        return None
    return len({share >= 0.5 for share in shares if share is not None}) == 1


def _han_share(text: str) -> float | None:
    """Han words among Han and Latin ones, 0..1."""
    plain = _CODE.sub(" ", text)
    han, latin = HAN_WORDS * han_characters(plain), len(_LATIN_WORD.findall(plain))
    return han / (han + latin) if han + latin else None


_REFUSAL = re.compile(
    r"\bI(?: can(?:no|['’])t| can not|(?: am|['’]m) (?:unable|not able) to| won['’]t(?: be able to)?| will not)"
    r" (?:\w+ ){0,2}?(?:assist|help(?! but)|provide|fulfil|comply|answer|engage|create|generate|write|support|do that)"
    r"|\b(?:sorry|apologi[sz]e|afraid)\b.{0,40}?\b(?:can(?:no|['’])t|can not|unable|not able|won['’]t)\b"
    r"|\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b[\w ]{0,30}, I (?:can|am|do|don|won|must)\b"
    r"|(?:抱歉|对不起|不好意思).{0,20}?(?:无法|不能|没办法|没法|不便)"
    r"|我(?:无法|不能|不会)(?:提供|回答|满足|协助|帮助|完成|参与|生成)"
    r"|作为一?[个名款]?(?:大型)?(?:AI|人工智能|语言模型).{0,10}?我(?:无法|不能|没有|不会)",
    re.IGNORECASE | re.DOTALL,
)


def refusal(text: str) -> bool:
    """Whether an answer opens like a refusal, in English or Chinese; a heuristic."""
    return bool(_REFUSAL.search(text[:OPENING]))


# ------------------------------------------------------------------------------------------------- of all the answers


def distinct_2(rows: Rows) -> float:
    """Unique / all pairs of neighbouring tokens in the first 200 tokens of every answer (Li et al. 2016), 0..1.

    NaN where there is no pair.
    """
    import numpy

    heads = [numpy.asarray(row[:HEAD], dtype=numpy.int64) for row in rows]
    pairs = numpy.concatenate([numpy.empty(0, numpy.int64), *(head[:-1] << 32 | head[1:] for head in heads)])
    return len(numpy.unique(pairs)) / len(pairs) if len(pairs) else math.nan


def compression(rows: Rows) -> float:
    """Raw / zlib-compressed bytes of the first 200 tokens of every answer, one after another (Shaib et al. 2024, arXiv
    2403.00553); higher is less diverse.

    Token ids as 4-byte integers, lowest byte first, so that Chinese and English are alike. NaN where there is none.
    """
    import numpy

    raw = b"".join(numpy.asarray(row[:HEAD], dtype="<i4").tobytes() for row in rows)
    return len(raw) / len(zlib.compress(raw)) if raw else math.nan


def of_corpus(statistic: Callable[[Rows], float], base: Rows, tuned: Rows) -> list[Figure]:
    """A statistic of all the base answers, of all the tuned ones, and tuned - base, with intervals over prompts.

    value ± t √V, with the variance of the jackknife that leaves out one of g groups of prompts at a time (Shao & Tu
    1995, section 2.3), V = (g - 1) / g Σ_j (θ_j - mean θ)², and Student's t of g - 1 degrees of freedom. Not a
    bootstrap: that draws prompts twice, and a corpus that holds answers twice is less diverse, so that the whole
    interval would lie beside the value.
    """
    import numpy

    groups = min(GROUPS, len(base))

    def whole_and_parts(rows: Rows) -> Any:
        parts = ([row for place, row in enumerate(rows) if place % groups != group] for group in range(groups))
        return numpy.array([statistic(rows), *map(statistic, parts)])

    found = [whole_and_parts(base), whole_and_parts(tuned)]
    figures = []
    for value, *parts in (*found, found[1] - found[0]):
        half = student(groups - 1) * math.sqrt((groups - 1) * numpy.var(parts)) if groups > 1 else math.nan
        bounds = [value - half, value, value + half]
        low, middle, high = (round(float(bound), 6) if math.isfinite(bound) else None for bound in bounds)
        figures.append(Figure(value=middle, low=low, high=high, n=len(base)))
    return figures


def sample_metrics(samples: Sequence[Sample], seed: int) -> dict[str, Figure]:
    """The `samples` figures of `eval/metrics.json`; of each X, X_base, X_tuned and X_change (tuned - base, paired).

    kl: nats a token of the tuned model's answers, from the tuned model to its reference, all tokens alike.
    kl_total: nats an answer, the mean over answers.
    length_ratio: exp(mean(log tuned tokens - log base tokens)).
    tokens: of an answer, with its end token. truncated: share that was cut at `eval.max_new_tokens`.
    repetition: see `repetition`. repetitive: share of answers above ½.
    distinct_2, compression: see there; of all the answers together.
    language_match: share of answers in the prompt's script, where both have words. refusal: share of refusals.

    Args:
        samples: one a prompt.
        seed: of the bootstrap, which resamples prompts.
    """
    import numpy

    def match(sample: Sample, answer: Answer) -> float:
        found = language_match(sample.prompt[-1]["content"], answer.text)
        return math.nan if found is None else float(found)

    shares: dict[str, Callable[[Sample, Answer], float]] = {
        "truncated": lambda _, answer: float(not answer.finished),
        "repetitive": lambda _, answer: float(repetition(answer.said) > 0.5),
        "language_match": match,
        "refusal": lambda _, answer: float(refusal(answer.text)),
    }
    means: dict[str, Callable[[Sample, Answer], float]] = {
        "tokens": lambda _, answer: float(len(answer.said)),
        "repetition": lambda _, answer: repetition(answer.said),
    }
    kl = [sample.kl_total for sample in samples]
    positions = [float(len(sample.tuned.ids)) for sample in samples]
    ratios = [math.log(max(len(one.tuned.said), 1) / max(len(one.base.said), 1)) for one in samples]
    figures = {
        "kl": bootstrap([kl, positions], lambda nats, tokens: nats.sum(-1) / tokens.sum(-1), seed),
        "kl_total": bootstrap_mean(kl, seed),
        "length_ratio": bootstrap([ratios], lambda logs: numpy.exp(logs.mean(-1)), seed),
    }
    for name, measure in (shares | means).items():
        base = [measure(sample, sample.base) for sample in samples]
        tuned = [measure(sample, sample.tuned) for sample in samples]
        for side, values in (("base", base), ("tuned", tuned)):
            known = [value for value in values if not math.isnan(value)]
            share = name in shares
            figures[f"{name}_{side}"] = wilson(sum(known), len(known)) if share else bootstrap_mean(known, seed)
        figures[f"{name}_change"] = (
            share_change(base, tuned)
            if name in shares
            else bootstrap([base, tuned], lambda b, t: t.mean(-1) - b.mean(-1), seed)
        )
    said = [[sample.base.said for sample in samples], [sample.tuned.said for sample in samples]]
    for name, statistic in (("distinct_2", distinct_2), ("compression", compression)):
        found = of_corpus(statistic, *said)
        figures |= {f"{name}_{side}": one for side, one in zip(("base", "tuned", "change"), found, strict=True)}
    return figures
