"""What the report and the terminal show of `metrics.json`: which figures, under what name, in what unit.

Nothing is computed here: a figure is looked up, rounded and put in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_cli.evaluate import charts
from dpo_cli.stats import Figure


class Unit(NamedTuple):
    """How a figure is written: its factor and decimal places, whether it has a sign, and what stands around it."""

    places: int
    factor: float = 1
    signed: bool = False
    before: str = ""
    after: str = ""

    @property
    def change(self) -> Unit:
        """What a difference of two such figures is written in: percent points for shares."""
        return self._replace(signed=True, after=" pp" if self.after == "%" else self.after)

    def write(self, value: float) -> str:
        number = round(self.factor * value, self.places) + 0.0  # + 0.0: no minus before a nought
        text = f"{number:+,.{self.places}f}" if self.signed else f"{number:,.{self.places}f}"
        return text.replace("-", "−")


SHARE, NATS, RATIO = Unit(1, 100, after="%"), Unit(2, signed=True), Unit(2, before="×")


class Row(NamedTuple):
    """A line of a table: the metric's name, what it is called, what it says, its unit.

    `compared`: three figures in one cell, `<key>_base`, `<key>_tuned` and `<key>_change`.
    `brief`: the terminal shows it too.
    """

    key: str
    title: str
    meaning: str
    unit: Unit = SHARE
    compared: bool = False
    brief: bool = True


ROWS = (
    Row("reward_accuracy", "Reward accuracy", "chosen gained more than rejected; 50% before training"),
    Row("reward_accuracy_per_token", "… per token", "the same, gains divided by length"),
    Row("longer_wins", "Longer answer wins", "what always taking the longer answer would get"),
    Row("ranking_accuracy", "Ranking", "chosen is likelier per token than rejected", compared=True),
    Row("margin", "Reward margin", "beta × (gain of chosen − gain of rejected), nats", NATS),
    Row("margin_median", "… median", "half of the pairs have more", NATS, brief=False),
    Row("margin_p10", "… 10th percentile", "nine in ten pairs have more", NATS, brief=False),
    Row("margin_p90", "… 90th percentile", "one in ten pairs has more", NATS, brief=False),
    Row("chosen_drift", "Drift of chosen", "change of its log-probability, nats", NATS),
    Row("chosen_drift_per_token", "… per token", "the same, divided by length", Unit(3, signed=True), brief=False),
    Row("rejected_drift", "Drift of rejected", "change of its log-probability, nats", NATS),
    Row("rejected_drift_per_token", "… per token", "the same, divided by length", Unit(3, signed=True), brief=False),
)

SAMPLE_ROWS = (
    Row("kl", "KL to base", "nats a token, over the tuned model's answers", Unit(4)),
    Row("kl_total", "… of an answer", "nats, summed over its tokens", Unit(2)),
    Row("length_ratio", "Length ratio", "tuned to base, geometric mean", RATIO),
    Row("tokens", "Tokens", "of an answer", Unit(1), compared=True),
    Row("truncated", "Cut off", "answers that hit eval.max_new_tokens", compared=True),
    Row("repetition", "Repetition", "4-grams that stood there before, mean", compared=True),
    Row("repetitive", "Repetitive", "answers with more than half such 4-grams", compared=True),
    Row(
        "distinct_2", "Distinct-2", "different pairs of tokens among all; 200 tokens an answer", Unit(3), compared=True
    ),
    Row("compression", "Compression", "zlib ratio, higher is duller; 200 tokens an answer", Unit(2), compared=True),
    Row("language_match", "Language match", "answers in the prompt's language", compared=True),
    Row("refusal", "Refusals", "by their first words, a heuristic", compared=True),
)

JUDGE_ROWS = (
    Row("win_rate", "Win rate", "of the tuned model over the base, a tie counts half"),
    Row("length_adjusted_win_rate", "… length-adjusted", "as it would be at equal lengths"),
    Row("wins", "Won", "share of the prompts"),
    Row("ties", "Tied", "share of the prompts"),
    Row("losses", "Lost", "share of the prompts"),
    Row("position_consistency", "Consistent", "the same verdict when the two answers swap places"),
    Row("score_difference", "Score difference", "tuned − base, in the reward model's own unit", NATS),
    Row("calibration", "Agrees with the data", "prefers the chosen answer of held-out pairs"),
)

KINDS = {"best": "Best by the judge", "worst": "Worst by the judge", "random": "Drawn at random"}


class Cell(NamedTuple):
    """A figure as it is shown: what is read first, and the interval, or the change with its interval, after it."""

    main: str
    after: str = ""

    def __str__(self) -> str:
        return f"{self.main}; {self.after}" if "→" in self.main else f"{self.main} {self.after}".rstrip()


class Table(NamedTuple):
    heads: list[str]
    rows: list[tuple[Row, list[Cell]]]


def show(figure: Figure, unit: Unit = SHARE, interval: bool = True) -> str:
    """A figure, with its interval or without: `98.4% (94.2–99.6)`, `+1.66 (+1.58 to +1.73)`; – where there is none."""
    if figure["value"] is None:
        return "–"
    text = unit.before + unit.write(figure["value"]) + unit.after
    return f"{text} {_interval(figure, unit)}".rstrip() if interval else text


def _interval(figure: Figure, unit: Unit) -> str:
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return ""
    return f"({unit.write(low)}{' to ' if unit.signed else '–'}{unit.write(high)})"


def cell(figures: Mapping[str, Any], row: Row) -> Cell:
    """One place of a table: `54.9% → 62.5%` and its change, or one figure and its interval; empty without a figure."""
    if row.compared:
        base, tuned = (show(figures[f"{row.key}_{one}"], row.unit, interval=False) for one in ("base", "tuned"))
        return Cell(f"{base} → {tuned}", show(figures[f"{row.key}_change"], row.unit.change))
    figure = figures.get(row.key)
    return Cell(show(figure, row.unit, interval=False), _interval(figure, row.unit)) if figure else Cell("")


def tables(metrics: Mapping[str, Any]) -> dict[str, Table]:
    """pairs, samples and judge, each with a column for all and one a language; without what was not asked for."""
    found = {}
    for part, rows, counted in (
        ("pairs", ROWS, "reward_accuracy"),
        ("samples", SAMPLE_ROWS, "tokens_tuned"),
        ("judge", JUDGE_ROWS, "win_rate"),
    ):
        if not metrics[part]:
            continue
        groups = {"all": metrics[part], **{name: one[part] for name, one in metrics["languages"].items()}}
        groups = {name: figures for name, figures in groups.items() if figures}
        heads = [f"{name} (n = {figures[counted]['n']:,})" for name, figures in groups.items()]
        lines = [(row, [cell(figures, row) for figures in groups.values()]) for row in rows]
        found[part] = Table(heads, [(row, cells) for row, cells in lines if cells[0].main])
    return found


def accuracies(metrics: Mapping[str, Any]) -> list[tuple[str, list[charts.Dot]]]:
    """Reward accuracy beside what is to be had without a model, and by language, source, margin and length.

    Where there is only one language, source or quartile, there is nothing to set side by side and it is left out.
    """
    baselines, shortcut = metrics["baselines"], metrics["baselines"]["shortcut"]
    rivals: dict[str, Figure | None] = {
        "reward accuracy": metrics["pairs"]["reward_accuracy"],
        "the longer answer": baselines["longer_wins"],
        "longer/shorter, as in training": baselines["majority"],
        f"in training: {shortcut['name']}" if shortcut else "": shortcut,
    }
    found = [("What it has to beat", [charts.Dot(name, one, show(one)) for name, one in rivals.items() if one])]
    groups = {
        "By language": metrics["languages"].items(),
        "By source": metrics["sources"].items(),
        "By the data's own margin": [(_reach(one, 2), one) for one in metrics["margin_quartiles"]],
        "By length, tokens an answer": [(_reach(one, 0), one) for one in metrics["length_quartiles"]],
    }
    for title, parts in groups.items():
        rows = []
        for name, part in parts:
            figure: Figure = part["pairs"]["reward_accuracy"]
            label = f"{charts.shorten(name, 22)}, n = {figure['n']:,}"
            rows.append(charts.Dot(label, figure, show(figure), part["pairs"]["longer_wins"]["value"]))
        if len(rows) > 1:
            found.append((title, rows))
    return found


def _reach(quartile: Mapping[str, Any], places: int) -> str:
    """`0.10 to 0.20`, or one number where both ends look alike."""
    return " to ".join(dict.fromkeys(f"{quartile[end]:,.{places}f}" for end in ("from", "to")))


def win_rates(metrics: Mapping[str, Any]) -> list[charts.Dot]:
    """Win rates, raw and length-adjusted, of all prompts and of each language where there are several."""
    parts = {name: one["judge"] for name, one in metrics["languages"].items()}
    groups = {"": metrics["judge"], **({f", {name}": one for name, one in parts.items()} if len(parts) > 1 else {})}
    return [
        charts.Dot(f"{title}{name}", group[key], show(group[key]))
        for name, group in groups.items()
        if group
        for key, title in (("win_rate", "win rate"), ("length_adjusted_win_rate", "length-adjusted"))
    ]


def judged(judge: Mapping[str, Any] | None) -> str:
    """Who judged, how much of it counts, and what chance would say."""
    if not judge:
        return ""
    said = f"Judge: {judge['model']} ({judge['kind']}). {judge['judged']:,} of {judge['asked']:,} prompts judged"
    said += f"; {judge['failures']:,} gave no verdict and are left out." if judge["failures"] else "."
    if judge["p_value"] is not None:
        p_value = "< 0.001" if judge["p_value"] < 0.001 else f"= {judge['p_value']:.3f}"
        said += f" p {p_value}: how often chance alone would be this far from 50%, by sign flips over prompts."
    if judge.get("cut"):
        said += f" It saw an answer cut short in {judge['cut']:,} of them."
    if judge["calibration_failures"]:
        said += f" Held-out pairs without a verdict: {judge['calibration_failures']:,}."
    return said + (f" Template sha256 {judge['template_sha256'][:12]}." if judge["template_sha256"] else "")


def sampled(sampling: Mapping[str, Any] | None) -> str:
    """How the answers were drawn."""
    if not sampling:
        return ""
    said = ", ".join(f"{key} {value}" for key, value in sampling.items() if key not in ("prompts", "max_new_tokens"))
    return f"{sampling['prompts']:,} held-out prompts, at most {sampling['max_new_tokens']:,} tokens an answer; {said}."


def examples(metrics: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The answers to look at, under their headings; a kind that has none is left out."""
    kinds = {title: [one for one in metrics["examples"] if one["kind"] == kind] for kind, title in KINDS.items()}
    return [(title, some) for title, some in kinds.items() if some]


def opening(messages: Sequence[Mapping[str, str]], columns: int = 90) -> str:
    """The last turn of a prompt in one line."""
    return charts.shorten(" ".join(messages[-1]["content"].split()), columns) if messages else ""
