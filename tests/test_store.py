"""What is put into a store is there: after a kill, beside another process, on a full disk."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.store import Store

Spawn = Callable[..., "subprocess.Popen[str]"]


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store.sqlite"
    values = {
        "甲": {"文": "你好，“世界”", "none": None, "half a pair": "\ud800"},
        "floats": [0.1 + 0.2, -1e-308, math.pi, math.inf],
        "": [],
    }
    with Store(path) as store:
        assert store.all() == store.get(["甲"]) == {}
        assert not path.exists(), "who only looks makes no file"
        store.put(values)
        store.put({"": "another"})
    with Store(path) as store:
        assert store.all() == {**values, "": "another"}
        assert store.get(["floats", "nobody", "floats"]) == {"floats": values["floats"]}
        store.put({f"row {number}": number for number in range(1200)})
        assert len(store.get(f"row {number}" for number in range(2000))) == 1200
    assert [one.name for one in path.parent.iterdir()] == [path.name], "one file, to be copied and moved"


WRITER = """
import sys
from pathlib import Path
from dpo_cli.store import Store
with Store(Path(sys.argv[1])) as store:
    for number in range(int(sys.argv[3])):
        store.put({f"{sys.argv[2]} {number} {part}": "text " * 200 for part in range(20)})
        print(number, flush=True)
"""


def test_a_kill_costs_nothing_that_was_put_and_halves_no_batch(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / "store.sqlite"
    process = spawn("-c", WRITER, path, "it", 10**6)
    assert process.stdout
    for _ in range(30):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    last = max([last, *map(int, process.communicate()[0].split("\n")[:-1])])
    with Store(path) as store:
        batches = {tuple(key.split()[:2]) for key in store.all()}
        assert len(store.all()) == 20 * len(batches)
        assert {("it", str(number)) for number in range(last + 1)} <= batches
        store.put({"and": "on"})


def test_two_processes_write_at_once(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / "store.sqlite"
    processes = [spawn("-c", WRITER, path, name, 40) for name in ("one", "other")]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with Store(path) as store:
        assert len(store.all()) == 2 * 40 * 20


def test_a_full_disk_is_said_and_harms_nothing_that_was_there(tmp_path: Path, spawn: Spawn) -> None:
    code = """
import json, resource, signal, sys
from pathlib import Path
from dpo_cli.errors import DpoError
from dpo_cli.store import Store
store = Store(Path(sys.argv[1]))
store.put({"first": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    store.put({str(number): "x" * 10_000 for number in range(100)})
except DpoError as error:
    print(json.dumps([error.message, error.where, error.hint]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.put({"second": 2})
print(json.dumps(store.all()))
"""
    path = tmp_path / "store.sqlite"
    out, errors = spawn("-c", code, path).communicate(timeout=60)
    said, values = map(json.loads, out.splitlines())
    assert said[0].startswith("can't keep results") and said[1] == str(path) and "disk space" in said[2], errors
    assert values == {"first": 1, "second": 2}


@pytest.mark.parametrize("content", [b"{}\n" * 500, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_store_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(content)
    with pytest.raises(DpoError, match="damaged, or no store") as caught, Store(path) as store:
        store.all()
    assert caught.value.where == str(path)
    assert path.read_bytes() == content
