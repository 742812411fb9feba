"""The memory plan against published figures and against resident memory; the trial against a run without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.terminal import print_markdown
from dpo_cli.train import memory as sizes
from dpo_cli.train import preflight
from dpo_cli.train.memory import GIB, Memory, parse_memory_limit, predict
from dpo_cli.train.plan import cuts, plan
from dpo_cli.train.planned import PARTS, memory_table, sentences
from dpo_cli.train.preflight import fit
from dpo_cli.train.shape import LINEARS, Shape
from tests.train.runs import trl_trainer, untimed

# Published widths of Qwen3.
QWEN3 = {
    "0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151936, True),
    "1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151936, True),
    "4B": Shape(36, 2560, 9728, 32, 8, 128, 151936, True),
    "8B": Shape(36, 4096, 12288, 32, 8, 128, 151936, False),
}


def qlora(size: str, tokens: int, **options: Any) -> Memory:
    """4-bit, rank 32 on all linear layers, as the published table has it; two thirds scored (the table doesn't say)."""
    chosen: dict[str, Any] = {
        "precision": "nf4", "rank": 32, "targets": LINEARS, "optimizer": "adamw_torch_fused",
        "checkpointing": True, "tokens": tokens, "scored": tokens * 2 // 3,
    }  # fmt: skip
    return predict(QWEN3[size], **chosen | options)


def qwen3_config(**widths: Any) -> Any:
    from transformers import Qwen3Config

    small = {
        "vocab_size": 512, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
    }  # fmt: skip
    return Qwen3Config(**small | widths)


# -------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_parameter_counts_are_the_models_own(tied: bool, bias: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    config = qwen3_config(tie_word_embeddings=tied, attention_bias=bias)
    model: Any = Qwen3ForCausalLM(config)
    shape = Shape.of(config)
    assert shape.parameters == model.num_parameters()
    linear = [module for name, module in model.model.named_modules() if name.endswith("_proj")]
    assert shape.linear == sum(module.weight.numel() for module in linear)
    for targets in (list(LINEARS), ["q_proj", "down_proj"]):
        adapted = get_peft_model(model, LoraConfig(r=6, target_modules=targets, task_type="CAUSAL_LM"))
        assert shape.lora(6, targets) == adapted.get_nb_trainable_parameters()[0]
        model = adapted.unload()


def test_a_mixture_of_experts_is_refused() -> None:
    from transformers import Qwen3MoeConfig

    with pytest.raises(DpoError, match="dense decoders"):
        Shape.of(Qwen3MoeConfig())


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
    return 10 * QWEN3[size].lora(32, LINEARS) / GIB


@pytest.mark.parametrize("size", QWEN3)
def test_the_gpu_formula_gives_the_published_parts(size: str) -> None:
    assert QWEN3[size].kept(2, 32, LINEARS) / 1024 == pytest.approx(KEPT[size], rel=0.005)
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


# ------------------------------------------------------------------------------------ against resident memory, on a CPU

# A process of its own, whose allocator gives freed blocks back at once, so that resident memory is what is in use.
MEASURE = """
import gc, json, re, sys
from pathlib import Path
import torch, datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from dpo_cli import smoke
from dpo_cli.train.methods import METHODS

torch.set_num_threads(1)
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(smoke.resolve("builtin:tiny-qwen3"))
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

def status(key):
    return int(re.search(key + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(case):
    gc.collect()
    before = status("VmRSS")
    base = Qwen3ForCausalLM(Qwen3Config(**case["config"]))
    model = get_peft_model(base.to(torch.bfloat16) if case.get("bf16") else base,
                           LoraConfig(r=32, target_modules=targets, task_type="CAUSAL_LM"))
    method = METHODS[case.get("method", "dpo")]
    config, trainer_class = method.classes()
    args = config(output_dir=sys.argv[2], use_cpu=True, bf16=case.get("bf16", False), report_to="none",
                     gradient_checkpointing=case["checkpointing"], disable_tqdm=True, max_length=512,
                     per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=2, save_strategy="no")
    said = {"prompt": [{"role": "user", "content": "a"}]}
    said |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    some = datasets.Dataset.from_list([{"id": "x", **said}])
    trainer = type("Trainer", (*method.mixins, trainer_class), {})(
        model=model, args=args, train_dataset=some, eval_dataset=None, processing_class=tokenizer)
    if method.reference:
        trainer.model.delete_adapter("ref")
    half = case["row"] // 2
    pairs = [{"prompt_ids": [5] * half, "chosen_ids": [6] * half, "rejected_ids": [7] * (half - 20)}] * 4
    trainer.train_dataset = datasets.Dataset.from_list(pairs)
    if not method.reference:
        trainer.train_dataset = trainer.train_dataset.map(trainer.tokenize_row)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    trainer.train()
    return before, status("VmHWM") - before

cases = json.loads(sys.argv[1])
peak({**cases[0], "row": 32})  # what the libraries set up at the first step is not the model's
print(json.dumps([peak(case) for case in cases]))
"""
# The first two are topped by the head's tiles, the third by a layer's backward, the others by all logits at once.
WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
CASES: list[dict[str, Any]] = [
    {"config": WIDE | {"vocab_size": 8192, "intermediate_size": 1536, "num_hidden_layers": 8}, "row": 384}
    | {"checkpointing": False},
    {"config": WIDE | {"vocab_size": 8192, "intermediate_size": 1536, "num_hidden_layers": 8}, "row": 384}
    | {"checkpointing": True},
    {"config": WIDE | {"vocab_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 2}, "row": 384}
    | {"checkpointing": True},
    {"config": WIDE | {"vocab_size": 32768, "intermediate_size": 1536, "num_hidden_layers": 2}, "row": 384}
    | {"checkpointing": True, "method": "cpo"},
    {"config": WIDE | {"vocab_size": 32768, "intermediate_size": 1536, "num_hidden_layers": 2}, "row": 384}
    | {"checkpointing": True, "method": "orpo", "bf16": True},
]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.slow  # test_memory.py measures the formula's parts
def test_the_prediction_is_within_15_percent_of_resident_memory(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(CASES), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, (libraries, measured) in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        memory = predict(
            Shape.of(Qwen3Config(tie_word_embeddings=True, **case["config"])),
            precision="bf16" if case.get("bf16") else "fp32",
            rank=32,
            targets=LINEARS,
            optimizer="adamw_torch_fused",
            checkpointing=case["checkpointing"],
            tokens=2 * case["row"],
            scored=case["row"] - 20,
            row=case["row"],
            fused_head=case.get("method") is None,
            device="cpu",
        )
        predicted = memory.total - sizes.CPU_LIBRARIES
        print(f"{case['checkpointing']}: predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
        assert predicted == pytest.approx(measured, rel=0.15)
        assert libraries == pytest.approx(sizes.CPU_LIBRARIES, rel=0.4)


# --------------------------------------------------------------------------------------------------------------- plan


def recipe(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"name": "x", "model": {"id": "x"}, "data": {"sources": [{"id": "x"}]}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Recipe.model_validate(values)


def batch(micro: int, accumulation: int, **options: Any) -> dict[str, Any]:
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation} | options


def config_4b() -> Any:
    shape = {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    return qwen3_config(**shape)


PAIRS = [(400, 600, 500), (300, 500, 600)] * 4


def test_the_shape_is_read_off_a_config() -> None:
    assert Shape.of(config_4b()) == QWEN3["4B"]


@pytest.mark.parametrize("gib", [8, 10, 16, 24, 40, 60])
@pytest.mark.parametrize(("micro", "accumulation"), [(8, 3), (6, 4), (5, 1), (7, 2), (1, 24)])
def test_a_proposal_keeps_the_effective_batch_fits_and_is_the_largest(micro: int, accumulation: int, gib: int) -> None:
    made = plan(recipe(train=batch(micro, accumulation)), PAIRS, config_4b(), gib * GIB)
    proposal = made.proposal
    assert proposal is not None
    assert proposal.micro_batch * proposal.accumulation == micro * accumulation
    assert proposal.memory.total <= gib * GIB
    tried = list(cuts(micro, accumulation))
    position = tried.index((proposal.micro_batch, proposal.accumulation))
    for larger, times in tried[:position]:
        bigger = plan(
            recipe(train=batch(larger, times, gradient_checkpointing=proposal.checkpointing)),
            PAIRS, config_4b(), gib * GIB,
        )  # fmt: skip
        assert not bigger.fits


@pytest.mark.parametrize(
    ("train", "available", "verdict", "proposed"),
    [
        (batch(1, 24, gradient_checkpointing=False), 80, "It fits.", (1, False)),
        (batch(1, 24, gradient_checkpointing=True), 24, "It fits. So does this, without computing", (1, False)),
        (batch(1, 24, gradient_checkpointing=False), 12, "It does not fit. This does, with the same", (1, True)),
        (batch(4, 6), 3, "It does not fit, not even one pair at a time: lower model.max_length", None),
        (batch(64, 1), None, "How much memory there is, is not known.", (64, False)),
    ],
)
def test_the_verdict_and_the_table_of_a_plan(
    train: dict[str, Any], available: int | None, verdict: str, proposed: tuple[int, bool] | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    there = None if available is None else available * GIB
    made = plan(recipe(train=train), PAIRS, config_4b(), there, card="NVIDIA GeForce RTX 4080 SUPER")
    assert made.verdict.startswith(verdict) and made.fits == ("does not fit" not in verdict)
    assert (made.proposal and (made.proposal.micro_batch, made.proposal.checkpointing)) == proposed
    monkeypatch.setenv("COLUMNS", "80")
    print_markdown("\n\n".join([memory_table(made), *sentences(made)]))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for words in (made.verdict, f"{made.recipe.memory.total / GIB:.2f}", *PARTS.values()):
        assert words in " ".join(text.split())
    assert (f"{available:.2f}" if available else "not known") in text


def test_a_micro_batch_is_halved_down_to_what_divides_the_effective_batch() -> None:
    assert list(cuts(8, 3)) == [(8, 3), (4, 6), (2, 12), (1, 24)]
    assert list(cuts(6, 4)) == [(6, 4), (3, 8), (1, 24)]
    assert list(cuts(5, 1)) == [(5, 1), (1, 5)]


def test_rows_are_cut_at_max_length_as_trl_cuts_them() -> None:
    long = plan(recipe(model={"id": "x", "max_length": 1024}), [(400, 9000, 100)], config_4b(), None)
    assert long.longest == 1024
    assert long.recipe.memory == plan(recipe(), [(400, 624, 100)], config_4b(), None).recipe.memory


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (None, None), (16, 16 * GIB), ("16", 16 * GIB), ("16GB", 16 * GIB), ("16 GiB", 16 * GIB), (7.5, 15 * GIB // 2),
        (" 7.5g ", 15 * GIB // 2), ("900 MB", 900 * 2**20),
    ],
)  # fmt: skip
def test_a_memory_limit_is_read(value: Any, size: int | None) -> None:
    assert parse_memory_limit(value) == size


@pytest.mark.parametrize("value", ["", "lots", "-1", -4, 0, "0GB", "16 TBs", float("nan"), float("inf"), True, "1e3"])
def test_nonsense_is_no_memory_limit(value: Any) -> None:
    with pytest.raises(DpoError, match="no size of memory") as caught:
        parse_memory_limit(value)
    assert caught.value.exit_code == USAGE


# ---------------------------------------------------------------------------------------------------------------- fit

Trainers = Callable[..., Any]


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Path) -> Trainers:
    """`trainer(micro, accumulation, words=…)`: TRL's on the tiny model, with pairs of growing length."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    chosen: dict[str, Any] = {
        "max_length": None, "max_steps": 5, "learning_rate": 1e-2, "seed": 3, "disable_dropout": False,
        "gradient_checkpointing": True,
    }  # fmt: skip

    def build(micro: int, accumulation: int, words: int = 8, **options: Any) -> Any:
        set_seed(1)
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        pairs = [
            {"prompt": "say it", "chosen": "yes " * (words + n % 5), "rejected": "no " * (words + n % 3)}
            for n in range(24)
        ]
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        return trl_trainer(tmp_path, model, tokenizer, pairs, **chosen | sizes | options)

    return build


def trained(made: Any) -> list[dict[str, Any]]:
    made.train()
    return untimed(made.state.log_history)


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_after_the_trial_is_the_run_without_it(trainer: Trainers, checkpointing: bool) -> None:
    """With dropout, so that a random number drawn by the trial would show."""
    import torch

    tried = trainer(2, 2, gradient_checkpointing=checkpointing)
    before = {name: value.clone() for name, value in tried.model.state_dict().items()}
    training = tried.model.training
    assert fit(tried, 64 * GIB) == 2
    assert all(torch.equal(value, before[name]) for name, value in tried.model.state_dict().items())
    assert all(parameter.grad is None for parameter in tried.model.parameters())
    assert tried.optimizer is None
    assert tried.model.training is training
    assert tried._total_train_tokens == 0
    rows = trained(tried)
    assert len(rows) == 6
    assert rows == trained(trainer(2, 2, gradient_checkpointing=checkpointing))


def test_the_longest_pairs_are_tried_with_the_accumulation_they_will_have(
    trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(2, 3)
    seen: list[tuple[int, int, int]] = []
    step = made.training_step

    def watched(model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append((*inputs["input_ids"].shape, made.current_gradient_accumulation_steps))
        return step(model, inputs, *rest)

    monkeypatch.setattr(made, "training_step", watched)
    fit(made, 64 * GIB)
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in made.train_dataset
    )
    assert seen == [(4, longest, 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured against a limit")
def test_a_small_limit_halves_the_micro_batch_and_keeps_the_effective_batch(trainer: Trainers) -> None:
    """TRL's torch head alone takes 33 bytes x 2,048 words for each padded token: 34 MB a pair of 253-token rows."""
    made = trainer(8, 3, words=120)
    rows = preflight._longest_rows(made.train_dataset, 8)
    two, four = (preflight._try(made, rows[:pairs], 1) for pairs in (2, 4))
    assert four > two + 40e6
    assert fit(made, int(two + four) // 2) == 2
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (2, 12)
    assert made.get_total_train_batch_size(made.args) == 24
    assert len(next(iter(made.get_train_dataloader()))["input_ids"]) == 4  # chosen and rejected of two pairs


def test_running_out_of_memory_halves_as_well(trainer: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    made = trainer(4, 2)
    step = made.training_step

    def small_card(model: Any, inputs: Any, *rest: Any) -> Any:
        loss = step(model, inputs, *rest)
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(made, "training_step", small_card)
    assert fit(made, 64 * GIB) == 1
    assert made.args.gradient_accumulation_steps == 8
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_trial_waits_for_no_other_process(trainer: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose memory ran out would not be there for the metrics that TRL gathers, only for the peak."""
    from accelerate import Accelerator

    made, gather = trainer(2, 1), Accelerator.gather
    monkeypatch.setattr(Accelerator, "gather", lambda *_: pytest.fail("it waits for the others"))
    assert fit(made, 64 * GIB) == 2
    monkeypatch.setattr(Accelerator, "gather", gather)
    assert made.accelerator.gather.__func__ is gather and "gather_for_metrics" not in vars(made.accelerator)


def test_other_errors_of_a_step_are_not_taken_for_a_full_memory(
    trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(4, 2)

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(made, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(made, 64 * GIB)


@pytest.mark.parametrize(
    ("checkpointing", "fix"), [(True, "lower model.max_length"), (False, "train.gradient_checkpointing: true")]
)
def test_one_pair_that_does_not_fit_is_an_error_with_a_fix(trainer: Trainers, checkpointing: bool, fix: str) -> None:
    made = trainer(2, 3, gradient_checkpointing=checkpointing)
    with pytest.raises(DpoError, match="one pair at a time does not fit") as caught:
        fit(made, 10 * 2**20)
    assert fix in str(caught.value.hint)
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (2, 3)


def test_a_cpu_without_a_limit_tries_nothing(trainer: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(2, 3)
    monkeypatch.setattr(made, "training_step", lambda *_: pytest.fail("a step was tried"))
    assert fit(made) == 2
