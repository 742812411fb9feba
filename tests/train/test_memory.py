"""What the memory formula says a layer keeps against what PyTorch keeps of one; Unsloth's rule; the shipped recipe."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.recipe import load
from dpo_cli.train.memory import GIB, NF4_BYTES, predict
from dpo_cli.train.plan import budgets, plan
from dpo_cli.train.planned import sentences
from dpo_cli.train.shape import LINEARS, Shape

FOLDER, REPOSITORY = Path(__file__).parent, Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "tests" / "benchmarks"))
import lengths  # noqa: E402

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
        empty: Any = Qwen3ForCausalLM(qwen3(size, num_hidden_layers=2))
    model = empty.to(torch.bfloat16).to_empty(device="cpu")
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
@pytest.mark.parametrize("size", [pytest.param(one, marks=pytest.mark.slow if one != "0.6B" else []) for one in WIDTHS])
def test_the_formula_is_within_2_percent_of_what_a_layer_saves_for_its_backward(
    size: str, shared: bool, in_4bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second layer's, so that embedding, positions and last norm don't count."""
    import torch

    torch.set_num_threads(1)
    # PEFT's 4-bit layers ask about a GPU's autocast alone, and would cast on a CPU what they leave to it on a GPU.
    asked = torch.is_autocast_enabled
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device="cpu": asked(device))
    one, two = (kept(model_of(size, in_4bit), layers, shared) for layers in (1, 2))
    assert not asked("cpu")  # autocast puts back what it was told at its start
    length, further = OPENING + max(RESTS), OPENING + RESTS[1]
    tokens = OPENING + sum(RESTS) if shared else 2 * length
    shape = Shape.of(qwen3(size, num_hidden_layers=1))
    again, row = (further / tokens, 0) if shared else (0.0, length)
    formula = tokens * shape.kept(2, 32, LINEARS, row=row, again=again, casts=not in_4bit)
    formula += 2 * shape.lora(32, LINEARS)  # autocast's copy
    print(f"formula {formula / tokens / 1024:.1f}, counted {(two - one) / tokens / 1024:.1f} KiB a token and layer")
    assert formula == pytest.approx(two - one, rel=0.02)


# ------------------------------------------------------------------------------------------------ Unsloth's own rule


def of_1_7b(**options: Any) -> Any:
    shape = Shape.of(qwen3("1.7B", num_hidden_layers=28, vocab_size=151936))
    chosen: dict[str, Any] = {
        "precision": "nf4", "rank": 32, "targets": LINEARS, "optimizer": "adamw_torch_fused", "checkpointing": False,
        "tokens": 4096, "scored": 2048, "again": 0.5,
    }  # fmt: skip
    return predict(shape, **chosen | options)


def test_unsloths_kernels_keep_about_60_kib_of_a_token_and_layer() -> None:
    """The review's figure for 1.7B, and its 9.6 GiB at 4,096 tokens, to its last digit."""
    shape = Shape.of(qwen3("1.7B"))
    assert shape.kept_fused(2, flex=True) / 1024 == pytest.approx(60, rel=0.05)
    assert shape.kept_fused(2, flex=False) / 1024 == pytest.approx(60, rel=0.05)
    assert of_1_7b(unsloth=True).total / GIB == pytest.approx(9.6, abs=0.5)
    assert of_1_7b(unsloth=True).total < 0.7 * of_1_7b().total


def test_what_unsloth_does_not_fuse_is_counted_as_peft_keeps_it() -> None:
    """It fuses a layer only where each linear module has a LoRA, and none a bias."""
    some = LINEARS[:4]
    assert of_1_7b(unsloth=True, targets=some).activations > 1.4 * of_1_7b(unsloth=True).activations
    assert of_1_7b(unsloth=True, targets=some).activations < of_1_7b(targets=some).activations


# ------------------------------------------------------------------------------------- the shipped recipe's repository


def dynamic_4bit() -> Any:
    """The config of a Qwen3-1.7B whose 4-bit weights leave some modules in 16 bits, as such repositories have it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(FOLDER / "qwen3_dynamic_4bit")


def test_what_a_4bit_repository_leaves_in_16_bits_is_what_transformers_leaves() -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = dynamic_4bit()
    quantization = BitsAndBytesConfig(**config.quantization_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = replace_with_bnb_linear(model, quantization.llm_int8_skip_modules, quantization, pre_quantized=True)
    left = [module.weight.numel() for module in model.model.modules() if type(module) is torch.nn.Linear]
    assert len(left) == 3 * 3 + 4 + 1
    shape = Shape.of(config)
    assert shape.whole == sum(left)

    plain = Shape.of(qwen3("1.7B", num_hidden_layers=28, vocab_size=151936))
    whole, all_in_4bit = (of.parameters * 2 - of.linear * 2 for of in (shape, plain))
    assert whole == all_in_4bit, "they differ in nothing else"
    options: dict[str, Any] = {"rank": 32, "targets": LINEARS, "optimizer": "adamw", "tokens": 2048, "scored": 1024}
    some, none = (predict(of, precision="nf4", checkpointing=True, **options).weights for of in (shape, plain))
    assert some - none == pytest.approx(sum(left) * (2 - NF4_BYTES))


@pytest.mark.parametrize("taken", [0.0, 1.0], ids=["bare", "desktop"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("unsloth", [True, False])
def test_the_shipped_recipe_fits_an_rtx_4080(unsloth: bool, shared: bool, taken: float) -> None:
    """Of its 15.57 GiB a desktop takes one; real pairs, of which the longest fill max_length."""
    rows = [(row.prompt, row.chosen, row.rejected) for language in ("en", "zh") for row in lengths.load(language)]
    recipe = load(REPOSITORY / "recipes" / "ultrafeedback_zh_en.yaml")
    there = int((15.57 - taken) * GIB)
    made = plan(recipe, rows, dynamic_4bit(), there, shared=shared, budgeted=True, unsloth=unsloth)
    assert made.fits and made.longest == recipe.model.max_length == 1024
    assert made.recipe == made.proposal and not made.recipe.checkpointing, "no layer has to be computed twice"
    assert made.recipe.token_budget in ((6144, 4096) if unsloth else (4096, 3072))


@pytest.mark.parametrize("max_length", [511, 512])
def test_unsloths_checkpointing_keeps_layer_inputs_in_the_machines_memory_and_the_plan_says_so(max_length: int) -> None:
    """All but two, where texts are not short: Unsloth then takes the usual checkpointing."""
    settings = ["train.gradient_checkpointing=true", f"model.max_length={max_length}"]
    recipe = load(REPOSITORY / "recipes" / "ultrafeedback_zh_en.yaml", settings)
    rows = [(300, 200, 200)] * 24
    plain, made = (
        plan(recipe, rows, dynamic_4bit(), 15 * GIB, budgeted=True, unsloth=unsloth) for unsloth in (False, True)
    )
    note = "Unsloth's checkpointing keeps 0.84 GiB more in the machine's own memory."
    saved = plain.recipe.memory.activations - made.recipe.memory.activations
    assert plain.recipe.checkpointing and plain.recipe.host == 0
    copy = 2 * Shape.of(dynamic_4bit()).lora(32, LINEARS)  # autocast's, which Unsloth does not keep
    if max_length < 512:
        assert saved == copy
        assert made.recipe.host == 0 and note not in sentences(made)
    else:
        assert saved == 26 * 8192 * 2048 * 2 + copy
        assert made.recipe.host == 27 * 8192 * 2048 * 2 and note in sentences(made)


# ------------------------------------------------------------------------------------------------------ token budgets


def test_budgets_are_halves_and_three_quarters_and_whoever_goes_on_tries_the_same() -> None:
    tried = budgets(8192, 1000)
    assert tried == [8192, 6144, 4096, 3072, 2048, 1536, 1024, 1000]
    assert all(budgets(tried[at], 1000) == tried[at:] for at in range(len(tried))), "the preflight goes on from a plan"
    assert budgets(5000, 2100) == [5000, 4096, 3072, 2100]
    assert budgets(1000, 1000) == [1000] and budgets(500, 1000) == [500]
