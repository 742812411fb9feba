"""The best dtype of a card, and every name that running out of memory has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_cli import models
from dpo_cli.gpu import best_dtype, free_gpu_memory, limit_memory
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.recipe import Recipe


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Have torch see one NVIDIA card of a compute capability; its own bfloat16 test runs on that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(major=capability[0], minor=0)
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16)],
    ids=["V100", "T4 and RTX 20xx", "A100", "RTX 40xx"],
)
def test_auto_is_bfloat16_only_where_the_card_computes_in_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, capability)
    assert best_dtype() == dtype
    recipe = Recipe.model_validate({"model": {"id": "nobody/none"}, "data": {"sources": [{"id": "nobody/none"}]}})
    assert models.resolve_dtype(recipe) == dtype


def test_auto_is_float32_without_a_card() -> None:
    assert best_dtype() == torch.float32


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_every_name_of_running_out_of_memory_is_known(error: BaseException) -> None:
    assert ran_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("the judge said: out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not ran_out_of_memory(error)


def test_free_memory_is_what_others_leave_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    assert free_gpu_memory() == 10 * 2**30


@pytest.mark.parametrize(
    ("system", "most", "share"),
    [
        ("6.8.0-generic", None, None),
        ("6.8.0-generic", 4, 4 / 16),
        ("5.15.153.1-microsoft-standard-WSL2", None, 10 / 16),
        ("5.15.153.1-microsoft-standard-WSL2", 4, 4 / 16),
        ("5.15.153.1-microsoft-standard-WSL2", 12, 10 / 16),
    ],
)
def test_in_wsl_a_full_card_raises_and_takes_no_memory_of_the_machine(
    system: str, most: int | None, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    monkeypatch.setattr("platform.release", lambda: system)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    limit_memory(None if most is None else most * 2**30)
    assert taken == ([] if share is None else [share])


@pytest.mark.parametrize("as_dict", [True, False], ids=["as Unsloth leaves it", "as transformers does"])
def test_the_modules_that_4bit_weights_leave_in_16_bits_are_read_either_way(as_dict: bool) -> None:
    named: Any = {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}
    assert models.modules_in_16bit(named if as_dict else SimpleNamespace(**named)) == ["lm_head", "model.layers.1.mlp"]
    assert models.modules_in_16bit(None) == models.modules_in_16bit({}) == []


@pytest.mark.parametrize(
    "named",
    [
        ["lm_head", "model.layers.1.mlp"],  # as a dynamic 4-bit repository has it
        ["model.layers.1"],  # the layers 10 and 11 begin with it
        ["mlp"],  # no linear layer ends with it
        ["down_proj", "model.layers.2.self_attn.q"],
        ["model.layers.*.self_attn"],
        [],
    ],
    ids=str,
)
def test_the_layers_that_stay_in_16_bits_are_those_that_transformers_leaves(named: list[str]) -> None:
    """Compared with what it does to a model of twelve layers."""
    from torch import nn
    from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "head_dim": 4}
    heads: dict[str, Any] = {"num_hidden_layers": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear and "layers" in name}
    replace_with_bnb_linear(model, named, BitsAndBytesConfig(load_in_4bit=True))
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear} & linear
    assert {name for name in linear if models.stays_in_16bit(name, named)} == left
