"""`eval/report.md` and one self-contained `eval/report.html`: no network, no scripts, light and dark.

Both come from `metrics.json` alone. The page is the Jinja template beside this file (text is escaped by it), with the
tables of tables.py and the charts of charts.py; the Markdown has the same tables.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_cli.disk import write_text
from dpo_cli.evaluate import charts
from dpo_cli.evaluate.tables import SHARE, accuracies, examples, judged, opening, sampled, tables, win_rates


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """Write report.md and report.html into `folder`, from what stands in `eval/metrics.json`."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    judge, margins, groups = metrics["judge"], metrics["histogram"], accuracies(metrics)
    heard = judge and judge["judged"]  # else no verdict came from it, and there are no shares
    ends = charts.scale(dot for _, dots in groups for dot in dots)
    page = environment.get_template("page.html.jinja").render(
        metrics,
        tables=tables(metrics),
        accuracies=[(title, charts.dots(dots, *ends, f"Reward accuracy. {title}")) for title, dots in groups],
        win_rates=charts.dots(win_rates(metrics), 0, 1, "Win rate of the tuned model over the base"),
        verdicts=charts.verdicts(*(judge[key]["value"] for key in ("wins", "ties", "losses"))) if heard else "",
        margins=charts.histogram(margins["edges"], margins["counts"], margins["right"]),
        lengths=charts.scatter(metrics["scatter"], "length difference against score"),
        lines=[(one["title"], charts.curve(one["points"], one["title"])) for one in metrics["curves"]],
        sampled=sampled(metrics["sampling"]),
        judged=judged(judge),
        shown=examples(metrics),
        opening=opening,
        tax_says=TAX_SAYS,
        tasks=tax_tasks(metrics),
        commands=tax_commands(metrics),
    )
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", markdown(metrics))


# -------------------------------------------------------------------------------------------------- alignment tax


class Task(NamedTuple):
    """A task of the lm-evaluation-harness, by its name in 0.4.13; `written`: the model writes its answer out."""

    name: str
    language: str
    written: bool
    why: str


TAX_SAYS = (
    "What the preference cost elsewhere is for lm-evaluation-harness to say; dpo-cli neither wraps nor needs it. "
    "Once dpo-cli export has run, base and exported model take the same tasks, each score with its standard error:"
)

TAX = (
    Task("ifeval", "en", True, "does it still do as told: instructions that a program can check"),
    Task("gsm8k", "en", True, "does it still reason, in steps, to a right number"),
    Task("mmlu", "en", False, "does it still know what it knew, multiple choice"),
    Task("cmmlu", "zh", False, "the same in Chinese, with subjects of China"),
    Task("mmlu_prox_lite_zh", "zh", True, "does it still reason in Chinese"),
)


def _thinking(metrics: Mapping[str, Any]) -> bool:
    return bool(yaml.safe_load(metrics["recipe"])["model"]["thinking"])


def tax_tasks(metrics: Mapping[str, Any]) -> list[Task]:
    """English always, because losses show there even where it was not trained; Chinese where it was.

    The harness refuses to score likelihoods, as mmlu and cmmlu do, with thinking on.
    """
    spoken, thinking = {"en", *metrics["languages"]}, _thinking(metrics)
    return [task for task in TAX if task.language in spoken and (task.written or not thinking)]


def tax_commands(metrics: Mapping[str, Any]) -> str:
    """The shell commands that put base and exported model through the same tasks."""
    think = "enable_thinking=True,think_end_token=</think>" if _thinking(metrics) else "enable_thinking=False"
    names = ",".join(task.name for task in tax_tasks(metrics))
    lines = ["pip install 'lm_eval[hf,ifeval]'"]
    for name, model in (("base", metrics["base_model"]), ("tuned", metrics["exported"])):
        arguments = shlex.quote(f"pretrained={model},dtype=bfloat16,{think}")
        lines += [
            f"lm_eval --model hf --model_args {arguments} \\",
            f"  --tasks {names} \\",
            f"  --apply_chat_template --batch_size auto --output_path lm_eval/{name}",
        ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- Markdown


def markdown(metrics: Mapping[str, Any]) -> str:
    """report.md: the same tables; accuracies as tables instead of charts, samples cut short."""
    return "\n\n".join(_markdown(metrics)) + "\n"


def _markdown(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_plain(metrics['name'])}"
    yield _plain(metrics["verdict"])
    if metrics["warnings"]:
        yield "\n".join(f"- Warning: {_plain(warning)}" for warning in metrics["warnings"])
    found = tables(metrics)
    said = {"pairs": "", "samples": sampled(metrics["sampling"]), "judge": judged(metrics["judge"])}
    for part, title in (("pairs", "Held-out pairs"), ("samples", "Sampled answers"), ("judge", "Judge")):
        if part in found:
            yield f"## {title}"
            yield from filter(None, [_plain(said[part])])
            lines = [[row.title, *map(str, cells)] for row, cells in found[part].rows]
            yield _table(["", *found[part].heads], lines)
    yield "## Reward accuracy"
    for title, dots in accuracies(metrics):
        rows = [[dot.label, dot.text, "–" if dot.rival is None else f"{SHARE.write(dot.rival)}%"] for dot in dots]
        yield _table([title, "reward accuracy", "longer answer wins"], rows)
    for title, some in examples(metrics):
        yield f"## {title}"
        for one in some:
            score = "" if one["score"] is None else f", score {one['score']:.2f}"
            yield f"**{_plain(one['id'])}** ({_plain(one['language'])}{score})"
            for message in one["prompt"]:
                yield f"{_plain(message['role'])}:\n\n{_fenced(message['content'])}"
            for model in ("base", "tuned"):
                cut = "" if one[f"{model}_finished"] else ", cut off"
                yield f"{model}, {one[f'{model}_tokens']:,} tokens{cut}:\n\n{_fenced(one[model])}"
    yield "## Data"
    data = metrics["data"]
    counts = [[name, f"{one['got']:,}", _count(one["wanted"])] for name, one in data["languages"].items()]
    yield _table(["language", "training pairs", "wanted"], [*counts, ["all", f"{data['pairs']['train']:,}", ""]])
    yield f"{data['pairs']['eval']:,} pairs are held out."
    yield "## How it was made"
    yield "\n".join(f"- {what}: {_plain(str(value))}" for what, value in metrics["environment"].items() if value)
    yield f"## Recipe\n\n{_fenced(metrics['recipe'], most=None)}"
    yield f"## Alignment tax\n\n{TAX_SAYS}"
    yield "\n".join(f"- `{task.name}`: {task.why}" for task in tax_tasks(metrics))
    yield _fenced(tax_commands(metrics), most=None)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands, on one line; an underscore inside a word is plain already."""
    return re.sub(r"([\\`*\[\]<|&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(text.split()))


def _fenced(text: str, most: int | None = 600) -> str:
    """A block of code, with a fence longer than any run of backticks inside, cut after so many characters."""
    if most and len(text) > most:
        text = f"{text[:most].rstrip()}… ({len(text):,} characters, whole in report.html)"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"
