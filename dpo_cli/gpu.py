"""The GPU as torch uses it: why it finds none, what it computes in, and how much of its memory is ours."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch

from dpo_cli.driver import Driver, build_problem, find_driver, torch_index
from dpo_cli.environment import in_wsl
from dpo_cli.errors import DpoError, first_line


def cuda_problem() -> DpoError | None:
    """Why torch finds no GPU though there is an NVIDIA card, or Unsloth is installed, which needs one; else None.

    A card hidden by CUDA_VISIBLE_DEVICES, or one beside a CPU build of torch, is a problem for Unsloth only: the hf
    backend trains small models on the CPU.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver in its own words
        usable = torch.cuda.is_available()
    if usable or torch.version.hip or os.environ.get("UNSLOTH_ALLOW_CPU") == "1":
        return None
    driver, unsloth = find_driver(), find_spec("unsloth") is not None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    meant = hidden in ("", "-1") or not torch.version.cuda
    if not unsloth and (driver is None or meant):
        return None
    return _problem(torch.__version__, torch.version.cuda, driver, hidden)


def _problem(torch_version: str, cuda: str | None, driver: Driver | None, hidden: str | None) -> DpoError:
    index = torch_index(driver)
    pins = f"torch=={torch_version.partition('+')[0]} torchvision"
    install = f"pip uninstall -y torch torchvision && pip install {pins} --index-url {{}}"
    without_card = "; without an NVIDIA card, use the CPU packages in another venv: make smoke creates .venv"
    if cuda is None:
        way = install.format(index) if index else "update its driver first"
        what = f"torch {torch_version} is a CPU build, and Unsloth needs a GPU"
        return DpoError(what, hint=f"for a card, {way}{without_card}")
    if found := build_problem(driver, cuda, install):
        what, fix = f"torch finds no GPU: {found[0]}", found[1] + (without_card if driver is None else "")
    elif hidden is not None:
        what = f"torch finds no GPU: CUDA_VISIBLE_DEVICES={hidden!r} hides it"
        fix = "unset CUDA_VISIBLE_DEVICES, or set it to 0"
    else:
        what = f"torch finds no GPU, though the driver should do: {_reason()}"
        fix = "restart the machine; in a container, pass every /dev/nvidia* device (--gpus all)"
    return DpoError(what, hint=fix)


def _reason() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError or what a later torch raises: only its words are wanted
        return first_line(error)
    return "no reason is given"


def best_dtype() -> torch.dtype:
    """bfloat16 on a GPU that computes in it (Ampere and newer), float16 on an older one, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    # Cards without bfloat16 (T4, V100, RTX 20xx) emulate it: slowly, and Unsloth's trainer refuses it there.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def free_gpu_memory() -> int:
    """Bytes of the current GPU that this process may take: what is free, and what PyTorch holds already."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def limit_memory(most: int | None) -> None:
    """Have PyTorch raise before it takes more bytes of the current GPU than these; None: all that is there.

    In WSL never more than is free: there Windows gives a full card the machine's memory, without an error and many
    times slower (microsoft/WSL#11050).
    """
    if in_wsl():
        free = free_gpu_memory()
        most = free if most is None else min(most, free)
    if most is not None:
        share = most / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0))
