"""Which figures of `metrics.json` the report and the terminal show, under what name; their tables in Markdown.

Nothing is computed here: a figure is looked up, rounded and put in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_cli.evaluate.charts import Dot
from dpo_cli.show import NATS, RATIO, SHARE, Unit, escaped, shorten, show_figure, table

BESIDE = 2  # languages that have room beside the whole on 80 columns


class Row(NamedTuple):
    """A line of a table: the metric's name, what it is called, what it says, its unit.

    `compared`: three figures, `<key>_base`, `<key>_tuned` and `<key>_change`.
    `brief`: the terminal shows it too.
    """

    key: str
    title: str
    meaning: str
    unit: Unit = SHARE
    compared: bool = False
    brief: bool = True

    def sides(self, figures: Mapping[str, Any]) -> str:
        """Both models' figures, `54.9% → 62.5%`."""
        return " → ".join(show_figure(figures[f"{self.key}_{one}"], self.unit, False) for one in ("base", "tuned"))


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

ANSWER_ROWS = (
    Row("loss", "Loss", "nats a token, of the answers to be learned", Unit(3), compared=True),
    Row("perplexity", "Perplexity", "exp of the loss", Unit(2), compared=True),
)

SAMPLE_ROWS = (
    Row("valid_rate", "Valid", "ended, not empty, in the prompt's language, no repetition, no markers", compared=True),
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


def beside(title: str, groups: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], counted: str, brief: bool) -> str:
    """Lay out the first group with intervals, and what the others have beside it.

    Args:
        title: over the names.
        groups: name -> figures.
        counted: the figure whose n stands over a group.
        brief: for the terminal: no meanings, and only the brief rows.
    """
    parts = list(groups.values())
    heads = [title, *(f"{shorten(name, 12)}, n = {one[counted]['n']:,}" for name, one in groups.items())]
    lines = []
    for row in rows if not brief else [row for row in rows if row.brief]:
        if row.compared:
            lines.append([row.title, *map(row.sides, parts), row.meaning])
            key, name, meaning, unit = f"{row.key}_change", "… change", "", row.unit.change
        else:
            key, name, meaning, unit = row.key, row.title, row.meaning, row.unit
        known = [(one.get(key), index == 0) for index, one in enumerate(parts)]
        cells = [show_figure(figure, unit, first) if figure else "" for figure, first in known]
        if cells[0]:
            lines.append([name, *cells, meaning])
    return _table(heads, lines, brief, left=(1,))


def changes(title: str, figures: Mapping[str, Any], rows: Sequence[Row], brief: bool) -> str:
    """Lay out both models' figures and their change with its interval; a figure of its own stands in the last place."""
    lines = []
    for row in rows:
        if row.compared:
            change = show_figure(figures[f"{row.key}_change"], row.unit.change)
            lines.append([row.title, row.sides(figures), change, row.meaning])
        else:
            lines.append([row.title, "", show_figure(figures[row.key], row.unit), row.meaning])
    return _table([title, "base → tuned", "change, 95% interval"], lines, brief)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], brief: bool, left: tuple[int, ...] = ()) -> str:
    if brief:
        return table(heads, [line[:-1] for line in lines], left)
    return table([*heads, "what it says"], lines, (*left, len(heads)))


def parts(metrics: Mapping[str, Any], brief: bool = False) -> dict[str, str]:
    """The tables of pairs, answers, samples and judge; without what was not asked for."""
    languages = metrics["languages"] if 1 < len(metrics["languages"]) <= BESIDE else {}
    found = {}
    for part, title, rows, counted in (
        ("pairs", "held-out pairs", ROWS, "reward_accuracy"),
        ("answers", "held-out answers", ANSWER_ROWS, "loss_tuned"),
        ("judge", "judge", JUDGE_ROWS, "win_rate"),
    ):
        if metrics[part]:
            groups = {"all": metrics[part], **{name: one[part] for name, one in languages.items() if one[part]}}
            found[part] = beside(title, groups, rows, counted, brief)
    if metrics["samples"]:
        title = f"sampled answers, n = {metrics['samples']['tokens_tuned']['n']:,}"
        found["samples"] = changes(title, metrics["samples"], SAMPLE_ROWS, brief)
    if metrics["sets"]:
        found["sets"] = test_sets(metrics["sets"], brief)
    return found


def by_language(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Every language's own tables, with intervals; nothing where there is but one."""
    if len(metrics["languages"]) < 2:
        return
    for name, one in metrics["languages"].items():
        if one["pairs"]:
            yield beside("held-out pairs", {name: one["pairs"]}, ROWS, "reward_accuracy", False)
        yield beside("held-out answers", {name: one["answers"]}, ANSWER_ROWS, "loss_tuned", False)
        if one["samples"]:
            title = f"sampled answers, {name}, n = {one['samples']['tokens_tuned']['n']:,}"
            yield changes(title, one["samples"], SAMPLE_ROWS, False)
        if one["judge"]:
            yield beside("judge", {name: one["judge"]}, JUDGE_ROWS, "win_rate", False)


def test_sets(sets: Mapping[str, Any], brief: bool = False) -> str:
    """Lay out the figures of the test sets, and below them each set's subsets and languages; nothing without sets."""
    if not sets:
        return ""
    heads = ["test set", "n", "reward accuracy", "longer wins", "ranking"]
    ranking = next(row for row in ROWS if row.key == "ranking_accuracy")

    def line(name: str, pairs: Mapping[str, Any]) -> list[str]:
        accuracy, longer = pairs["reward_accuracy"], show_figure(pairs["longer_wins"], SHARE, False)
        return [name, f"{accuracy['n']:,}", show_figure(accuracy), longer, ranking.sides(pairs)]

    found = [table(heads, [line(shorten(name, 22), one["pairs"]) for name, one in sets.items()])]
    for name, one in sets.items() if not brief else ():
        for part in ("subsets", "languages"):
            if one[part]:
                rows = [line(shorten(group, 40), figures["pairs"]) for group, figures in one[part].items()]
                found.append(table([f"{shorten(name, 22)}, {part}", *heads[1:]], rows))
    counts = [
        f"- {escaped(name)}: {one['kept']:,} of {one['in']:,} prompts scored"
        + "".join(f", {count:,} {reason}" for reason, count in one["dropped"].items())
        + f"; {one['overlap']:,} were trained on"
        for name, one in sets.items()
    ]
    return "\n\n".join([*found, "\n".join(counts)])


def accuracies(metrics: Mapping[str, Any]) -> list[tuple[str, list[Dot]]]:
    """Reward accuracy beside what is to be had without a model, and by language, source, margin and length.

    Where there is only one language, source or quartile, there is nothing to set side by side and it is left out.
    """
    if not metrics["pairs"]:
        return []
    baselines, shortcut = metrics["baselines"], metrics["baselines"]["shortcut"]
    rivals = {
        "reward accuracy": metrics["pairs"]["reward_accuracy"],
        "the longer answer": baselines["longer_wins"],
        "longer/shorter, as in training": baselines["majority"],
        f"in training: {shortcut['name']}" if shortcut else "": shortcut,
    }
    found = [("What it has to beat", [Dot(name, one, show_figure(one)) for name, one in rivals.items() if one])]
    groups = {
        "By language": metrics["languages"].items(),
        "By source": metrics["sources"].items(),
        "By the data's own margin": [(_reach(one, 2), one) for one in metrics["margin_quartiles"]],
        "By length, tokens an answer": [(_reach(one, 0), one) for one in metrics["length_quartiles"]],
    }
    for title, some in groups.items():
        rows = []
        for name, part in some:
            if not part["pairs"]:
                continue
            figure = part["pairs"]["reward_accuracy"]
            label = f"{shorten(name, 22)}, n = {figure['n']:,}"
            rows.append(Dot(label, figure, show_figure(figure), part["pairs"]["longer_wins"]["value"]))
        if len(rows) > 1:
            found.append((title, rows))
    return found


def accuracy_tables(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The same as tables, by title."""
    found = {}
    for title, dots in accuracies(metrics):
        rivals = ["–" if dot.rival is None else f"{SHARE.write(dot.rival)}%" for dot in dots]
        rows = [[dot.label, dot.text, rival] for dot, rival in zip(dots, rivals, strict=True)]
        found[title] = table([title, "reward accuracy", "longer answer wins"], rows)
    return found


def _reach(quartile: Mapping[str, Any], places: int) -> str:
    """`0.10 to 0.20`, or one number where both ends look alike."""
    return " to ".join(dict.fromkeys(f"{quartile[end]:,.{places}f}" for end in ("from", "to")))


def win_rates(metrics: Mapping[str, Any]) -> list[Dot]:
    """Win rates, raw and length-adjusted, of all prompts and of each language where there are several."""
    several = {name: one["judge"] for name, one in metrics["languages"].items()}
    groups = {"": metrics["judge"], **({f", {name}": one for name, one in several.items()} if len(several) > 1 else {})}
    return [
        Dot(f"{title}{name}", group[key], show_figure(group[key]))
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
