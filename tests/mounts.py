"""`dpo-cli` with mounts of its own: on a disk that is nearly full, or on a folder that may only be read.

    mounts.py full DISK RUNS AFTER KIB ARGUMENTS…   RUNS on a new disk with KIB free, and what is left of them in AFTER
    mounts.py readonly FOLDER ARGUMENTS…

Exit code 99 where this machine lets an ordinary user mount nothing.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
REFUSED = 99
SIZE = 16 * 2**20
SCRIPT = __file__


def skip_where_refused(code: int) -> None:
    if code == REFUSED:
        pytest.skip("this machine lets an ordinary user mount nothing")


def mount(*arguments: object) -> None:
    """Mount in a namespace that only this process and its children see; ends the process where that is refused."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(NEW_MOUNTS | NEW_USER):
        sys.exit(REFUSED)
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
        subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(REFUSED)


def dpo_cli(arguments: list[str]) -> None:
    sys.argv = ["dpo_cli", *arguments]
    runpy.run_module("dpo_cli", run_name="__main__", alter_sys=True)


def main(kind: str, folder: str, *arguments: str) -> None:
    if kind == "readonly":
        mount("--bind", "-o", "ro", folder, folder)
        return dpo_cli(list(arguments))
    runs, after, kib, *command = arguments
    mount("-t", "tmpfs", "-o", f"size={SIZE}", "none", folder)
    shutil.copytree(runs, folder, symlinks=True, dirs_exist_ok=True)
    disk, filler = os.statvfs(folder), Path(folder, "filler")
    filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - int(kib) * 1024))
    child = os.fork()
    if child == 0:
        return dpo_cli(command)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    filler.unlink()
    shutil.copytree(folder, after, symlinks=True, dirs_exist_ok=True)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
