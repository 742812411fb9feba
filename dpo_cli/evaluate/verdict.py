"""The verdict of an evaluation: one of five kinds, by a table of conditions that 95 % intervals have to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

from dpo_cli.evaluate.answers import learned
from dpo_cli.stats import Z95, Figure, places

SMALL = 0.1  # an accuracy that much above ½ is worth finding
BROKEN = 0.25  # of the valid rate, lost
LONGER, SHORTER = 1.25, 0.8  # answers so many times as long
DRIFT = 0.5  # nats a token that chosen answers lost
POWER = 0.8416212335729143  # the standard normal's 80 % point

HEADLINES = {
    "better": "Better",
    "learned_at_a_price": "Learned, at a price",
    "worse": "Worse",
    "not_learned": "Not learned",
    "too_little_to_tell": "Too little to tell",
}


class Rule(NamedTuple):
    """A kind of verdict, and the states it asks for, by name; `*` is any of them."""

    kind: str
    preference: str = "*"
    text: str = "*"
    judge: str = "*"


# The first line that holds is the verdict. The states:
#   preference  learned: accuracy above ½ and above what length alone would get · length: above ½, but not above that ·
#               opposite: below ½ · none: ½ is inside the interval and `SMALL` above ½ is not · unclear: both are inside
#   text        intact · worse: one of PRICES was paid · broken: the valid rate fell by `BROKEN` or more · unseen: no
#               answers were sampled
#   judge       tuned, base: whose answers it prefers · unclear: ½ is inside · none: none was asked, or none answered
RULES = (
    Rule("worse", preference="opposite"),
    Rule("worse", text="broken"),
    Rule("worse", judge="base"),
    Rule("too_little_to_tell", preference="unclear"),
    Rule("not_learned", preference="none"),
    Rule("not_learned", preference="length"),
    Rule("learned_at_a_price", text="worse"),
    Rule("too_little_to_tell", text="unseen"),
    Rule("too_little_to_tell", judge="unclear"),
    Rule("better", preference="learned", text="intact"),
)


class Verdict(TypedDict):
    """`verdict` in `eval/metrics.json`.

    kind: better, learned_at_a_price, worse, not_learned or too_little_to_tell.
    sentence: the kind in words, with the reasons.
    reasons: what it rests on: the preference, the text or each price that was paid in it, the judge.
    pairs_needed: of too_little_to_tell, how many held-out prompts would show an effect of this size in four of five
        runs; None where there is none to show, and of the other kinds.
    """

    kind: str
    sentence: str
    reasons: list[str]
    pairs_needed: int | None


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Weigh `metrics.json`: was the preference learned, is the text intact, does the judge agree."""
    preference, moved = _preference(metrics)
    text, said_of_text = _text(metrics)
    judge, judged = _judge(metrics["judge"])
    states = (preference, text, judge)
    kind = next(one.kind for one in RULES if all(w in ("*", is_) for w, is_ in zip(one[1:], states, strict=True)))
    unclear = metrics["pairs"]["reward_accuracy"] if preference == "unclear" else None
    if preference == "learned" and judge == "unclear":
        unclear = metrics["judge"]["win_rate"]
    needed = pairs_needed(unclear) if unclear and kind == "too_little_to_tell" else None
    reasons = [moved, *said_of_text, *judged]
    sentence = f"{HEADLINES[kind]}: {'; '.join(reasons)}."
    if needed:
        sentence += f" About {needed:,} held-out prompts would tell."
    return Verdict(kind=kind, sentence=sentence, reasons=reasons, pairs_needed=needed)


def pairs_needed(figure: Figure) -> int | None:
    """How many prompts show a share of this size to differ from ½, by a 95 % interval in 80 of 100 runs.

    n = ((z₀.₉₇₅ ½ + z₀.₈ √(p (1 - p))) / (p - ½))², to two digits; None for a share within half a percent of ½.
    """
    share = figure["value"]
    if share is None or abs(share - 0.5) < 0.005:
        return None
    count = ((Z95 / 2 + POWER * math.sqrt(share * (1 - share))) / (share - 0.5)) ** 2
    return math.ceil(float(f"{count:.1e}"))


# -------------------------------------------------------------------------------------------------------------- states


def _preference(metrics: Mapping[str, Any]) -> tuple[str, str]:
    if not metrics["pairs"]:
        return learned(metrics["answers"])
    accuracy, longer = metrics["pairs"]["reward_accuracy"], metrics["pairs"]["longer_wins"]["value"]
    bets = {
        "always taking the longer answer": longer,
        "always taking the shorter answer": 1 - longer,
        "the longer or the shorter answer, as in training": metrics["baselines"]["majority"]["value"],
    }
    bet, length = max(bets.items(), key=lambda one: one[1])
    low, high = accuracy["low"], accuracy["high"]
    if high < 0.5:
        state = "opposite"
    elif low <= 0.5:
        state = "none" if high < 0.5 + SMALL or changes_nothing(metrics) else "unclear"
    else:
        state = "learned" if low > length else "length"
    return state, (
        f"{percent(accuracy)} of {accuracy['n']:,} held-out prompts moved towards the chosen answer (95% interval "
        f"{interval(accuracy)}; 50% before training, {length:.0%} for {bet})"
    )


def changes_nothing(metrics: Mapping[str, Any]) -> bool:
    """Whether both models give every held-out answer the same probability."""
    drifts = [metrics["pairs"][f"{answer}_drift"] for answer in ("chosen", "rejected")]
    return not any(drift[part] for drift in drifts for part in ("value", "low", "high"))


def _text(metrics: Mapping[str, Any]) -> tuple[str, list[str]]:
    samples = metrics["samples"]
    prices = [words(metrics) for words in PRICES.values()]
    paid = [one for one in prices if one]
    if not samples:
        return "unseen" if not paid else "worse", [*paid, "no answers were sampled"]
    if (samples["valid_rate_change"]["high"] or 0.0) <= -BROKEN:
        return "broken", [f"the text fell apart ({_sides(samples, 'valid_rate')} of the answers are valid)", *paid]
    return ("worse", paid) if paid else ("intact", ["the text is intact"])


def _judge(judge: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    if not judge or not judge["asked"]:
        return "none", []
    rate, adjusted = judge["win_rate"], judge["length_adjusted_win_rate"]
    if rate["value"] is None:
        return "none", [f"the judge gave no verdict on any of {judge['asked']:,} prompts"]
    figures = f"win rate {percent(rate)}, {interval(rate)}, over {rate['n']:,} prompts"
    without, sides = f"{percent(adjusted)} with length taken out", (_side(rate), _side(adjusted))
    if sides[1] == "unclear" != sides[0]:
        without = f"not distinguishable with length taken out: {percent(adjusted)}, {interval(adjusted)}"
    said = {
        "tuned": "the judge prefers its answers",
        "base": "the judge prefers the base's answers",
        "unclear": "to the judge its answers are not distinguishable from the base's",
    }[sides[0]]
    if set(sides) == {"tuned", "base"}:
        return "unclear", [
            f"{said} ({figures}), but with length taken out it is the other way round: {interval(adjusted)}"
        ]
    return sides[0], [f"{said} ({figures}; {without})"]


def _side(rate: Figure) -> str:
    """Whose answers a win rate says are preferred."""
    low, high = rate["low"], rate["high"]
    if low is None or high is None or low <= 0.5 <= high:
        return "unclear"
    return "tuned" if low > 0.5 else "base"


# -------------------------------------------------------------------------------------------------------------- prices


def _rose(name: str, words: str) -> Callable[[Mapping[str, Any]], str | None]:
    def price(metrics: Mapping[str, Any]) -> str | None:
        samples = metrics["samples"]
        if not samples or (samples[f"{name}_change"]["low"] or 0.0) <= 0:
            return None
        return f"{words} ({_sides(samples, name)})"

    return price


def _language(metrics: Mapping[str, Any]) -> str | None:
    samples = metrics["samples"]
    if not samples or (samples["language_match_change"]["high"] or 0.0) >= 0:
        return None
    return f"fewer answers are in the prompt's language ({_sides(samples, 'language_match')})"


def _length(metrics: Mapping[str, Any]) -> str | None:
    samples, judge = metrics["samples"], metrics["judge"]
    ratio: Figure | None = samples and samples["length_ratio"]
    if not ratio or ratio["low"] is None or ratio["high"] is None:
        return None
    times = f"×{ratio['value']:.{places(ratio, most=2)}f}"
    if ratio["low"] > LONGER or ratio["high"] < SHORTER:
        return f"answers are {times} as long"
    changed = not ratio["low"] <= 1 <= ratio["high"]
    if changed and judge and (judge["win_rate"]["low"] or 0) > 0.5 >= (judge["length_adjusted_win_rate"]["low"] or 1):
        return f"its answers win by their length ({times})"
    return None


def _drift(metrics: Mapping[str, Any]) -> str | None:
    drift: Figure | None = metrics["pairs"] and metrics["pairs"]["chosen_drift_per_token"]
    if not drift or drift["high"] is None or drift["high"] > -DRIFT:
        return None
    return f"the chosen answers lost {-(drift['value'] or 0):.{places(drift, most=2)}f} nats a token"


# What may have got worse: its name, and the words for it where its interval says so.
PRICES: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "language": _language,
    "endings": _rose("truncated", "more answers do not end"),
    "repetition": _rose("repetitive", "more answers repeat themselves"),
    "refusals": _rose("refusal", "more answers refuse"),
    "length": _length,
    "drift": _drift,
}


# --------------------------------------------------------------------------------------------------------------- words


def percent(figure: Figure) -> str:
    """A share in percent, with the decimal places that its interval supports."""
    return "–" if figure["value"] is None else f"{100 * figure['value']:.{places(figure, 100, most=1)}f}%"


def interval(figure: Figure) -> str:
    """The ends of a share's interval, in percent."""
    ends = [100 * (figure[end] or 0.0) for end in ("low", "high")]
    digits = places(figure, 100, most=1)
    while any(round(end, digits) == 50 != end for end in ends) and digits < 6:
        digits += 1  # an end beside chance is not written as chance
    return " to ".join(f"{end:.{digits}f}%" for end in ends)


def _sides(samples: Mapping[str, Any], name: str) -> str:
    return " → ".join(percent(samples[f"{name}_{side}"]) for side in ("base", "tuned"))
