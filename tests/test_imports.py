"""The house's rules on imports, read off the source: down only, rooms apart, nothing heavy on the ground floor."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import dpo_cli
import pytest

PACKAGE = Path(dpo_cli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("prepare", "train", "evaluate", "export")
HEAVY = {
    "torch", "transformers", "trl", "peft", "datasets", "unsloth", "numpy", "pyarrow", "matplotlib", "rich",
}  # fmt: skip

# The floors, lowest first; a part imports from its own floor or from below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("show", "errors", "disk", "environment", "processes", "machine", "families", "distribution"),
    ("terminal", "progress", "driver", "recipe"),
    ("run", "records", "stats", "language", "published", "store", "refusal", "page", "gpu", "preinstall"),
    ("adapters", "backends", "chat", "hub", "model_files", "models", "smoke"),
    ("inference", "judging"),
    ROOMS,
    ("cli", "job", "doctor", "imports", "__main__"),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def part_of(path: Path) -> str:
    """`dpo_cli/prepare/dedup.py` -> prepare, `dpo_cli/run.py` -> run."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    """The dotted names that an import statement reaches; `from dpo_cli import run` reaches dpo_cli.run."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute, so that these tests can read them"
        module = node.module or ""
        return [f"{module}.{alias.name}" for alias in node.names] if module == "dpo_cli" else [module]
    return []


def all_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in imported(node)}


def parts_imported(path: Path) -> set[str]:
    """The parts of dpo_cli that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    names = {name.split(".")[1] for name in all_imports(path) if name.startswith("dpo_cli.")}
    return {name for name in names if not name.startswith("__")}


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported: all but function bodies and `if TYPE_CHECKING:`."""
    for node in nodes:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from at_import(node.orelse)
            continue
        for inner in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from at_import(handler.body)


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_rooms_stay_apart(path: Path) -> None:
    here = part_of(path)
    for part in parts_imported(path):
        if here == "__init__":
            pytest.fail(f"the package itself imports {part}, so every import of dpo_cli does")
        assert FLOOR[part] <= FLOOR[here], f"{here} is below {part}"
        assert part == here or part not in ROOMS or here not in ROOMS, f"room {here} imports room {part}"


def test_parts_do_not_import_in_a_circle() -> None:
    below = {part: set[str]() for part in FLOOR}
    for path in FILES:
        if part_of(path) in below:
            below[part_of(path)] |= parts_imported(path) - {part_of(path)}
    done: list[str] = []
    while len(done) < len(below):
        free = [part for part, needs in below.items() if part not in done and needs <= set(done)]
        assert free, f"these import each other: {sorted(set(below) - set(done))}"
        done += free


# Imported by `cli.py` when a command needs them, and not before.
HEAVY_PARTS = (
    *ROOMS, "terminal", "stats", "hub", "gpu", "backends", "inference", "judging", "models", "adapters",
)  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if part_of(path) not in HEAVY_PARTS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_ground_floor_imports_nothing_heavy_with_a_module(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name.split(".")[0] for node in at_import(tree.body) for name in imported(node)}
    assert not names & HEAVY


def test_only_backends_and_models_import_unsloth() -> None:
    importers = {part_of(path) for path in FILES if any(n.split(".")[0] == "unsloth" for n in all_imports(path))}
    assert importers == {"backends", "models"}


def test_everything_imported_is_declared() -> None:
    """A package that others happen to bring along may go, or change, without a word in pyproject.toml."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {re.split(r"[^\w.-]", one)[0].replace("-", "_").lower() for one in asked}
    found = {name.split(".")[0] for path in FILES for name in all_imports(path)}
    named = {
        {"yaml": "pyyaml", "pydantic_core": "pydantic", "markdown_it": "markdown_it_py"}.get(one, one)
        for one in found - {"dpo_cli"}
    }
    optional = {"llama_cpp"}  # used where a person has installed it
    assert named - set(sys.stdlib_module_names) - declared == optional


ROOMS_IMPORTED = """
import gc, sys
from dpo_cli.environment import prepare_environment
prepare_environment("eval")
from dpo_cli.job import importing_models
with importing_models():
    assert not gc.isenabled(), "a CPU second of every command"
    import dpo_cli.evaluate.evaluate, dpo_cli.export.export
assert gc.isenabled()
assert "torch._inductor.compile_fx" not in sys.modules, "CPU seconds of eval and export, which compile nothing"
import dpo_cli.prepare.pipeline, dpo_cli.train.trainer
"""


def test_rooms_are_imported_without_a_word() -> None:
    """What a library prints at import would stand between the lines of every command, and under --quiet alone."""
    done = subprocess.run([sys.executable, "-c", ROOMS_IMPORTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
