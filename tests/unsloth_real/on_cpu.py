"""The real Unsloth on a machine without a GPU, along the way it takes on a card: loader, adapters, kernels, trainer.

`UNSLOTH_ALLOW_CPU=1` is Unsloth's own switch for that, but with it some calls still need CUDA. What `start` replaces:

- answers about the card (`torch.cuda.device_count` and the like): one of 16 GB and capability 8.9;
- `cuda` and a bare device number where a tensor is made or moved: the CPU (`torch.cuda.is_available()` stays False);
- pinned host memory, which needs a driver: ordinary memory;
- Triton's compiler, by its own interpreter; torch.compile is off;
- the verdict that bitsandbytes is broken for want of its CUDA library: Unsloth's own Triton kernels unpack NF4;
- flex attention's kernel, which has no backward on a CPU: PyTorch's dense attention under the same mask function;
- the replacement of TRL's classes, which `import unsloth` leaves out under that switch: called by hand.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENVIRONMENT = {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_AUTO_INSTALL": "0",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_RMSNORM_MULTIROW": "0",  # kernels that check themselves bit by bit, and the interpreter rounds otherwise
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def start(compiled: Path) -> None:
    """Import Unsloth with the replacements above, for the rest of this process."""
    os.environ.update(ENVIRONMENT, UNSLOTH_COMPILE_LOCATION=str(compiled))
    import torch

    card = SimpleNamespace(name="no card", total_memory=16 << 30, major=8, minor=9, multi_processor_count=1)
    cuda, native = vars(torch.cuda), vars(torch._C)
    cuda["device_count"] = lambda: 1
    cuda["current_device"] = lambda: 0
    cuda["get_device_properties"] = lambda device=None: card
    cuda["get_device_capability"] = lambda device=None: (card.major, card.minor)
    native["_cuda_getCurrentRawStream"] = lambda index: 0  # Unsloth reads it at import
    from unsloth.models import loader

    vars(loader)["ALLOW_BITSANDBYTES"] = True
    _replace_devices()
    _replace_flex_attention()
    _replace_trl()


def _replace_devices() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    def on_cpu(device: Any) -> Any:
        number = isinstance(device, int) and not isinstance(device, bool)
        gpu = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
        return "cpu:0" if number or gpu else device

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            if function is torch.Tensor.to:
                args = (args[0], *map(on_cpu, args[1:]))
            elif function is torch.device:
                args = tuple(map(on_cpu, args))
            return function(*args, **kwargs)

    OnCpu().__enter__()


def _replace_flex_attention() -> None:
    import torch
    from torch.nn.attention.flex_attention import create_mask
    from unsloth.utils import prefix_grouper_kernel as kernel

    def attend(q: Any, k: Any, v: Any, *, block_mask: Any, enable_gqa: bool, scale: Any, kernel_options: Any) -> Any:
        mask = create_mask(block_mask.mask_mod, 1, 1, q.shape[2], k.shape[2], device="cpu")
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )

    kernel._flex_attention_compiled = attend


def _replace_trl() -> None:
    from unsloth.models.rl import PatchFastRL

    allowed = os.environ.pop("UNSLOTH_ALLOW_CPU")
    PatchFastRL()
    os.environ["UNSLOTH_ALLOW_CPU"] = allowed
