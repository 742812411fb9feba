"""What `make` looks at before it downloads gigabytes: python -m dpo_cli.preinstall cpu|gpu [TORCH_INDEX]."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dpo_cli.driver import (
    QWEN3_GIB,
    Driver,
    build_problem,
    compiler,
    find_driver,
    has_python_headers,
    lacks_kernels,
    torch_index,
)

Problem = tuple[str, str]  # what is wrong, and how to fix it

NEWEST_PYTHON = (3, 14)  # that torch 2.13 and 2.14 are built for
# GB that pip downloads on Linux, and that the venv then takes (measured); with torch for CUDA, and for CPUs alone.
DOWNLOAD, VENV = 3.2, 6.4
CPU_DOWNLOAD, CPU_VENV = 0.4, 1.9
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# GB that the recipe for a 16 GB card adds: in `runs`, and in the caches of the Hub and of pip in the home folder.
RUN, CACHES = 5.0, 9.0
OTHER_CARD = "take a smaller model (Qwen3-0.6B), or make smoke, which needs no card"


def problems(kind: str, index: str) -> Iterator[Problem]:
    """What would end an installation, or the first training after it.

    Args:
        kind: `cpu` or `gpu`.
        index: TORCH_INDEX, or "" for the build of torch that PyPI has.
    """
    release = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        yield f"torch is not built for Python {release}", f"take Python 3.11 to {newest}: make … PYTHON=python{newest}"
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        yield f"Python {release} can't make a venv", f"apt install python{release}-venv, or your system's way"
    small = index.rstrip("/") == CPU_INDEX
    download, venv = (CPU_DOWNLOAD, CPU_VENV) if small else (DOWNLOAD, VENV)
    if kind == "gpu":
        if not compiler():
            yield "there is no C compiler, which Unsloth's kernels need", "apt install gcc, or your system's way"
        if not has_python_headers():
            fix = f"apt install python{release}-dev, or your system's way"
            yield f"the headers of Python {release} are missing, which Unsloth's kernels need", fix
        yield from _card_problems(find_driver(), index)
        yield from _disk_problems(venv + RUN, download + CACHES)
    else:
        yield from _disk_problems(venv, download)


def _card_problems(driver: Driver | None, index: str) -> Iterator[Problem]:
    if platform.system() not in ("Linux", "Windows"):
        yield f"Unsloth needs an NVIDIA card; {platform.system()} has none", "make smoke trains a small model here"
        return
    build = re.search(r"/cu(\d+)(\d)/?$", index)
    cuda = f"{build[1]}.{build[2]}" if build else "" if index else "13.0"
    other = "make train TORCH_INDEX={}"
    if found := build_problem(driver, cuda, other):
        what, fix = found
        yield what, fix if driver else f"{fix}; else {OTHER_CARD}"
    if driver is None or driver.error:
        return
    best = torch_index(driver)
    for name in {card.name for card in driver.cards if lacks_kernels(cuda, card)}:
        yield f"torch for CUDA {cuda} has no kernels for the {name}", other.format(best) if best else OTHER_CARD
    total, free = (max((getattr(card, key) / 2**30 for card in driver.cards), default=0.0) for key in ("total", "free"))
    least = QWEN3_GIB["1.7B"]
    if total and total < least:
        yield f"the card has {total:.1f} GiB, and Qwen3-1.7B takes {least} or more", OTHER_CARD
    elif total and free < least:
        fix = "end what else uses the card: nvidia-smi names it"
        yield f"only {free:.1f} of the card's {total:.1f} GiB are free", fix


def _disk_problems(here: float, home: float) -> Iterator[Problem]:
    """GB wanted in this folder, and in the home folder, where pip and the Hub keep what they download."""
    folders = {Path.cwd(): here}
    caches = Path(os.environ.get("HF_HOME") or Path.home())
    while not caches.exists():
        caches = caches.parent
    if caches.stat().st_dev == Path.cwd().stat().st_dev:
        folders[Path.cwd()] += home
    else:
        folders[caches] = home
    for folder, wanted in folders.items():
        free = shutil.disk_usage(folder).free / 1e9
        if free < wanted:
            fix = "free some; HF_HOME and PIP_CACHE_DIR move what is downloaded to another disk"
            yield f"{free:.1f} GB are free in {folder}, and this takes {wanted:.0f} GB", fix


def main() -> None:
    """Print each problem with its fix; exit code 1 where there is one, unless ANYWAY is set."""
    kind, index = sys.argv[1], "".join(sys.argv[2:])
    found = list(problems(kind, index))
    for what, fix in found:
        print(f"check: {what}\n  fix: {fix}", file=sys.stderr)
    if found and not os.environ.get("ANYWAY"):
        print("nothing was installed; with ANYWAY=1 make goes on all the same", file=sys.stderr)
        sys.exit(1)
    small = index.rstrip("/") == CPU_INDEX
    print(f"installing torch and what it needs; pip downloads about {CPU_DOWNLOAD if small else DOWNLOAD} GB")
    if kind == "cpu" and not small:
        print(f"without CUDA it is {CPU_DOWNLOAD} GB: make smoke TORCH_INDEX={CPU_INDEX}")


if __name__ == "__main__":
    main()
