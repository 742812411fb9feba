"""The tables of figures that the report and the terminal show, in Markdown, and which figures they are.

Nothing is computed here: a figure is looked up, rounded and put in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_cli.evaluate import words
from dpo_cli.evaluate.charts import Dot
from dpo_cli.evaluate.figure_names import figure_name
from dpo_cli.show import LOSS, NATS, RATIO, SHARE, Unit, escaped, shorten, show_figure, table

BESIDE = 2  # languages that have room beside the whole on 80 columns


class Row(NamedTuple):
    """A line of a table: the metric's key, by which figure_names.py names it, and its unit.

    `compared`: three figures, `<key>_base`, `<key>_tuned` and `<key>_change`.
    `brief`: the terminal shows it too.
    """

    key: str
    unit: Unit = SHARE
    compared: bool = False
    brief: bool = True

    def sides(self, figures: Mapping[str, Any]) -> str:
        """Both models' figures, `55% → 63%`."""
        return " → ".join(show_figure(figures[f"{self.key}_{one}"], self.unit, False) for one in ("base", "tuned"))


RANKING = Row("ranking_accuracy", compared=True)
ROWS = (
    Row("reward_accuracy"),
    Row("reward_accuracy_per_token"),
    Row("longer_wins"),
    RANKING,
    Row("margin", NATS),
    Row("margin_median", NATS, brief=False),
    Row("margin_p10", NATS, brief=False),
    Row("margin_p90", NATS, brief=False),
    Row("chosen_drift", NATS),
    Row("chosen_drift_per_token", Unit(3, signed=True), brief=False),
    Row("rejected_drift", NATS),
    Row("rejected_drift_per_token", Unit(3, signed=True), brief=False),
)
ANSWER_ROWS = (
    Row("loss", LOSS, compared=True),
    Row("perplexity", Unit(2), compared=True),
    Row("auroc"),
)
SAMPLE_ROWS = (
    Row("valid_rate", compared=True),
    Row("kl", Unit(4)),
    Row("kl_total", Unit(2)),
    Row("length_ratio", RATIO),
    Row("tokens", Unit(1), compared=True),
    Row("truncated", compared=True),
    Row("repetition", compared=True),
    Row("repetitive", compared=True),
    Row("distinct_2", Unit(3), compared=True),
    Row("compression", Unit(2), compared=True),
    Row("language_match", compared=True),
    Row("refusal", compared=True),
)
JUDGE_ROWS = (
    Row("win_rate"),
    Row("length_adjusted_win_rate"),
    Row("wins"),
    Row("ties"),
    Row("losses"),
    Row("position_consistency"),
    Row("score_difference", NATS),
    Row("calibration"),
)
# The tables, by their part of metrics.json: the rows, and the figure whose n stands over each column.
PARTS: dict[str, tuple[Sequence[Row], str]] = {
    "pairs": (ROWS, "reward_accuracy"),
    "answers": (ANSWER_ROWS, "loss_tuned"),
    "samples": (SAMPLE_ROWS, "tokens_tuned"),
    "judge": (JUDGE_ROWS, "win_rate"),
}


class Tables:
    """Lay out `metrics.json` in Markdown tables.

    Args:
        language: what they are written in, en or zh.
        brief: for the terminal: no meanings, only the brief rows, and few languages beside the whole.
    """

    def __init__(self, metrics: Mapping[str, Any], language: str = "en", brief: bool = False) -> None:
        self.metrics, self.language, self.brief, self.say = metrics, language, brief, words.speaker(language)

    def parts(self) -> dict[str, str]:
        """The tables of pairs, answers, samples, judge and test sets; without what was not asked for."""
        metrics, found = self.metrics, {}
        several = len(metrics["languages"]) > 1 and not (self.brief and len(metrics["languages"]) > BESIDE)
        for part in PARTS:
            if metrics[part]:
                languages = metrics["languages"].items() if several else ()
                groups = {name: one[part] for name, one in languages if one[part]}
                found[part] = self._figures(part, {self.say("all"): metrics[part], **groups})
        if metrics["sets"]:
            found["sets"] = self._sets(metrics["sets"])
        return found

    def accuracies(self) -> dict[str, list[Dot]]:
        """Reward accuracy beside what is to be had without a model, and by language, source, margin and length.

        Where there is only one language, source or quartile, there is nothing to set side by side and it is left out.
        """
        metrics, say = self.metrics, self.say
        if not metrics["pairs"]:
            return {}
        baselines, shortcut = metrics["baselines"], metrics["baselines"]["shortcut"]
        rivals = {
            self._name("reward_accuracy"): metrics["pairs"]["reward_accuracy"],
            say("bet_longer"): baselines["longer_wins"],
            say("bet_trained"): baselines["majority"],
            say("bet_shortcut", name=shortcut["name"]) if shortcut else "": shortcut,
        }
        found = {say("to_beat"): [Dot(name, one) for name, one in rivals.items() if one]}
        groups = {
            "languages": metrics["languages"].items(),
            "by_source": metrics["sources"].items(),
            "by_margin": [(self._reach(one, 2), one) for one in metrics["margin_quartiles"]],
            "by_length": [(self._reach(one, 0), one) for one in metrics["length_quartiles"]],
        }
        for title, some in groups.items():
            rows = [_dot(name, part["pairs"]) for name, part in some if part["pairs"]]
            if len(rows) > 1:
                found[say(title)] = rows
        return found

    def accuracy_tables(self) -> dict[str, str]:
        """The same as tables, by title."""
        found = {}
        for title, dots in self.accuracies().items():
            rivals = [show_figure(dot.rival, interval=False) if dot.rival else "–" for dot in dots]
            rows = [[dot.label, dot.text, rival] for dot, rival in zip(dots, rivals, strict=True)]
            found[title] = table([title, *map(self._name, ("reward_accuracy", "longer_wins"))], rows)
        return found

    def win_rates(self) -> list[Dot]:
        """Win rates, raw and length-adjusted, of all prompts and of each language where there are several."""
        several = {name: one["judge"] for name, one in self.metrics["languages"].items()}
        groups = {"": self.metrics["judge"], **(several if len(several) > 1 else {})}
        found = []
        for name, group in groups.items():
            for key in ("win_rate", "length_adjusted_win_rate") if group else ():
                label = self.say("of_language", what=self._name(key), name=name) if name else self._name(key)
                found.append(Dot(label, group[key]))
        return found

    def judged(self) -> str:
        """Who judged how many prompts, and what chance would give."""
        judge, say = self.metrics["judge"], self.say
        if not judge:
            return ""
        note = say("judged", model=judge["model"], kind=judge["kind"], judged=judge["judged"], asked=judge["asked"])
        if judge["p_value"] is not None:
            note += say("judged_chance", p="< 0.001" if judge["p_value"] < 0.001 else f"= {judge['p_value']:.3f}")
        return note + (say("judged_template", digest=judge["template_sha256"][:12]) if judge["template_sha256"] else "")

    def _name(self, key: str) -> str:
        return figure_name(key, self.language)[0]

    def _figures(self, part: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
        """A column a group, with intervals; on the terminal only the first has them. Of two models a second line."""
        rows, counted = PARTS[part]
        heads = [f"{shorten(name, 12)}, n = {one[counted]['n']:,}" for name, one in groups.items()]
        lines = []
        for row in [row for row in rows if row.brief or not self.brief]:
            title, meaning = figure_name(row.key, self.language)
            key, unit = row.key, row.unit
            if row.compared:
                lines.append([title, *map(row.sides, groups.values()), meaning])
                key, title, meaning, unit = f"{row.key}_change", self.say("change"), "", row.unit.change
            found = [(figures.get(key), place == 0 or not self.brief) for place, figures in enumerate(groups.values())]
            cells = [show_figure(one, unit, interval, self.say("to")) if one else "" for one, interval in found]
            if cells[0]:
                lines.append([title, *cells, meaning])
        if self.brief:
            return table([self.say(f"{part}_head"), *heads], [line[:-1] for line in lines], left=(1,))
        return table([self.say(f"{part}_head"), *heads, self.say("says")], lines, left=range(len(heads) + 2))

    def _reach(self, quartile: Mapping[str, Any], places: int) -> str:
        """`0.10 to 0.20`, or one number where both ends look alike."""
        return self.say("to").join(dict.fromkeys(f"{quartile[end]:,.{places}f}" for end in ("from", "to")))

    def _sets(self, sets: Mapping[str, Any]) -> str:
        """The figures of the test sets; below them each set's subsets and languages, and what was counted."""
        say = self.say
        heads = [say("test_set"), "n", *map(self._name, ("reward_accuracy", "longer_wins", "ranking_accuracy"))]
        found = [table(heads, [_set_line(shorten(name, 22), one["pairs"]) for name, one in sets.items()])]
        counts = []
        for name, one in sets.items():
            for part, title in (("subsets", "subsets"), ("languages", "set_languages")) if not self.brief else ():
                rows = [_set_line(shorten(group, 40), figures["pairs"]) for group, figures in one[part].items()]
                if rows:
                    found.append(table([say(title, name=shorten(name, 22)), *heads[1:]], rows))
            dropped = "".join(f", {count:,} {reason}" for reason, count in one["dropped"].items())
            numbers = {"kept": f"{one['kept']:,}", "came": f"{one['in']:,}", "overlap": f"{one['overlap']:,}"}
            counts.append(f"- {escaped(say('set_counts', name=name, dropped=dropped, **numbers))}")
        return "\n\n".join([*found, "\n".join(counts)])


def _set_line(name: str, pairs: Mapping[str, Any]) -> list[str]:
    accuracy, longer = pairs["reward_accuracy"], show_figure(pairs["longer_wins"], interval=False)
    return [name, f"{accuracy['n']:,}", show_figure(accuracy), longer, RANKING.sides(pairs)]


def _dot(name: str, pairs: Mapping[str, Any]) -> Dot:
    figure = pairs["reward_accuracy"]
    return Dot(f"{shorten(name, 22)}, n = {figure['n']:,}", figure, pairs["longer_wins"])
