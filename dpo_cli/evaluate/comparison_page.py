"""What a comparison of runs shows: tables on the terminal, and compare.html with the answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_cli.disk import write_text
from dpo_cli.evaluate import charts, compare, words
from dpo_cli.evaluate.compare import Compared, Difference
from dpo_cli.evaluate.report import opening
from dpo_cli.evaluate.tables import BY_KEY, figure_name
from dpo_cli.page import render
from dpo_cli.published import clean
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.show import SHARE, Unit, escaped, show_figure, table
from dpo_cli.show import say as print_line
from dpo_cli.terminal import print_markdown, terminal

ELO = Unit(0, signed=True, mark=0.0)
BESIDE = 3  # columns of figures with intervals that have room on 80 columns
# What is measured, by its key in tables.py; a test set is called by its name.
MEASURES = {compare.HELD_OUT: "reward_accuracy", compare.JUDGE: "win_rate", compare.VALID: "valid_rate"}
ACCURACY = ("pairs", "reward_accuracy")
OTHERS = (
    ("pairs", "margin"), ("pairs", "chosen_drift"), ("samples", "valid_rate_tuned"), ("samples", "length_ratio"),
    ("samples", "kl"),
)  # fmt: skip


def print_comparison(runs: Sequence[tuple[Recipe, Run]]) -> None:
    """Print the runs' figures, their differences from the first and which is the best; write its compare.html."""
    compared, remarks = compare.read_runs(runs)
    shown = Comparison(compared, "en")
    print_markdown("\n\n".join([*shown.tables(), shown.say("differences", run=shown.first), shown.differences()]))
    lines = [*shown.recipes(), *(f"warning: {remark}" for remark in remarks), *shown.no_candidates()]
    terminal().print("", *lines, ". ".join(shown.best()), sep="\n")

    page = Comparison(compared, compared[shown.first].metrics["report_language"])
    path = runs[0][1].folder / "compare.html"
    try:
        write_text(path, page.html(remarks, compare.examples(compared, runs[0][0].seed)))
        print_line(f"report: {path}")
    except OSError as error:  # a run that may only be read can be compared all the same
        print_line(f"warning: {path} can't be written: {error.strerror}")


class Comparison:
    """The parts of a comparison, in a language."""

    def __init__(self, runs: Mapping[str, Compared], language: str) -> None:
        self.runs, self.language, self.say = runs, language, words.speaker(language)
        self.first = next(iter(runs))
        self.worse = [name for name, one in runs.items() if one.metrics["verdict"]["kind"] == "worse"]
        self.left = {name: one for name, one in runs.items() if name not in self.worse}
        self.lead = compare.best(self.left) if len(self.left) > 1 else None

    def no_candidates(self) -> list[str]:
        """Which runs can't be the best, for they got worse."""
        return [self.say("no_candidate", run=name) for name in self.worse]

    def best(self) -> tuple[str, str]:
        """Which run is the best, or that none can be told; and a sentence of what that rests on."""
        if len(self.left) < 2:
            kind = "left" if self.left else "none_left"
            return self.say(kind, run="".join(self.left)), self.say(f"{kind}_means")
        if self.lead is None:
            return self.say("nothing_shared"), self.say("nothing_shared_means")
        kind = "best" if self.lead.clear else "no_best"
        values = {
            "run": self.lead.run,
            "other": self.lead.against,
            "measure": self._measure(self.lead.measure),
            "change": self._change(self.lead),
            "n": f"{self.lead.change['n']:,}",
        }
        return self.say(kind, **values), self.say(f"{kind}_means", **values)

    def tables(self) -> Iterator[str]:
        """The runs' figures: accuracy by language, that of test sets, others, what training took, and the judge's."""
        languages, sets = self._names("languages"), self._names("sets")
        by_language: dict[str, Sequence[str]] = {
            one: ("languages", one, *ACCURACY) for one in languages if 1 < len(languages) <= 6
        }
        yield self._table({self._name("reward_accuracy"): ACCURACY, **by_language}, len(by_language) < BESIDE)
        for start in range(0, len(sets), BESIDE):
            yield self._table({one: ("sets", one, *ACCURACY) for one in sets[start : start + BESIDE]})
        yield self._table({self._name(one[-1].removesuffix("_tuned")): one for one in OTHERS}, interval=False)
        took = [(name, one.training) for name, one in self.runs.items()]
        rows = [[name, f"{one['seconds']:,.0f} s", f"{one['peak_memory_bytes'] / 1e9:.1f} GB"] for name, one in took]
        yield table([self.say(one) for one in ("run", "train_head", "memory_head")], rows)
        if any(one.metrics["judge"] for one in self.runs.values()):
            yield self._table({self._name(key): ("judge", key) for key in ("win_rate", "length_adjusted_win_rate")})
        strengths = {name: one.strength for name, one in self.runs.items() if one.strength}
        if strengths:
            shown = [[name, show_figure(one, ELO, to=self.say("to"))] for name, one in strengths.items()]
            yield table([self.say("run"), self.say("elo_head")], shown)

    def differences(self) -> str:
        """Every other run's difference from the first."""
        rows = [
            [one.run, self._measure(one.measure), self._change(one), f"{one.change['n']:,}"]
            for one in compare.differences(self.runs)
        ]
        heads = [self.say(one) for one in ("run", "figure_head", "difference_head", "prompts_head")]
        return table(heads, rows, left=(1,)) if rows else ""

    def recipes(self) -> list[str]:
        """What each recipe has otherwise than the first one's."""
        lines = []
        for name, one in list(self.runs.items())[1:]:
            known = {key: ", ".join(map(str, of)) if isinstance(of, list) else of for key, of in one.differs.items()}
            what = ", ".join(f"{key}: {of}" for key, of in known.items()) or self.say("nothing")
            lines.append(self.say("differs", run=name, what=what))
        return lines

    def charts(self) -> Iterator[tuple[str, str]]:
        """Accuracy of each run on the held-out pairs and on each test set, and the judge's win rates, as dots."""
        paths: dict[str, Sequence[str]] = {
            self._name("reward_accuracy"): ACCURACY,
            self._name("win_rate"): ("judge", "win_rate"),
        }
        paths |= {name: ("sets", name, *ACCURACY) for name in self._names("sets")}
        for title, path in paths.items():
            figures = {name: _figure(one, *path) for name, one in self.runs.items()}
            dots = [charts.Dot(name, figure) for name, figure in figures.items() if figure]
            if len(dots) > 1:
                yield title, charts.dots(dots, *charts.scale(dots), title)

    def html(self, remarks: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> str:
        """compare.html; what models wrote stays as it is, and no path of this machine is in the rest."""
        kind, means = self.best()
        kinds = [one["kind"] for one in answers]
        counts = {name: kinds.count(name) for name in ("changed", "random")}
        return render(
            "evaluate/compare.html.jinja",
            name=self.say("compared", n=len(self.runs)),
            badge="better" if self.lead and self.lead.clear else "",
            best=clean(kind),
            means=clean(means),
            warnings=clean([*self.no_candidates(), *remarks]),
            first=self.first,
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

    def _table(self, columns: Mapping[str, Sequence[str]], interval: bool = True) -> str:
        """A row a run, a column a figure of metrics.json, by its name and the keys that lead to it."""
        rows = [[name, *(_cell(one, path, interval) for path in columns.values())] for name, one in self.runs.items()]
        return table([self.say("run"), *columns], rows)

    def _names(self, part: str) -> list[str]:
        """The languages or the test sets of all runs."""
        return list(dict.fromkeys(name for one in self.runs.values() for name in one.metrics[part]))

    def _measure(self, measure: str) -> str:
        return self._name(MEASURES[measure]).lower() if measure in MEASURES else measure

    def _name(self, key: str) -> str:
        return figure_name(key, self.language)

    def _change(self, one: Difference) -> str:
        return show_figure(one.change, SHARE.change, to=self.say("to"))


def _figure(one: Compared, *path: str) -> Any:
    """What stands in metrics.json under these keys; None where one is missing."""
    found: Any = one.metrics
    for key in path:
        found = found.get(key) if found else None
    return found


def _cell(one: Compared, path: Sequence[str], interval: bool) -> str:
    figure = _figure(one, *path)
    return show_figure(figure, BY_KEY[path[-1].removesuffix("_tuned")].unit, interval) if figure else "–"
