"""What the memory formula says a layer keeps against what PyTorch keeps of one; Unsloth's rule; the shipped recipe."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.recipe import Recipe, load
from dpo_cli.train.memory import GIB, Plan, budgets, plan, predict
from dpo_cli.train.shape import LINEARS, Shape

RECIPES = Path(__file__).parents[2] / "recipes"
# hidden, intermediate, heads, KV heads, head_dim. The first is not one of Qwen3's, so that no two widths are equal.
WIDTHS = {
    "odd": (96, 160, 6, 2, 32), "0.6B": (1024, 3072, 16, 8, 128), "1.7B": (2048, 6144, 16, 8, 128),
    "4B": (2560, 9728, 32, 8, 128),
}  # fmt: skip
OPENING, RESTS = 60, (68, 100)  # tokens of a pair


def qwen3(size: str, **more: Any) -> Any:
    from transformers import Qwen3Config

    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    real = {"vocab_size": 64, "tie_word_embeddings": True, **dict(zip(names, WIDTHS[size], strict=True))}
    return Qwen3Config(**real | more)


# --------------------------------------------------------------------------------------------- what a layer keeps


@lru_cache(maxsize=1)
def model_of(size: str, in_4bit: bool) -> Any:
    """Two layers of frozen 16-bit or NF4 weights, whatever they are, with a float32 LoRA on each linear module."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        empty: Any = Qwen3ForCausalLM(qwen3(size, num_hidden_layers=2)).to(torch.bfloat16)
    model = empty.to_empty(device="cpu")
    if in_4bit:
        for name, module in list(model.model.named_modules()):
            if type(module) is torch.nn.Linear:
                quantised = Linear4bit(module.in_features, module.out_features, False, torch.bfloat16, quant_type="nf4")
                quantised.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                model.model.set_submodule(name, quantised.to("cpu"))
        model.is_loaded_in_4bit = True  # by which PEFT takes its own layers for 4-bit weights
    return get_peft_model(model, LoraConfig(r=32, target_modules=list(LINEARS), task_type="CAUSAL_LM"))


def kept(model: Any, layers: int, shared: bool) -> int:
    """Bytes of all storages, but the parameters, that a forward of a pair saves for its backward."""
    import torch
    from dpo_cli.train import shared_prefix

    length = OPENING + max(RESTS)
    ids, mask = torch.full((2, length), 3), torch.zeros(2, length, dtype=torch.long)
    for row, rest in enumerate(RESTS):
        ids[row, OPENING:] = 5 + row
        mask[row, : OPENING + rest] = 1
    shared_prefix.install(model).enabled = shared
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        # A GPU's kernels know the mask of a further text by name, so that only a CPU makes one of queries x keys.
        is_mask = shared and tensor.shape[-2:] == (RESTS[1], OPENING + RESTS[1])
        if not is_mask and tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        backbone = model.get_base_model().model
        backbone.config.num_hidden_layers = layers  # of those it has
        backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("size", WIDTHS)
def test_the_formula_is_within_2_percent_of_what_a_layer_saves_for_its_backward(
    size: str, shared: bool, in_4bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second layer's, so that embedding, positions and last norm don't count."""
    import torch

    torch.set_num_threads(1)
    # PEFT's 4-bit layers ask about a GPU's autocast alone, and would cast on a CPU what they leave to it on a GPU.
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: True)
    one, two = (kept(model_of(size, in_4bit), layers, shared) for layers in (1, 2))
    length, further = OPENING + max(RESTS), OPENING + RESTS[1]
    tokens = OPENING + sum(RESTS) if shared else 2 * length
    shape = Shape.of(qwen3(size, num_hidden_layers=1))
    again, row = (further / tokens, 0) if shared else (0.0, length)
    formula = tokens * shape.kept(2, 32, LINEARS, row=row, again=again, casts=not in_4bit)
    formula += 2 * shape.lora(32, LINEARS)  # autocast's copy
    print(f"formula {formula / tokens / 1024:.1f}, counted {(two - one) / tokens / 1024:.1f} KiB a token and layer")
    assert formula == pytest.approx(two - one, rel=0.02)
