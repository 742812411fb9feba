"""`eval/report.md` and one self-contained `eval/report.html`: no network, no scripts, light and dark.

Both come from `metrics.json` alone, and from the same sections in Markdown; the page sets the charts of charts.py and
the answers in the place where the Markdown has tables and blocks, and speaks the language of `eval.report_language`.
report.md is English, for the model card takes parts of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.disk import write_text
from dpo_cli.evaluate import charts, words
from dpo_cli.evaluate.tables import BESIDE, accuracies, accuracy_tables, by_language, judged, parts, sampled, win_rates
from dpo_cli.page import render
from dpo_cli.published import clean
from dpo_cli.show import RATIO, Unit, escaped, fenced, print_markdown, say, shorten, show_figure, table, terminal

SHOWN = 600  # characters of a prompt or an answer in the Markdown


class Section(NamedTuple):
    """A part of the report.

    Attributes:
        key: of its heading in words.py.
        text: Markdown.
        note: what stands above it, and on the page above the charts; plain text.
        charts: (caption, SVG).
        examples: answers that the page shows side by side, and `text` one after the other.
        folded: the page shows `text` only to who opens it.
        title, lead: the heading, and what the part says in one sentence; plain text.
    """

    key: str
    text: str = ""
    note: str = ""
    charts: Sequence[tuple[str, str]] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    folded: bool = False
    title: str = ""
    lead: str = ""


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """Write report.md and report.html into `folder`, from what stands in `eval/metrics.json`."""
    said = {"examples": metrics["examples"], "verdict": metrics["verdict"]}  # what models wrote stays as it is
    metrics = clean({name: one for name, one in metrics.items() if name not in said}) | said
    write_text(folder / "report.md", markdown(metrics))
    language = metrics["report_language"]

    def say(key: str) -> str:
        return words.say(key, language)

    page = render(
        "evaluate/report.html.jinja",
        name=metrics["name"],
        verdict=metrics["verdict"],
        warnings=metrics["warnings"],
        facts=list(_facts(metrics, language)),
        sections=list(sections(metrics, language)),
        held_out=any("held_out" in one for one in metrics["curves"]),
        page_language=language,
        say=say,
        opening=opening,
    )
    write_text(folder / "report.html", page)


def markdown(metrics: Mapping[str, Any]) -> str:
    """report.md."""
    lines = [f"# {escaped(metrics['name'])}", escaped(metrics["verdict"]["sentence"])]
    if metrics["warnings"]:
        lines.append("\n".join(f"- Warning: {escaped(warning)}" for warning in metrics["warnings"]))
    for section in sections(metrics, "en"):
        if section.text:
            said = [escaped(one) for one in (section.lead, section.note) if one]
            lines += [f"## {section.title}", *said, section.text]
    return "\n\n".join(lines) + "\n"


def print_report(folder: Path) -> None:
    """Print what stands in a run's `eval`, for 80 columns; the verdict and where the report is come last."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    tables = parts(metrics, brief=True)
    if len(metrics["languages"]) > BESIDE and "pairs" in tables:
        tables["pairs"] += f"\n\n{accuracy_tables(metrics)['By language']}"
    print_markdown(
        "\n\n".join(tables[part] for part in ("pairs", "sets", "answers", "samples", "judge") if part in tables)
    )
    said = [judged(metrics["judge"]), *(f"warning: {warning}" for warning in metrics["warnings"])]
    terminal().print("", *filter(None, [*said, metrics["verdict"]["sentence"]]), sep="\n")
    say(f"report: {folder / 'report.html'}")  # whole, however long, so that it can be copied


def sections(metrics: Mapping[str, Any], language: str) -> Iterator[Section]:
    """The report's parts in the order that a reader needs, without what was not asked for; heads and leads in words."""
    leads = _leads(metrics)
    for section in _sections(metrics, language):
        values = leads.get(section.key)
        lead = words.say(f"{section.key}_lead", language, **values) if values else ""
        yield section._replace(title=words.say(section.key, language), lead=lead)


def _sections(metrics: Mapping[str, Any], language: str) -> Iterator[Section]:
    tables, judge = parts(metrics), metrics["judge"]
    if metrics["examples"]:
        yield _examples(metrics["examples"], language)
    if "pairs" in tables:
        yield Section("pairs", tables["pairs"])
    if "sets" in tables:
        yield Section("sets", tables["sets"])
    yield Section("learned", tables["answers"], "Chosen answers, or those that are called good.")
    if "samples" in tables:
        note = f"{sampled(metrics['sampling'])} Base → tuned, and the change from prompt to prompt."
        yield Section("samples", tables["samples"], note)
    if "judge" in tables:
        dots = charts.dots(win_rates(metrics), 0, 1, "Win rate of the tuned model over the base")
        yield Section("judge", tables["judge"], judged(judge), [("Tuned against base", dots)])
    if "pairs" in tables:
        yield _accuracy(metrics)
    yield _training(metrics)
    if languages := "\n\n".join(by_language(metrics)):
        yield Section("languages", languages, folded=True)
    yield Section("data", _data(metrics["data"]))
    made = [f"- {what}: {escaped(str(value))}" for what, value in metrics["environment"].items() if value]
    yield Section("made", "\n".join(made))
    yield Section("recipe", fenced(metrics["recipe"]), folded=True)


def _accuracy(metrics: Mapping[str, Any]) -> Section:
    groups = accuracies(metrics)
    ends = charts.scale(dot for _, dots in groups for dot in dots)
    drawn = [(title, charts.dots(dots, *ends, f"Reward accuracy. {title}")) for title, dots in groups]
    return Section("accuracy", "\n\n".join(accuracy_tables(metrics).values()), "", drawn, folded=True)


def _training(metrics: Mapping[str, Any]) -> Section:
    """Curves, and before them the margins of held-out pairs where there are any."""
    lines = [
        (one["title"], charts.curve(one["points"], one["title"], one.get("held_out", ()))) for one in metrics["curves"]
    ]
    if not metrics["pairs"]:
        return Section("training", charts=lines)
    margins = metrics["histogram"]
    histogram = charts.histogram(margins["edges"], margins["counts"], margins["right"])
    return Section("margins", charts=[("reward margins of held-out pairs, nats", histogram), *lines])


def _leads(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each group's sentence is filled with; no sentence where there is nothing to say."""
    pairs, samples, judge, data = (metrics[part] for part in ("pairs", "samples", "judge", "data"))
    found: dict[str, dict[str, Any]] = {
        "learned": {side: show_figure(metrics["answers"][f"loss_{side}"], Unit(3)) for side in ("base", "tuned")},
        "languages": {"n": len(metrics["languages"])},
        "data": {"kept": f"{data['kept']:,}", "came": f"{data['came']:,}"},
    }
    if pairs:
        accuracy, longer = pairs["reward_accuracy"], pairs["longer_wins"]["value"]
        found["pairs"] = {"accuracy": show_figure(accuracy), "n": f"{accuracy['n']:,}"}
        found["accuracy"] = {"length": f"{max(longer, 1 - longer):.1%}"}
    if metrics["sets"]:
        found["sets"] = {"n": len(metrics["sets"])}
    if samples:
        kinds = [one["kind"] for one in metrics["examples"]]
        counts = {kind: kinds.count(kind) for kind in ("changed", "random")}
        found["answers"] = {**counts, "all": f"{metrics['sampling']['prompts']:,}"}
        repetitive = show_figure(samples["repetitive_tuned"], interval=False)
        found["samples"] = {"ratio": show_figure(samples["length_ratio"], RATIO), "repetitive": repetitive}
    if judge:
        rate, adjusted = (show_figure(judge[name]) for name in ("win_rate", "length_adjusted_win_rate"))
        found["judge"] = {"rate": rate, "adjusted": adjusted}
    loss = [one["points"] for one in metrics["curves"] if one["key"] == "loss"]
    known = [(step, value) for step, value in (loss or [[]])[0] if value is not None]
    if known:
        ends = {"first": f"{known[0][1]:.3g}", "last": f"{known[-1][1]:.3g}", "steps": f"{known[-1][0]:,}"}
        found["training"] = ends
        margins = metrics["histogram"]
        found["margins"] = {"right": f"{margins['right']:,}", "n": f"{sum(margins['counts']):,}", **ends}
    return found


def _facts(metrics: Mapping[str, Any], language: str) -> Iterator[tuple[str, str]]:
    """Which run this is, for the top of the page: (what, value)."""
    about, counts = metrics["about"], metrics["data"]["pairs"]
    rows = words.say("rows_are", language, train=f"{counts['train']:,}", eval=f"{counts['eval']:,}")
    known = {**about, "run": metrics["name"], "rows": rows, "duration": duration(about["seconds"])}
    for key in ("run", "model", "method", "rows", "date", "device", "duration"):
        if known[key]:
            yield words.say(key, language), str(known[key])


def duration(seconds: float) -> str:
    """`1:24 min`, `3:05 h`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def _examples(examples: Sequence[Mapping[str, Any]], language: str) -> Section:
    lines = []
    for one in examples:
        score = "" if one["score"] is None else f", score {one['score']:.2f}"
        lines.append(
            f"**{escaped(one['id'])}** ({escaped(one['language'])}{score}, {words.say(one['kind'], language)})"
        )
        for message in one["prompt"]:
            lines += [f"{escaped(message['role'])}:", fenced(message["content"], SHOWN)]
        for model in ("base", "tuned"):
            cut = "" if one[f"{model}_finished"] else ", cut off"
            lines += [f"{model}, {one[f'{model}_tokens']:,} tokens{cut}:", fenced(one[model], SHOWN)]
    scored = any(one["score"] is not None for one in examples)
    return Section("answers", "\n\n".join(lines), words.say("scores", language) if scored else "", examples=examples)


def _data(data: Mapping[str, Any]) -> str:
    counts = [
        [name, f"{one['got']:,}", "–" if one["wanted"] is None else f"{one['wanted']:,}"]
        for name, one in data["languages"].items()
    ]
    counted = table(["language", "training pairs", "wanted"], [*counts, ["all", f"{data['pairs']['train']:,}", ""]])
    parts = [counted, f"{data['pairs']['eval']:,} pairs are held out.", data["report"]]
    return "\n\n".join(filter(None, parts))


def opening(messages: Sequence[Mapping[str, str]], columns: int = 90) -> str:
    """The last turn of a prompt in one line."""
    return shorten(" ".join(messages[-1]["content"].split()), columns) if messages else ""
