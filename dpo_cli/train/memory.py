"""What a step takes of the memory, predicted from the architecture; what layers keep is in `shape.py`.

Sizes are bytes, GiB is 2**30. `tests/train/test_memory.py` compares the GPU formula with published figures (no
constant of it was measured on a GPU by us). A CPU, where only toys are trained, is taken for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dpo_cli.recipe import MEMORY_SIZE, Recipe
from dpo_cli.train.shape import Shape

Precision = Literal["nf4", "bf16", "fp16", "fp32"]
Device = Literal["cuda", "cpu"]

GIB = 2**30
# Driver, CUDA kernels and cuBLAS workspaces: a common figure for one process (a guess until a GPU run corrects it).
CUDA_CONTEXT = 6 * GIB // 10
# Blocks that PyTorch's CUDA allocator holds but can't use; a guess as well.
CUDA_MARGIN = 0.06
# NF4 with double quantisation: 4 bits, an 8-bit scale for 64 weights, a 32-bit one for 256 of those (arXiv 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# trl/kernels/chunked_logprob.py and trl/trainer/utils.py (1.15, 1.16): rows and columns of one tile of logits.
HEAD_ROWS, HEAD_COLUMNS = 4096, 32768
LORA_BYTES = 4  # float32 on both backends, see `trainer.build`
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
    precision: Precision,  # of the frozen weights; activations are 16-bit, but 32-bit for fp32
    rank: int,
    targets: Sequence[str],
    optimizer: str,
    checkpointing: bool,
    tokens: int,  # positions of one micro-batch, padding included; `scored` of them are answers'
    scored: int,
    row: int = 0,  # of padded rows and, `again`, of shared prefixes, see `Shape.kept`
    again: float = 0.0,
    fused_head: bool = True,  # TRL >= 1.15 makes logits tile by tile; the trainers of CPO and ORPO hold them all
    unsloth: bool = False,  # the layers are Unsloth's
    offloading: bool = True,  # whose checkpointing keeps their inputs in the host's memory, but for short rows
    reference_copy: bool = False,  # a frozen second adapter, where training goes on from an SFT adapter
) -> Memory:
    """Predict the peak of one forward and backward of a method with LoRA."""
    width = 4 if precision == "fp32" else 2
    lora = shape.lora(rank, targets)
    if unsloth and shape.fuses(targets):
        layer = tokens * shape.kept_fused(width, flex=again > 0)
    else:  # Unsloth's attention lays out nothing twice
        row, again = (0, 0.0) if unsloth else (row, again)
        casts = precision in ("bf16", "fp16")
        layer = tokens * shape.kept(width, rank, targets, row=row, again=again, casts=casts)
    # Checkpointing keeps each layer's input; Unsloth's, the two buffers through which they go to the host.
    inputs = tokens * width * shape.hidden * (2 if unsloth and offloading else shape.layers)
    activations, workspace = (inputs, layer) if checkpointing else (shape.layers * layer, 0)
    if width < LORA_BYTES and not unsloth:
        activations += lora * width  # autocast's copy of the LoRA; Unsloth's kernels cast what they are about to read
    in_4bit = 0
    if precision == "nf4":
        in_4bit = shape.linear - shape.whole
        workspace += width * shape.hidden * shape.intermediate
    parts = {
        "weights": round(in_4bit * NF4_BYTES) + (shape.parameters - in_4bit) * width,
        "adapter": lora * LORA_BYTES * (2 if reference_copy else 1),
        "gradients": lora * LORA_BYTES,
        "optimizer": lora * state_bytes(optimizer, LORA_BYTES),
        "activations": activations,
        "workspace": workspace,
        "head": _head(shape, width, tokens, scored, fused_head),
        "context": CUDA_CONTEXT,
    }
    return Memory(**parts, margin=round(CUDA_MARGIN * sum(parts.values())))


def _head(shape: Shape, width: int, tokens: int, scored: int, fused: bool) -> int:
    """Bytes of the logits at a time, and of the hidden states they are made of."""
    if not fused:
        # The logits in float32, which mixed precision makes them too, the copies that CPO's slices and sums make of
        # them, and their gradient: four times float32, with 16-bit weights as with others (measured on a CPU).
        return tokens * shape.vocabulary * 16
    # One tile; the hidden states gathered for it, and their float32 gradient.
    tile = min(scored, HEAD_ROWS) * min(HEAD_COLUMNS, shape.vocabulary) * width
    return tile + (width + 4) * shape.hidden * scored


def state_bytes(optimizer: str, parameter_bytes: int) -> int:
    states = next((count for name, count in STATES.items() if name in optimizer), 2)
    return states * (1 if "8bit" in optimizer else parameter_bytes)


def memory_limit(recipe: Recipe) -> int | None:
    """`engine.memory_limit` in bytes; GB means GiB, as on a graphics card's box."""
    match = MEMORY_SIZE.fullmatch(str(recipe.engine.memory_limit))
    return int(float(match[1]) * (2**20 if (match[2] or "g").lower() == "m" else GIB)) if match else None


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
