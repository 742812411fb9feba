"""`check` knows TRL's arguments from a generated file; it has to be what the installed TRL declares."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import dpo_cli
import pytest
from dpo_cli.recipe.foreign import OLD_TRAIN_ARGUMENTS, OWNED_TRAIN_ARGUMENTS
from dpo_cli.recipe.train import trl_arguments
from dpo_cli.train.methods import LOSSES, METHODS
from tests.tools.trl_arguments import describe_arguments

PINNED = "1.16.0"


@pytest.mark.skipif(version("trl") != PINNED, reason=f"trl_arguments.json describes TRL {PINNED}, not {version('trl')}")
def test_the_file_says_what_the_installed_trl_declares() -> None:
    assert trl_arguments() == describe_arguments(), "write it anew: python -m tests.tools.trl_arguments"


@pytest.mark.parametrize("method", METHODS)
def test_a_name_is_either_trls_or_an_old_one(method: str) -> None:
    """A hint on what replaced a name would be wrong where TRL (again) has it."""
    arguments = trl_arguments()[method]["arguments"]
    assert not set(OLD_TRAIN_ARGUMENTS) & set(arguments)
    assert not set(OLD_TRAIN_ARGUMENTS) & set(OWNED_TRAIN_ARGUMENTS)


def test_every_loss_has_a_row() -> None:
    assert {loss for one in trl_arguments().values() for loss in one["losses"]} == set(LOSSES)


def conditions(tree: ast.AST) -> Iterator[ast.expr | ast.pattern]:
    """What decides something in a source: tests, comparisons, cases."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Compare | ast.MatchValue):
            yield node


def test_no_method_is_asked_for_by_name_outside_its_row() -> None:
    """Else a new method is more than a row: each such place has to be found, and decided anew."""
    package = Path(dpo_cli.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path == package / "train/methods.py":
            continue
        for condition in conditions(ast.parse(path.read_text(encoding="utf-8"))):
            if "layout" in ast.unparse(condition):  # of rows of data, one of which is called kto
                continue
            named = {one.value for one in ast.walk(condition) if isinstance(one, ast.Constant)} & set(METHODS)
            assert not named, f"{path.relative_to(package)}, line {condition.lineno}: {ast.unparse(condition)}"
