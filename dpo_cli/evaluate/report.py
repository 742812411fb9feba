"""`eval/report.md` and one self-contained `eval/report.html`: no network, no scripts, light and dark.

Figures come from the metrics, curves from `train/log.jsonl`; nothing is computed here. The page is the Jinja template
beside this file (text is escaped by it); the two charts are drawn as plain SVG, coloured by the page's style sheet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.recipe import Recipe, dump
from dpo_cli.records import read_jsonl
from dpo_cli.run import Run, versions, write_text
from dpo_cli.stats import Figure

# metric, what it is called, what it says, and whether it is a share
ROWS = (
    ("reward_accuracy", "Reward accuracy", "chosen gained more than rejected; 50% before training", True),
    ("reward_accuracy_per_token", "… per token", "the same, gains divided by length", True),
    ("longer_wins", "Longer answer wins", "what always taking the longer answer would get", True),
    ("ranking_accuracy_base", "Ranking, base", "the base model finds chosen likelier per token", True),
    ("ranking_accuracy_tuned", "Ranking, tuned", "the tuned model does", True),
    ("margin", "Reward margin", "beta × (gain of chosen − gain of rejected), nats", False),
    ("chosen_drift", "Drift of chosen", "change of its log-probability, nats", False),
    ("rejected_drift", "Drift of rejected", "change of its log-probability, nats", False),
)

CURVES = (("rewards/accuracies", "reward accuracy"), ("loss", "loss"), ("rewards/margins", "reward margin"))


def write_report(recipe: Recipe, run: Run, metrics: dict[str, Any], margins: Sequence[float], folder: Path) -> None:
    """Write report.md and report.html into `folder`.

    Args:
        metrics: what stands in `eval/metrics.json`.
        margins: one reward margin a held-out pair, in nats.
    """
    from jinja2 import Environment, FileSystemLoader

    log = [row for row in read_jsonl(run["train"] / "log.jsonl") if "loss" in row]
    prepared = json.loads((run["prepare"] / "report.json").read_text(encoding="utf-8"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    groups = {"all": metrics["pairs"], **{name: part["pairs"] for name, part in metrics["languages"].items()}}
    record = run.record("train")
    page = environment.get_template("report.html.jinja").render(
        name=recipe.name,
        metrics=metrics,
        groups=groups,
        rows=ROWS,
        show=show,
        curves=[(title, curve([(row["step"], row[key]) for row in log if key in row], title)) for key, title in CURVES],
        histogram=histogram(margins),
        data={"pairs": prepared["pairs"], "languages": prepared["languages"]},
        environment={**versions(), "device": record.get("device"), "backend": record.get("backend")},
        recipe=dump(recipe),
    )
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", markdown(recipe.name, metrics, groups))


def markdown(name: str, metrics: dict[str, Any], groups: dict[str, dict[str, Figure]]) -> str:
    """The verdict, the table and the warnings, as Markdown."""
    lines = [f"# {name}", "", metrics["verdict"], ""]
    lines += [f"- Warning: {warning}" for warning in metrics["warnings"]]
    lines += ["", "| | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    for key, title, _, share in ROWS:
        lines.append(f"| {title} | " + " | ".join(show(figures[key], share) for figures in groups.values()) + " |")
    return "\n".join(lines) + "\n"


def show(figure: Figure, share: bool, interval: bool = True) -> str:
    """A figure, with its interval or without: `98.4% (94.2–99.6)` or `+1.66 (+1.58 to +1.73)`."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None or low is None or high is None:
        return "–"
    text = f"{100 * value:.1f}%" if share else f"{value:+.2f}"
    if interval:
        text += f" ({100 * low:.1f}–{100 * high:.1f})" if share else f" ({low:+.2f} to {high:+.2f})"
    return text.replace("-", "−")


# ------------------------------------------------------------------------------------------------------------ charts

Label = tuple[float, float, str, str]  # x, y, text, text-anchor

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 170, 44, 22, 10


def curve(points: Sequence[tuple[float, float]], title: str) -> str:
    """A line chart as SVG; empty where there are fewer than two points."""
    if len(points) < 2:
        return ""
    steps, values = [x for x, _ in points], [y for _, y in points]
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    dots = [(_x((x - steps[0]) / (steps[-1] - steps[0])), _y((y - low) / (high - low))) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    body = f'<polyline class="line" points="{line}"/>'
    labels: list[Label] = [(LEFT - 6, _y(1) + 4, f"{high:.3g}", "end"), (LEFT - 6, _y(0), f"{low:.3g}", "end")]
    labels += [(_x(0), HEIGHT - 6, f"step {steps[0]:g}", "start"), (_x(1), HEIGHT - 6, f"{steps[-1]:g}", "end")]
    return _svg(body, labels, f"{title} over training steps: from {values[0]:.3g} to {values[-1]:.3g}")


def histogram(values: Sequence[float], bins: int = 24) -> str:
    """Reward margins as SVG bars, those below 0 in another colour, with a line at 0."""
    if not values:
        return ""
    low, high = min(*values, 0.0), max(*values, 0.0)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    bars = []
    for index, count in enumerate(counts):
        x, y = _x(index / bins), _y(count / max(counts))
        wrong = "bar wrong" if low + (index + 0.5) * width < 0 else "bar"
        bars.append(
            f'<rect class="{wrong}" x="{x:.1f}" y="{y:.1f}" width="{_x(1 / bins) - _x(0) - 1:.1f}" '
            f'height="{_y(0) - y:.1f}"/>'
        )
    zero = _x((0 - low) / (high - low or 1.0))
    bars.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_y(1)}" y2="{_y(0)}"/>')
    labels: list[Label] = [(_x(0), HEIGHT - 6, f"{low:.2g}", "start"), (_x(1), HEIGHT - 6, f"{high:.2g}", "end")]
    labels += [(LEFT - 6, _y(1) + 4, str(max(counts)), "end"), (LEFT - 6, _y(0), "0", "end")]
    right = sum(value > 0 for value in values)
    return _svg("".join(bars), labels, f"reward margins of {len(values)} held-out pairs, {right} above 0")


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - 8)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _svg(body: str, labels: Sequence[Label], title: str) -> str:
    texts = "".join(
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>' for x, y, text, anchor in labels
    )
    axis = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 8}" y1="{_y(0)}" y2="{_y(0)}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{axis}{body}{texts}</svg>'
