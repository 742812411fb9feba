"""What the training pairs are like: margins, lengths, tokens, and the shortcuts that would tell chosen from rejected.

A shortcut is anything but quality that alone predicts which answer was chosen; a model may learn that instead.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.language import language
from dpo_cli.prepare import scoring
from dpo_cli.prepare.filters import refuses
from dpo_cli.prepare.tally import Entry
from dpo_cli.records import CandidateSet
from dpo_cli.stats import wilson

WARN_ABOVE = 0.6  # a rule of thumb that wins three pairs in five without reading them
RATIOS = (1.2, 1.5, 2.0, 3.0, 5.0)

_MARKDOWN = re.compile(r"^ {0,3}(?:#{1,6} |[-*+] |\d+[.)] |> |\|.*\|)|\*\*[^*\n]+\*\*|```", re.MULTILINE)


def quantiles(values: Any) -> dict[str, float] | None:
    """{mean, p5, p50, p95, max} of an array of numbers, None of an empty one."""
    import numpy as np

    if not len(values):
        return None
    p5, p50, p95 = (round(float(value), 4) for value in np.quantile(values, (0.05, 0.5, 0.95)))
    return {
        "mean": round(float(np.mean(values)), 4),
        "p5": p5,
        "p50": p50,
        "p95": p95,
        "max": round(float(max(values)), 4),
    }


# What a rule of thumb bets on, and what it looks at: (answer, language of the question) -> a number, the higher wins.
SHORTCUTS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "length": ("the longer answer", lambda text, asked: float(len(text))),
    "language_match": (
        "the answer in the question's language",
        lambda text, asked: float(language(text) in (asked, "und")),
    ),
    "markdown": ("the answer with markdown", lambda text, asked: float(bool(_MARKDOWN.search(text)))),
    "refusal": ("the answer that is no refusal", lambda text, asked: -float(refuses(text))),
}
MODEL = "the answer of the model that usually wins"


@dataclass
class Audit:
    """Figures of the pairs added; memory is a few numbers a pair.

    A tally counts `pairs`, `wins` (2 a win, 1 a draw) and where the answers `differ`.
    """

    wins: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by shortcut
    longer: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by language
    models: tuple[Counter[Any], Counter[Any]] = field(default_factory=lambda: (Counter(), Counter()))  # (winner, loser)
    numbers: defaultdict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))

    def add(self, item: CandidateSet, chosen: int, rejected: int, entry: Entry) -> None:
        """Count one pair of `item`, by the indexes of its answers."""
        better, worse = item.candidates[chosen], item.candidates[rejected]
        asked = item.language or "und"
        for name, (_, look) in SHORTCUTS.items():
            first, second = look(better.text, asked), look(worse.text, asked)
            for tally in (self.wins[name], self.longer[asked]) if name == "length" else (self.wins[name],):
                tally["pairs"] += 1
                tally["wins"] += 2 * (first > second) + (first == second)
                tally["differ"] += first != second
        if better.model and worse.model:
            self.models[entry.hash & 1][better.model, worse.model] += 1
        margin = scoring.margin(item, chosen, rejected)
        figures: dict[str, float] = {"chosen": len(better.text), "rejected": len(worse.text)}
        if margin is not None:
            figures |= {"margin": margin, "score_chosen": better.score or 0.0, "score_rejected": worse.score or 0.0}
            figures["longer_by"] = figures["chosen"] - figures["rejected"]
        if entry.tokens is not None:
            prompt, totals = entry.tokens
            figures |= {"prompt": prompt, "prompt_chosen": totals[chosen], "prompt_rejected": totals[rejected]}
        for name, figure in figures.items():
            self.numbers[name].append(figure)

    def margins(self) -> dict[str, Any] | None:
        """Quantiles, those of both scores, and a histogram of ten bins on 0..1; None where no source has scores."""
        margins = self.numbers["margin"]
        if not margins:
            return None
        bins = Counter(min(int(value * 10 + 1e-9), 9) for value in margins)
        scores = {name: quantiles(self.numbers[name]) for name in ("score_chosen", "score_rejected")}
        histogram = [bins[number] for number in range(10)]
        return {"n": len(margins), **(quantiles(margins) or {}), **scores, "histogram": histogram}

    def lengths(self) -> dict[str, Any]:
        """Characters of both answers, how often the longer was chosen, and what a cap on their ratio would leave."""
        import numpy as np

        chosen, rejected = np.array(self.numbers["chosen"]), np.array(self.numbers["rejected"])
        ratio = np.maximum(chosen, rejected) / np.maximum(np.minimum(chosen, rejected), 1)
        return {
            "unit": "characters",
            "chosen": quantiles(chosen),
            "rejected": quantiles(rejected),
            "ratio": quantiles(ratio),
            "longer_wins": self._share(self.wins["length"]),
            "languages": {name: self._share(tally) for name, tally in sorted(self.longer.items())},
            "within_ratio": {f"{limit:g}": int((ratio <= limit).sum()) for limit in RATIOS},
            "correlation_with_margin": _spearman(self.numbers["longer_by"], self.numbers["margin"]),
        }

    def token_counts(self) -> dict[str, Any] | None:
        """Quantiles of prompt, prompt + chosen, prompt + rejected; None where no filter counted tokens."""
        names = ("prompt", "prompt_chosen", "prompt_rejected")
        return {name: quantiles(self.numbers[name]) for name in names} if self.numbers["prompt"] else None

    def shortcuts(self) -> dict[str, Any]:
        """Per shortcut {value, low, high, n, differs}: how often it is right (a draw is half) and says anything."""
        return {**{name: self._share(self.wins[name]) for name in SHORTCUTS}, "model": self._model()}

    @staticmethod
    def _share(tally: Counter[str]) -> dict[str, Any]:
        return {**wilson(tally["wins"] / 2, tally["pairs"]), "differs": tally["differ"]}

    def _model(self) -> dict[str, Any]:
        """ "The model that wins more often": win rates from one half of the pairs, tried on the other."""
        found = Counter[str]()
        for learnt, tried in (self.models, self.models[::-1]):
            won, met = Counter[str](), Counter[str]()
            for (better, worse), times in learnt.items():
                won[better] += times
                met[better] += times
                met[worse] += times
            for names, times in tried.items():
                first, second = (won[name] / met[name] if met[name] else 0.5 for name in names)
                found["wins"] += times * (2 * (first > second) + (first == second))
                found["differ"] += times * (first != second)
                found["pairs"] += times
        return self._share(found)


def _spearman(one: Any, other: Any) -> float | None:
    """Rank correlation, -1..1 (ties share their mean rank); None for fewer than three pairs or no variation."""
    import numpy as np

    def ranks(values: Any) -> Any:
        _, where, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[where]

    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return round(float(np.corrcoef(ranks(one), ranks(other))[0, 1]), 4)


def warnings(shortcuts: dict[str, Any]) -> list[str]:
    """A sentence for each shortcut that is right, or wrong, in more than three pairs of five, and not by chance."""
    said = []
    for name, figure in shortcuts.items():
        value, low, high = figure["value"], figure["low"], figure["high"]
        word = "chosen"
        if value is not None and value < 0.5 and name != "model":  # a model that usually wins is no bet on losing
            value, low, high, word = 1 - value, 1 - high, 1 - low, "rejected"
        if value is not None and value > WARN_ABOVE and low > 0.5:
            bet = SHORTCUTS[name][0] if name in SHORTCUTS else MODEL
            said.append(
                f"{bet} is {word} in {value:.0%} of pairs ({low:.0%} to {high:.0%}); a model may learn just that"
            )
    return said
