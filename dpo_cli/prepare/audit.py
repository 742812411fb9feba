"""What the training pairs are like: margins, lengths, tokens, and the shortcuts that would tell chosen from rejected.

A shortcut is anything but quality that alone predicts which answer was chosen; a model may learn that instead.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_cli.language import language
from dpo_cli.prepare import scoring
from dpo_cli.prepare.funnel import Entry
from dpo_cli.records import CandidateSet
from dpo_cli.refusal import refuses
from dpo_cli.stats import share

WARN_ABOVE = 0.6  # a rule of thumb that wins three pairs in five without reading them
QUANTILES = ("mean", "p5", "p50", "p95", "max")

_MARKDOWN = re.compile(r"^ {0,3}(?:#{1,6} |[-*+] |\d+[.)] |> |\|.*\|)|\*\*[^*\n]+\*\*|```", re.MULTILINE)


def quantiles(values: Any) -> dict[str, float] | None:
    """{mean, p5, p50, p95, max} of an array of numbers, None of an empty one."""
    if not len(values):
        return None
    figures = (np.mean(values), *np.quantile(values, (0.05, 0.5, 0.95)), np.max(values))
    return dict(zip(QUANTILES, (round(float(figure), 4) for figure in figures), strict=True))


# What a rule of thumb bets on.
SHORTCUTS = {
    "length": "the longer answer", "language_match": "the answer in the question's language",
    "markdown": "the answer with markdown", "refusal": "the answer that is no refusal",
    "model": "the answer of the model that usually wins",
}  # fmt: skip
# What it looks at: (answer, language of the question) -> a number, the higher wins.
LOOKS: dict[str, Callable[[str, str], float]] = {
    "length": lambda text, asked: len(text),
    "language_match": lambda text, asked: language(text) in (asked, "und"),
    "markdown": lambda text, asked: bool(_MARKDOWN.search(text)),
    "refusal": lambda text, asked: not refuses(text),
}


@dataclass
class Wins:
    """Which of the pairs a rule of thumb gets right: 2 a win, 1 a draw; and of which prompt each is, by its hash."""

    doubled: array[int] = field(default_factory=lambda: array("b"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, chosen: float, rejected: float, prompt: int) -> None:
        self.doubled.append(2 * (chosen > rejected) + (chosen == rejected))
        self.prompts.append(prompt)

    def figure(self) -> dict[str, Any]:
        """Return {value, low, high, n, differs}: how often it is right, and in how many pairs it says anything."""
        wins = [doubled / 2 for doubled in self.doubled]
        return {**share(wins, self.prompts), "differs": len(wins) - self.doubled.count(1)}


@dataclass
class Audit:
    """Figures of the pairs added; memory is a few numbers a pair.

    Shares count prompts: of a prompt's pairs, which are not independent, the mean.
    """

    wins: defaultdict[str, Wins] = field(default_factory=lambda: defaultdict(Wins))  # by shortcut
    longer: defaultdict[str, Wins] = field(default_factory=lambda: defaultdict(Wins))  # by language
    models: list[tuple[str, str, int]] = field(default_factory=list)  # (winner, loser, prompt), strings shared
    numbers: defaultdict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))

    def add(self, item: CandidateSet, chosen: int, rejected: int, entry: Entry) -> None:
        better, worse = item.candidates[chosen], item.candidates[rejected]
        asked = item.language or "und"
        for name, look in LOOKS.items():
            self.wins[name].add(look(better.text, asked), look(worse.text, asked), entry.hash)
        self.longer[asked].add(len(better.text), len(worse.text), entry.hash)
        if better.model and worse.model:
            self.models.append((sys.intern(better.model), sys.intern(worse.model), entry.hash))
        margin = scoring.margin(item, chosen, rejected)
        figures: dict[str, float] = {"chosen": len(better.text), "rejected": len(worse.text)}
        if margin is not None:
            figures |= {"margin": margin, "score_chosen": better.score or 0.0, "score_rejected": worse.score or 0.0}
        if entry.tokens is not None:
            prompt, totals = entry.tokens
            figures |= {"prompt": prompt, "prompt_chosen": totals[chosen], "prompt_rejected": totals[rejected]}
        for name, figure in figures.items():
            self.numbers[name].append(figure)

    def margins(self) -> dict[str, Any] | None:
        """Return quantiles, and those of both scores; None where no source has scores."""
        found, scores = quantiles(self.numbers["margin"]), ("score_chosen", "score_rejected")
        return found and {
            "n": len(self.numbers["margin"]),
            **found,
            **{one: quantiles(self.numbers[one]) for one in scores},
        }

    def lengths(self) -> dict[str, Any]:
        """Return characters of both answers, and how often the longer won."""
        chosen, rejected = np.array(self.numbers["chosen"]), np.array(self.numbers["rejected"])
        ratio = np.maximum(chosen, rejected) / np.maximum(np.minimum(chosen, rejected), 1)
        return {
            "unit": "characters",
            "chosen": quantiles(chosen),
            "rejected": quantiles(rejected),
            "ratio": quantiles(ratio),
            "longer_wins": self.wins["length"].figure(),
            "languages": {name: wins.figure() for name, wins in sorted(self.longer.items())},
        }

    def token_counts(self) -> dict[str, Any] | None:
        """Return quantiles of prompt, prompt + chosen, prompt + rejected; None where no filter counted tokens."""
        names = ("prompt", "prompt_chosen", "prompt_rejected")
        return {name: quantiles(self.numbers[name]) for name in names} if self.numbers["prompt"] else None

    def shortcuts(self) -> dict[str, Any]:
        return {**{name: self.wins[name].figure() for name in LOOKS}, "model": self._model()}

    def _model(self) -> dict[str, Any]:
        """ "The model that wins more often": win rates from one half of the prompts, tried on the other."""
        found = Wins()
        won, met = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for better, worse, prompt in self.models:
            won[better, prompt & 1] += 1
            met[better, prompt & 1] += 1
            met[worse, prompt & 1] += 1
        for better, worse, prompt in self.models:
            other = 1 - (prompt & 1)
            first, second = (
                won[name, other] / met[name, other] if met[name, other] else 0.5 for name in (better, worse)
            )
            found.add(first, second, prompt)
        return found.figure()


def shortcut_warnings(shortcuts: dict[str, Any]) -> list[str]:
    """Return a sentence for each shortcut that is right, or wrong, in over three pairs of five, and not by chance."""
    found = []
    for name, figure in shortcuts.items():
        value, low, high = figure["value"], figure["low"], figure["high"]
        word = "chosen"
        if value is not None and value < 0.5 and name != "model":  # a model that usually wins is no bet on losing
            value, low, high, word = 1 - value, 1 - high, 1 - low, "rejected"
        if value is not None and value > WARN_ABOVE and low > 0.5:
            rate = f"{word} in {value:.0%} of pairs ({low:.0%} to {high:.0%})"
            found.append(f"{SHORTCUTS[name]} is {rate}; a model may learn just that")
    return found
