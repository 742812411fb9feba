"""The tables that commands print, from what stands in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from dpo_cli.errors import UNVERIFIED
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.show import say, terminal

if TYPE_CHECKING:
    from rich.table import Table

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


def print_metrics(run: Run) -> None:
    """What eval found, for a terminal of 80 columns; the verdict and where the report is come last."""
    from dpo_cli.evaluate.tables import judged

    metrics: dict[str, Any] = json.loads((run["eval"] / "metrics.json").read_text(encoding="utf-8"))
    console = terminal()
    for table in _metrics_tables(metrics):
        console.print(table)
        console.print()
    said = [judged(metrics["judge"]), *(f"warning: {warning}" for warning in metrics["warnings"])]
    if any(said):
        console.print(*filter(None, said), "", sep="\n")
    console.print(f"{metrics['verdict']}\nreport: {run['eval'] / 'report.html'}")


def _metrics_tables(metrics: dict[str, Any]) -> Iterator[Table]:
    """Pairs, samples, judge. Up to three languages stand beside the whole, more in a table of their own."""
    from rich.table import Table

    from dpo_cli.evaluate.charts import shorten
    from dpo_cli.evaluate.tables import JUDGE_ROWS, NATS, ROWS, SAMPLE_ROWS, show

    def table(*heads: str, left: int) -> Table:
        made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for index, head in enumerate(heads):
            made.add_column(head, no_wrap=True, justify="left" if index in (0, left) else "right")
        return made

    pairs, samples, judge = metrics["pairs"], metrics["samples"], metrics["judge"]
    languages = {name: part["pairs"] for name, part in metrics["languages"].items()}
    beside = languages if len(languages) <= 3 else {}
    counted = [f"{shorten(name, 9)}\nn={figures['reward_accuracy']['n']:,}" for name, figures in beside.items()]
    shown = table("held-out pairs", f"all, 95% interval\nn={pairs['reward_accuracy']['n']:,}", *counted, left=1)
    for row in ROWS:
        lines = [(row.key, row.title, row.unit)]
        if row.compared:
            lines = [(f"{row.key}_{one}", f"{row.title}, {one}", row.unit) for one in ("base", "tuned")]
            lines.append((f"{row.key}_change", "… change", row.unit.change))
        for key, title, unit in lines if row.brief else ():
            parts = (show(figures[key], unit, interval=False) for figures in beside.values())
            shown.add_row(title, show(pairs[key], unit), *parts)
    yield shown

    if not beside and languages:
        shown = table("language", "reward accuracy", "longer wins", "margin", "n", left=1)
        for name, figures in languages.items():
            accuracy, margin = figures["reward_accuracy"], show(figures["margin"], NATS, interval=False)
            longer = show(figures["longer_wins"], interval=False)
            shown.add_row(shorten(name, 24), show(accuracy), longer, margin, f"{accuracy['n']:,}")
        yield shown

    if samples:
        shown = table("sampled answers", "base", "tuned", "change, 95% interval", left=3)
        for row in SAMPLE_ROWS:
            if row.compared:
                sides = [show(samples[f"{row.key}_{one}"], row.unit, interval=False) for one in ("base", "tuned")]
                shown.add_row(row.title, *sides, show(samples[f"{row.key}_change"], row.unit.change))
            else:
                shown.add_row(row.title, "", "", show(samples[row.key], row.unit))
        yield shown

    if judge:
        shown = table("judge", "95% interval", left=1)
        for row in JUDGE_ROWS:
            if judge[row.key] is not None:
                shown.add_row(row.title, show(judge[row.key], row.unit))
        yield shown


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


def print_comparison(runs: Sequence[tuple[Recipe, Run]]) -> None:
    """A row a run, what the judge says of each, what sets its recipe apart from the first one's, and remarks."""
    from rich.table import Table

    from dpo_cli.evaluate.compare import compare
    from dpo_cli.evaluate.tables import NATS, RATIO, Unit, show

    compared, remarks = compare(runs)
    console = terminal()

    def table(*heads: str) -> Table:
        made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for index, head in enumerate(heads):
            made.add_column(head, no_wrap=index > 0, overflow="fold")
        return made

    languages = list(dict.fromkeys(name for one in compared for name in one.metrics["languages"]))
    beside = languages if 1 < len(languages) <= 6 else []
    shown = table("run", "reward accuracy", *beside)
    for one in compared:
        parts = (one.metrics["languages"].get(name, {}).get("pairs") for name in beside)
        cells = (show(part["reward_accuracy"], interval=len(beside) <= 2) if part else "–" for part in parts)
        shown.add_row(one.name, show(one.metrics["pairs"]["reward_accuracy"]), *cells)
    console.print(shown)
    console.print()
    shown = table("run", "margin", "chosen drift", "length ratio", "KL a token", "train", "memory")
    for one in compared:
        pairs, samples = one.metrics["pairs"], one.metrics["samples"] or {}
        cells = (show(pairs[key], NATS, interval=False) for key in ("margin", "chosen_drift"))
        sampled = ((samples.get(key), unit) for key, unit in (("length_ratio", RATIO), ("kl", Unit(4))))
        answers = (show(figure, unit, interval=False) if figure else "–" for figure, unit in sampled)
        cost = (f"{one.training['seconds']:,.0f} s", f"{one.training['peak_memory_bytes'] / 1e9:.1f} GB")
        shown.add_row(one.name, *cells, *answers, *cost)
    console.print(shown)
    if any(one.metrics["judge"] for one in compared):
        shown = table("run", "win rate", "length-adjusted", "Elo over the base")
        for one in compared:
            judge = one.metrics["judge"] or {}
            rates = (show(judge[key]) if judge else "–" for key in ("win_rate", "length_adjusted_win_rate"))
            shown.add_row(one.name, *rates, show(one.strength, Unit(0, signed=True)) if one.strength else "–")
        console.print()
        console.print(shown)
    console.print()
    for one in compared[1:]:
        listed = {
            key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in one.differs.items()
        }
        differs = ", ".join(f"{key}: {value}" for key, value in listed.items())
        console.print(f"{one.name} differs in {differs or 'nothing'}")
    for remark in remarks:
        console.print(f"warning: {remark}")
