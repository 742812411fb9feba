"""What this machine computes on: its best dtype, its memory, and the errors that say that memory ran out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dpo_cli.environment import in_wsl

if TYPE_CHECKING:
    import torch

# PyTorch's GPU and CPU allocators, torch.AcceleratorError, Triton's launcher and NVIDIA's libraries each have words of
# their own.
OUT_OF_MEMORY = re.compile(r"out of memory|STATUS_ALLOC_FAILED|not enough memory|can't allocate memory", re.IGNORECASE)


def best_dtype() -> torch.dtype:
    """bfloat16 on a GPU that computes in it (Ampere and newer), float16 on an older one, float32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    # Cards without bfloat16 (T4, V100, RTX 20xx) emulate it: slowly, and Unsloth's trainer refuses it there.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU, or of this machine, was too small."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None  # torch's are all of these


def free_gpu_memory() -> int:
    """Bytes of the current GPU that this process may take: what is free, and what PyTorch holds already."""
    import torch

    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def limit_memory(most: int | None) -> None:
    """Have PyTorch raise before it takes more bytes of the current GPU than these; None: all that is there.

    In WSL never more than is free: there Windows gives a full card the machine's memory, without an error and many
    times slower (microsoft/WSL#11050).
    """
    import torch

    if in_wsl():
        free = free_gpu_memory()
        most = free if most is None else min(most, free)
    if most is not None:
        share = most / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0))
