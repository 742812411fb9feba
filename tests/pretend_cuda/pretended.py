"""A GPU that is not there: CPU tensors that say they are on cuda:0, for the code that a machine without one never runs.

What a real card refuses is refused here: an operation on tensors of both devices, `.numpy()` of a tensor on the card, a
generator of the other device. What makes the CPU wait for a card is counted (`item`, `tolist`, `nonzero`, indexing by a
mask, copies to the CPU), and so are blocking copies to it. `pretended_torch.pretending` switches it on.

The numbers are the CPU's. Not covered, and so still to be seen on a card: bitsandbytes' and Unsloth's own kernels,
autocast("cuda") (the CPU's kernels don't look at it), Triton and flash kernels (TRL's and torch's own code for other
devices stands in), pinned memory, streams, and what anything takes of memory: the largest tensor stands for the peak.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
Tensor: Any = torch.Tensor  # its declared types leave no room for a tensor that says other things of itself
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
TO_PYTHON = {aten._local_scalar_dense.default: "item", aten.equal.default: "equal"}
WAITS = TO_PYTHON | {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
READING = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEXING = READING | {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MASKS = (torch.bool, torch.uint8)
# A number of the CPU, a tensor without dimensions, may stand in most arithmetic on a card; not in these.
SAME_DEVICE = {aten.cat.default, aten.stack.default, aten.embedding.default, aten.mm.default, aten.index_select.default}
THIS = str(Path(__file__).with_suffix(""))  # and pretended_torch
PYTHON, TORCH, INSTALLED = str(Path(os.__file__).parent), str(Path(torch.__file__).parent), "site-packages"


class Asked(NamedTuple):
    """Who waited, and what for: `by` is "ours" for code outside of installed packages, else the package's name."""

    what: str
    by: str
    line: str


@dataclass
class Card:
    """What the pretended card is, and what it has seen.

    Attributes:
        capability: (8, 9) is an RTX 4080; (7, 5) a T4, which computes bfloat16 by emulation only.
        total: bytes of memory.
        count: how many of them the machine has.
        waits, copies: of the CPU for the card, and blocking copies to it, by who asked for it.
        refused: the operations that raised.
        largest: bytes of the largest tensor since `reset_peak_memory_stats`.
        share: what `set_per_process_memory_fraction` was given.
        emptied: calls of `empty_cache`.
        random: the state of the card's default generator.
        generators: those made for the card, by their address.
    """

    capability: tuple[int, int] = (8, 9)
    name: str = "a pretended card"
    total: int = 16 * 2**30
    count: int = 1
    waits: Counter[Asked] = field(default_factory=Counter)
    copies: Counter[Asked] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    largest: int = 0
    share: float | None = None
    emptied: int = 0
    random: Any = field(default_factory=lambda: torch.Generator().manual_seed(1).get_state())
    generators: dict[int, Any] = field(default_factory=dict)


cards: list[Card] = []  # the one that is pretended, if any


def on_card(value: Any) -> bool:
    return isinstance(value, Pretended)


def asked(what: str) -> Asked:
    """By the innermost frame that is not torch's, Python's own library's or of this machinery."""
    frame: Any = sys._getframe(1)
    while frame and _passed_over(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return Asked(what, "nobody", "")
    path = Path(frame.f_code.co_filename)
    package = path.parts[path.parts.index(INSTALLED) + 1] if INSTALLED in path.parts else "ours"
    line = linecache.getline(str(path), frame.f_lineno).strip()
    return Asked(what, package, f"{'/'.join(path.parts[-3:])}:{frame.f_lineno}  {line}")


def _passed_over(path: str) -> bool:
    return path.startswith((THIS, TORCH, "<")) or (path.startswith(PYTHON) and INSTALLED not in path)


def refuse(message: str, error: type[Exception] = RuntimeError) -> Exception:
    """Make a real card's error, with the place; it is kept too, for the program may catch it."""
    text = f"{message}, at {asked('').line}"
    cards[-1].refused.append(text)
    return error(text)


# ------------------------------------------------------------------------------------------------------------ tensors


class Pretended(Tensor):
    """`held`, a tensor of the CPU, said to be on the card. To torch's C++ it is one of the CPU, so what Python asks of
    its device is answered by methods here."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        like: Any = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.size(), device=CPU, **like)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held
        if cards:
            cards[-1].largest = max(cards[-1].largest, held.nbytes)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a card that is no longer pretended")

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        device, dtype = asked_for(*args, **kwargs)
        moved = self.cpu() if device is not None and device.type == "cpu" else self
        return Tensor._to(moved, dtype or self.dtype, copy=copy)

    def cpu(self, *_: Any) -> Any:
        cards[-1].waits[asked("copy to the CPU")] += 1
        return Moved.apply(self)

    def cuda(self, *_: Any, **__: Any) -> Any:
        return self

    def tolist(self) -> Any:
        cards[-1].waits[asked("tolist")] += 1
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise refuse("can't convert cuda:0 device type tensor to numpy", TypeError)

    __array__ = numpy

    @property
    def data(self) -> Any:
        return Pretended(self.held.detach())

    @data.setter
    def data(self, new: Any) -> None:
        if not on_card(new):
            raise refuse("a parameter on cuda:0 is given data on the CPU")
        Tensor.data.__set__(self, new)
        self.held = new.held

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: Any) -> Any:
        return Pretended(self.held.clone()).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # a file holds plain numbers, for whichever device loads them

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"


class Moved(torch.autograd.Function):
    """A tensor on the other device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        return tensor.held.clone() if on_card(tensor) else Pretended(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return Moved.forward(ctx, gradient)


def asked_for(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and dtype in the arguments of `Tensor.to`, which may be another tensor."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device, args[0].dtype
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype


# --------------------------------------------------------------------------------------------------------- operations


class Operations(TorchDispatchMode):
    """Runs every operation on the CPU, and says it was on the card where it names it or takes a tensor of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where nothing else takes compound operations apart
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors: list[Any] = []
        _each(tensors.append, (args, tuple(kwargs.values())))
        here, plain = [one for one in tensors if on_card(one)], [one for one in tensors if not on_card(one)]
        named = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        kwargs = {name: CPU if name == "device" and named else one for name, one in kwargs.items()}
        kwargs.pop("pin_memory", None)
        _look(func, args, kwargs, bool(here or named), plain)
        if not (here or named):
            return func(*args, **kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags and "generator" not in kwargs
        args, values = _each(lambda one: one.held if on_card(one) else one, (args, tuple(kwargs.values())))
        with _random_of_the_card() if random else nullcontext():
            found = func(*args, **dict(zip(kwargs, values, strict=True)))
        if func in TO_PYTHON:
            return found
        known = {id(one.held): one for one in here} | {id(one): one for one in plain}  # what was changed in place
        with torch.inference_mode(False):  # a view has to be of the kind of tensor that it is a view of
            return _each(lambda one: known[id(one)] if id(one) in known else Pretended(one), found)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of every tensor in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)([_each(change, one) for one in value]) if isinstance(value, (list, tuple)) else value


def _look(func: Any, args: Any, kwargs: Mapping[str, Any], on_the_card: bool, plain: list[Any]) -> None:
    """Count what waits and what copies; raise where devices are mixed."""
    card, first, generator = cards[-1], args[0] if args else None, kwargs.get("generator")
    if generator is not None and on_the_card != (generator._cdata in card.generators):
        raise refuse(f"Expected a generator of the tensor's device in {func}")
    if not on_the_card:
        return
    if func is aten.copy_.default or func is aten._to_copy.default:
        if plain:
            (card.waits if first is plain[0] and func is aten.copy_.default else card.copies)[asked("copy")] += 1
        return
    if func in WAITS:
        card.waits[asked(WAITS[func])] += 1
    if func in INDEXING:
        indices = [one for one in args[1] if one is not None]
        number = func not in READING and not on_card(args[2])  # stored by a mask without looking at it
        if any(on_card(one) and one.dtype in MASKS for one in indices) and not number:
            card.waits[asked("index by a mask")] += 1
        if on_card(first):  # then its indices may be the CPU's
            card.copies[asked("index of the CPU")] += any(not on_card(one) for one in indices)
            plain = [one for one in plain if not any(one is index for index in indices)]
    written = func._schema.is_mutable or func in INDEXING
    if any(one.dim() or func in SAME_DEVICE or (written and one is first) for one in plain):
        raise refuse(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}")


@contextmanager
def _random_of_the_card() -> Iterator[None]:
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(cards[-1].random)
    try:
        yield
    finally:
        cards[-1].random = torch.default_generator.get_state()
        torch.default_generator.set_state(before)
