"""`doctor`: what is installed, what can run here, and the command that mends what cannot."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.run import versions


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
        mend = f"  fix: {self.mend}" if self.mend and not self.ok else ""
        return f"{mark} {self.what:<14} {self.state}{mend}"


def examine() -> list[Finding]:
    """Look at this machine; imports torch only where it is installed."""
    found = versions()
    install = "pip install 'dpo-cli[cpu]', or 'dpo-cli[unsloth]' with an NVIDIA GPU"
    findings = [Finding("python", platform.python_version(), True)]
    for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"):
        findings.append(Finding(name, found.get(name, "not installed"), name in found, True, install))
    gpu = "none: the tiny model only"
    if "torch" in found:
        import torch

        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            gpu = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    has_gpu = not gpu.startswith("none")
    findings.append(Finding("gpu", gpu, has_gpu))
    unsloth = found.get("unsloth", "not installed")
    mend = "in a venv of its own: pip install 'dpo-cli[unsloth]'" if has_gpu else ""
    findings.append(Finding("unsloth", unsloth, "unsloth" in found, False, mend))
    if found.get("trl", "").startswith("1.15.") and not has_gpu:
        findings.append(Finding("trl on a CPU", "1.15 trains on GPUs only", False, True, "pip install trl==1.16.0"))
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    findings.append(
        Finding("disk", f"{free:.0f} GB free here", free > 10, False, "a 1.7B run with exports takes 10 GB")
    )
    return findings
