"""`eval/report.md` and one self-contained `eval/report.html`: no network, no scripts, light and dark.

Both come from `metrics.json` alone, and from the same sections in Markdown; the page sets the charts of charts.py and
the answers in the place where the Markdown has tables and blocks. Its frame is the Jinja template beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

from dpo_cli.disk import write_text
from dpo_cli.evaluate import charts
from dpo_cli.evaluate.tables import BESIDE, accuracies, accuracy_tables, by_language, judged, parts, sampled, win_rates
from dpo_cli.show import escaped, fenced, print_markdown, shorten, table, terminal, to_html

KINDS = {"best": "Best by the judge", "worst": "Worst by the judge", "random": "Drawn at random"}
SHOWN = 600  # characters of a prompt or an answer in the Markdown


class Section(NamedTuple):
    """A part of the report.

    Attributes:
        text: Markdown.
        note: what stands above it, and on the page above the charts; plain text.
        charts: (caption, SVG).
        examples: answers that the page shows side by side, and `text` one after the other.
        folded: the page shows `text` only to who opens it.
    """

    title: str
    text: str = ""
    note: str = ""
    charts: Sequence[tuple[str, str]] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    folded: bool = False


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """Write report.md and report.html into `folder`, from what stands in `eval/metrics.json`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    found = list(sections(metrics))
    page = environment.get_template("page.html.jinja").render(metrics, sections=found, to_html=to_html, opening=opening)
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", markdown(metrics, found))


def markdown(metrics: Mapping[str, Any], found: Sequence[Section]) -> str:
    """report.md."""
    lines = [f"# {escaped(metrics['name'])}", escaped(metrics["verdict"]["sentence"])]
    if metrics["warnings"]:
        lines.append("\n".join(f"- Warning: {escaped(warning)}" for warning in metrics["warnings"]))
    for section in found:
        if section.text:
            lines += [f"## {section.title}", *filter(None, [escaped(section.note)]), section.text]
    return "\n\n".join(lines) + "\n"


def print_report(folder: Path) -> None:
    """Print what stands in a run's `eval`, for 80 columns; the verdict and where the report is come last."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    tables = parts(metrics, brief=True)
    if len(metrics["languages"]) > BESIDE and "pairs" in tables:
        tables["pairs"] += f"\n\n{accuracy_tables(metrics)['By language']}"
    print_markdown("\n\n".join(tables[part] for part in ("pairs", "answers", "samples", "judge") if part in tables))
    said = [judged(metrics["judge"]), *(f"warning: {warning}" for warning in metrics["warnings"])]
    terminal().print(
        "", *filter(None, said), metrics["verdict"]["sentence"], f"report: {folder / 'report.html'}", sep="\n"
    )


def sections(metrics: Mapping[str, Any]) -> Iterator[Section]:
    """The report's parts in the order that a reader needs; without what was not asked for."""
    tables, judge = parts(metrics), metrics["judge"]
    if "pairs" in tables:
        yield Section("Held-out pairs", tables["pairs"])
    yield Section("Held-out answers", tables["answers"], "Chosen answers, or those that are called good.")
    if "samples" in tables:
        note = f"{sampled(metrics['sampling'])} Base → tuned, and the change from prompt to prompt."
        yield Section("Sampled answers", tables["samples"], note)
    if "judge" in tables:
        dots = charts.dots(win_rates(metrics), 0, 1, "Win rate of the tuned model over the base")
        yield Section("Judge", tables["judge"], judged(judge), [("Tuned against base", dots)])
    if "pairs" in tables:
        yield _accuracy(metrics)
    lines = [(one["title"], charts.curve(one["points"], one["title"])) for one in metrics["curves"]]
    if "pairs" in tables:
        margins = metrics["histogram"]
        histogram = charts.histogram(margins["edges"], margins["counts"], margins["right"])
        yield Section(
            "Margins and training",
            note="The margins of the held-out pairs: right of 0 is right. Then what training logged, step by step.",
            charts=[("reward margins of held-out pairs, nats", histogram), *lines],
        )
    else:
        yield Section("Training", note="What training logged, step by step.", charts=lines)
    yield from _examples(metrics["examples"])
    if languages := "\n\n".join(by_language(metrics)):
        yield Section("By language", languages, folded=True)
    yield Section("Data", _data(metrics["data"]))
    made = [f"- {what}: {escaped(str(value))}" for what, value in metrics["environment"].items() if value]
    yield Section("How it was made", "\n".join(made))
    yield Section("Recipe", fenced(metrics["recipe"]), folded=True)


def _accuracy(metrics: Mapping[str, Any]) -> Section:
    groups = accuracies(metrics)
    ends = charts.scale(dot for _, dots in groups for dot in dots)
    drawn = [(title, charts.dots(dots, *ends, f"Reward accuracy. {title}")) for title, dots in groups]
    return Section("Reward accuracy", "\n\n".join(accuracy_tables(metrics).values()), "", drawn, folded=True)


def _examples(examples: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    for kind, title in KINDS.items():
        some = [one for one in examples if one["kind"] == kind]
        lines = []
        for one in some:
            score = "" if one["score"] is None else f", score {one['score']:.2f}"
            lines.append(f"**{escaped(one['id'])}** ({escaped(one['language'])}{score})")
            for message in one["prompt"]:
                lines += [f"{escaped(message['role'])}:", fenced(message["content"], SHOWN)]
            for model in ("base", "tuned"):
                cut = "" if one[f"{model}_finished"] else ", cut off"
                lines += [f"{model}, {one[f'{model}_tokens']:,} tokens{cut}:", fenced(one[model], SHOWN)]
        if some:
            scored = any(one["score"] is not None for one in some)
            note = "Scores: 1 where the tuned model's answer is better, 0 where the base's is." if scored else ""
            yield Section(title, "\n\n".join(lines), note, examples=some)


def _data(data: Mapping[str, Any]) -> str:
    counts = [
        [name, f"{one['got']:,}", "–" if one["wanted"] is None else f"{one['wanted']:,}"]
        for name, one in data["languages"].items()
    ]
    counted = table(["language", "training pairs", "wanted"], [*counts, ["all", f"{data['pairs']['train']:,}", ""]])
    return f"{counted}\n\n{data['pairs']['eval']:,} pairs are held out."


def opening(messages: Sequence[Mapping[str, str]], columns: int = 90) -> str:
    """The last turn of a prompt in one line."""
    return shorten(" ".join(messages[-1]["content"].split()), columns) if messages else ""
