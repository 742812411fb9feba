"""`doctor`: what is installed, what can run here, and how to fix what cannot."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from dpo_cli import machine
from dpo_cli.driver import (
    CUDA_12,
    QWEN3_GIB,
    Card,
    compiler,
    find_driver,
    has_python_headers,
    lacks_kernels,
    oldest_driver,
)
from dpo_cli.show import one_line

NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
GIB = 2**30
ROOM = 10e9  # bytes that a 1.7B run with its 16-bit export takes
PATIENCE = 300  # seconds for all imports
OPTIONAL = ("gguf", "openai")
TOOLS = ("llama-quantize", "ollama")


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`; `needed` says that `train` can't run without it."""

    what: str
    state: str
    ok: bool
    needed: bool = False
    fix: str = ""

    def line(self) -> str:
        mark = "ok  " if self.ok else "MISS" if self.needed else "--  "
        fix = f"\n     fix: {one_line(self.fix)}" if self.fix and not self.ok else ""
        return f"{mark} {self.what:<13} {one_line(self.state)}{fix}"


class Installed:
    """The libraries of this machine, each looked at once."""

    @cached_property
    def versions(self) -> dict[str, str]:
        return {name: version or "unknown version" for name, version in machine.versions().items()}

    @cached_property
    def imports(self) -> dict[str, dict[str, Any]]:
        """What `imports.py` finds by package: its facts, or an `error`; again without one that crashes it."""
        found: dict[str, dict[str, Any]] = {}
        left = list(self.versions)
        while crashed := _import_in_a_process(left, found):
            left.remove(crashed)
        return found

    @property
    def torch(self) -> dict[str, Any]:
        return self.imports.get("torch", {})


def examine() -> Iterator[Finding]:
    """Look at this machine, and say last what can run here. A probe that fails is a finding and ends nothing."""
    probes = (
        _system, _memory, _disk, _hub, _optional, _packages, _versions, _driver, _gpu, _bitsandbytes, _unsloth,
    )  # fmt: skip
    installed, missing = Installed(), list[str]()
    for probe in probes:
        try:
            for finding in probe(installed):
                yield finding
                if finding.needed and not finding.ok and finding.what not in missing:
                    missing.append(finding.what)
        except Exception as error:  # whatever is odd about this machine, the rest is still worth knowing
            name = probe.__name__.strip("_")
            yield Finding(name, f"can't be examined: {type(error).__name__}: {error}", False)
    yield _verdict(missing, installed)


def _verdict(missing: list[str], installed: Installed) -> Finding:
    card = installed.torch.get("card")
    if missing or "card" not in installed.torch:
        return Finding("can run", f"train can't: see {', '.join(missing) or 'torch'} above", False, True)
    if not card:
        gpu = "once the GPU works, see above" if installed.torch["problem"] else "on a GPU"
        small = "the smoke run, and training of small models on the CPU"
        return Finding("can run", f"{small}; from Qwen3-0.6B {gpu}", True)
    fit = [size for size, least in QWEN3_GIB.items() if least * GIB <= card["total"]]
    if not fit or not installed.imports.get("bitsandbytes", {}).get("loads"):
        return Finding("can run", "the smoke run, and training of small models on the GPU", True)
    crowded = ", ".join(size for size in fit if QWEN3_GIB[size] * GIB > card["free"])
    until = f"; {crowded} once more of its memory is free" if crowded else ""
    sizes = f"training of Qwen3 {', '.join(fit)} in 4-bit on the {card['name']}"
    return Finding("can run", f"the smoke run, and {sizes}{until}", True)


def _import_in_a_process(packages: list[str], found: dict[str, dict[str, Any]]) -> str:
    """Fill in `found`; the package at whose import that process ended, or "" where it came to its own end."""
    begun = ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "imports.jsonl"
        command = [sys.executable, "-m", "dpo_cli.imports", str(file), *packages]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
            end = f"exit code {done.returncode}" if done.returncode >= 0 else f"signal {-done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"no end in {PATIENCE} seconds"
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            answer = json.loads(line)
            begun = answer.get("begins", "")
            if not begun:
                found[answer.pop("name")] = answer
    if begun:
        found[begun] = {"error": f"the import crashes Python ({end})", "crash": True}
    return begun


def _system(_: Installed) -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", True)
    if sys.platform != "linux":
        yield Finding("system", "training is tested on Linux; WSL2 should do the same", False)


def _memory(_: Installed) -> Iterator[Finding]:
    total, free = machine.total_memory() / GIB, machine.free_memory() / GIB
    yield Finding("memory", f"{total:.1f} GiB, {free:.1f} free; {machine.cores()} cores", True)


def _packages(installed: Installed) -> Iterator[Finding]:
    extra = "unsloth" if installed.torch.get("card") else "cpu"
    install = f"in a clone of dpo-cli: pip install -e '.[{extra}]'"
    for name in NEEDED:
        version, error = installed.versions.get(name), installed.imports.get(name, {}).get("error")
        if version is None:
            yield Finding(name, "not installed", False, True, install)
        elif error:
            fix = f"pip install --force-reinstall {name}=={version}, or in a new venv, {install}"
            yield Finding(name, f"{version} does not import: {error}", False, True, fix)
        else:
            yield Finding(name, version, True, True)


def _versions(installed: Installed) -> Iterator[Finding]:
    """Packages of another version than pyproject.toml asks for."""
    for one in map(Requirement, metadata.requires("dpo-cli") or ()):
        version = installed.versions.get(one.name)
        if one.marker is not None or version is None:
            continue
        try:
            fits = one.specifier.contains(version, prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            state = f"{version}, and dpo-cli is made for {one.specifier}"
            yield Finding(one.name, state, False, fix=f"pip install '{one.name}{one.specifier}'")


def _driver(installed: Installed) -> Iterator[Finding]:
    driver = find_driver()
    if driver is None:
        yield Finding("driver", "no NVIDIA driver (no nvidia-smi)", False)
        return
    cuda = installed.torch.get("cuda") or ""
    needs = f"; torch for CUDA {cuda} needs {oldest_driver(cuda)} or newer" if oldest_driver(cuda) else ""
    state = f"nvidia-smi fails: {driver.error}" if driver.error else f"NVIDIA {driver.version}{needs}"
    yield Finding("driver", state, not driver.error, fix="restart the machine, or reinstall the NVIDIA driver")
    if driver.cards and not installed.torch.get("card"):
        names = ", ".join(card.name for card in driver.cards)
        yield Finding("card", f"{names}, not used by torch", False, fix="see gpu below")


def _gpu(installed: Installed) -> Iterator[Finding]:
    torch = installed.torch
    if "cuda" not in torch:
        yield Finding("gpu", "unknown without torch", False)
    elif not torch["card"]:
        built = f"torch is built for CUDA {torch['cuda']}" if torch["cuda"] else "torch is a CPU build"
        small = "small models train on the CPU; README.md has the way to a GPU"
        what, fix = torch["problem"] or (f"none; {built}", small)
        yield Finding("gpu", what, False, torch["problem"] is not None and "unsloth" in installed.versions, fix)
    else:
        card = torch["card"]
        kind = "bfloat16" if card["bf16"] else "float16 only"
        memory = f"{card['total'] / GIB:.1f} GiB, {card['free'] / GIB:.1f} free"
        state = f"{card['name']}, {memory}, CUDA {torch['cuda'] or 'none'}, {kind}"
        capability = (card["capability"][0], card["capability"][1])
        lacking = lacks_kernels(torch["cuda"] or "", Card(card["name"], 0, 0, capability))
        without = f"; torch has no kernels for its compute capability {capability[0]}.{capability[1]}"
        fix = f"rm -r .venv-gpu; make train TORCH_INDEX={CUDA_12}"
        yield Finding("gpu", state + (without if lacking else ""), not lacking, True, fix)


def _bitsandbytes(installed: Installed) -> Iterator[Finding]:
    version, facts = installed.versions.get("bitsandbytes"), installed.imports.get("bitsandbytes", {})
    fix, needed = "python -m bitsandbytes says why; or set model.load_in_4bit: false", False
    if version is None:
        state, fix = "no bitsandbytes", "pip install bitsandbytes, or set model.load_in_4bit: false"
    elif "error" in facts:  # PEFT imports it too, so that where it crashes Python nothing trains
        state, needed = f"bitsandbytes {version} does not import: {facts['error']}", "crash" in facts
    else:
        state = f"bitsandbytes {version}, its library {'loads' if facts['loads'] else 'does not load'}"
    yield Finding("4-bit", state, bool(facts.get("loads")), needed, fix)


def _unsloth(installed: Installed) -> Iterator[Finding]:
    has_card, trl = bool(installed.torch.get("card")), installed.versions.get("trl", "")
    if trl.startswith("1.15") and not has_card:
        state = "TRL 1.15 computes its log-probabilities on GPUs only"
        yield Finding("trl on a CPU", state, False, True, "pip install trl==1.16.0")
    version, error = installed.versions.get("unsloth"), installed.imports.get("unsloth", {}).get("error")
    if version is None:
        fix = "in a venv of its own: make .venv-gpu/installed" if has_card else ""
        yield Finding("unsloth", "not installed; the hf backend trains", False, fix=fix)
        return
    if error:
        fix = "install it again: rm -r .venv-gpu; make .venv-gpu/installed; or set engine.backend: hf"
        yield Finding("unsloth", f"{version} does not import: {error}", False, True, fix)
    else:
        yield Finding("unsloth", version, has_card, fix="it needs an NVIDIA GPU")
    newer = re.match(r"(\d+)\.(\d+)", trl)
    if newer and (int(newer[1]), int(newer[2])) > (1, 15):
        state = f"Unsloth needs trl 1.15.0 or older, and {trl} is installed"
        yield Finding("its trl", state, False, fix="pip install trl==1.15.0")
    if has_card:
        tool, headers = compiler(), has_python_headers()
        state = f"compiler {tool or 'missing'}, Python.h {'there' if headers else 'missing'}"
        fix = "apt install gcc python3-dev, or your system's way"
        yield Finding("triton", state, bool(tool and headers), True, fix)


def _optional(_: Installed) -> Iterator[Finding]:
    """What some settings need: GGUF files, a judge on a server, another runtime."""
    there = {name: f"{name} {metadata.version(name)}" for name in OPTIONAL if find_spec(name)}
    there |= {name: name for name in TOOLS if shutil.which(name)}
    missing = [name for name in (*OPTIONAL, *TOOLS) if name not in there]
    without = f"; not there: {', '.join(missing)}" if missing else ""
    yield Finding("optional", f"{', '.join(there.values()) or 'none'}{without}", True)


def _disk(_: Installed) -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    fix = f"a 1.7B run and its 16-bit export take {ROOM / 1e9:.0f} GB; choose a place with --runs-dir"
    yield Finding("disk", f"{free / 1e9:.0f} GB free here", free > ROOM, fix=fix)


def _hub(_: Installed) -> Iterator[Finding]:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("hub", "switched off by HF_HUB_OFFLINE", False)
        return
    try:
        urlopen(Request(address, method="HEAD"), timeout=3).close()
    except (URLError, OSError, ValueError) as error:
        fix = "only hub ids need it; set HF_ENDPOINT to a mirror, such as https://hf-mirror.com"
        yield Finding("hub", f"{address} can't be reached ({getattr(error, 'reason', error)})", False, fix=fix)
    else:
        yield Finding("hub", address, True)
