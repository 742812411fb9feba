"""What a comparison of runs shows: tables on the terminal, and compare.html with the answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_cli.disk import write_text
from dpo_cli.evaluate import charts, words
from dpo_cli.evaluate.compare import Compared, compare
from dpo_cli.evaluate.differences import HELD_OUT, JUDGE, VALID, Best, Difference, best, differences, examples, measured
from dpo_cli.evaluate.report import opening
from dpo_cli.page import render
from dpo_cli.published import clean
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.show import NATS, RATIO, SHARE, Unit, escaped, show_figure, table
from dpo_cli.show import say as print_line
from dpo_cli.terminal import print_markdown, terminal

ELO = Unit(0, signed=True, mark=0.0)
BESIDE = 3  # columns of figures with intervals that have room on 80 columns
MEASURES = {HELD_OUT: "reward_accuracy", JUDGE: "win_rate", VALID: "valid_rate"}  # by their key in words.py


def print_comparison(runs: Sequence[tuple[Recipe, Run]]) -> None:
    """Print the runs' figures, their differences from the first and which is the best; write its compare.html."""
    compared, remarks = compare(runs)
    found = {one.name: measured(run) for one, (_, run) in zip(compared, runs, strict=True)}
    judged_alike = all(one.strength for one in compared)
    worse = [one.name for one in compared if one.metrics.get("verdict", {}).get("kind") == "worse"]
    leads, several = best(found, judged_alike, worse), differences(found, judged_alike)

    shown = Comparison(compared, several, leads, "en")
    print_markdown("\n\n".join([*shown.tables(), shown.say("differences", run=compared[0].name), shown.differences()]))
    kind, means = shown.best()
    lines = [*shown.recipes(), *(f"warning: {remark}" for remark in remarks)]
    lines += [shown.say("no_candidate", run=name) for name in worse]
    terminal().print("", *lines, f"{kind}. {means}", sep="\n")

    language = compared[0].metrics.get("report_language", "en")
    page, path = Comparison(compared, several, leads, language), runs[0][1].folder / "compare.html"
    answers = examples(found, runs[0][0].seed)
    try:
        write_text(path, page.html([*(page.say("no_candidate", run=name) for name in worse)], remarks, answers))
        print_line(f"report: {path}")
    except OSError as error:  # a run that may only be read can be compared all the same
        print_line(f"warning: {path} can't be written: {error.strerror}")


class Comparison:
    """The parts of a comparison, in a language."""

    def __init__(
        self, compared: Sequence[Compared], changes: Sequence[Difference], leads: Best | None, language: str
    ) -> None:
        self.compared, self.changes, self.leads = compared, changes, leads
        self.language, self.say = language, words.speaker(language)

    def best(self) -> tuple[str, str]:
        """Which run is the best, or that none can be told; and a sentence of what that rests on."""
        kind = "unshared" if self.leads is None else "told" if self.leads.told else "untold"
        if self.leads is None:
            return self.say(kind), self.say(f"{kind}_means")
        nearest = self.leads.nearest
        values = {
            "run": self.leads.run,
            "other": nearest.against,
            "measure": self._measure(self.leads.measure),
            "change": self._change(nearest),
            "n": f"{nearest.change['n']:,}",
        }
        return self.say(kind, **values), self.say(f"{kind}_means", **values)

    def tables(self) -> Iterator[str]:
        """The runs' figures: accuracy by language, that of test sets, others, and the judge's."""
        languages = list(dict.fromkeys(name for one in self.compared for name in one.metrics["languages"]))
        beside = languages if 1 < len(languages) <= 6 else []
        rows = []
        for one in self.compared:
            parts = (one.metrics["languages"].get(name, {}).get("pairs") for name in beside)
            cells = (show_figure(part["reward_accuracy"], SHARE, len(beside) <= 2) if part else "–" for part in parts)
            rows.append([one.name, _figure(one.metrics["pairs"], "reward_accuracy"), *cells])
        yield table([self.say("run_head"), self.say("reward_accuracy"), *beside], rows)
        sets = list(dict.fromkeys(name for one in self.compared for name in one.metrics.get("sets", {})))
        for start in range(0, len(sets), BESIDE):
            some = sets[start : start + BESIDE]
            rows = []
            for one in self.compared:
                known = (one.metrics.get("sets", {}).get(name, {}).get("pairs") for name in some)
                rows.append([one.name, *(_figure(pairs, "reward_accuracy") for pairs in known)])
            yield table([self.say("run_head"), *some], rows)
        yield from self._others()

    def _others(self) -> Iterator[str]:
        columns = {"margin_head": ("pairs", "margin", NATS), "drift_head": ("pairs", "chosen_drift", NATS)}
        columns |= {
            "valid_rate": ("samples", "valid_rate_tuned", SHARE),
            "length_head": ("samples", "length_ratio", RATIO),
        }
        columns |= {"kl_head": ("samples", "kl", Unit(4))}
        rows = []
        for one in self.compared:
            cells = (_figure(one.metrics[part], key, unit, False) for part, key, unit in columns.values())
            cost = f"{one.training['seconds']:,.0f} s", f"{one.training['peak_memory_bytes'] / 1e9:.1f} GB"
            rows.append([one.name, *cells, *cost])
        yield table([self.say(one) for one in ("run_head", *columns, "train_head", "memory_head")], rows)
        if any(one.metrics["judge"] for one in self.compared):
            rates = ("win_rate", "length_adjusted_win_rate")
            rows = [
                [
                    one.name,
                    *(_figure(one.metrics["judge"], key) for key in rates),
                    show_figure(one.strength, ELO, to=self.say("to")) if one.strength else "–",
                ]
                for one in self.compared
            ]
            yield table([self.say(one) for one in ("run_head", "win_rate", "win_rate_adjusted", "elo_head")], rows)

    def differences(self) -> str:
        """Every other run's difference from the first."""
        rows = [
            [one.run, self._measure(one.measure), self._change(one), f"{one.change['n']:,}"] for one in self.changes
        ]
        heads = [self.say(one) for one in ("run_head", "figure_head", "difference_head", "prompts_head")]
        return table(heads, rows, left=(1,)) if rows else ""

    def recipes(self) -> list[str]:
        """What each recipe has otherwise than the first one's."""
        lines = []
        for one in self.compared[1:]:
            known = {key: ", ".join(map(str, of)) if isinstance(of, list) else of for key, of in one.differs.items()}
            what = ", ".join(f"{key}: {of}" for key, of in known.items()) or self.say("nothing")
            lines.append(self.say("differs", run=one.name, what=what))
        return lines

    def charts(self) -> Iterator[tuple[str, str]]:
        """Accuracy of each run on the held-out pairs and on each test set, and the judge's win rates, as dots."""
        for title, figures in self._drawn():
            known = [(name, figure) for name, figure in figures if figure]
            dots = [charts.Dot(name, figure, show_figure(figure)) for name, figure in known]
            if len(dots) > 1:
                yield title, charts.dots(dots, *charts.scale(dots), title)

    def _drawn(self) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
        sets = list(dict.fromkeys(name for one in self.compared for name in one.metrics.get("sets", {})))
        parts: dict[str, Any] = {self.say("reward_accuracy"): lambda one: one.metrics["pairs"]}
        for name in sets:
            parts[name] = lambda one, name=name: one.metrics.get("sets", {}).get(name, {}).get("pairs")
        for title, part in parts.items():
            yield title, [(one.name, (part(one) or {}).get("reward_accuracy")) for one in self.compared]
        rates = [(one.name, (one.metrics["judge"] or {}).get("win_rate")) for one in self.compared]
        yield self.say("win_rate"), rates

    def html(self, notes: Sequence[str], remarks: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> str:
        """compare.html; what models wrote stays as it is, and no path of this machine is in the rest."""
        kind, means = self.best()
        kinds = [one["kind"] for one in answers]
        counts = {name: kinds.count(name) for name in ("changed", "random")}
        return render(
            "evaluate/compare.html.jinja",
            name=self.say("compared", n=len(self.compared)),
            badge="better" if self.leads and self.leads.told else "",
            best=clean(kind),
            means=clean(means),
            warnings=clean([*notes, *remarks]),
            first=clean(self.compared[0].name),
            figures=clean("\n\n".join(self.tables())),
            differences=clean(self.differences()),
            charts=list(self.charts()),
            recipes=clean("\n".join(f"- {escaped(line)}" for line in self.recipes())),
            examples=answers,
            answers_lead=self.say("compared_answers_lead", **counts),
            page_language=self.language,
            say=self.say,
            opening=opening,
        )

    def _measure(self, measure: str) -> str:
        return self.say(MEASURES[measure]) if measure in MEASURES else measure

    def _change(self, one: Difference) -> str:
        return show_figure(one.change, SHARE.change, to=self.say("to"))


def _figure(part: Mapping[str, Any] | None, key: str, unit: Unit = SHARE, interval: bool = True) -> str:
    figure = (part or {}).get(key)
    return show_figure(figure, unit, interval) if figure else "–"
