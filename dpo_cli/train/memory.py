"""Whether a run fits the memory, predicted from the architecture: what `train --plan` shows.

Sizes are bytes, GiB is 2**30. What layers keep is in `shape.py`. The rest of the GPU formula is the one that
`tests/train/test_preflight.py` compares with published figures; no constant of it was measured on a GPU by us. The CPU
formula is compared with resident memory there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from dpo_cli.errors import USAGE, DpoError
from dpo_cli.families import with_targets
from dpo_cli.recipe import MEMORY_SIZE, Recipe
from dpo_cli.train.methods import METHODS
from dpo_cli.train.shape import LINEARS, Shape

Precision = Literal["nf4", "bf16", "fp16", "fp32"]
Device = Literal["cuda", "cpu"]
Lengths = tuple[int, ...]  # tokens of a row's prompt and of its answers: chosen and rejected, KTO's one, LiPO's list

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
# From this max_length on, Unsloth's checkpointing offloads; below, it is the usual one (2026.10.9, models/_utils.py).
UNSLOTH_OFFLOADS = 512
# Optimizer state a trained parameter has, in parameters of its own dtype; Adam's two moments where nothing is named.
STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
# Where a larger pass gains no more. On a GPU its launches are hidden by then (a guess until one has run). On a CPU
# 1,024 took 10.7 CPU seconds, 2,048 took 13.4 and 4,096 15.4 (tests/benchmarks, 512 wide): more leaves the caches.
LARGEST_PASS: dict[str, int] = {"cuda": 8192, "cpu": 1024}


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
    h, columns = shape.hidden, min(HEAD_COLUMNS, shape.vocabulary)
    lora = shape.lora(rank, targets)
    lora_bytes = 4  # float32 on both backends, see `trainer.build`
    unsloth = unsloth and on_gpu
    casts = precision in ("bf16", "fp16")
    if not unsloth:
        layer = tokens * shape.kept(width, rank, targets, row=row, again=again, casts=casts)
    elif shape.fuses(targets):
        layer = tokens * shape.kept_fused(width, flex=again > 0)
    else:  # Unsloth's attention, which lays out nothing twice, between PEFT's own layers
        layer = tokens * shape.kept(width, rank, targets, casts=casts)

    # With checkpointing, a layer keeps its input, and one layer at a time is computed again. Offloading sends the
    # inputs through two buffers on the card.
    inputs = tokens * width * h * (2 if offloading else shape.layers)
    activations = inputs if checkpointing else shape.layers * layer
    if width < lora_bytes and not unsloth:
        activations += lora * width  # autocast's copy of the LoRA; Unsloth's kernels cast what they are about to read
    workspace = layer if checkpointing else 0
    if precision == "nf4":
        workspace += width * h * shape.intermediate
    if not fused_head:
        # The logits in float32, which mixed precision makes them too, the copies that CPO's slices and sums make of
        # them, and their gradient: four times float32, with 16-bit weights as with others (measured on a CPU).
        head = tokens * shape.vocabulary * 16
    elif on_gpu:
        # One tile; the hidden states gathered for it, and their float32 gradient.
        head = min(scored, HEAD_ROWS) * columns * width + (width + 4) * h * scored
    else:
        # The torch fallback's float32 tiles; the last norm's input and output, their flat copy, and its gradient.
        head = min(tokens, HEAD_ROWS) * columns * (width + CPU_TILE) + tokens * h * (2 * width + 8)
    if not on_gpu:
        workspace += tokens * width * shape.intermediate  # gradient of the MLP's product
        head = max(0, head - workspace)  # the head's tiles are given back before the layers' backward
    in_4bit = shape.linear - shape.whole if precision == "nf4" else 0
    parts = {
        "weights": round(in_4bit * NF4_BYTES) + (shape.parameters - in_4bit) * width,
        "adapter": lora * lora_bytes * (2 if reference_copy else 1),
        "gradients": lora * lora_bytes,
        "optimizer": lora * state_bytes(optimizer, lora_bytes),
        "activations": activations,
        "workspace": workspace,
        "head": head,
        "context": CUDA_CONTEXT if on_gpu else CPU_LIBRARIES + CPU_TRAINER,
    }
    return Memory(**parts, margin=round(CUDA_MARGIN * sum(parts.values())) if on_gpu else 0)


def offloaded(shape: Shape, tokens: int) -> int:
    """Bytes of the host's memory that Unsloth's checkpointing takes: a 16-bit input of each layer but one."""
    return 2 * tokens * shape.hidden * (shape.layers - 1)


def state_bytes(optimizer: str, parameter_bytes: int) -> int:
    states = next((count for name, count in STATES.items() if name in optimizer), 2)
    return states * (1 if "8bit" in optimizer else parameter_bytes)


# ------------------------------------------------------------------------------------------------------- train --plan


@dataclass(frozen=True)
class Setting:
    """How a step is cut, by tokens or by pairs, and whether layers are computed twice; with the peak."""

    micro_batch: int
    accumulation: int
    checkpointing: bool
    memory: Memory
    token_budget: int | None = None  # tokens of a pass; the whole step is then one micro-batch
    host: int = 0  # bytes that Unsloth's checkpointing keeps in the host's memory

    @property
    def says(self) -> str:
        checkpointing = f"gradient_checkpointing: {str(self.checkpointing).lower()}"
        if self.token_budget:
            return f"engine: {{token_budget: {self.token_budget}}}, train: {{{checkpointing}}}"
        return (
            f"train: {{per_device_train_batch_size: {self.micro_batch}, "
            f"gradient_accumulation_steps: {self.accumulation}, {checkpointing}}}"
        )

    @property
    def at_once(self) -> str:
        return f"{self.token_budget} tokens" if self.token_budget else f"{self.micro_batch} x {self.accumulation}"


@dataclass(frozen=True)
class Plan:
    """What the recipe comes to, what there is, and the setting to take: None where none fits."""

    recipe: Setting
    available: int | None
    card: str
    longest: int  # tokens of the longest row
    proposal: Setting | None
    notes: tuple[str, ...] = ()
    rows_are: str = "pairs"

    @property
    def fits(self) -> bool:
        return self.available is None or self.recipe.memory.total <= self.available

    def table(self) -> Table:
        """Parts, total, card, verdict and proposal, at most 80 columns wide."""

        table = Table(title="Predicted peak memory", width=80, show_footer=False)
        table.add_column("part")
        table.add_column("recipe, GiB", justify="right")
        columns = [self.recipe]
        if self.proposal and self.proposal != self.recipe:
            columns.append(self.proposal)
            table.add_column("proposed, GiB", justify="right")
        for name in vars(self.recipe.memory):
            table.add_row(name, *(f"{getattr(one.memory, name) / GIB:.2f}" for one in columns))
        table.add_section()
        table.add_row("total", *(f"{one.memory.total / GIB:.2f}" for one in columns), style="bold")
        there_is = "not known" if self.available is None else gib(self.available)
        table.add_row(f"there is ({self.card})", *(there_is for _ in columns))
        by = "at once" if self.recipe.token_budget else f"{self.rows_are} at once x accumulation"
        table.add_row(by, *(one.at_once for one in columns))
        table.add_row("gradient checkpointing", *("on" if one.checkpointing else "off" for one in columns))
        host = max(one.host for one in columns)
        notes = [*self.notes]
        if host:
            notes.append(f"Unsloth's checkpointing keeps {gib(host)} GiB more in the machine's own memory.")
        table.caption = "\n".join((f"longest row: {self.longest} tokens. {self.verdict}", *notes))
        table.caption_justify = "left"
        return table

    @property
    def verdict(self) -> str:
        if self.available is None:
            return "What there is, is not known."
        if self.proposal is None:
            return "It does not fit, one pair at a time neither: lower model.max_length, or take a smaller model."
        if not self.fits:
            return f"It does not fit. This does, with the same effective batch: {self.proposal.says}"
        if self.proposal == self.recipe:
            return "It fits."
        return f"It fits. So does this, without computing layers twice: {self.proposal.says}"


def plan(
    recipe: Recipe,
    pairs: Sequence[Lengths],
    config: Any,
    available_bytes: int | None,
    *,
    device: Device = "cuda",
    unsloth: bool = False,
    card: str | None = None,
    shared: bool = False,
    budgeted: bool = False,
) -> Plan:
    """Predict the peak of a recipe at its longest pairs, and choose the setting to take.

    Tried are passes by `budgets`, or micro-batches by `cuts`; first without gradient checkpointing, and with it only
    where one pair at a time does not fit without. (Checkpointing costs a third forward, while more at once gains
    little.) What the recipe sets itself, it keeps; where it then does not fit, a proposal says what would. The
    effective batch stays as it is.

    Args:
        pairs: token counts of the pairs, KTO's rows or LiPO's lists; of the longest ones, at least as many as make a
            micro-batch.
        config: the model's transformers config.
        available_bytes: the card's memory, or `engine.memory_limit`; None where nobody knows.
        unsloth: the layers and their checkpointing are Unsloth's, which keep less on the card.
        shared: the prompt is computed once a pair, and nothing is padded.
        budgeted: a step is cut by tokens: `engine.token_budget`.
    """
    train, data = recipe.train, _Batches.of(pairs, recipe.model.max_length, shared)
    named = with_targets(recipe, config.to_dict()).lora.target_modules
    targets = LINEARS if named == "auto" else named
    shape, precision, method = Shape.of(config), _precision(recipe, config, device), METHODS[train.method]
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    offloading = unsloth and device == "cuda" and recipe.model.max_length >= UNSLOTH_OFFLOADS

    def setting(pairs_at_once: int, times: int, budget: int | None, checkpointing: bool) -> Setting:
        tokens = max(budget, data.tokens(1)) if budget else data.tokens(pairs_at_once)
        memory = predict(
            shape,
            precision=precision,
            rank=recipe.lora.r,
            targets=targets,
            optimizer=train.optim,
            checkpointing=checkpointing,
            tokens=tokens,
            scored=min(data.scored(None if budget else pairs_at_once), tokens),
            row=0 if shared else data.longest,
            again=data.again,
            device=device,
            unsloth=unsloth,
            offloading=offloading,
            fused_head=not method.whole_logits,
            reference_copy=method.reference and recipe.model.adapter is not None,
        )
        host = offloaded(shape, tokens) if checkpointing and offloading else 0
        return Setting(pairs_at_once, times, checkpointing, memory, budget, host)

    def fits(one: Setting) -> bool:
        return available_bytes is None or one.memory.total <= available_bytes

    asked = recipe.engine.token_budget
    sizes: list[tuple[int, int, int | None]] = [(*cut, None) for cut in cuts(micro, accumulation)]
    if set(train.losses) & set(method.neighbours):
        sizes = [size for size in sizes if size[0] > 1]
    if budgeted:
        largest = asked if isinstance(asked, int) else LARGEST_PASS[device]
        sizes = [(micro * accumulation, 1, budget) for budget in budgets(largest, data.tokens(1))]
    every = [setting(*size, checkpointing) for checkpointing in (False, True) for size in sizes]
    allowed = [
        one
        for one in every
        if train.gradient_checkpointing in (None, one.checkpointing)
        and ((asked == "auto" and budgeted) or (one.micro_batch, one.token_budget) == (sizes[0][0], sizes[0][2]))
    ]
    own = next(filter(fits, allowed), allowed[-1])
    proposal = own if available_bytes is None else next(filter(fits, every), None)
    notes = [] if method.reference else [f"No reference: {train.method} needs none."]
    if proposal and not budgeted and proposal.micro_batch not in {micro / 2**times for times in range(64)}:
        notes.append(
            f"{micro} {method.rows_are} can't be halved evenly: "
            f"{proposal.micro_batch} at once keeps the effective batch."
        )
    return Plan(own, available_bytes, card or device, data.longest, proposal, tuple(notes), method.rows_are)


@dataclass(frozen=True)
class _Batches:
    """What the longest rows of a data set take, as many of them at once as are asked for."""

    rows: list[Lengths]  # those that take most come first
    shared: bool

    @classmethod
    def of(cls, pairs: Sequence[Lengths], limit: int, shared: bool) -> _Batches:
        rows = [(prompt, *(min(answer, limit - prompt) for answer in answers)) for prompt, *answers in pairs]
        return cls(sorted(rows, key=sum, reverse=True), shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max((prompt + max(answers) for prompt, *answers in self.rows), default=0)

    @property
    def again(self) -> float:
        """Tokens of the texts after the first, per token of a stream; for `Shape.kept`."""

        def share(rows: list[Lengths]) -> float:
            further = sum(prompt + answer for prompt, _, *answers in rows for answer in answers)
            return further / max(sum(map(sum, rows)), 1)

        return max(share(self.rows), share(self.rows[:1])) if self.shared else 0.0

    def tokens(self, count: int) -> int:
        """Positions of a forward of so many rows, padding included."""
        if self.shared:
            return sum(map(sum, self.rows[:count]))
        return count * self.longest * max((len(row) - 1 for row in self.rows), default=2)

    def scored(self, count: int | None) -> int:
        """Answer tokens of as many rows at most."""
        answers = sorted((sum(max(answer, 0) for answer in some) for _, *some in self.rows), reverse=True)
        return sum(answers[:count])


def budgets(largest: int, alone: int) -> list[int]:
    """Tokens of a pass to try: the largest, then 2**n and 3 * 2**n down to a pass that holds the longest pair alone.

    So whoever goes on from a smaller one, as the preflight does, tries the same: 8192, 6144, 4096, 3072, …
    """
    steps = {largest, *(part << times for part in (2, 3) for times in range(largest.bit_length()))}
    tried = sorted((step for step in steps if alone < step <= largest), reverse=True)
    return [*tried, alone] if tried else [largest]


def cuts(micro_batch: int, accumulation: int) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation) with the same product, halving the first: down, where it is odd, to what divides."""
    effective = micro_batch * accumulation
    while True:
        yield micro_batch, effective // micro_batch
        if micro_batch == 1:
            return
        micro_batch //= 2
        while effective % micro_batch:
            micro_batch -= 1


def _precision(recipe: Recipe, config: Any, device: Device) -> Precision:
    if recipe.model.load_in_4bit or getattr(config, "quantization_config", None) is not None:
        return "nf4"
    names: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return names.get(recipe.model.dtype, "bf16" if device == "cuda" else "fp32")


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
