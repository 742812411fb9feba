"""Tools of a machine that is not there: an `nvidia-smi` and a `df` that say what a test wants."""

from __future__ import annotations

from pathlib import Path

# A loaded driver shows through the fakes below.
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists() or Path("/usr/lib/wsl/lib/nvidia-smi").exists()

RTX_4080 = "NVIDIA GeForce RTX 4080, 16376, 15012, 8.9"
GTX_1080 = "NVIDIA GeForce GTX 1080 Ti, 11264, 11000, 6.1"
RTX_5090 = "NVIDIA GeForce RTX 5090, 32607, 31000, 12.0"


def write_tool(folder: Path, name: str, body: str) -> Path:
    """A program of that name, to be put on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return folder


def nvidia_smi(folder: Path, driver: str, *cards: str, knows_capability: bool = True) -> Path:
    """An `nvidia-smi` that lists these cards; before driver 510 it knows no compute_cap."""
    rows = [f"{driver}, {card if knows_capability else card.rpartition(',')[0]}" for card in cards]
    refuses = 'case "$1" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac'
    lines = [] if knows_capability else [refuses]
    return write_tool(folder, "nvidia-smi", "\n".join([*lines, "/bin/cat <<'END'", *rows, "END"]))


def broken_nvidia_smi(folder: Path, said: str, code: int) -> Path:
    return write_tool(folder, "nvidia-smi", f"echo '{said}'\nexit {code}")
