"""Memory of a machine and of a container, what libraries are told before their import, and machines unlike this one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
from dpo_cli import machine
from dpo_cli.backends import before_unsloth
from dpo_cli.environment import ALLOCATOR, prepare_environment
from tests import program

GIB = 1 << 30


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`container("0::/a/b", {"a/memory.max": "1073741824"})`: a process in these control groups."""

    def set_up(groups: str, files: dict[str, str]) -> None:
        process, root = tmp_path / "self", tmp_path / "cgroup"
        process.mkdir()
        (process / "cgroup").write_text(groups + "\n", encoding="ascii")
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content + "\n", encoding="ascii")
        monkeypatch.setattr(machine, "PROCESS", process)
        monkeypatch.setattr(machine, "CGROUPS", root)

    return set_up


@pytest.mark.parametrize(
    ("groups", "files", "limit", "used"),
    [
        ("0::/", {"memory.max": f"{GIB}", "memory.current": f"{GIB // 4}"}, GIB, GIB // 4),
        ("0::/user/job", {"user/memory.max": f"{GIB}", "user/job/memory.max": "max"}, GIB, 0),
        ("0::/user/job", {"user/memory.max": f"{2 * GIB}", "user/job/memory.max": f"{GIB}"}, GIB, 0),
        ("0::/../../host/path", {"memory.max": f"{GIB}"}, GIB, 0),
    ],
    ids=["its own", "of the parent", "nested", "with the host's path"],
)
def test_a_container_has_the_memory_of_its_limit(
    container: Any, groups: str, files: dict[str, str], limit: int, used: int
) -> None:
    container(groups, files)
    assert machine.total_memory() == limit
    assert machine.free_memory() == min(limit - used, psutil.virtual_memory().available)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/", {"memory.max": "max"}),
        ("0::/", {}),
    ],
)
def test_without_a_limit_the_machine_has_all_of_its_memory(container: Any, groups: str, files: dict[str, str]) -> None:
    container(groups, files)
    assert machine.total_memory() == psutil.virtual_memory().total


def test_the_plan_of_a_cpu_run_keeps_to_the_container(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_cli.recipe import Recipe
    from dpo_cli.train.plan import available_memory

    recipe = Recipe.model_validate({"name": "x", "model": {"id": "a/b"}, "data": {"sources": [{"id": "a"}]}})
    container("0::/", {"memory.max": str(3 * GIB)})
    assert available_memory(recipe) == 3 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # as accelerate launch and torchrun set it
    assert available_memory(recipe) == GIB


def test_the_peak_is_what_was_held_at_the_highest() -> None:
    filled = bytearray(b"x" * (64 << 20))
    high = machine.peak_memory()
    assert high >= psutil.Process().memory_info().rss
    del filled
    assert machine.peak_memory() >= high


def test_where_the_kernel_keeps_no_peak_it_is_what_is_held_now(container: Any) -> None:
    container("0::/", {})  # no status, no clear_refs, as in some sandboxes and on macOS
    assert machine.peak_memory() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_cores_are_those_that_this_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {0}); from dpo_cli.machine import cores; print(cores())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


# ------------------------------------------------------------------------------------------- before the first import


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of what `prepare_environment` sets; and it is taken back at the end."""
    for name in (*ALLOCATOR, "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY", "UNSLOTH_DISABLE_STATISTICS"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever it was
        monkeypatch.delenv(name)


def test_memory_of_a_card_may_grow_in_place(clean: None) -> None:
    prepare_environment("train")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_the_users_own_allocator_settings_stay(clean: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    prepare_environment("train")
    assert {one: os.environ[one] for one in ALLOCATOR if one in os.environ} == {name: "max_split_size_mb:128"}


@pytest.mark.parametrize(
    ("system", "release"),
    [("linux", "5.15.153.1-microsoft-standard-WSL2"), ("win32", "11"), ("darwin", "24.1.0")],
    ids=["WSL2", "Windows", "macOS"],
)
def test_it_stays_as_it_is_where_cuda_can_not_do_that(
    clean: None, monkeypatch: pytest.MonkeyPatch, system: str, release: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    prepare_environment("train")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(("command", "value"), [("train", "false"), ("prepare", "true"), ("eval", "true")])
def test_the_tokenizer_takes_all_cores_where_nothing_forks(clean: None, command: str, value: str) -> None:
    prepare_environment(command)
    assert os.environ["TOKENIZERS_PARALLELISM"] == value


def test_what_the_preflight_makes_unsloth_say_is_not_shown(clean: None) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        prepare_environment("train")
        warnings.warn("Unsloth: detected a manual forward/backward run before trainer.train(); reset …", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in shown] == ["another"]


@pytest.mark.parametrize(
    ("capability", "rows"),
    [((8, 9), "64"), ((12, 0), "64"), ((7, 5), None), ((9, 0), None)],
)
def test_the_attention_kernels_tile_fits_the_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], rows: str | None
) -> None:
    import torch

    monkeypatch.setenv("PG_FLEX_BF16_BLOCK_M", "")
    monkeypatch.delenv("PG_FLEX_BF16_BLOCK_M")
    before_unsloth()
    assert "PG_FLEX_BF16_BLOCK_M" not in os.environ  # no card here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    before_unsloth()
    assert os.environ.get("PG_FLEX_BF16_BLOCK_M") == rows
    monkeypatch.setenv("PG_FLEX_BF16_BLOCK_M", "32")
    before_unsloth()
    assert os.environ["PG_FLEX_BF16_BLOCK_M"] == "32"


# -------------------------------------------------------------------------------------------- machines unlike this one


BLOCKED = """
import importlib, os, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in list(sys.modules):  # a fork has some already
    if name.split(".")[0] in ("dpo_cli", "resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
        del sys.modules[name]
import dpo_cli
ours = [one.name for one in pkgutil.walk_packages(dpo_cli.__path__, "dpo_cli.") if not one.name.endswith("__main__")]
import torch, transformers, trl, peft, datasets, filelock  # what they do on another system is theirs
sys.meta_path.insert(0, Blocked())
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules.pop(name, None)
for name in ("sysconf", "getuid", "geteuid", "getpwuid", "uname", "sched_getaffinity", "fork", "killpg", "setsid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ours:
    importlib.import_module(name)
print(len(ours), "imported")
"""


def test_every_module_is_imported_where_posix_is_missing() -> None:
    done = program.run_python("-c", BLOCKED, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 60


def test_no_file_uses_what_only_posix_has() -> None:
    """Inside functions too, where importing does not reach."""
    names = ("os.sysconf", "import resource", "import fcntl", "import pwd", "import grp", "import termios", "os.getuid")
    for path in Path(machine.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in names if name in text], path
