"""`eval/report.md` and one self-contained `eval/report.html`: no network, no scripts, light and dark.

Both come from `metrics.json` alone, and from the same sections in Markdown; the page sets the charts of charts.py and
the answers in the place where the Markdown has tables and blocks, and speaks the language of `eval.report_language`.
report.md is English, for the model card takes parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.disk import read_json, write_text
from dpo_cli.evaluate import charts, words
from dpo_cli.evaluate.tables import BESIDE, Tables
from dpo_cli.evaluate.verdict import verdict, warnings
from dpo_cli.page import render
from dpo_cli.progress import clock
from dpo_cli.published import clean
from dpo_cli.show import LOSS, RATIO, escaped, fenced, shorten, show_figure
from dpo_cli.show import say as print_line
from dpo_cli.stats import opposite
from dpo_cli.terminal import print_markdown, terminal

SHOWN = 600  # characters of a prompt or an answer in the Markdown


class Section(NamedTuple):
    """A part of the report.

    Attributes:
        key: of its words in words.py.
        title: the heading; plain text.
        text: Markdown.
        notes: paragraphs above it, and on the page above the charts; plain text.
        charts: (caption, SVG).
        examples: answers that the page shows side by side, and `text` one after the other.
        folded: the page shows `text` only to who opens it.
    """

    key: str
    title: str
    text: str = ""
    notes: Sequence[str] = ()
    charts: Sequence[tuple[str, str]] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    folded: bool = False


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """Write report.md and report.html into `folder`, from what stands in `eval/metrics.json`."""
    whole = {name: metrics[name] for name in ("examples", "verdict")}  # what models wrote stays as it is
    metrics = clean({name: one for name, one in metrics.items() if name not in whole}) | whole
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
            lines += [f"## {section.title}", *map(escaped, section.notes), section.text]
    return "\n\n".join(lines) + "\n"


def print_report(folder: Path) -> None:
    """Print what stands in a run's `eval`, for 80 columns; the verdict and where the report is come last."""
    metrics = read_json(folder / "metrics.json")
    tables = Tables(metrics, brief=True)
    parts = tables.parts()
    if len(metrics["languages"]) > BESIDE and "pairs" in parts:
        parts["pairs"] += f"\n\n{tables.accuracy_tables()[words.say('languages')]}"
    shown = ("pairs", "sets", "answers", "samples", "judge")
    print_markdown("\n\n".join(parts[part] for part in shown if part in parts))
    lines = [tables.judged(), *(f"warning: {warning}" for warning in warnings(metrics))]
    if remarks := len(metrics["data"]["warnings"]):
        lines.append(f"{remarks} remark{'s' * (remarks > 1)} of prepare on the data: see the report")
    terminal().print("", *filter(None, [*lines, metrics["verdict"]["sentence"]]), sep="\n")
    print_line(f"report: {folder / 'report.html'}")  # whole, however long, so that it can be copied


def sections(metrics: Mapping[str, Any], language: str) -> Iterator[Section]:
    """The report's parts in the order that a reader needs, without what was not asked for."""
    tables, say = Tables(metrics, language), words.speaker(language)
    parts, pairs, data = tables.parts(), metrics["pairs"], metrics["data"]

    def section(key: str, text: str = "", *notes: str, **more: Any) -> Section:
        return Section(key, say(key), text, notes, **more)

    if examples := metrics["examples"]:
        kinds = [one["kind"] for one in examples]
        counts = {one: kinds.count(one) for one in ("changed", "random")}
        notes = [say("answers_lead", all=f"{metrics['sampling']['prompts']:,}", **counts)]
        notes += [say("scores")] if any(one["score"] is not None for one in examples) else []
        yield section("answers", _examples(examples, say), *notes, examples=examples)
    if pairs:
        accuracy = pairs["reward_accuracy"]
        lead = say("pairs_lead", accuracy=show_figure(accuracy), n=f"{accuracy['n']:,}")
        yield section("pairs", parts["pairs"], lead)
    if "sets" in parts:
        yield section("sets", parts["sets"], say("sets_lead", n=len(metrics["sets"])))
    losses = {side: show_figure(metrics["answers"][f"loss_{side}"], LOSS) for side in ("base", "tuned")}
    yield section("learned", parts["answers"], say("learned_lead", **losses))
    if samples := metrics["samples"]:
        repetitive = show_figure(samples["repetitive_tuned"], interval=False)
        lead = say("samples_lead", ratio=show_figure(samples["length_ratio"], RATIO), repetitive=repetitive)
        yield section("samples", parts["samples"], lead, say("sampled", **metrics["sampling"]))
    if judge := metrics["judge"]:
        rates = {"rate": show_figure(judge["win_rate"]), "adjusted": show_figure(judge["length_adjusted_win_rate"])}
        yield section("judge", parts["judge"], say("judge_lead", **rates), tables.judged())
    points: list[Any] = next((one["points"] for one in metrics["curves"] if one["key"] == "loss"), [])
    known = [(step, value) for step, value in points if value is not None]
    above = []
    if known:
        (_, first), (steps, last) = known[0], known[-1]
        above.append(say("training_lead", first=f"{first:.3g}", last=f"{last:.3g}", steps=f"{steps:,}"))
    if pairs:
        groups, longer, margins = tables.accuracies(), pairs["longer_wins"], metrics["histogram"]
        ends = charts.scale(dot for dots in groups.values() for dot in dots)
        dots = [(title, charts.dots(rows, *ends, f"{say('accuracy')}. {title}")) for title, rows in groups.items()]
        bet = show_figure(longer if longer["value"] >= 0.5 else opposite(longer), interval=False)
        text, note = "\n\n".join(tables.accuracy_tables().values()), say("accuracy_lead", length=bet)
        yield section("accuracy", text, note, charts=dots, folded=True)
        above.append(say("margins_lead", right=f"{margins['right']:,}", n=f"{sum(margins['counts']):,}"))
    drawn = list(_training_charts(metrics, say))
    yield section("margins" if pairs else "training", "", *above, charts=drawn)
    lead = say("data_lead", kept=f"{data['kept']:,}", came=f"{data['came']:,}")
    yield section("data", data["report"], lead)
    made = [f"- {what}: {escaped(str(value))}" for what, value in metrics["environment"].items() if value]
    yield section("made", "\n".join(made))
    yield section("recipe", fenced(metrics["recipe"]), folded=True)


def _training_charts(metrics: Mapping[str, Any], say: words.Say) -> Iterator[tuple[str, str]]:
    """The margins of held-out pairs, where there are any, and the curves."""
    if metrics["pairs"]:
        yield say("margins_drawn"), charts.histogram(**metrics["histogram"], say=say)
    for one in metrics["curves"]:
        title = say(f"curve_{one['key']}")
        yield title, charts.curve(one["points"], title, one.get("held_out", ()), say)


def _facts(metrics: Mapping[str, Any], language: str) -> Iterator[tuple[str, str]]:
    """Which run this is, for the top of the page: (what, value)."""
    about, counts = metrics["about"], metrics["data"]["pairs"]
    rows = words.say("rows_are", language, train=f"{counts['train']:,}", eval=f"{counts['eval']:,}")
    known = {**about, "data": rows, "duration": clock(about["seconds"])}
    for key in ("model", "method", "data", "date", "device", "duration"):
        if known[key]:
            yield words.say(key, language), str(known[key])


def _examples(examples: Sequence[Mapping[str, Any]], say: words.Say) -> str:
    lines = []
    for one in examples:
        score = "" if one["score"] is None else say("score", score=f"{one['score']:.2f}")
        lines.append(f"**{escaped(one['id'])}** ({escaped(one['language'])}{score}, {say(one['kind'])})")
        for message in one["prompt"]:
            lines += [f"{escaped(message['role'])}:", fenced(message["content"], SHOWN)]
        for name, answer in one["answers"].items():
            cut = "" if answer["finished"] else say("cut_off")
            lines += [f"{say(name)}, {say('count', n=answer['tokens'])}{cut}:", fenced(answer["text"], SHOWN)]
    return "\n\n".join(lines)


def opening(messages: Sequence[Mapping[str, str]], columns: int = 90) -> str:
    """The last turn of a prompt in one line."""
    return shorten(" ".join(messages[-1]["content"].split()), columns) if messages else ""
