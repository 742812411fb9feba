"""Whether sharing a prefix gives the numbers of the stock path, tried on real rows, forward and backward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_cli.train.shared_prefix import SharedPrefix, members

# Of the largest log-probability. float32: about 84 roundings, which is what another order of the sums comes to over a
# few dozen layers. Sixteen-bit types: one rounding, for a logit of that size has been rounded once.
FLOAT32_FLOOR = 1e-5
# A wrong mask or a wrong kernel changes a gradient by about its own size; rounding by 1e-6 in float32 (measured), and
# by a few times its unit of 0.008 in bfloat16.
GRADIENT_LIMIT = 0.05


@dataclass(frozen=True)
class Check:
    """Sharing against the untouched model on one batch; differences are nats of a completion token's log-probability.

    Args:
        difference: the largest between sharing and the untouched model.
        noise: the largest of the untouched model with itself, rows in a batch against rows alone.
        limit: twice the noise, or what rounding makes of the largest log-probability, whichever is more.
        gradient: norm of the difference of the gradients, as a share of the untouched model's norm.
        error: why sharing failed or did not take place; empty otherwise.
    """

    difference: float = math.inf
    noise: float = math.inf
    limit: float = math.inf
    gradient: float = math.inf
    error: str = ""

    @property
    def ok(self) -> bool:
        """False also where a number is NaN, or where nothing was compared."""
        return not self.error and self.difference <= self.limit and self.gradient <= GRADIENT_LIMIT

    def why_not(self) -> str:
        """Say what is wrong, to follow "the shared prefix is off: "."""
        if self.error:
            return self.error
        if not self.difference <= self.limit:
            return (
                f"its log-probabilities differ from the stock path's by {self.difference:.1e}, and may by "
                f"{self.limit:.1e}"
            )
        return f"its gradients differ from the stock path's by {self.gradient:.1%}, and may by {GRADIENT_LIMIT:.0%}"


def check(trainer: Any, shared: SharedPrefix, batch: Mapping[str, Tensor]) -> Check:
    """Compare sharing with the untouched model on a batch of the trainer's collator; nothing is left changed.

    The untouched model sees each row alone, forward and backward, and each pair as a batch, forward; sharing sees all
    of them at once, forward and backward. The model runs as in a training step, but without dropout or a draw from a
    random state. Any error of sharing is a miss, memory that runs out too.

    Args:
        batch: `input_ids`, `attention_mask` and `completion_mask`, each `[2B, L]`, right-padded; or `[N, L]` of lists,
            with the `present` of `SharedPrefix.lists`.
    """
    model, device = trainer.model, trainer.accelerator.device
    ids, mask, completion = (batch[name].to(device) for name in ("input_ids", "attention_mask", "completion_mask"))
    labels, scored = ids.masked_fill(completion == 0, -100), completion[:, 1:].bool()
    lengths, present = mask.sum(1), batch.get("present")
    lists = None if present is None else present.sum(1).tolist()

    def log_probs(rows: list[int], backward: bool) -> Tensor:
        """[rows, L - 1], zeros where nothing is scored; gradients are added up."""
        end = int(lengths[rows].max())
        inputs = {"input_ids": ids[rows, :end], "attention_mask": mask[rows, :end], "labels": labels[rows, :end]}
        with torch.set_grad_enabled(backward):
            found = model(**inputs, use_cache=False, fused_lm_head=True).log_probs.float()
            found = found.masked_fill(~scored[rows, : end - 1], 0.0)
            if backward:
                found.sum().backward()
        return torch.nn.functional.pad(found.detach(), (0, ids.shape[1] - end))

    every, alone, noise = list(range(len(ids))), torch.zeros_like(scored, dtype=torch.float), 0.0
    before = shared.padded_tokens, shared.stream_tokens, shared.enabled
    with trainer.accelerator.autocast(), _as_in_a_step(model), warnings.catch_warnings(), shared.lists(present):
        warnings.simplefilter("ignore")  # reentrant checkpointing wants inputs with gradients
        precision = max(torch.finfo(dtype).eps for dtype in _dtypes(model, device.type))
        try:
            shared.enabled = False
            for row in every:
                alone[row] = log_probs([row], backward=True)[0]
            expected = _take_gradients(model)
            for rows in members(len(ids), lists):
                noise = max(noise, _largest(log_probs(rows, backward=False) - alone[rows]))
            shared.enabled = True
            ours = log_probs(every, backward=True)
            found = _take_gradients(model)
            if shared.stream_tokens == before[1]:
                return Check(error="the batch took the untouched path")
        except Exception as failure:  # a kernel that does not compile here, say, or memory that runs out
            return Check(error=f"{type(failure).__name__}: {failure}")
        finally:
            model.zero_grad(set_to_none=True)
            shared.padded_tokens, shared.stream_tokens, shared.enabled = before
    floor = FLOAT32_FLOOR if precision < 1e-6 else precision
    limit = max(2 * noise, floor * max(1.0, _largest(alone)))
    gradient = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return Check(_largest(ours - alone), noise, limit, gradient)


# ------------------------------------------------------------------------------------------------------------ pieces


@contextmanager
def _as_in_a_step(model: Any) -> Iterator[None]:
    """In training mode, as Unsloth's forward asks for it, but with nothing that is drawn at random."""
    modes = [(module, module.training) for module in model.modules()]
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    model.train()
    for module, _ in modes:
        if isinstance(module, torch.nn.Dropout) or getattr(module, "attention_dropout", None):
            module.training = False
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _dtypes(model: Any, device: str) -> set[Any]:
    """The floating types that the model computes in: of its weights, of 4-bit layers, and of autocast."""
    found = {one.dtype for one in model.parameters() if one.is_floating_point() and one.element_size() > 1}
    found |= {one.compute_dtype for one in model.modules() if getattr(one, "compute_dtype", None) is not None}
    return found | ({torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set())


def _take_gradients(model: Any) -> Tensor:
    """The gradients of the trained parameters as one vector; they are cleared. Parameters without one count as 0."""
    trained = [one for one in model.parameters() if one.requires_grad]
    taken = [(torch.zeros_like(one) if one.grad is None else one.grad).flatten().float() for one in trained]
    model.zero_grad(set_to_none=True)
    return torch.cat(taken)


def _largest(values: Tensor) -> float:
    """The largest magnitude; 0 of nothing, and NaN where there is one."""
    return float(values.abs().max()) if values.numel() else 0.0
