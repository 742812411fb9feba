"""What has to be set before torch, transformers and Unsloth are imported, so that they are quiet, private and fit."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from pathlib import Path

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def prepare_environment(command: str) -> None:
    """Set what libraries read at import, for one of dpo-cli's commands. What the user has set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's and transformers'
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # The tokenizer uses all cores, except where data loaders may fork after it has: there it could hang.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if command == "train" else "true")
    if _has_expandable_segments() and not any(name in os.environ for name in ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # less of a card is lost to fragments
    # torchao registers enums in a way that newer versions of torch call deprecated, at every import of transformers.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package of kernels at import
    # engine.preflight is such a run, and the reset that this warning tells of is right.
    warnings.filterwarnings("ignore", message="Unsloth: detected a manual forward/backward run before trainer.train")


def cache_folder() -> Path:
    """Return `$DPO_CLI_CACHE`, else `$XDG_CACHE_HOME/dpo-cli`, else `~/.cache/dpo-cli`; absolute, perhaps not there."""
    if own := os.environ.get("DPO_CLI_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "dpo-cli"
    return Path.home() / ".cache" / "dpo-cli"


def never_fail_to_print() -> None:
    """Show `?` or an escape for a character that the terminal's encoding lacks, instead of ending in an error."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)  # a stream put there by a test or a notebook may lack it
        if reconfigure:
            reconfigure(errors=errors)


def in_wsl() -> bool:
    """Whether this Linux runs in Windows."""
    return "microsoft" in platform.release().lower()


def _has_expandable_segments() -> bool:
    """Whether CUDA can grow a block of memory: on Linux, but not in WSL."""
    return sys.platform == "linux" and not in_wsl()
