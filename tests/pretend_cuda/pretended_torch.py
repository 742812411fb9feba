"""What of torch and its neighbours has to be replaced for a pretended card: each where it would look for a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tests.pretend_cuda.pretended import (
    CPU,
    CUDA,
    Card,
    Moved,
    Operations,
    Pretended,
    Tensor,
    asked,
    asked_for,
    cards,
    on_card,
)
from torch.nn.attention import bias
from torch.utils._python_dispatch import _disable_current_modes

CausalBias: Any = bias.CausalBias


@contextmanager
def pretending(card: Card) -> Iterator[Card]:
    """Within it there is this card. All that it replaces is put back; tensors of the card are of no use after it."""
    from transformers import PreTrainedModel

    module: Any = torch.nn.Module
    loading: Any = PreTrainedModel.from_pretrained
    core: Any = torch._C
    cuda = _torch_cuda(card)
    replaced: dict[Any, dict[str, Any]] = {
        torch.cuda: cuda,
        torch.cuda.random: {name: cuda[name] for name in cuda if hasattr(torch.cuda.random, name)},
        torch: {"Generator": _Generator},
        core: {"_group_tensors_by_device_and_dtype": _grouped(core._group_tensors_by_device_and_dtype)},
        Tensor: {"_to": Tensor.to, "to": _to, "cuda": lambda self, *_, **__: _to(self, CUDA)},
        module: {"to": _module_to(module.to), "cuda": lambda self, *_: carry(self)},
        bias: {"CausalBias": _causal_bias},
        PreTrainedModel: {"from_pretrained": _from_pretrained(loading.__func__)},
        **_torch_in_place_of_triton(),
    }
    with ExitStack() as stack:
        for where, names in replaced.items():
            stack.enter_context(patch.multiple(where, create=True, **names))
        stack.callback(_forget_devices)
        _forget_devices()
        core._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes its copy to the card where it is seen
        stack.callback(core._set_only_lift_cpu_tensors, False)
        cards.append(card)
        stack.callback(cards.pop)
        stack.enter_context(Operations())
        yield card


def _torch_in_place_of_triton() -> dict[Any, dict[str, Any]]:
    """Replace TRL's Triton kernels by its own torch code for machines without Triton: here and nowhere else.

    Its head scores labelled positions only, as it does on a card.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    return {
        chunked_logprob: {"_use_triton": lambda device: False, "_MM_OUT_DTYPE": False},
        utils: {
            "_use_triton": lambda device: device.type == "cuda",
            "_supports_trl_loss_kernel": lambda *_, **__: False,
        },
    }


def _torch_cuda(card: Card) -> dict[str, Any]:
    """What the program and its libraries ask of torch.cuda."""

    def keep(name: str, value: Any) -> Callable[..., None]:
        return lambda *given, **_: setattr(card, name, value(*given))

    seed = keep("random", lambda number: torch.Generator().manual_seed(number).get_state())
    major, minor = card.capability
    properties = SimpleNamespace(total_memory=card.total, name=card.name, major=major, minor=minor)
    quiet: dict[str, Any] = dict.fromkeys(("_lazy_init", "set_device", "synchronize", "ipc_collect"), lambda *_: None)
    return quiet | {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: card.count,
        "current_device": lambda: 0, "device": lambda *_: nullcontext(),
        "is_bf16_supported": lambda including_emulation=True: including_emulation or major >= 8,
        "get_device_capability": lambda *_: card.capability, "get_device_name": lambda *_: card.name,
        "get_device_properties": lambda *_: properties, "mem_get_info": lambda *_: (card.total - 2**30, card.total),
        "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0, "max_memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: card.largest, "reset_peak_memory_stats": keep("largest", lambda *_: 0),
        "empty_cache": keep("emptied", lambda: card.emptied + 1),
        "set_per_process_memory_fraction": keep("share", lambda share, *_: share),
        "manual_seed": seed, "manual_seed_all": seed,
        "get_rng_state": lambda *_: card.random, "set_rng_state": keep("random", lambda state, *_: state),
        "get_rng_state_all": lambda: [card.random], "set_rng_state_all": keep("random", lambda states: states[0]),
    }  # fmt: skip


def _forget_devices() -> None:
    """Make accelerate and transformers look at this machine again."""
    import accelerate.utils.imports
    import transformers.utils.import_utils
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for module in (accelerate.utils.imports, transformers.utils.import_utils):
        for one in vars(module).values():
            if hasattr(one, "cache_clear"):
                one.cache_clear()


# ------------------------------------------------------------------------------------------------- tensors and modules


def _to(self: Any, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    """`Tensor.to` of a tensor on the CPU."""
    device, dtype = asked_for(*args, **kwargs)
    if device is None or device.type != "cuda":
        return Tensor._to(self, *args, copy=copy, **kwargs)
    cards[-1].copies[asked("copy")] += 1
    return Moved.apply(self).to(dtype or self.dtype)


def carry(module: Any, to_card: bool = True) -> Any:
    """Move a module's parameters and buffers; what is shared, tied embeddings say, stays shared."""
    moved: dict[int, Any] = {}

    def place(tensor: Any) -> Any:
        if tensor is None or on_card(tensor) is to_card:
            return tensor
        if id(tensor) not in moved:
            new: Any = Pretended(tensor.detach()) if to_card else tensor.held
            weight = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if weight else new
        return moved[id(tensor)]

    parts = [values for one in module.modules() for values in (one._parameters, one._buffers)]
    # All of them before the first is let go of, whose id another might get.
    for values, new in [(values, {name: place(one) for name, one in values.items()}) for values in parts]:
        values.update(new)
    return module


def _module_to(original: Any) -> Any:
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        device, dtype = asked_for(*args, **kwargs)
        if device is None or device.type not in ("cuda", "cpu"):
            return original(self, *args, **kwargs)
        carry(self, device.type == "cuda")
        return original(self, dtype) if dtype else self

    return to


def _from_pretrained(original: Any) -> Any:
    def from_pretrained(cls: Any, /, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        """transformers reads a file straight to the card; here by way of the CPU."""
        found = original(cls, *args, **kwargs)
        if device_map is not None:
            carry(found[0] if isinstance(found, tuple) else found)
        return found

    return classmethod(from_pretrained)


class _Generator(torch.Generator):
    """Of either device. Operations are given another object for it, so the card knows its own by their address."""

    device: Any = property(lambda self: CUDA if self._cdata in cards[-1].generators else CPU)

    def __new__(cls, device: Any = "cpu") -> Any:
        made: Any = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cards[-1].generators[made._cdata] = made
        return made


def _causal_bias(*given: Any) -> Any:
    """It is a tensor itself, which PyTorch can't make while operations are looked at."""
    with _disable_current_modes():
        return CausalBias(*given)


def _grouped(original: Any) -> Any:
    """Group tensors by device and dtype, for clipping and optimizers."""

    def group(lists: Any, *args: Any) -> Any:
        here = any(on_card(one) for one in lists[0])
        return {(CUDA if here else key[0], key[1]): value for key, value in original(lists, *args).items()}

    return group
