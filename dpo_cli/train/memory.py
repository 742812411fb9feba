"""What a step takes of the memory, predicted from the architecture.

Sizes are bytes, GiB is 2**30. What layers keep is in `shape.py`. The rest of the GPU formula is the one that
`tests/train/test_preflight.py` compares with published figures; no constant of it was measured on a GPU by us. The CPU
formula is compared with resident memory there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import MEMORY_SIZE
from dpo_cli.train.shape import Shape

Precision = Literal["nf4", "bf16", "fp16", "fp32"]
Device = Literal["cuda", "cpu"]

GIB = 2**30
# Driver, CUDA kernels and cuBLAS workspaces: a common figure for one process (a guess until a GPU run corrects it).
CUDA_CONTEXT = 6 * GIB // 10
# A process with torch, transformers, TRL, PEFT and datasets imported and warm: 525 MiB measured (torch 2.13, TRL 1.16);
# and what a trainer adds to it (data set, hooks, loader): 14-16 MiB measured.
CPU_LIBRARIES, CPU_TRAINER = 525 * 2**20, 15 * 2**20
# Blocks that PyTorch's CUDA allocator holds but can't use; a guess as well. A CPU gives big blocks back at once.
CUDA_MARGIN = 0.06
# NF4 with double quantisation: 4 bits, an 8-bit scale for 64 weights, a 32-bit one for 256 of those (arXiv 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# trl/kernels/chunked_logprob.py and trl/trainer/utils.py (1.15, 1.16): rows and columns of one tile of logits.
HEAD_ROWS, HEAD_COLUMNS = 4096, 32768
# `_backward_tile` there, the torch fallback: y, z, log_p, p, grad and two products in float32, a mask of one byte.
CPU_TILE = 7 * 4 + 1
# Optimizer state a trained parameter has, in parameters of its own dtype; Adam's two moments where nothing is named.
STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class Memory:
    """A predicted peak by its parts, in bytes."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # kept from the forward until the backward
    workspace: int  # one layer in its backward: recomputed activations, a dequantised weight
    head: int  # logits, or TRL's tile of them, and the hidden states they are made of
    context: int
    margin: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def predict(
    shape: Shape,
    *,
    precision: Precision,
    rank: int,
    targets: Sequence[str],
    optimizer: str,
    checkpointing: bool,
    tokens: int,
    scored: int,
    row: int = 0,
    again: float = 0.0,
    fused_head: bool = True,
    device: Device = "cuda",
    unsloth: bool = False,
    offloading: bool = False,
    reference_copy: bool = False,
) -> Memory:
    """Predict the peak of one forward and backward of a method with LoRA.

    Args:
        precision: of the frozen weights; activations are 16-bit, but 32-bit for fp32 and for nf4 on a CPU.
        tokens: positions of one micro-batch, padding included: answers x longest row.
        scored: answer tokens among them.
        row, again: of padded rows and of shared prefixes, see `Shape.kept`; 0 where there are none.
        unsloth: the layers are Unsloth's.
        offloading: checkpointing keeps the inputs of layers in the host's memory; see `offloaded`.
        fused_head: TRL >= 1.15 makes the logits tile by tile: on a GPU for `scored` positions, else for all. The
            trainers of CPO and ORPO hold them all.
        reference_copy: a frozen second adapter, kept where training goes on from an SFT adapter.
    """
    on_gpu = device == "cuda"
    width = 4 if precision == "fp32" or (precision == "nf4" and not on_gpu) else 2
    lora = shape.lora(rank, targets)
    lora_bytes = 4  # float32 on both backends, see `trainer.build`
    unsloth = unsloth and on_gpu
    if unsloth and shape.fuses(targets):
        layer = tokens * shape.kept_fused(width, flex=again > 0)
    else:  # Unsloth's attention lays out nothing twice
        row, again = (0, 0.0) if unsloth else (row, again)
        casts = precision in ("bf16", "fp16")
        layer = tokens * shape.kept(width, rank, targets, row=row, again=again, casts=casts)
    activations = _inputs(shape, width, tokens, offloading) if checkpointing else shape.layers * layer
    if width < lora_bytes and not unsloth:
        activations += lora * width  # autocast's copy of the LoRA; Unsloth's kernels cast what they are about to read
    workspace = layer if checkpointing else 0
    if precision == "nf4":
        workspace += width * shape.hidden * shape.intermediate
    head = _head(shape, width, tokens, scored, fused_head, on_gpu)
    if not on_gpu:
        workspace += tokens * width * shape.intermediate  # gradient of the MLP's product
        head = max(0, head - workspace)  # the head's tiles are given back before the layers' backward
    parts = {
        "weights": _weights(shape, width, precision),
        "adapter": lora * lora_bytes * (2 if reference_copy else 1),
        "gradients": lora * lora_bytes,
        "optimizer": lora * state_bytes(optimizer, lora_bytes),
        "activations": activations,
        "workspace": workspace,
        "head": head,
        "context": CUDA_CONTEXT if on_gpu else CPU_LIBRARIES + CPU_TRAINER,
    }
    return Memory(**parts, margin=round(CUDA_MARGIN * sum(parts.values())) if on_gpu else 0)


def _weights(shape: Shape, width: int, precision: Precision) -> int:
    in_4bit = shape.linear - shape.whole if precision == "nf4" else 0
    return round(in_4bit * NF4_BYTES) + (shape.parameters - in_4bit) * width


def _inputs(shape: Shape, width: int, tokens: int, offloading: bool) -> int:
    """What checkpointing keeps: each layer's input; of offloaded ones, the two buffers that they go through."""
    return tokens * width * shape.hidden * (2 if offloading else shape.layers)


def _head(shape: Shape, width: int, tokens: int, scored: int, fused: bool, on_gpu: bool) -> int:
    """Bytes of the logits at a time, and of the hidden states they are made of."""
    columns = min(HEAD_COLUMNS, shape.vocabulary)
    if not fused:
        # The logits in float32, which mixed precision makes them too, the copies that CPO's slices and sums make of
        # them, and their gradient: four times float32, with 16-bit weights as with others (measured on a CPU).
        return tokens * shape.vocabulary * 16
    if on_gpu:
        # One tile; the hidden states gathered for it, and their float32 gradient.
        return min(scored, HEAD_ROWS) * columns * width + (width + 4) * shape.hidden * scored
    # The torch fallback's float32 tiles; the last norm's input and output, their flat copy, and its gradient.
    return min(tokens, HEAD_ROWS) * columns * (width + CPU_TILE) + tokens * shape.hidden * (2 * width + 8)


def offloaded(shape: Shape, tokens: int) -> int:
    """Bytes of the host's memory that Unsloth's checkpointing takes: a 16-bit input of each layer but one."""
    return 2 * tokens * shape.hidden * (shape.layers - 1)


def state_bytes(optimizer: str, parameter_bytes: int) -> int:
    states = next((count for name, count in STATES.items() if name in optimizer), 2)
    return states * (1 if "8bit" in optimizer else parameter_bytes)


def parse_memory_limit(value: str | float | None) -> int | None:
    """`engine.memory_limit` in bytes. GB means GiB here, as it does on a graphics card's box; a bare number is GB.

    Raises:
        DpoError: (exit code 2) it is no such size, or not above 0.
    """
    if value is None:
        return None
    match = MEMORY_SIZE.fullmatch(str(value).lower())
    size = float(match[1]) * (2**20 if match[2] == "m" else GIB) if match else 0.0
    if not math.isfinite(size) or size < 1:
        raise DpoError(
            f"{value!r} is no size of memory",
            where="engine.memory_limit",
            hint="write a number of GB, such as 16, 7.5 or 16GB",
            exit_code=USAGE,
        )
    return int(size)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
