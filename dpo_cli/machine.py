"""Memory and cores of this machine, or of the container that this process may use."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil

PROCESS = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit where that is less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes of memory that are not in use, of the machine and within every limit of its container."""
    within = (limit - used for limit, used in _limits())
    return max(min([psutil.virtual_memory().available, *within]), 0)


def cores() -> int:
    """CPU cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def peak_memory() -> int:
    """Bytes of resident memory at the highest; what is resident now on macOS, which tells no more than that."""
    highest = re.search(r"VmHWM:\s*(\d+) kB", _read(PROCESS / "status"))
    now = psutil.Process().memory_info()
    return int(highest[1]) * 1024 if highest else int(getattr(now, "peak_wset", now.rss))


def can_reset_peak() -> bool:
    """Whether `reset_peak` works: on Linux, where the kernel keeps the count that is to be reset."""
    return os.access(PROCESS / "clear_refs", os.W_OK) and "VmHWM" in _read(PROCESS / "status")


def reset_peak() -> None:
    """Count the peak of resident memory from here on (proc(5), clear_refs)."""
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")


def _limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group that holds this process, in version 1 or 2; none outside Linux."""
    found = []
    for line in _read(PROCESS / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = root / path.lstrip("/")
        # A limit of any group above holds too. In a container the path may be the host's, and only the root is there.
        for group in (inner, *inner.parents):
            if group == root or root in group.parents:
                limit, used = (_read(group / name).strip() for name in names)
                if limit.isdigit():  # "max" is no limit
                    found.append((int(limit), int(used) if used.isdigit() else 0))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
