"""The NVIDIA driver and its cards, as `nvidia-smi` shows them, what builds of torch they run, and what builds kernels.

Imports nothing but the standard library, and runs on an older Python than the rest: `preinstall.py` needs it before
anything is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.disk import read_if_there

# The oldest driver branch that runs programs built for a CUDA release, by its major number:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Where PyTorch keeps its builds, the newest CUDA first; and the compute capabilities that 2.14 has kernels for in each:
# https://github.com/pytorch/pytorch/blob/main/RELEASE.md
CUDA_12, CUDA_13 = "https://download.pytorch.org/whl/cu126", "https://download.pytorch.org/whl/cu130"
BUILDS = {"13.0": CUDA_13, "12.6": CUDA_12}
KERNELS = {"13.2": ((7, 5), (12, 9)), "13.0": ((7, 5), (12, 9)), "12.6": ((5, 0), (9, 9))}
# GiB of a card that DPO of a 4-bit Qwen3 takes at least: LoRA of rank 32 on all layers, one pair of 2 x 1,024 tokens at
# once, gradient checkpointing (`train.memory.predict`, to which a test compares this).
QWEN3_GIB = {"0.6B": 1.9, "1.7B": 3.1, "4B": 5.2, "8B": 9.3}
LOADED_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Card:
    """One GPU: memory in bytes, 0 where the driver doesn't say; compute capability, such as (8, 9)."""

    name: str
    total: int
    free: int
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Driver:
    """The installed driver: its version ("" where unknown), its cards, and what `nvidia-smi` says where it fails."""

    version: str
    cards: tuple[Card, ...] = ()
    error: str = ""

    @property
    def branch(self) -> int:
        """535 of 535.129.03; 0 where the version is unknown."""
        number = re.match(r"\d+", self.version)
        return int(number[0]) if number else 0


def find_driver() -> Driver | None:
    """The NVIDIA driver of this machine, or None where there is neither `nvidia-smi` nor a loaded driver."""
    loaded = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", read_if_there(LOADED_DRIVER))
    version = loaded[0] if loaded else ""
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if not tool:
        return Driver(version) if version else None
    rows, error = _ask(tool, "driver_version,name,memory.total,memory.free,compute_cap")
    if error:  # drivers before 510 don't know compute_cap
        rows, error = _ask(tool, "driver_version,name,memory.total,memory.free")
    cards = tuple(_card(row[1:]) for row in rows)
    return Driver(rows[0][0] if rows else version, cards, error)


def compiler() -> str | None:
    """The C compiler with which Triton builds its launchers."""
    return shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")


def has_python_headers() -> bool:
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def oldest_driver(cuda: str) -> int:
    """The oldest driver branch for programs built for this CUDA release, such as 580 for "13.0"; 0 if unknown."""
    return OLDEST_DRIVER.get(int(cuda.partition(".")[0] or 0), 0)


def too_old(driver: Driver, cuda: str) -> bool:
    return 0 < driver.branch < oldest_driver(cuda)


def lacks_kernels(cuda: str, card: Card) -> bool:
    """Whether PyTorch's build for this CUDA release is known to have no kernels for the card."""
    if cuda not in KERNELS or not card.capability:
        return False
    oldest, newest = KERNELS[cuda]
    return not oldest <= card.capability <= newest


def torch_index(driver: Driver | None) -> str | None:
    """The index with the build of torch that this driver and its cards can run; None where there is none."""
    if driver is None:
        return CUDA_13
    runs = (
        index
        for cuda, index in BUILDS.items()
        if not too_old(driver, cuda) and not any(lacks_kernels(cuda, card) for card in driver.cards)
    )
    return next(runs, None)


def build_problem(driver: Driver | None, cuda: str, install: str) -> tuple[str, str] | None:
    """What keeps the driver from running torch as built for this CUDA release, "" if unknown, and how to fix it.

    Args:
        install: the command that installs another build, with {} in the place of its index.
    """
    index = torch_index(driver)
    if driver is None:
        needed = f" ({oldest_driver(cuda)} or newer, for CUDA {cuda})" if oldest_driver(cuda) else ""
        what = "there is no NVIDIA driver here (no nvidia-smi)"
        return what, f"install it{needed}; start a container with --gpus all"
    if driver.error:
        return f"nvidia-smi fails: {driver.error}", "restart the machine, or reinstall the NVIDIA driver"
    if cuda and too_old(driver, cuda):
        needs = f"torch for CUDA {cuda} needs {oldest_driver(cuda)} or newer"
        other = f", or {install.format(index)}" if index else ""
        return f"the NVIDIA driver is {driver.version}, and {needs}", f"update the driver{other}"
    return None


def _ask(tool: str, fields: str) -> tuple[list[list[str]], str]:
    """Rows of `nvidia-smi`, and what it says where it fails."""
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return [], str(error)
    output = done.stdout.decode("utf-8", "replace").strip()
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    if done.returncode or not rows or any(len(row) != len(fields.split(",")) for row in rows):
        return [], output.partition("\n")[0] or f"exit code {done.returncode}"
    return rows, ""


def _card(row: list[str]) -> Card:
    name, total, free, *rest = row
    found = re.fullmatch(r"(\d+)\.(\d+)", rest[0]) if rest else None
    capability = (int(found[1]), int(found[2])) if found else None
    return Card(name, _mebibytes(total), _mebibytes(free), capability)


def _mebibytes(cell: str) -> int:
    """Bytes; 0 for the [N/A] of cards that share the machine's memory."""
    return int(cell) << 20 if cell.isdigit() else 0
