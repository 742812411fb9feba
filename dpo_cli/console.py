"""The tables that commands print, from what stands in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from dpo_cli.errors import UNVERIFIED
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.show import say, terminal

if TYPE_CHECKING:
    from dpo_cli.inference import Answer


def print_funnel(run: Run, quiet: bool, examples: bool) -> None:
    """Where every prompt went, from `data/report.json`."""
    if quiet:
        return
    from dpo_cli.prepare.report import funnel_table, rows_are

    report = json.loads((run["prepare"] / "report.json").read_text(encoding="utf-8"))
    terminal().print(funnel_table(report, examples))
    pairs = report["pairs"]
    say(f"prepare: {pairs['train']} training {rows_are(report)}, {pairs['eval']} held out -> {run['prepare']}")


def print_answers(prompt: str, base: Sequence[Answer], tuned: Sequence[Answer]) -> None:
    """Draws of one prompt side by side, base left and tuned right."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console = terminal()
    console.print(Text(prompt, style="bold"))
    for number, (one, other) in enumerate(zip(base, tuned, strict=True), 1):
        console.print(Rule(f"answer {number} of {len(base)}", style="dim"))
        table = Table(box=None, padding=(0, 1), expand=True, pad_edge=False)
        for name, answer in (("base", one), ("tuned", other)):
            ended = "" if answer.finished else ", cut off"
            table.add_column(f"{name} ({len(answer.said)} tokens{ended})", ratio=1, overflow="fold")
        table.add_row(*(Text(answer.text) for answer in (one, other)))
        console.print(table)


def print_plan(loaded: Recipe, run: Run) -> None:
    """What a run would take, at its longest pairs; exit code 3 where that does not fit."""
    import torch
    from transformers import AutoConfig

    from dpo_cli import backends, chat, model_files
    from dpo_cli.inference import encode
    from dpo_cli.records import Message, Pair, read_jsonl
    from dpo_cli.train.engine import available_memory
    from dpo_cli.train.memory import Lengths
    from dpo_cli.train.memory import plan as predict
    from dpo_cli.train.methods import METHODS, cannot_be_cut

    gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if gpu else "this machine"
    tokenizer, method = chat.load_tokenizer(loaded), METHODS[loaded.train.method]
    rows: list[Lengths] = []
    for row in read_jsonl(run.train_pairs):
        answers = [row[side] for side in ("chosen", "rejected", "completion") if side in row]
        answers += [[Message(role="assistant", content=one["text"])] for one in row.get("candidates", [])]
        common = {name: row[name] for name in ("id", "prompt", "language", "source", "chat_template_kwargs")}
        sides = zip(answers[::2], [*answers[1::2], answers[-1]], strict=False)  # two at a time, the last one twice
        pairs = [Pair(chosen=one, rejected=other, **common) for one, other in sides]
        encoded = [one for pair in pairs for one in encode(tokenizer, pair, loaded.model.max_length)]
        lengths = [len(one.ids) - one.start for one in encoded[: len(answers)]]
        start = encoded[0].start
        rows += [(start, one) for one in lengths] if method.row == "answer" else [(start, *lengths)]
    config = AutoConfig.from_pretrained(
        model_files.location(loaded.model.id), revision=loaded.model.revision, trust_remote_code=False
    )
    backend = backends.choose_backend(loaded)
    fits = method.engine
    found = predict(
        loaded,
        rows,
        config,
        available_memory(loaded),
        device="cuda" if gpu else "cpu",
        unsloth=backend.name == "unsloth",
        card=card,
        shared=loaded.engine.shared_prefix != "off" and "shared_prefix" in fits,
        budgeted=loaded.engine.token_budget != "off"
        and "token_budget" in fits
        and cannot_be_cut(loaded.train.losses) is None,
    )
    epochs = "one epoch" if loaded.train.num_train_epochs == 1 else f"{loaded.train.num_train_epochs:g} epochs"
    say(f"train: {len(rows)} {found.rows_are}, {epochs}, {card}")
    say(f"  backend {backend.name}: {backend.why}")
    terminal(width=80).print(found.table())
    if not found.fits:
        raise typer.Exit(UNVERIFIED)


def print_files(loaded: Recipe, planned: Sequence[tuple[str, int]]) -> None:
    """What `export --dry-run` found: the files in the run's `export`, and those of the repository."""
    from dpo_cli.export import hub

    formats = loaded.export.formats
    say(f"export would write {len(planned)} files, {sum(size for _, size in planned):,} bytes; 0: not yet known")
    for name, size in planned:
        say(f"  {size:>15,}  {name}")
    if "hub" in formats:
        parts = ((name.split("/", 1), size) for name, size in planned)
        sent = {hub.path_in_repo(kind, name, formats): size for (kind, name), size in parts} | {"verify.json": 0}
        say(hub.listing(loaded, sorted(sent.items())))
