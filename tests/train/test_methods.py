"""Every method on the real thing: it runs, logs, evaluates, resumes to the same bytes, and learns from DPO's tokens."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke
from dpo_cli.backends import Backend, import_backend
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe, load
from dpo_cli.recipe.train import trl_arguments
from dpo_cli.run import Run
from dpo_cli.train import engine, methods, preflight, trl_fixes
from dpo_cli.train import trainer as trainers
from dpo_cli.train.checkpoints import Start, damage, saved, seal
from dpo_cli.train.memory import GIB
from dpo_cli.train.methods import METHODS
from dpo_cli.train.plan import cuts, plan
from dpo_cli.train.trainer import build
from dpo_cli.train.watchdog import Watchdog
from tests.train.runs import SMOKE, cut_short, dpo_cli, log, record, weights
from typer.testing import Result

OTHERS = [method for method in METHODS if method != "dpo" and "pairs" in METHODS[method].data]
COMPARE = [method for method in OTHERS if METHODS[method].compares]
FEW = (
    "data.format=pairs", "data.total=40", "data.eval_size=12", "train.max_steps=4", "train.logging_steps=1",
    "train.save_steps=2", "train.gradient_accumulation_steps=1",
)  # fmt: skip
Train = Callable[..., Result]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs in which the smoke data are prepared, as pairs; what no method changes."""
    runs = tmp_path_factory.mktemp("runs")
    done = dpo_cli("prepare", SMOKE, runs, *FEW)
    assert done.exit_code == 0, done.output
    return runs


@pytest.fixture
def train(prepared: Path, tmp_path: Path) -> Train:
    """`dpo-cli train` of four steps of a method on those data."""
    runs = shutil.copytree(prepared, tmp_path / "runs")

    def go(method: str, *settings: str) -> Result:
        return dpo_cli("train", SMOKE, runs, *FEW, f"train.method={method}", *settings)

    return go


# ------------------------------------------------------------------------------------------------------------ a run


RESUMED = [pytest.param(method, marks=[] if method in ("kto", "simpo") else pytest.mark.slow) for method in OTHERS]


@pytest.mark.parametrize("method", RESUMED)
def test_a_method_trains_evaluates_and_resumes_to_the_same_bytes(method: str, train: Train, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "smoke"
    settings = ("train.eval_strategy=steps", "train.eval_steps=2")
    done = train(method, *settings)
    assert done.exit_code == 0, done.output
    said = done.stdout
    assert "prepare: nothing has changed" in said, "the data are the same for all methods"
    taken = record(run)["engine"]
    assert not taken["shared_prefix"] and taken["token_budget"] is None and not taken["reference_cache"]
    assert f" by {method}, on " in said and "made for train.method dpo" in said
    assert ("no reference" in said) == (method != "kto")
    assert ("80 rows (pairs split in two)" in said) == (method == "kto")
    assert ("rows/s" in said) == (method in ("kto", "sft"))

    rows = log(run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    compared = {"rewards/margins", "logps/chosen"} if METHODS[method].compares else {"mean_token_accuracy"}
    assert all({"grad_norm", *compared} <= row.keys() for row in steps)
    held_out = {key for row in rows for key in row}
    compared = {"eval_zh_rewards/margins", "eval_rewards/chosen"} if METHODS[method].compares else {"eval_zh_entropy"}
    assert {"eval_loss", "eval_en_loss", *compared} <= held_out
    metrics = json.loads((run / "train" / "metrics.json").read_text())
    assert metrics["tokens_per_second"] > 0

    whole, same = weights(run), ("step", "loss", "grad_norm", "rewards/margins", "logps/rejected")
    cut_short(run, step=2)
    again = train(method, *settings)
    assert again.exit_code == 0, again.output
    assert "resumed from step 2" in again.stdout
    assert [[row.get(key) for key in same] for row in log(run)] == [[row.get(key) for key in same] for row in rows]
    assert weights(run) == whole


def test_a_beta_of_dpos_size_is_told_with_the_loss_of_simpo(built: Callable[..., Any]) -> None:
    """As cpo has it, whose beta is TRL's 0.1."""
    settings = ("train.loss_type=simpo",)
    said = trainers._notes(load(SMOKE, [*FEW, "train.method=cpo", *settings]), built("cpo", *settings))
    assert any("train.beta 0.1 is of DPO's size; simpo weighs" in note for note in said)
    simpo = trainers._notes(load(SMOKE, [*FEW, "train.method=simpo"]), built("simpo"))
    assert simpo == ["no reference: simpo needs none"]


def test_more_of_an_epoch_that_is_no_step_more_is_refused() -> None:
    begun = Start(Path("checkpoint-4"), longer=True)
    with pytest.raises(DpoError, match="that is 4 steps, and the finished run has 4"):
        trainers._check_longer(load(SMOKE, []), 4, begun)
    trainers._check_longer(load(SMOKE, []), 5, begun)


def test_steps_are_as_many_as_transformers_takes(built: Callable[..., Any]) -> None:
    trainer = built("dpo", "train.max_steps=-1", "train.num_train_epochs=0.35")
    *_, counted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert trainers.total_steps(trainer) == counted
    steps = len(trainer.train_dataset) / trainer.get_total_train_batch_size(trainer.args)
    assert counted > 0.35 * steps, "a step that is begun is taken"


def test_unpaired_rows_train_and_a_heavy_label_is_told(tmp_path: Path) -> None:
    good, bad = (f"{word} answer that is long enough to be kept here, number {{}}." for word in ("A good", "Some bad"))
    rows = [
        {"prompt": f"What is to be said of the number {n}, if anything?", "completion": text.format(n), "label": label}
        for n in range(40)
        for text, label in [(bad, False) if n % 4 == 0 else (good, True)]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tmp_path / "kto.yaml"
    recipe.write_text(
        "model: {id: builtin:tiny-qwen3, load_in_4bit: false, max_length: 256}\n"
        "data: {format: unpaired, sources: [{id: rows.jsonl, layout: kto, language: en}], languages: null, "
        "total: null, eval_fraction: 0.2, filters: {near_duplicate: false}}\n"
        # A rate at which two steps leave a change that the rounding of a merged 16-bit file does not drown.
        "train: {method: kto, max_steps: 2, learning_rate: 2.0e-3, gradient_accumulation_steps: 1, "
        "eval_strategy: steps, eval_steps: 2}\n",
        encoding="utf-8",
    )
    done = dpo_cli("train", recipe, tmp_path / "runs")
    assert done.exit_code == 0, done.output
    assert " rows, 4 a step by kto" in done.stdout and "split in two" not in done.stdout
    assert "! You have different amounts of desirable" in done.stdout, "by TRL itself, but in our form"
    assert any("eval_en_loss" in row for row in log(tmp_path / "runs" / "kto"))
    exported = dpo_cli("export", recipe, tmp_path / "runs")
    assert exported.exit_code == 0, exported.output
    evaluated = dpo_cli("eval", recipe, tmp_path / "runs", "eval.prompts=1", "eval.max_new_tokens=2")
    assert evaluated.exit_code == 0, evaluated.output
    metrics = json.loads((tmp_path / "runs" / "kto" / "eval" / "metrics.json").read_text(encoding="utf-8"))
    held_out = [json.loads(line) for line in (tmp_path / "runs" / "kto" / "data" / "eval.jsonl").open()]
    fewer = min(sum(row["label"] is label for row in held_out) for label in (True, False))
    assert metrics["pairs"] is None, "no prompt has both"
    assert metrics["answers"]["auroc"]["n"] == fewer > 0


# ---------------------------------------------------------------------------------------------- what it is trained on


@pytest.fixture(scope="module")
def built(prepared: Path) -> Callable[..., Any]:
    """`built(method)`: its trainer on the prepared pairs, before the first step."""
    backend = Backend("hf", "")
    import_backend(backend)
    made: dict[tuple[str, ...], Any] = {}

    def go(method: str, *settings: str) -> Any:
        if (method, *settings) not in made:
            recipe = load(SMOKE, [*FEW, f"train.method={method}", *settings])
            made[method, *settings] = build(recipe, Run(prepared / "smoke", {}), backend)
        return made[method, *settings]

    return go


@pytest.mark.parametrize("method", [method for method in COMPARE if not METHODS[method].reference])
def test_the_tokens_are_those_of_dpo(built: Callable[..., Any], method: str) -> None:
    """TRL's older trainers would end an answer twice, and a template's thinking block is easily lost."""
    trainer, dpo = built(method), built("dpo")
    tokenizer = dpo.processing_class
    for row, wanted in zip(trainer.train_dataset, dpo.train_dataset, strict=True):
        assert row["id"] == wanted["id"]
        for side in ("chosen", "rejected"):
            prompt, answer = wanted["prompt_ids"], wanted[f"{side}_ids"]
            assert row[f"{side}_input_ids"] == prompt + answer
            assert row[f"{side}_labels"] == [-100] * len(prompt) + answer
            assert answer.count(tokenizer.eos_token_id) == 1
    prompt = tokenizer.decode(dpo.train_dataset[0]["prompt_ids"])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "thinking is off"


def test_what_is_over_max_length_is_cut_at_the_end(built: Callable[..., Any]) -> None:
    trainer = built("simpo")
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4] * 600, "rejected_ids": [5]}
    cut = trainer.tokenize_row(row)
    assert cut["chosen_input_ids"] == [1, 2, 3] + [4] * 509 and len(cut["chosen_labels"]) == 512
    assert cut["rejected_labels"] == [-100, -100, -100, 5]


def test_ktos_rows_are_the_pairs_and_a_kl_row_is_never_a_real_one(built: Callable[..., Any]) -> None:
    pairs = {row["id"]: row for row in built("dpo").train_dataset}
    rows = list(built("kto").train_dataset)
    assert len(rows) == 2 * len(pairs)
    for row in rows:
        wanted = pairs[row["id"]]
        assert row["prompt_ids"] == wanted["prompt_ids"]
        assert row["completion_ids"] == wanted["chosen_ids" if row["label"] else "rejected_ids"]
        assert row["KL_completion_ids"] not in (wanted["chosen_ids"], wanted["rejected_ids"])
    assert {(row["id"], row["label"]) for row in rows} == {(name, label) for name in pairs for label in (True, False)}
    for start in range(0, len(rows), 4):
        assert sum(row["label"] for row in rows[start : start + 4]) == 2, "each micro-batch has both"


@pytest.mark.parametrize("method", ["simpo", "kto", "sft"])
def test_a_loss_that_is_no_number_names_its_rows(built: Callable[..., Any], method: str) -> None:
    import torch

    trainer = built(method, "train.adam_beta1=0.8")  # of its own, to be broken
    batch = [trainer.train_dataset[index] for index in (1, 4)]
    with torch.no_grad():
        next(one for one in trainer.model.parameters() if one.requires_grad).fill_(math.nan)
        for name, one in trainer.model.named_parameters():
            if "lora_B" in name:
                one.fill_(1.0)
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(DpoError) as caught:
        trainer.training_step(trainer.model, trainer.data_collator(batch))
    assert {row["id"] for row in batch} == set(str(caught.value).split("rows ")[1].splitlines()[0].split(", "))
    with pytest.raises(DpoError, match="the gradient's norm is inf after 0 steps"):
        trainer.log({"loss": 0.5, "grad_norm": math.inf})
    trainer.args.fp16 = True  # its loss scaler finds its scale by overflowing, and passes such steps over
    trainer.log({"loss": 0.5, "grad_norm": math.inf})


# ------------------------------------------------------------------------------------------------------- every loss

ALONE = [(method, [loss]) for method in METHODS for loss in trl_arguments()[method]["losses"] if method != "lipo"]
ORDINARY = ("dpo aot", "simpo simpo", "cpo sigmoid", "kto kto", "sft nll")
LOSSES = [
    pytest.param(method, losses, id=f"{method} {'+'.join(losses)}", marks=[] if f"{method} {losses[0]}" in ORDINARY
                 or len(losses) > 1 else pytest.mark.slow)
    for method, losses in [*ALONE, ("dpo", ["sigmoid", "bco_pair", "sft"])]
]  # fmt: skip


@pytest.mark.parametrize(("method", "losses"), LOSSES)
def test_every_loss_takes_a_step(method: str, losses: list[str], built: Callable[..., Any]) -> None:
    import torch

    settings = [f"train.loss_type={losses[0] if len(losses) == 1 else losses}"]
    settings += ["train.label_smoothing=0.1"] if {"exo_pair", "robust"} & set(losses) and method == "dpo" else []
    settings += ["train.loss_weights=[0.8, 0.2, 1.0]"] if len(losses) > 1 else []
    settings += ["train.alpha=0.1"] if losses == ["alphapo"] else []
    trainer = built(method, *settings)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.current_gradient_accumulation_steps = 1
    value = trainer.training_step(trainer.model, batch)
    moved = [one.grad for name, one in trainer.model.named_parameters() if "lora_B" in name]
    assert torch.isfinite(value) and moved
    assert all(one is not None and 0 < float(one.abs().max()) < math.inf for one in moved), "in every layer"


# ----------------------------------------------------------------------------------------------- memory and remarks


def recipe_of(method: str, **train: Any) -> Recipe:
    settings = [f"train.{name}={json.dumps(value)}" for name, value in train.items()]
    return load(SMOKE, [f"train.method={method}", *settings])


def config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(smoke.resolve("builtin:tiny-qwen3"))


def test_the_plan_counts_the_logits_that_a_reference_free_trainer_holds() -> None:
    pairs = [(40, 100, 90)] * 32
    dpo, simpo = (plan(recipe_of(method), pairs, config(), 80 * GIB) for method in ("dpo", "simpo"))
    assert simpo.memory.head > dpo.memory.head
    both = [recipe_of(method).model_copy(update={"model": recipe_of(method).model.model_copy(update={"adapter": "x"})})
            for method in ("dpo", "simpo")]  # fmt: skip
    copied, alone = (plan(one, pairs, config(), 80 * GIB).memory for one in both)
    assert copied.adapter == 2 * alone.adapter, "the reference is a second adapter, where there is a reference"


def test_the_plan_for_kto_counts_rows_and_keeps_two_of_them() -> None:
    kto = recipe_of("kto", per_device_train_batch_size=8, gradient_accumulation_steps=1)
    rows = [(40, 100)] * 32
    pairs = plan(recipe_of("dpo", per_device_train_batch_size=8), [(40, 100, 100)] * 32, config(), 80 * GIB)
    # As many texts, so the same activations.
    double = recipe_of("kto", per_device_train_batch_size=16, gradient_accumulation_steps=1)
    assert plan(double, rows, config(), 80 * GIB).memory.activations == pairs.memory.activations
    assert {cut.micro_batch for cut in plan(kto, rows, config(), 1).tries} == {8}, "its KL term is a mean over them"
    assert [cut.micro_batch for cut in cuts(kto, [True], None, "cpu")] == [8], "of an unknown architecture too"


def test_the_try_before_training_holds_the_logits_that_training_will(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, which accelerate makes of a 16-bit model's outputs, and only once train() has begun."""
    import torch

    trainer, seen = built("orpo", "train.bf16=true", "train.save_strategy=no"), list[torch.dtype]()
    forward = trainer.concatenated_forward

    def watched(*args: Any) -> Any:
        output = forward(*args)
        seen.append(output[2].dtype)
        return output

    monkeypatch.setattr(trainer, "concatenated_forward", watched)
    preflight.seconds_of(trainer, [trainer.train_dataset[0]])
    trainer.train()
    assert len(seen) > 1 and set(seen) == {torch.float32}


def test_the_longest_rows_are_tried(built: Callable[..., Any]) -> None:
    data = built("dpo").train_dataset
    sizes = {
        row["id"]: len(row["prompt_ids"]) + max(map(len, (row["chosen_ids"], row["rejected_ids"]))) for row in data
    }
    tried = [row["id"] for row in preflight._longest_rows(data, 3)]
    assert sorted((sizes[one] for one in tried), reverse=True) == sorted(sizes.values(), reverse=True)[:3]


def test_an_architecture_that_the_memory_plan_does_not_know_is_cut_by_rows(built: Callable[..., Any]) -> None:
    trainer = built("dpo")
    recipe = load(SMOKE, [*FEW, "train.per_device_train_batch_size=4"])
    trainer.model.config.num_experts = 8
    try:
        tried = engine._tries(recipe, trainer, can_cut=True)
    finally:
        del trainer.model.config.num_experts
    assert [(cut.micro_batch, cut.checkpointing) for cut in tried] == [(4, True), (2, True), (1, True)]


def test_older_checkpoints_stay_until_a_new_one_is_whole(built: Callable[..., Any], monkeypatch: Any) -> None:
    def full(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(checkpoint)

    trainer = built("dpo", "train.save_steps=1", "train.save_total_limit=1", "train.max_steps=2", "seed=4")
    monkeypatch.setattr(trl_fixes, "seal", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [one.name for one in saved(Path(trainer.args.output_dir)) if damage(one) is None] == ["checkpoint-1"]


def test_a_gradient_that_is_no_number_stops_the_run_but_where_losses_are_scaled(built: Callable[..., Any]) -> None:
    trainer = built("dpo", "seed=3")
    trainer.args.fp16 = True
    trainer.log({"loss": 0.7, "grad_norm": math.inf})
    trainer.args.fp16 = False
    with pytest.raises(DpoError, match="the gradient's norm is nan after 0 steps"):
        trainer.log({"loss": 0.7, "grad_norm": math.nan})


def test_rewards_without_a_reference_are_no_cause_for_alarm() -> None:
    """They are beta x log-probability, far below 0 from the start; only a shortcut and spikes still mean something."""
    row = {"loss": 2.0, "grad_norm": 1.0, "rewards/chosen": -40.0, "rewards/rejected": -41.0, "rewards/margins": 1.0,
           "rewards/accuracies": 0.6, "logps/chosen": -400.0}  # fmt: skip
    rows = [{**row, "step": step, "epoch": step / 50} for step in range(1, 50)]
    free = Watchdog(["sigmoid"], 0.1, 16, steps=50, method=METHODS["simpo"])
    assert [text for one in rows for text in free.observe(one)] == []
    against = Watchdog(["sigmoid"], 0.1, 16, steps=50)
    assert [text for one in rows for text in against.observe(one)]
    right = Watchdog(["simpo"], 0.1, 16, steps=50, method=METHODS["simpo"])
    said = [text for one in rows for text in right.observe({**one, "rewards/accuracies": 1.0})]
    assert len(said) == 1 and "easier" in said[0]


def test_ktos_first_loss_is_what_the_watchdog_takes_it_for(built: Callable[..., Any]) -> None:
    kto, first = built("kto"), methods.LOSSES["kto"].first
    batch = kto._prepare_inputs(kto.data_collator([kto.train_dataset[index] for index in range(4)]))
    assert first and kto.compute_loss(kto.model, batch).item() == pytest.approx(first(0.1), abs=1e-6)
    row = {"loss": 0.8, "grad_norm": 1.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.001}
    watchdog = Watchdog(["kto"], 0.1, 16, steps=50, weights=[1.0], method=METHODS["kto"])
    said = [text for step in range(1, 51) for text in watchdog.observe({**row, "step": step})]
    assert any("worse than no training (0.50)" in text for text in said)
    assert any("about where it began" in text for text in said)


@pytest.mark.parametrize(
    ("method", "settings", "first"),
    [("kto", ["train.desirable_weight=3"], 3 * 0.5), ("kto", ["train.undesirable_weight=3"], 3 * 0.5),
     ("dpo", ["train.loss_type=[sigmoid, hinge]", "train.loss_weights=[0.5, 2]"], 0.5 * math.log(2) + 2)],
)  # fmt: skip
def test_the_watchdog_of_a_run_weighs_losses_and_labels_as_it_does(
    method: str, settings: list[str], first: float, built: Callable[..., Any]
) -> None:
    recipe = load(SMOKE, [*FEW, f"train.method={method}", *settings])
    watchdog: Any = next(trainers._watchers(recipe, built(method), quiet=True))
    row = {"loss": 9.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}
    said = [text for step in range(1, 51) for text in watchdog.watchdog.observe({**row, "step": step})]
    assert any(f"worse than no training ({first:.2f})" in text for text in said), said


def test_4_bit_weights_are_nf4_and_their_lora_is_float32(built: Callable[..., Any]) -> None:
    """A bfloat16 one, which TRL makes of it, would round a step of a small learning rate to nothing."""
    import torch
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

    model = built("dpo", "model.load_in_4bit=true", "model.dtype=bfloat16").model
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    kinds = {(one.weight.quant_type, one.weight.quant_state.nested, one.compute_dtype) for one in layers}
    assert kinds == {("nf4", True, torch.bfloat16)}
    # What bitsandbytes has for CPUs with AVX512-BF16 is without a backward.
    assert not any(one.support_avx512bf16_for_cpu for one in layers)
