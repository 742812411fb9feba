"""The memory plan: against what PyTorch keeps of a layer, against published figures, and what it proposes.

tests/pretend_cuda tries what it proposes.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import gpu, machine
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe, load
from dpo_cli.terminal import print_markdown
from dpo_cli.train.memory import CUDA_CONTEXT, GIB, NF4_BYTES, Memory, memory_limit, predict
from dpo_cli.train.methods import METHODS, cannot_be_cut
from dpo_cli.train.plan import available_memory, cuts, plan
from dpo_cli.train.planned import PARTS, memory_table
from dpo_cli.train.shape import LINEARS, Shape

FOLDER, REPOSITORY = Path(__file__).parent, Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "tests" / "benchmarks"))
import lengths  # noqa: E402

# Layers, hidden, intermediate, heads, KV heads, head_dim, vocabulary and whether the head is the embedding: Qwen3's
# published ones. The first is none of them, so that no two widths are equal.
WIDTHS = {
    "odd": (2, 96, 160, 6, 2, 32, 64, True), "0.6B": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "1.7B": (28, 2048, 6144, 16, 8, 128, 151936, True), "4B": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "8B": (36, 4096, 12288, 32, 8, 128, 151936, False),
}  # fmt: skip
OPENING, RESTS = 60, (68, 100)  # tokens of a pair


def qwen3(size: str, **more: Any) -> Any:
    from transformers import Qwen3Config

    names = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "tie_word_embeddings",
    )  # fmt: skip
    return Qwen3Config(**dict(zip(names, WIDTHS[size], strict=True)) | more)


def test_the_shape_is_read_off_a_config() -> None:
    from transformers import Qwen3MoeConfig

    for size, widths in WIDTHS.items():
        assert Shape.of(qwen3(size)) == Shape(*widths)
    with pytest.raises(DpoError, match="dense decoders"):
        Shape.of(Qwen3MoeConfig())


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_the_parameter_counts_are_the_models_own(tied: bool, bias: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    config = qwen3("odd", tie_word_embeddings=tied, attention_bias=bias)
    model: Any = Qwen3ForCausalLM(config)
    shape = Shape.of(config)
    assert shape.parameters == model.num_parameters()
    linear = [module for name, module in model.model.named_modules() if name.endswith("_proj")]
    assert shape.linear == sum(module.weight.numel() for module in linear)
    for targets in (list(LINEARS), ["q_proj", "down_proj"]):
        adapted = get_peft_model(model, LoraConfig(r=6, target_modules=targets, task_type="CAUSAL_LM"))
        assert shape.lora(6, targets) == adapted.get_nb_trainable_parameters()[0]
        model = adapted.unload()


def test_qwen2s_attention_has_biases_that_its_config_does_not_name() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config: Any = Qwen2Config(hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
                              num_key_value_heads=2, vocab_size=64)  # fmt: skip
    assert Shape.of(config).parameters == Qwen2ForCausalLM(config).num_parameters()


# --------------------------------------------------------------------------------------------- what a layer keeps


@lru_cache(maxsize=1)
def model_of(size: str, in_4bit: bool) -> Any:
    """Two layers of frozen 16-bit or NF4 weights, whatever they are, with a float32 LoRA on each linear module."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        empty: Any = Qwen3ForCausalLM(qwen3(size, num_hidden_layers=2, vocab_size=64))
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
@pytest.mark.parametrize(
    "size", ["odd", *(pytest.param(one, marks=pytest.mark.slow) for one in ("0.6B", "1.7B", "4B"))]
)
def test_the_formula_is_within_2_percent_of_what_a_layer_saves_for_its_backward(
    size: str, shared: bool, in_4bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second layer's, so that embedding, positions and last norm don't count."""
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


# -------------------------------------------------------------------------------------------------- published figures


def qlora(size: str, tokens: int, **options: Any) -> Memory:
    """4-bit, rank 32 on all linear layers, as the published table has it; two thirds scored (the table doesn't say)."""
    chosen: dict[str, Any] = {
        "precision": "nf4", "rank": 32, "targets": LINEARS, "optimizer": "adamw_torch_fused",
        "checkpointing": True, "tokens": tokens, "scored": tokens * 2 // 3,
    }  # fmt: skip
    return predict(Shape(*WIDTHS[size]), **chosen | options)


# performance.md, 4.1 (measured, KiB per token and layer, bf16 autocast) and 4.2 (fixed GiB; peaks in GiB at
# 2 x pairs x max_length tokens: without checkpointing, and with it).
KEPT = {"0.6B": 60.6, "1.7B": 96.6, "4B": 146.7, "8B": 184.7}
FIXED = {"0.6B": 1.26, "1.7B": 2.14, "4B": 3.61, "8B": 7.00}
PEAKS = {
    ("0.6B", 2048): (4.9, 1.7), ("0.6B", 8192): (15.7, 2.6), ("0.6B", 16384): (29.8, 3.6),
    ("1.7B", 2048): (8.0, 2.8), ("1.7B", 4096): (13.7, 3.4), ("1.7B", 16384): (47, 6.1),
    ("4B", 2048): (14.9, 4.6), ("4B", 4096): (25.9, 5.4), ("4B", 8192): (48, 6.9),
    ("8B", 2048): (21.3, 8.5), ("8B", 8192): (63, 11.7), ("8B", 16384): (118, 15.8),
}  # fmt: skip


def float32_lora(size: str) -> float:
    """GiB more than published, where weights, gradients and Adam's two moments of the LoRA are bfloat16.

    They are float32 here, and autocast keeps a bfloat16 copy of the weights.
    """
    return 10 * Shape(*WIDTHS[size]).lora(32, LINEARS) / GIB


@pytest.mark.parametrize("size", KEPT)
def test_the_gpu_formula_gives_the_published_parts(size: str) -> None:
    assert Shape(*WIDTHS[size]).kept(2, 32, LINEARS) / 1024 == pytest.approx(KEPT[size], rel=0.005)
    nothing_run = qlora(size, 0, checkpointing=False)
    published = FIXED[size] + float32_lora(size)
    assert (nothing_run.total - nothing_run.margin) / GIB == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("size", "tokens"), PEAKS)
def test_the_gpu_formula_gives_the_published_peaks(size: str, tokens: int) -> None:
    peaks = (qlora(size, tokens, checkpointing=False), qlora(size, tokens))
    for memory, published in zip(peaks, PEAKS[size, tokens], strict=True):
        published += 1.06 * float32_lora(size)
        assert memory.total / GIB == pytest.approx(published, rel=0.02, abs=0.06)  # printed with one decimal


def test_what_saves_memory_saves_it_where_it_should() -> None:
    plain = qlora("4B", 2048)
    eight_bit = qlora("4B", 2048, optimizer="adamw_8bit")
    assert eight_bit.optimizer * 4 == plain.optimizer
    assert qlora("4B", 2048, optimizer="sgd").optimizer == 0
    assert qlora("4B", 2048, checkpointing=False).activations > 20 * plain.activations
    assert qlora("4B", 2048, precision="bf16").weights > 2.5 * plain.weights
    assert qlora("4B", 2048, reference_copy=True).adapter == 2 * plain.adapter
    assert qlora("4B", 2048, row=1024).total > plain.total


# ------------------------------------------------------------------------------------------------ Unsloth's own rule


def of_1_7b(**options: Any) -> Memory:
    return qlora("1.7B", 4096, **{"checkpointing": False, "scored": 2048, "again": 0.5, **options})


def test_unsloths_kernels_keep_about_60_kib_of_a_token_and_layer() -> None:
    """The review's figure for 1.7B, and its 9.6 GiB at 4,096 tokens, to its last digit."""
    shape = Shape(*WIDTHS["1.7B"])
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

    plain = Shape(*WIDTHS["1.7B"])
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
    assert not made.cut.checkpointing, "no layer has to be computed twice"
    assert made.cut.token_budget in ((6144, 4096) if unsloth else (4096, 3072))


@pytest.mark.parametrize(("max_length", "kept_elsewhere"), [(511, 0), (512, 26)])
def test_unsloths_checkpointing_keeps_layer_inputs_in_the_machines_memory(max_length: int, kept_elsewhere: int) -> None:
    """All but two, where texts are not short: Unsloth then takes the usual checkpointing."""
    settings = ["train.gradient_checkpointing=true", f"model.max_length={max_length}"]
    recipe = load(REPOSITORY / "recipes" / "ultrafeedback_zh_en.yaml", settings)
    rows = [(300, 200, 200)] * 24
    plain, made = (
        plan(recipe, rows, dynamic_4bit(), 15 * GIB, budgeted=True, unsloth=unsloth) for unsloth in (False, True)
    )
    assert plain.cut.checkpointing
    copy = 2 * Shape.of(dynamic_4bit()).lora(32, LINEARS)  # autocast's, which Unsloth does not keep
    assert plain.memory.activations - made.memory.activations == kept_elsewhere * 8192 * 2048 * 2 + copy


CARDS = {
    "qwen3_0.6b": ("0.6B", 8), "colab_t4": ("0.6B", 16), "ultrafeedback_zh_en": ("1.7B", 16), "qwen3_4b": ("4B", 16),
    "qwen3_8b_24gb": ("8B", 24), "dpo_ultrafeedback": ("1.7B", 16), "simpo_ultrafeedback": ("1.7B", 16),
    "safety": ("1.7B", 16),
}  # fmt: skip


@pytest.mark.parametrize("unsloth", [False, True])
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_the_card_that_it_names(name: str, unsloth: bool) -> None:
    """By the plan, with pairs that fill `max_length` and a desktop on the card."""
    size, card = CARDS[name]
    recipe = load(REPOSITORY / "recipes" / f"{name}.yaml")
    assert f"-{size}-" in recipe.model.id
    engine = METHODS[recipe.train.method].engine
    longest = [(recipe.model.max_length // 2, *[recipe.model.max_length // 2] * 2)] * 24
    made = plan(
        recipe, longest, qwen3(size), int((0.97 * card - 1) * GIB), unsloth=unsloth,
        shared="shared_prefix" in engine,
        budgeted="token_budget" in engine and cannot_be_cut(recipe.train.losses) is None,
    )  # fmt: skip
    assert made.fits, made.verdict


# --------------------------------------------------------------------------------------------------------------- plan


def recipe(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"name": "x", "model": {"id": "x"}, "data": {"sources": [{"id": "x"}]}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Recipe.model_validate(values)


def batch(micro: int, accumulation: int, **options: Any) -> dict[str, Any]:
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation} | options


PAIRS = [(400, 600, 500), (300, 500, 600)] * 4


def sizes(micro: int, accumulation: int) -> list[tuple[int, int]]:
    tried = cuts(recipe(train=batch(micro, accumulation)), [False], None, "cpu")
    return [(cut.micro_batch, cut.accumulation) for cut in tried]


@pytest.mark.parametrize(
    ("train", "available", "verdict", "taken"),
    [
        (batch(1, 24, gradient_checkpointing=False), 80, "It fits.", (1, False)),
        (batch(1, 24), 12, "It fits.", (1, True)),
        (batch(1, 24, gradient_checkpointing=False), 12, "It does not fit: set train.gradient_ch", (1, False)),
        (batch(1, 24), 3, "It does not fit: lower model.max_length", (1, True)),
        (batch(4, 6), 3, "It does not fit: lower train.per_device_train_batch_size and raise", (4, True)),
    ],
)
def test_the_verdict_and_the_table_of_a_plan(
    train: dict[str, Any], available: int, verdict: str, taken: tuple[int, bool],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = plan(recipe(train=train), PAIRS, qwen3("4B"), available * GIB)
    assert made.verdict.startswith(verdict) and made.fits == ("does not fit" not in verdict)
    assert (made.cut.micro_batch, made.cut.checkpointing) == taken
    monkeypatch.setenv("COLUMNS", "80")
    print_markdown(memory_table(made, "NVIDIA GeForce RTX 4080 SUPER", "pairs"))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for words in (f"{made.memory.total / GIB:.2f}", *PARTS.values()):
        assert words in " ".join(text.split())
    assert f"{available:.2f}" in text


def test_a_micro_batch_is_halved_down_to_what_divides_the_effective_batch() -> None:
    assert sizes(8, 3) == [(8, 3), (4, 6), (2, 12), (1, 24)]
    assert sizes(6, 4) == [(6, 4), (3, 8), (1, 24)]
    assert sizes(5, 1) == [(5, 1), (1, 5)]


def test_rows_are_cut_at_max_length_as_trl_cuts_them() -> None:
    long = plan(recipe(model={"id": "x", "max_length": 1024}), [(400, 9000, 100)], qwen3("4B"), GIB)
    assert long.longest == 1024
    assert long.memory == plan(recipe(), [(400, 624, 100)], qwen3("4B"), GIB).memory


def test_only_answers_have_logits_and_auto_is_float32_on_a_cpu() -> None:
    answers, prompts = ([(*lengths, lengths[1])] * 24 for lengths in ((10, 490), (490, 10)))
    heads = [plan(recipe(), pairs, qwen3("0.6B"), 80 * GIB).memory.head for pairs in (answers, prompts)]
    assert heads[0] > 2 * heads[1]
    whole = recipe(model={"load_in_4bit": False})
    on_gpu, on_cpu = (plan(whole, answers, qwen3("0.6B"), GIB, device=one).memory for one in ("cuda", "cpu"))
    assert on_cpu.weights == 2 * on_gpu.weights


def test_there_is_what_the_card_has_free_or_a_process_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_memory(recipe()) == machine.total_memory() // 2
    assert available_memory(recipe(engine={"memory_limit": "100 MB"})) == 100 * 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "free_gpu_memory", lambda: 7 * GIB)
    assert available_memory(recipe()) == 7 * GIB + CUDA_CONTEXT, "our own context is in the plan"


@pytest.mark.parametrize(
    ("value", "size"),
    [(None, None), (16, 16 * GIB), ("16 GiB", 16 * GIB), (" 7.5g ", 15 * GIB // 2), ("900 MB", 900 * 2**20)],
)
def test_a_memory_limit_is_read(value: Any, size: int | None) -> None:
    assert memory_limit(recipe(engine={"memory_limit": value})) == size


def tried(budget: int, alone: int) -> list[int | None]:
    """Token budgets from the recipe's down."""
    return [cut.token_budget for cut in cuts(recipe(engine={"token_budget": budget}), [False], alone, "cpu")]


def test_token_budgets_are_halves_and_three_quarters_down_to_the_longest_pair() -> None:
    assert tried(8192, 1000) == [8192, 6144, 4096, 3072, 2048, 1536, 1024, 1000]
    assert tried(5000, 2100) == [5000, 4096, 3072, 2100]
    assert tried(1000, 1000) == [1000] and tried(500, 1000) == [500]
