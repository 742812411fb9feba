"""What `doctor` asks of the libraries, in a process of its own: python -m dpo_cli.imports FILE.

Each is imported as `train` does it, one after the other. A line of JSON says what became of it, so that where this
process is killed or crashes the last line names the library before.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.environment import prepare_environment


def torch_facts() -> dict[str, Any]:
    """The build of torch, the GPU that it finds, and why it finds none where there should be one."""
    import torch

    from dpo_cli.gpu import cuda_problem

    problem = cuda_problem()
    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "problem": [problem.message, problem.hint] if problem else None,
        "card": None,
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts["card"] = {
            "name": card.name,
            "total": card.total_memory,
            "free": torch.cuda.mem_get_info(0)[0],
            "capability": [card.major, card.minor],
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
        torch.zeros(8, device="cuda").add_(1).cpu()  # a build without kernels for this card fails here
    return facts


def unsloth_facts() -> dict[str, Any]:
    from dpo_cli.backends import Backend, import_backend

    import_backend(Backend("unsloth", ""))
    return {}


def bitsandbytes_facts() -> dict[str, Any]:
    """Whether its compiled library loads; without that 4-bit weights don't."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    lib = importlib.import_module("bitsandbytes.cextension").lib
    return {"loads": type(lib).__name__ not in ("ErrorHandlerMockBNBNativeLibrary", "NoneType")}


# In `train`'s order: Unsloth comes before what it patches.
PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts, "unsloth": unsloth_facts, "bitsandbytes": bitsandbytes_facts,
}  # fmt: skip
ORDER = (*PROBES, "transformers", "peft", "datasets", "accelerate", "trl")


def imported(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    if name == "trl":
        module.DPOTrainer  # noqa: B018  imported only when it is named
    return {}


def main() -> None:
    """Write a line of JSON before and after each import: what it is, and what became of it."""
    prepare_environment("doctor")
    file, *installed = sys.argv[1:]
    with Path(file).open("w", encoding="utf-8") as out:
        has_card = False
        for name in ORDER:
            if name not in installed or (name == "unsloth" and not has_card):
                continue
            print(json.dumps({"begins": name}), file=out, flush=True)
            try:
                found = PROBES[name]() if name in PROBES else imported(name)
            except BaseException as error:  # a package may raise anything at import, SystemExit too
                lines = str(error).strip().splitlines()
                found = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")}
            has_card = has_card or bool(found.get("card"))
            print(json.dumps({"name": name, **found}), file=out, flush=True)


if __name__ == "__main__":
    main()
