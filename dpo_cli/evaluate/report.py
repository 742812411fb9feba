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
from dpo_cli.evaluate.summary import warnings
from dpo_cli.evaluate.tables import BESIDE, Tables
from dpo_cli.evaluate.verdict import verdict
from dpo_cli.page import render
from dpo_cli.published import clean
from dpo_cli.show import LOSS, RATIO, escaped, fenced, shorten, show_figure, table
from dpo_cli.show import say as print_line
from dpo_cli.stats import opposite
from dpo_cli.terminal import print_markdown, terminal

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
    page = render(
        "evaluate/report.html.jinja",
        name=metrics["name"],
        verdict=metrics["verdict"],
        sentence=verdict(metrics, language)["sentence"],
        warnings=warnings(metrics, language),
        data_warnings=metrics["data"]["warnings"],
        facts=list(_facts(metrics, language)),
        sections=list(sections(metrics, language)),
        held_out=any("held_out" in one for one in metrics["curves"]),
        page_language=language,
        say=words.speaker(language),
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
    tables = Tables(metrics, brief=True)
    parts = tables.parts()
    if len(metrics["languages"]) > BESIDE and "pairs" in parts:
        parts["pairs"] += f"\n\n{tables.accuracy_tables()[words.say('languages')]}"
    shown = ("pairs", "sets", "answers", "samples", "judge")
    print_markdown("\n\n".join(parts[part] for part in shown if part in parts))
    said = [tables.judged(), *(f"warning: {warning}" for warning in metrics["warnings"])]
    terminal().print("", *filter(None, [*said, metrics["verdict"]["sentence"]]), sep="\n")
    print_line(f"report: {folder / 'report.html'}")  # whole, however long, so that it can be copied


def sections(metrics: Mapping[str, Any], language: str) -> Iterator[Section]:
    """The report's parts in the order that a reader needs, without what was not asked for; heads and leads in words."""
    leads = _leads(metrics)
    for section in _sections(metrics, language):
        values = leads.get(section.key)
        lead = words.say(f"{section.key}_lead", language, **values) if values else ""
        yield section._replace(title=words.say(section.key, language), lead=lead)


def _sections(metrics: Mapping[str, Any], language: str) -> Iterator[Section]:
    tables, say = Tables(metrics, language), words.speaker(language)
    parts = tables.parts()
    if metrics["examples"]:
        yield _examples(metrics["examples"], say)
    if "pairs" in parts:
        yield Section("pairs", parts["pairs"])
    if "sets" in parts:
        yield Section("sets", parts["sets"])
    yield Section("learned", parts["answers"], say("goods"))
    if "samples" in parts:
        yield Section("samples", parts["samples"], tables.sampled())
    if "judge" in parts:
        dots = charts.dots(tables.win_rates(), 0, 1, say("tuned_against_base"))
        yield Section("judge", parts["judge"], tables.judged(), [(say("tuned_against_base"), dots)])
    if "pairs" in parts:
        yield _accuracy(tables)
    yield _training(metrics, say)
    if languages := "\n\n".join(tables.by_language()):
        yield Section("languages", languages, folded=True)
    yield Section("data", _data(metrics["data"], say))
    made = [f"- {what}: {escaped(str(value))}" for what, value in metrics["environment"].items() if value]
    yield Section("made", "\n".join(made))
    yield Section("recipe", fenced(metrics["recipe"]), folded=True)


def _accuracy(tables: Tables) -> Section:
    groups, say = tables.accuracies(), tables.say
    ends = charts.scale(dot for dots in groups.values() for dot in dots)
    drawn = [(title, charts.dots(dots, *ends, f"{say('accuracy')}. {title}")) for title, dots in groups.items()]
    return Section("accuracy", "\n\n".join(tables.accuracy_tables().values()), "", drawn, folded=True)


def _training(metrics: Mapping[str, Any], say: words.Say) -> Section:
    """Curves, and before them the margins of held-out pairs where there are any."""
    lines = []
    for one in metrics["curves"]:
        title = say(f"curve_{one['key']}")
        lines.append((title, charts.curve(one["points"], title, one.get("held_out", ()), say)))
    if not metrics["pairs"]:
        return Section("training", charts=lines)
    margins = metrics["histogram"]
    histogram = charts.histogram(margins["edges"], margins["counts"], margins["right"], say)
    return Section("margins", charts=[(say("margins_drawn"), histogram), *lines])


def _leads(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each group's sentence is filled with; no sentence where there is nothing to say."""
    pairs, samples, judge, data = (metrics[part] for part in ("pairs", "samples", "judge", "data"))
    found: dict[str, dict[str, Any]] = {
        "learned": {side: show_figure(metrics["answers"][f"loss_{side}"], LOSS) for side in ("base", "tuned")},
        "languages": {"n": len(metrics["languages"])},
        "data": {"kept": f"{data['kept']:,}", "came": f"{data['came']:,}"},
    }
    if pairs:
        accuracy, longer = pairs["reward_accuracy"], pairs["longer_wins"]
        bet = longer if longer["value"] >= 0.5 else opposite(longer)
        found["pairs"] = {"accuracy": show_figure(accuracy), "n": f"{accuracy['n']:,}"}
        found["accuracy"] = {"length": show_figure(bet, interval=False)}
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


def _examples(examples: Sequence[Mapping[str, Any]], say: words.Say) -> Section:
    lines = []
    for one in examples:
        score = "" if one["score"] is None else say("score", score=f"{one['score']:.2f}")
        lines.append(f"**{escaped(one['id'])}** ({escaped(one['language'])}{score}, {say(one['kind'])})")
        for message in one["prompt"]:
            lines += [f"{escaped(message['role'])}:", fenced(message["content"], SHOWN)]
        for model in ("base", "tuned"):
            cut = "" if one[f"{model}_finished"] else say("cut_off")
            count = say("count", n=f"{one[f'{model}_tokens']:,}")
            lines += [f"{say(model)}, {count}{cut}:", fenced(one[model], SHOWN)]
    scored = any(one["score"] is not None for one in examples)
    return Section("answers", "\n\n".join(lines), say("scores") if scored else "", examples=examples)


def _data(data: Mapping[str, Any], say: words.Say) -> str:
    counts = [
        [name, f"{one['got']:,}", "–" if one["wanted"] is None else f"{one['wanted']:,}"]
        for name, one in data["languages"].items()
    ]
    heads = [say(one) for one in ("language", "training_pairs", "wanted")]
    counted = table(heads, [*counts, [say("all"), f"{data['pairs']['train']:,}", ""]])
    parts = [counted, say("held_out", n=f"{data['pairs']['eval']:,}"), data["report"]]
    return "\n\n".join(filter(None, parts))


def opening(messages: Sequence[Mapping[str, str]], columns: int = 90) -> str:
    """The last turn of a prompt in one line."""
    return shorten(" ".join(messages[-1]["content"].split()), columns) if messages else ""
