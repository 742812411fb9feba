"""The verdict of an evaluation, one of five kinds by what 95 % intervals show, and its warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from dpo_cli.evaluate.words import Say, speaker
from dpo_cli.show import LOSS, NATS, RATIO, show_figure, show_interval
from dpo_cli.stats import Z95, Figure, opposite

SMALL = 0.1  # an accuracy that much above ½ is worth finding
BROKEN = 0.25  # of the valid rate, lost
LONGER, SHORTER = 1.25, 0.8  # answers so many times as long
DRIFT = 0.5  # nats a token that chosen answers lost
POWER = 0.8416212335729143  # the standard normal's 80 % point


class Rule(NamedTuple):
    """A kind of verdict, and the states it asks for, by name; `*` is any of them."""

    kind: str
    preference: str = "*"
    text: str = "*"
    judge: str = "*"


# The first line that holds is the verdict. The states:
#   preference  learned: accuracy above ½ and above what length alone would get · length: above ½, but not above that ·
#               opposite: below ½ · none: ½ is inside the interval and `SMALL` above ½ is not · unclear: both are inside
#   text        intact · worse: one of `prices` was paid · broken: the valid rate fell by more than `BROKEN` ·
#               unseen: no answers were sampled
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

    kind: better, learned_at_a_price, worse, not_learned or too_little_to_tell. sentence: the kind with the reasons.
    reasons: what it rests on: the preference, the text or each price that was paid in it, the judge.
    pairs_needed: of too_little_to_tell, see `pairs_needed`; None where there is no effect to show.
    """

    kind: str
    sentence: str
    reasons: list[str]
    pairs_needed: int | None


def verdict(metrics: Mapping[str, Any], language: str = "en") -> Verdict:
    """Weigh `metrics.json`: was the preference learned, is the text intact, does the judge agree."""
    say = speaker(language)
    preference, moved = _preference(metrics, say)
    text, said_of_text = _text(metrics, say)
    judge, judged = _judge(metrics["judge"], say)
    states = (preference, text, judge)
    kind = next(one.kind for one in RULES if all(w in ("*", is_) for w, is_ in zip(one[1:], states, strict=True)))
    unclear = None
    if preference == "unclear":
        unclear = metrics["pairs"]["reward_accuracy"] if metrics["pairs"] else metrics["answers"]["auroc"]
    if preference == "learned" and judge == "unclear":
        unclear = metrics["judge"]["win_rate"]
    needed = pairs_needed(unclear) if unclear and kind == "too_little_to_tell" else None
    reasons = [moved, *said_of_text, *judged]
    sentence = say("sentence", kind=say(kind), reasons=say("and").join(reasons))
    if needed:
        sentence += say("needed", n=f"{needed:,}")
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


def _preference(metrics: Mapping[str, Any], say: Say) -> tuple[str, str]:
    area = None if metrics["pairs"] else metrics["answers"].get("auroc")
    if area:
        interval = show_interval(area, to=say("to"))
        return _state(area), say("auroc", share=_percent(area), interval=interval)
    if not metrics["pairs"]:
        return _learned(metrics["answers"], say)
    accuracy, longer = metrics["pairs"]["reward_accuracy"], metrics["pairs"]["longer_wins"]
    bets = {"longer": longer, "shorter": opposite(longer), "trained": metrics["baselines"]["majority"]}
    bet = max(bets, key=lambda name: bets[name]["value"])
    state = _state(accuracy, changes_nothing(metrics))
    if state == "learned" and accuracy["low"] <= bets[bet]["value"]:
        state = "length"
    return state, say(
        "moved",
        share=_percent(accuracy),
        n=f"{accuracy['n']:,}",
        interval=show_interval(accuracy, to=say("to")),
        length=_percent(bets[bet]),
        bet=say(f"bet_{bet}"),
    )


def _state(share: Figure, still: bool = False) -> str:
    """What a share says that is ½ before training; `still`: the model is as before."""
    if _above(share, 0.5):
        return "learned"
    if _below(share, 0.5):
        return "opposite"
    return "none" if still or _below(share, 0.5 + SMALL) else "unclear"


def _learned(figures: Mapping[str, Figure], say: Say) -> tuple[str, str]:
    """What the loss shows where there are no pairs: learned, opposite or none; and the same in words."""
    change = figures["loss_change"]
    state = "learned" if _below(change, 0) else "opposite" if _above(change, 0) else "none"
    sides = {side: show_figure(figures[f"loss_{side}"], LOSS, False) for side in ("base", "tuned")}
    interval = show_interval(change, LOSS.change, say("to"))
    return state, say("loss_went", n=f"{change['n']:,}", interval=interval, **sides)


def changes_nothing(metrics: Mapping[str, Any]) -> bool:
    """Whether both models give every held-out answer the same probability."""
    drifts = [metrics["pairs"][f"{answer}_drift"] for answer in ("chosen", "rejected")]
    return not any(drift[part] for drift in drifts for part in ("value", "low", "high"))


def _text(metrics: Mapping[str, Any], say: Say) -> tuple[str, list[str]]:
    samples, paid = metrics["samples"], list(prices(metrics, say).values())
    if not samples:
        return "worse" if paid else "unseen", [*paid, say("unseen")]
    if _below(samples["valid_rate_change"], -BROKEN):
        return "broken", [say("broken", sides=_sides(samples, "valid_rate")), *paid]
    return ("worse", paid) if paid else ("intact", [say("intact")])


def _judge(judge: Mapping[str, Any] | None, say: Say) -> tuple[str, list[str]]:
    if not judge or not judge["asked"]:
        return "none", []
    rate, adjusted = judge["win_rate"], judge["length_adjusted_win_rate"]
    if rate["value"] is None:
        return "none", [say("silent", n=f"{judge['asked']:,}")]
    contradict = {_side(rate), _side(adjusted)} == {"tuned", "base"}
    side = "unclear" if contradict else _side(rate)
    return side, [
        say(
            "prefers",
            who=say(f"prefers_{side}"),
            rate=_percent(rate),
            interval=show_interval(rate, to=say("to")),
            n=f"{rate['n']:,}",
            adjusted=_percent(adjusted),
            without=show_interval(adjusted, to=say("to")),
        )
    ]


def _side(rate: Figure) -> str:
    """Whose answers a win rate says are preferred."""
    return "tuned" if _above(rate, 0.5) else "base" if _below(rate, 0.5) else "unclear"


def prices(metrics: Mapping[str, Any], say: Say) -> dict[str, str]:
    """What got worse besides, in words, by what the price is called in words.py: only what an interval shows."""
    samples, found = metrics["samples"], {}
    if samples:
        worse = {"language_match": _below(samples["language_match_change"], 0)}
        worse |= {name: _above(samples[f"{name}_change"], 0) for name in ("truncated", "repetitive", "refusal")}
        found = {name: say(f"price_{name}", sides=_sides(samples, name)) for name in worse if worse[name]}
        if length := _length(samples["length_ratio"], metrics["judge"]):
            found["length"] = say(length, times=show_figure(samples["length_ratio"], RATIO, False))
    drift = metrics["pairs"] and metrics["pairs"]["chosen_drift_per_token"]
    if drift and _below(drift, -DRIFT):
        found["drift"] = say("price_drift", nats=show_figure(drift, NATS, False))
    return found


def _length(ratio: Figure, judge: Mapping[str, Any] | None) -> str | None:
    """Whether answers are much longer or shorter, or whether they win by their length."""
    if _above(ratio, LONGER) or _below(ratio, SHORTER):
        return "price_length"
    won = judge and _above(judge["win_rate"], 0.5) and not _above(judge["length_adjusted_win_rate"], 0.5)
    return "price_by_length" if won and (_above(ratio, 1) or _below(ratio, 1)) else None


def _above(figure: Figure, level: float) -> bool:
    """Whether the whole interval is; a figure without one shows nothing."""
    return figure["low"] is not None and figure["low"] > level


def _below(figure: Figure, level: float) -> bool:
    return figure["high"] is not None and figure["high"] < level


def _sides(samples: Mapping[str, Any], name: str) -> str:
    return " → ".join(_percent(samples[f"{name}_{side}"]) for side in ("base", "tuned"))


def _percent(share: Mapping[str, Any]) -> str:
    return show_figure(share, interval=False)


def warnings(metrics: Mapping[str, Any], language: str = "en") -> list[str]:
    """What a reader should know before trusting the figures."""
    say = speaker(language)
    found = _warnings_on_pairs(metrics, say) if metrics["pairs"] else []
    paid = prices(metrics, say)
    paid.pop("drift", None)  # `chosen_fell` has that
    found += [say(f"advice_{name}", price=price) for name, price in paid.items()]
    found += _warnings_on_judge(metrics["judge"], say)
    for name, one in metrics["sets"].items():
        if one["overlap"]:
            found.append(say("overlap", n=f"{one['overlap']:,}", kept=f"{one['kept']:,}", name=name))
    return found


def _warnings_on_pairs(metrics: Mapping[str, Any], say: Say) -> list[str]:
    found = []
    pairs = metrics["pairs"]
    if changes_nothing(metrics):
        found.append(say("changes_nothing"))
    if _below(pairs["chosen_drift"], 0):
        found.append(say("chosen_fell", nats=show_figure(pairs["chosen_drift"], NATS, False)))
    for name, figures in metrics["languages"].items():
        if not figures["pairs"]:
            continue
        accuracy = figures["pairs"]["reward_accuracy"]
        if accuracy["n"] < 30:
            found.append(say("few_pairs", name=name, n=accuracy["n"]))
        elif _below(accuracy, 0.5):
            found.append(say("below_half", name=name))
        elif not _above(accuracy, 0.5):
            found.append(say("near_half", name=name))
    shortcut, accuracy = metrics["baselines"]["shortcut"], pairs["reward_accuracy"]
    if shortcut and _above(accuracy, 0.5) and not _above(accuracy, shortcut["value"]):
        found.append(say("shortcut", name=shortcut["name"], share=_percent(shortcut)))
    return found


def _warnings_on_judge(judge: Mapping[str, Any] | None, say: Say) -> list[str]:
    if not judge:
        return []
    found = []
    for count, key in (("failures", "no_verdict"), ("cut", "judge_cut")):
        if judge[count]:
            found.append(say(key, n=judge[count], asked=judge["asked"]))
    consistency, calibration = judge["position_consistency"], judge["calibration"]
    if consistency and consistency["value"] is not None and consistency["value"] < 0.6:
        found.append(say("inconsistent", share=_percent(consistency)))
    if calibration["value"] is not None and not _above(calibration, 0.5):
        found.append(say("disagrees", share=_percent(calibration), n=calibration["n"]))
    return found
