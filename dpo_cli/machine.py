"""What this machine, or the container that this process may use, computes with: memory, cores, GPU, libraries."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

from dpo_cli import __version__
from dpo_cli.disk import read_if_there

PROCESS = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "unsloth")
# PyTorch's GPU and CPU allocators, torch.AcceleratorError, Triton's launcher and NVIDIA's libraries each have words of
# their own.
OUT_OF_MEMORY = re.compile(r"out of memory|STATUS_ALLOC_FAILED|not enough memory|can't allocate memory", re.IGNORECASE)


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
    highest = re.search(r"VmHWM:\s*(\d+) kB", read_if_there(PROCESS / "status"))
    now = psutil.Process().memory_info()
    return int(highest[1]) * 1024 if highest else int(getattr(now, "peak_wset", now.rss))


def _limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group (version 2) that holds this process; none outside Linux."""
    found = []
    named = re.search(r"^0::/(.*)", read_if_there(PROCESS / "cgroup"), re.MULTILINE)
    inner = CGROUPS / (named[1] if named else "")
    # A limit of any group above holds too. In a container the path may be the host's, and only the root is there.
    for group in (inner, *inner.parents):
        if group == CGROUPS or CGROUPS in group.parents:
            limit, used = (read_if_there(group / name).strip() for name in ("memory.max", "memory.current"))
            if limit.isdigit():  # "max" is no limit
                found.append((int(limit), int(used) if used.isdigit() else 0))
    return found


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU, or of this machine, was too small."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None  # torch's are all of these


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape results; read without importing them."""
    found = {"python": platform.python_version(), "dpo-cli": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(stage: str) -> str:
    """What a stage computes on: the GPU's name, where it runs the model and there is one; else the processor."""
    torch = sys.modules.get("torch")  # a stage that runs the model has imported it
    if stage not in ("prepare", "sets") and torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the repository one works in, to find a recipe's history again; None outside of one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
