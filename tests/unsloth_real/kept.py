"""`python kept.py HIDDEN INTERMEDIATE HEADS KV_HEADS HEAD_DIM`: bytes a token that Unsloth's kernels keep of a layer.

A decoder layer of Unsloth's own fused functions, as its Qwen3 calls them, in Triton's interpreter (TRITON_INTERPRET=1),
which has no bfloat16 and so takes float16. Only the causal attention between them is PyTorch's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import unsloth  # noqa: F401
from torch.nn.functional import scaled_dot_product_attention
from unsloth.kernels import fast_lora, qk_norm_rope, rms_layernorm, swiglu

TOKENS = 32


class Layer:
    """Frozen weights and a float32 LoRA on each linear module; `own` are their storages."""

    def __init__(self, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> None:
        self.hidden, self.intermediate, self.heads, self.kv_heads, self.head_dim = (
            hidden, intermediate, heads, kv_heads, head_dim,
        )  # fmt: skip
        self.own: list[torch.Tensor] = []

    def frozen(self, *shape: int) -> torch.Tensor:
        self.own.append(torch.rand(shape, dtype=torch.float16))
        return self.own[-1]

    def linear(self, inputs: int, outputs: int) -> tuple[Any, ...]:
        """Weight, its quantisation, LoRA's A and B, and the scale, as Unsloth's functions take them."""
        lora = [torch.rand(shape, requires_grad=True) for shape in ((8, inputs), (outputs, 8))]
        self.own += lora
        return self.frozen(outputs, inputs), None, *lora, 2.0

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        norm = SimpleNamespace(weight=self.frozen(self.hidden), variance_epsilon=1e-6)
        return rms_layernorm.fast_rms_layernorm(norm, states, save_output=True, reuse_grad=True)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = [part for outputs in (q, kv, kv) for part in self.linear(h, outputs)]
        query, key, value = fast_lora.LoRA_QKV.apply(self.normed(states), *projections)
        query, key, value = (one.view(1, TOKENS, -1, self.head_dim) for one in (query, key, value))
        norms = [self.frozen(self.head_dim) for _ in range(2)]
        angles, at = [self.frozen(TOKENS, self.head_dim) for _ in range(2)], torch.arange(TOKENS).int()
        self.own.append(at)  # positions are made once for all layers
        query, key = qk_norm_rope.Fast_QK_Norm_RoPE.apply(query, key, *norms, *angles, at, 1e-6, 1e-6, True)
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        joined = attended.transpose(1, 2).reshape(1, TOKENS, q)
        states = states + fast_lora.LoRA_W.apply(joined, *self.linear(q, h))
        i = self.intermediate
        gated = [part for inputs, outputs in ((h, i), (h, i), (i, h)) for part in self.linear(inputs, outputs)]
        kernels = swiglu.swiglu_fg_kernel, swiglu.swiglu_DWf_DW_dfg_kernel
        return states + fast_lora.LoRA_MLP.apply(self.normed(states), *gated, *kernels)


def main() -> None:
    torch.set_num_threads(1)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("unsloth") and hasattr(module, "torch_gpu_device"):
            vars(module)["torch_gpu_device"] = lambda device: contextlib.nullcontext()
    layer, kept = Layer(*map(int, sys.argv[1:])), dict[int, torch.Tensor]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.forward(torch.rand(1, TOKENS, layer.hidden, dtype=torch.float16, requires_grad=True))
    for one in layer.own:
        kept.pop(one.untyped_storage().data_ptr(), None)
    print(json.dumps(sum(one.untyped_storage().nbytes() for one in kept.values()) / TOKENS))


if __name__ == "__main__":
    main()
