"""One quiet, offline environment for every test, and the small project that most of them start from."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests import program

Finished = subprocess.CompletedProcess[str]
DpoCli = Callable[..., Finished]

_scratch: list[str] = []
_servers = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Set before any test module is imported, for torch and huggingface_hub read these once, at import."""
    if hasattr(config, "workerinput"):  # one of pytest-xdist's, which has all this from the process that started it
        return
    folder = tempfile.mkdtemp(prefix="dpo-cli-tests-")
    _scratch.append(folder)
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        UNSLOTH_DISABLE_STATISTICS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HOME=f"{folder}/huggingface",
        DPO_CLI_CACHE=f"{folder}/dpo-cli",
    )
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        os.environ.pop(name, None)
    _servers.enter_context(program.server(Path(folder)))
    if getattr(config.option, "tx", None):  # pytest-xdist's workers: they import the same
        config.option.tx = [f"{worker}//python={program.AS_PYTHON}" for worker in config.option.tx]


def pytest_unconfigure(config: pytest.Config) -> None:
    _servers.close()
    while _scratch:
        shutil.rmtree(_scratch.pop(), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest groups first."""
    items.sort(key=lambda item: ORDER.get(group_of(item.nodeid), len(ORDER)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a group on one worker.

    pytest-xdist (3.8.0) has marks for that, which it writes into the names of the tests; pytest (9.2) doesn't let it.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare each `gc.collect()` of a preflight or an eval what is imported by now: half a second of it."""
    gc.collect()
    gc.freeze()


def group_of(nodeid: str) -> str:
    """The file of a test, or what it shares with other files: the smoke run, or a pretended card."""
    file = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    folder, _, name = file.partition("/")
    if folder == "end_to_end" and name in OF_THE_SMOKE_RUN:
        return "smoke"
    return folder if folder == "pretend_cuda" else file


OF_THE_SMOKE_RUN = (
    "test_eval", "test_export", "test_golden", "test_notebook", "test_serving", "test_smoke", "test_training",
)  # fmt: skip
LONGEST_FIRST = (
    "smoke", "pretend_cuda", "train/test_backends", "train/test_faults", "train/test_token_budget",
    "prepare/test_own_answers", "test_distribution", "end_to_end/test_methods_learn", "train/test_engine",
    "train/test_reference_cache", "test_imports", "test_cli", "end_to_end/test_processes", "train/test_methods",
    "judging/test_judging", "test_terminal", "test_run", "end_to_end/test_early_stopping", "test_crash_points",
    "train/test_shared_prefix", "evaluate/test_samples", "end_to_end/test_sft_then_dpo",
)  # fmt: skip
ORDER = {name: place for place, name in enumerate(LONGEST_FIRST)}
WORDS = (  # noqa: SIM905
    "amber basket candle dragon engine falcon garden harbour island jungle kettle ladder marble needle orchid pepper "
    "quarry ribbon saddle tunnel umbrella velvet window yellow zipper anchor bridge copper desert feather"
).split()


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the `pairs` layout, none like another, so that no filter drops one."""
    rng = random.Random(seed)

    def sentence(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."

    return [{"prompt": sentence(14), "chosen": sentence(20), "rejected": sentence(20)} for _ in range(count)]


@dataclass(frozen=True)
class Project:
    """A folder with `demo.yaml` and the data it names; `prepare` on it needs no tokenizer, so no torch."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "demo.yaml"

    @property
    def rows(self) -> Path:
        """The source: a folder of JSONL files."""
        return self.folder / "rows"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "demo"

    def write_rows(self, count: int, seed: int = 0, name: str = "a.jsonl") -> Path:
        self.rows.mkdir(exist_ok=True)
        path = self.rows / name
        path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(count, seed)), encoding="utf-8")
        return path

    def contents(self) -> dict[str, bytes]:
        """Every file that a later stage could read, hidden ones left out."""
        files = [path for path in sorted(self.run.rglob("*")) if path.is_file()]
        named = {path.relative_to(self.run).as_posix(): path for path in files}
        return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".")}

    def leftovers(self) -> list[str]:
        """Names that a stage uses while it works and should have cleared away."""
        return sorted(path.name for path in self.run.rglob(".*") if path.name != ".lock") if self.run.exists() else []


DEMO = """\
model:
  id: nobody/none
data:
  sources:
    - {id: ./rows, layout: pairs, language: en}
  total: null
  languages: null
  eval_fraction: 0.2
  filters: {too_long: false}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A small recipe with its data, in a folder of its own that is also the working directory."""
    made = Project(tmp_path)
    made.recipe.write_text(DEMO, encoding="utf-8")
    made.write_rows(40)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def dpo_cli() -> DpoCli:
    """`dpo_cli("check", "x.yaml")`: the real program, in a process of its own."""
    return program.run


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`spawn("-c", code)`: a Python to be talked to through its pipes, `forked` where it imports torch."""
    started: list[subprocess.Popen[str]] = []

    def go(*arguments: str | Path, forked: bool = False, **options: Any) -> subprocess.Popen[str]:
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        if arguments[:2] == ("-m", "dpo_cli"):
            process = program.start(*arguments[2:], **options)
        elif forked:
            process = program.python(*arguments, **options)
        else:
            process = subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **options)
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[1]
