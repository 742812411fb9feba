"""`doctor`: what is installed, what can run here, and the command that mends what cannot."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from dpo_cli.run import versions

NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
ROOM = 10e9  # bytes that a 1.7B run with its 16-bit export takes


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`; `needed` says that `train` can't run without it."""

    what: str
    state: str
    ok: bool
    needed: bool = False
    mend: str = ""

    def line(self) -> str:
        mark = "ok  " if self.ok else "MISS" if self.needed else "--  "
        mend = f"\n     fix: {self.mend}" if self.mend and not self.ok else ""
        return f"{mark} {self.what:<13} {self.state}{mend}"


def examine() -> list[Finding]:
    """Look at this machine; imports torch and bitsandbytes only where they are installed."""
    found = versions()
    gpu = _gpu(found)
    extra = "unsloth" if gpu.ok else "cpu"
    findings = [Finding("python", platform.python_version(), True)]
    for name in NEEDED:
        state = found.get(name, "not installed")
        findings.append(Finding(name, state, name in found, True, f"pip install 'dpo-cli[{extra}]'"))
    if found.get("trl", "").startswith("1.15.") and not gpu.ok:
        state = "TRL 1.15 computes its log-probabilities on GPUs only"
        findings.append(Finding("trl on a CPU", state, False, True, "pip install trl==1.16.0"))
    findings += [gpu, _bitsandbytes(found), *_unsloth(found, gpu.ok)]
    free = shutil.disk_usage(Path.cwd()).free
    mend = f"a 1.7B run and its 16-bit export take {ROOM / 1e9:.0f} GB; choose a place with --runs-dir"
    findings.append(Finding("disk", f"{free / 1e9:.0f} GB free here", free > ROOM, mend=mend))
    return [*findings, _hub()]


def _gpu(found: dict[str, str]) -> Finding:
    if "torch" not in found:
        return Finding("gpu", "unknown without torch", False)
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        mend = "small models train on the CPU; for a card: nvidia-smi, then pip install 'dpo-cli[unsloth]'"
        return Finding("gpu", f"none; {built}", False, mend=mend)
    card = torch.cuda.get_device_properties(0)
    bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "float16 only"
    return Finding("gpu", f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}, {bf16}", True)


def _bitsandbytes(found: dict[str, str]) -> Finding:
    """Whether its compiled library loads; without that 4-bit weights don't."""
    if "bitsandbytes" not in found:
        return Finding("4-bit", "no bitsandbytes", False)
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from bitsandbytes.cextension import lib

    works = type(lib).__name__ not in ("ErrorHandlerMockBNBNativeLibrary", "NoneType")
    return Finding("4-bit", "bitsandbytes' library loads" if works else "bitsandbytes' library does not load", works,
                   mend="python -m bitsandbytes says why; or set model.load_in_4bit: false")  # fmt: skip


def _unsloth(found: dict[str, str], has_gpu: bool) -> list[Finding]:
    if "unsloth" not in found:
        mend = "in a venv of its own: pip install 'dpo-cli[unsloth]'" if has_gpu else ""
        return [Finding("unsloth", "not installed; the hf backend trains", False, mend=mend)]
    findings = [
        Finding("unsloth", found["unsloth"], has_gpu, mend="it needs an NVIDIA GPU; engine.backend: hf does not")
    ]
    trl = tuple(int(part) for part in found.get("trl", "0.0").split(".")[:2])
    state = f"unsloth beside trl {found.get('trl', 'none')}"
    findings.append(Finding("its trl", state, trl <= (1, 15), mend="pip install 'trl<=1.15.0'"))
    if has_gpu:
        compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
        headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
        state = f"compiler {compiler or 'missing'}, Python.h {'there' if headers else 'missing'}"
        findings.append(
            Finding(
                "triton", state, bool(compiler and headers), True, "apt install gcc python3-dev, or your system's way"
            )
        )
    return findings


def _hub() -> Finding:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("hub", "switched off by HF_HUB_OFFLINE=1", False)
    try:
        urlopen(Request(address, method="HEAD"), timeout=3).close()
    except (URLError, OSError, ValueError) as error:
        mend = "only hub ids need it; set HF_ENDPOINT to a mirror, such as https://hf-mirror.com"
        return Finding("hub", f"{address} can't be reached ({getattr(error, 'reason', error)})", False, mend=mend)
    return Finding("hub", address, True)
