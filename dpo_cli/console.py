"""The tables that commands print, from what stands in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.show import print_markdown, say, terminal

if TYPE_CHECKING:
    pass


def print_funnel(run: Run, quiet: bool, examples: bool) -> None:
    """Where every prompt went, from `data/report.json`."""
    if quiet:
        return
    from dpo_cli.prepare.report import examples as rows
    from dpo_cli.prepare.report import rows_are, summary

    report = json.loads((run["prepare"] / "report.json").read_text(encoding="utf-8"))
    print_markdown("\n\n".join(summary(report, terminal().width) + (rows(report) if examples else [])))
    pairs = report["pairs"]
    say(f"prepare: {pairs['train']} training {rows_are(report)}, {pairs['eval']} held out -> {run['prepare']}")


def print_files(loaded: Recipe, planned: Sequence[tuple[str, int]]) -> None:
    """What `export --dry-run` found: the files in the run's `export`, and those of the repository."""
    from dpo_cli.export import hub

    formats = loaded.export.formats
    say(f"export would write {len(planned)} files, about {sum(size for _, size in planned) / 1e6:,.1f} MB")
    for name, size in planned:
        say(f"  {f'{size / 1e6:,.1f} MB' if size else '':>15}  {name}")
    if "hub" in formats:
        parts = ((name.split("/", 1), size) for name, size in planned)
        sent = {hub.path_in_repo(kind, name, formats): size for (kind, name), size in parts} | {"verify.json": 0}
        say(hub.listing(loaded, sorted(sent.items())))
