"""The tables that commands print, from what stands in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dpo_cli.errors import UNVERIFIED
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run


def print_funnel(run: Run, quiet: bool, examples: bool) -> None:
    """Where every prompt went, from `data/report.json`."""
    if quiet:
        return
    from rich.console import Console

    from dpo_cli.prepare import funnel_table

    report = json.loads((run["prepare"] / "report.json").read_text(encoding="utf-8"))
    Console().print(funnel_table(report, examples))
    pairs = report["pairs"]
    typer.echo(f"prepare: {pairs['train']} training pairs, {pairs['eval']} held out -> {run['prepare']}")


def print_metrics(run: Run) -> None:
    """The verdict, a table by language, the warnings, and where the report is."""
    from rich.console import Console
    from rich.table import Table

    from dpo_cli.evaluate.report import ROWS, show

    metrics: dict[str, Any] = json.loads((run["eval"] / "metrics.json").read_text(encoding="utf-8"))
    languages = {name: part["pairs"] for name, part in metrics["languages"].items()}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("held-out pairs", no_wrap=True)
    table.add_column(f"all (n={metrics['pairs']['reward_accuracy']['n']}), 95% interval", no_wrap=True)
    for name, figures in languages.items():
        table.add_column(f"{name} (n={figures['reward_accuracy']['n']})", justify="right", no_wrap=True)
    for key, title, _, share in ROWS:
        parts = (show(figures[key], share, interval=False) for figures in languages.values())
        table.add_row(title, show(metrics["pairs"][key], share), *parts)
    console = Console()
    console.print(table)
    for warning in metrics["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    console.print(f"\n{metrics['verdict']}\nreport: {run['eval'] / 'report.html'}", highlight=False, markup=False)


def print_plan(loaded: Recipe, run: Run) -> None:
    """What a run would take, at its longest pairs; exit code 3 where that does not fit."""
    import torch
    from rich.console import Console
    from transformers import AutoConfig

    from dpo_cli import models
    from dpo_cli.evaluate.score import encode
    from dpo_cli.records import Message, Pair, read_jsonl
    from dpo_cli.train.engine import available_memory
    from dpo_cli.train.memory import Lengths
    from dpo_cli.train.memory import plan as predict
    from dpo_cli.train.methods import METHODS
    from dpo_cli.train.token_budget import whole

    gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if gpu else "this machine"
    tokenizer = models.load_tokenizer(loaded)
    rows: list[Lengths] = []
    for row in read_jsonl(run.train_pairs):
        answers = [row[side] for side in ("chosen", "rejected", "completion") if side in row]
        answers += [[Message(role="assistant", content=one["text"])] for one in row.get("candidates", [])]
        common = {name: row[name] for name in ("id", "prompt", "language", "source", "chat_template_kwargs")}
        sides = zip(answers[::2], [*answers[1::2], answers[-1]], strict=False)  # two at a time, the last one twice
        pairs = [Pair(chosen=one, rejected=other, **common) for one, other in sides]
        encoded = [one for pair in pairs for one in encode(tokenizer, pair, loaded.model.max_length)]
        lengths = [len(one.ids) - one.start for one in encoded[: len(answers)]]
        singly, start = loaded.train.method == "kto", encoded[0].start
        rows += [(start, one) for one in lengths] if singly else [(start, *lengths)]
    config = AutoConfig.from_pretrained(models.location(loaded.model.id), revision=loaded.model.revision)
    backend = models.choose_backend(loaded)
    fits = METHODS[loaded.train.method].engine
    found = predict(
        loaded,
        rows,
        config,
        available_memory(loaded),
        device="cuda" if gpu else "cpu",
        card=card,
        shared=loaded.engine.shared_prefix != "off" and "shared_prefix" in fits,
        budgeted=loaded.engine.token_budget != "off" and "token_budget" in fits and whole(loaded.train.losses) is None,
    )
    typer.echo(f"train: {len(rows)} {found.rows_are}, {loaded.train.num_train_epochs:g} epochs, {card}")
    typer.echo(f"  backend {backend.name}: {backend.why}")
    Console(width=80).print(found.table())
    if not found.fits:
        raise typer.Exit(UNVERIFIED)


def print_comparison(runs: list[tuple[Path, Recipe, Run]]) -> None:
    """One row a run that has been evaluated, and what sets its recipe apart from the first one's."""
    from rich.console import Console
    from rich.table import Table

    from dpo_cli.evaluate.report import show
    from dpo_cli.run import recipe_keys

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("run", "reward accuracy", "margin", "drift of chosen", "otherwise"):
        table.add_column(title, no_wrap=title != "otherwise")
    first = recipe_keys(runs[0][1], "train")
    for path, loaded, run in runs:
        run.require("eval", loaded, f"dpo-cli eval {path}")
        pairs = json.loads((run["eval"] / "metrics.json").read_text(encoding="utf-8"))["pairs"]
        keys = recipe_keys(loaded, "train")
        differs = ", ".join(f"{key} {keys[key]}" for key in keys if keys[key] != first.get(key))
        figures = (show(pairs["reward_accuracy"], True), show(pairs["margin"], False, interval=False))
        table.add_row(loaded.name, *figures, show(pairs["chosen_drift"], False, interval=False), differs)
    Console().print(table)
