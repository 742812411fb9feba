"""`prepare`: raw preference data to clean pairs and a report of every drop. What the command line calls; all light."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.recipe import Recipe
from dpo_cli.records import Pair

if TYPE_CHECKING:
    from rich.console import Console, Group


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made.

    Attributes:
        report: what stands in report.json.
        inputs: every local file that was read, `<source label>/<name below its folder>` -> sha256.
        revisions: Hub data set id -> the commit that was read.
    """

    report: dict[str, Any]
    inputs: dict[str, str]
    revisions: dict[str, str]


def prepare(recipe: Recipe, folder: Path, *, quiet: bool = False) -> Prepared:
    """Write train.jsonl, eval.jsonl, report.json and report.md (dropped.jsonl with data.keep_dropped) into `folder`.

    The same recipe and rows give the same files, whatever the order of the rows, but for the line numbers in the
    report. `folder` has to exist and be empty; what stands in it after an error or Ctrl-C is of no use.

    Raises:
        DpoError: an input is missing or empty (exit code 1), its layout can't be told (2), or nothing is left.
    """
    from dpo_cli.prepare.pipeline import run

    return run(recipe, folder, quiet)


def source_files(recipe: Recipe, missing_ok: bool = False) -> dict[str, Path]:
    """Every local or built-in file that `prepare` would read, keyed as `Prepared.inputs`; Hub sources are left out.

    Raises:
        DpoError: one is not there, and `missing_ok` is false.
    """
    from dpo_cli.prepare.sources import source_files as files

    return files(recipe, missing_ok)


def preview(recipe: Recipe, pairs: list[Pair], count: int, console: Console) -> None:
    """Print the first `count` pairs as the model will see them: rendered, in tokens, and where the loss starts."""
    from dpo_cli.prepare.tokens import show

    show(recipe, pairs[:count], console)


def funnel_table(report: dict[str, Any], examples: bool = False) -> Group:
    """The report as a person reads it on a terminal of 80 columns; `examples` adds kept and dropped rows."""
    from dpo_cli.prepare.report import funnel_table as table

    return table(report, examples)
