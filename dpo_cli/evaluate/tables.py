"""Which figures of `metrics.json` the report and the terminal show, under what name; their tables in Markdown.

Nothing is computed here: a figure is looked up, rounded and put in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_cli.evaluate import words
from dpo_cli.evaluate.charts import Dot
from dpo_cli.evaluate.figure_names import figure_name
from dpo_cli.show import LOSS, NATS, RATIO, SHARE, Unit, escaped, shorten, show_figure, table

BESIDE = 2  # languages that have room beside the whole on 80 columns


class Row(NamedTuple):
    """A line of a table: the metric's name, by which figure_names.py calls it, and its unit.

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


ROWS = (
    Row("reward_accuracy"),
    Row("reward_accuracy_per_token"),
    Row("longer_wins"),
    Row("ranking_accuracy", compared=True),
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


RANKING = next(row for row in ROWS if row.key == "ranking_accuracy")
# Tables that are laid out alike: the part of metrics.json, its rows, and the figure whose n stands over them.
GROUPS = (("pairs", ROWS, "reward_accuracy"), ("answers", ANSWER_ROWS, "loss_tuned"), ("judge", JUDGE_ROWS, "win_rate"))


class Tables:
    """Lay out `metrics.json` in Markdown tables.

    Args:
        language: what they say, en or zh.
        brief: for the terminal: no meanings, and only the brief rows.
    """

    def __init__(self, metrics: Mapping[str, Any], language: str = "en", brief: bool = False) -> None:
        self.metrics, self.language, self.brief, self.say = metrics, language, brief, words.speaker(language)

    def parts(self) -> dict[str, str]:
        """The tables of pairs, test sets, answers, samples and judge; without what was not asked for."""
        metrics, found = self.metrics, {}
        languages = metrics["languages"] if 1 < len(metrics["languages"]) <= BESIDE else {}
        for part, rows, counted in GROUPS:
            if metrics[part]:
                groups = {name: one[part] for name, one in languages.items() if one[part]}
                found[part] = self._beside(part, {self.say("all"): metrics[part], **groups}, rows, counted)
        if metrics["samples"]:
            found["samples"] = self._changes(metrics["samples"])
        if metrics["sets"]:
            found["sets"] = self._sets(metrics["sets"])
        return found

    def by_language(self) -> Iterator[str]:
        """Every language's own tables, with intervals; nothing where there is but one."""
        if len(self.metrics["languages"]) < 2:
            return
        for name, one in self.metrics["languages"].items():
            for part, rows, counted in GROUPS:
                if part == "judge" and one["samples"]:
                    yield self._changes(one["samples"], name)
                if one[part]:
                    yield self._beside(part, {name: one[part]}, rows, counted)

    def accuracies(self) -> dict[str, list[Dot]]:
        """Reward accuracy beside what is to be had without a model, and by language, source, margin and length.

        Where there is only one language, source or quartile, there is nothing to set side by side and it is left out.
        """
        metrics, say = self.metrics, self.say
        if not metrics["pairs"]:
            return {}
        baselines, shortcut = metrics["baselines"], metrics["baselines"]["shortcut"]
        rivals = {
            say("reward_accuracy"): metrics["pairs"]["reward_accuracy"],
            say("rival_longer"): baselines["longer_wins"],
            say("rival_trained"): baselines["majority"],
            say("rival_shortcut", name=shortcut["name"]) if shortcut else "": shortcut,
        }
        found = {say("to_beat"): [Dot(name, one, show_figure(one)) for name, one in rivals.items() if one]}
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
            found[title] = table([title, self.say("reward_accuracy"), self.say("longer_wins")], rows)
        return found

    def win_rates(self) -> list[Dot]:
        """Win rates, raw and length-adjusted, of all prompts and of each language where there are several."""
        several = {name: one["judge"] for name, one in self.metrics["languages"].items()}
        groups = {"": self.metrics["judge"], **(several if len(several) > 1 else {})}
        found = []
        for name, group in groups.items():
            for key, title in (("win_rate", "win_rate"), ("length_adjusted_win_rate", "win_rate_adjusted")):
                what = self.say(title)
                label = self.say("of_language", what=what, name=name) if name else what
                if group:
                    found.append(Dot(label, group[key], show_figure(group[key])))
        return found

    def judged(self) -> str:
        """Who judged, how much of it counts, and what chance would say."""
        judge, say = self.metrics["judge"], self.say
        if not judge:
            return ""
        counts = {name: f"{judge[name]:,}" for name in ("judged", "asked")}
        said = say("judged", model=judge["model"], kind=judge["kind"], **counts)
        said += say("judged_failures", n=f"{judge['failures']:,}") if judge["failures"] else say("judged_all")
        if judge["p_value"] is not None:
            said += say("judged_chance", p="< 0.001" if judge["p_value"] < 0.001 else f"= {judge['p_value']:.3f}")
        if judge.get("cut"):
            said += say("judged_cut", n=f"{judge['cut']:,}")
        if judge["calibration_failures"]:
            said += say("judged_silent", n=f"{judge['calibration_failures']:,}")
        return said + (say("judged_template", digest=judge["template_sha256"][:12]) if judge["template_sha256"] else "")

    def sampled(self) -> str:
        """How the answers were drawn."""
        return self.say("sampled", **self.metrics["sampling"]) if self.metrics["sampling"] else ""

    # ---------------------------------------------------------------------------------------------------- layouts

    def _beside(self, part: str, groups: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], counted: str) -> str:
        """The first group with intervals, and what the others have beside it; the n of `counted` over each."""
        parts = list(groups.values())
        heads = [f"{shorten(name, 12)}, n = {one[counted]['n']:,}" for name, one in groups.items()]
        lines = []
        for row in rows if not self.brief else [row for row in rows if row.brief]:
            title, meaning = figure_name(row.key, self.language)
            key, unit = row.key, row.unit
            if row.compared:
                lines.append([title, *map(row.sides, parts), meaning])
                key, title, meaning, unit = f"{row.key}_change", self.say("change"), "", row.unit.change
            known = [(one.get(key), index == 0) for index, one in enumerate(parts)]
            cells = [show_figure(figure, unit, first, self.say("to")) if figure else "" for figure, first in known]
            if cells[0]:
                lines.append([title, *cells, meaning])
        return self._table([self.say(f"{part}_head"), *heads], lines, left=(1,))

    def _changes(self, figures: Mapping[str, Any], name: str = "") -> str:
        """Both models' figures and their change with its interval; a figure of its own stands in the last place."""
        what = self.say("samples_head")
        what = self.say("of_language", what=what, name=name) if name else what
        lines = []
        for row in SAMPLE_ROWS:
            title, meaning = figure_name(row.key, self.language)
            sides = row.sides(figures) if row.compared else ""
            key, unit = (f"{row.key}_change", row.unit.change) if row.compared else (row.key, row.unit)
            lines.append([title, sides, show_figure(figures[key], unit, to=self.say("to")), meaning])
        heads = [f"{what}, n = {figures['tokens_tuned']['n']:,}", self.say("sides"), self.say("change_interval")]
        return self._table(heads, lines)

    def _table(self, heads: Sequence[str], lines: Sequence[Sequence[str]], left: tuple[int, ...] = ()) -> str:
        if self.brief:
            return table(heads, [line[:-1] for line in lines], left)
        return table([*heads, self.say("says")], lines, (*left, len(heads)))

    def _reach(self, quartile: Mapping[str, Any], places: int) -> str:
        """`0.10 to 0.20`, or one number where both ends look alike."""
        return self.say("to").join(dict.fromkeys(f"{quartile[end]:,.{places}f}" for end in ("from", "to")))

    def _sets(self, sets: Mapping[str, Any]) -> str:
        """The figures of the test sets; below them each set's subsets and languages, and what was counted."""
        say, longer = self.say, "longer_wins_brief" if self.brief else "longer_wins"
        heads = [say("test_set"), "n", say("reward_accuracy"), say(longer), say("ranking")]
        found = [table(heads, [_set_line(shorten(name, 22), one["pairs"]) for name, one in sets.items()])]
        for name, one in sets.items() if not self.brief else ():
            for part, title in (("subsets", "subsets"), ("languages", "set_languages")):
                rows = [_set_line(shorten(group, 40), figures["pairs"]) for group, figures in one[part].items()]
                if rows:
                    found.append(table([say(title, name=shorten(name, 22)), *heads[1:]], rows))
        counts = []
        for name, one in sets.items():
            dropped = "".join(f", {count:,} {reason}" for reason, count in one["dropped"].items())
            numbers = {"kept": f"{one['kept']:,}", "came": f"{one['in']:,}", "overlap": f"{one['overlap']:,}"}
            counts.append(f"- {escaped(say('set_counts', name=name, dropped=dropped, **numbers))}")
        return "\n\n".join([*found, "\n".join(counts)])


def _set_line(name: str, pairs: Mapping[str, Any]) -> list[str]:
    accuracy, longer = pairs["reward_accuracy"], show_figure(pairs["longer_wins"], interval=False)
    return [name, f"{accuracy['n']:,}", show_figure(accuracy), longer, RANKING.sides(pairs)]


def _dot(name: str, pairs: Mapping[str, Any]) -> Dot:
    figure = pairs["reward_accuracy"]
    return Dot(f"{shorten(name, 22)}, n = {figure['n']:,}", figure, show_figure(figure), pairs["longer_wins"])
