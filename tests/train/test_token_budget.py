"""A step cut by tokens against TRL's own step: the same losses, metrics, gradients and parameters, on real trainers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpo_cli
import pytest
from dpo_cli.train import token_budget
from dpo_cli.train.methods import cannot_be_cut
from dpo_cli.train.token_budget import TokenBudget, cost, groups, stays_whole
from hypothesis import given
from hypothesis import strategies as st
from tests.train.runs import batch_of, leave_start, step, trl_trainer

Trainers = Callable[..., Any]
ARGUMENTS = json.loads((Path(dpo_cli.__file__).parent / "recipe/trl_arguments.json").read_text(encoding="utf-8"))
LOSSES: list[str] = ARGUMENTS["dpo"]["losses"]
OVER_BATCH = {"aot", "aot_unpaired", "sft"}
CLOSE = 1e-6


# ----------------------------------------------------------------------------------------------------------- the groups

LENGTHS = st.lists(st.integers(1, 300), max_size=40)


@given(LENGTHS, st.integers(1, 700), st.booleans())
def test_every_pair_is_in_one_group_and_no_group_goes_over_the_budget(
    lengths: list[int], budget: int, padded: bool
) -> None:
    """The longest pair comes first, where memory would run out; and of two half-empty passes first-fit makes one."""
    made = groups(lengths, budget, padded)
    assert sorted(index for group in made for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or cost(lengths, group, padded) <= budget for group in made)
    longest = [max(lengths[index] for index in group) for group in made]
    assert longest == sorted(longest, reverse=True)
    assert padded or sum(2 * cost(lengths, group, padded) <= budget for group in made) <= 1


def test_groups_by_hand() -> None:
    assert groups([3, 9, 5, 5, 1], 10) == [[1, 4], [2, 3], [0]]
    assert groups([30, 4], 10) == [[0], [1]]
    assert groups([3, 9, 5, 5, 1], 20, padded=True) == [[1], [2, 3], [0, 4]]
    assert groups([30, 1, 1], 10, padded=True) == [[0], [1, 2]]


# -------------------------------------------------------------------------------------------------------- the trainers

WORDS = ("the", "a", "is", "and", "of", "to", "amber", "basket", "candle", "的", "是", "我")


# Of the tiny model's embeddings, which are its head too; for entropies that differ, and a token guessed now and then.
SHARPER = 12.0


def ragged(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)

    def say(most: int) -> str:
        return " ".join(f"{word} {word}" for word in rng.choices(WORDS, k=rng.randint(1, most)))

    rows = [{"prompt": say(9), "chosen": " " + say(14), "rejected": " " + say(14)} for _ in range(count)]
    rows[1]["rejected"] = rows[1]["chosen"] + " amber"  # one opens with the other
    return rows


@pytest.fixture
def build(tmp_path: Path, tiny_model: Path) -> Trainers:
    """`build(24, 1, budget=…, count=…)`: TRL's trainer, budgeted or (budget 0) not, whose policy has left its start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    chosen: dict[str, Any] = {
        "max_length": None, "num_train_epochs": 1, "learning_rate": 1e-3, "seed": 3, "precompute_ref_batch_size": 4,
    }  # fmt: skip

    def go(micro: int, accumulation: int = 1, *, budget: int = 0, count: int = 24, **options: Any) -> Any:
        set_seed(1)
        base: Any = options.pop("base", None) or AutoModelForCausalLM.from_pretrained(tiny_model)
        base.get_input_embeddings().weight.data *= SHARPER
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        shared_prefix = options.pop("shared_prefix", True)
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        tokenizer, mixins = AutoTokenizer.from_pretrained(tiny_model), [TokenBudget] if budget else []
        trainer = trl_trainer(tmp_path, model, tokenizer, ragged(count), *mixins, **chosen | sizes | options)
        if budget:
            trainer.token_budget, trainer.shared_prefix = budget, shared_prefix
        leave_start(trainer)
        return trainer

    return go


def passes(trainer: Any) -> list[Any]:
    """The attention masks of each call of the backbone from now on; a pass makes two, the second for the reference."""
    seen: list[Any] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["attention_mask"].clone())

    trainer.model.get_base_model().model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def difference(grads: dict[str, Any], others: dict[str, Any]) -> float:
    """The largest over tensors of |a - b| / |b|, in Euclidean norms."""
    assert grads.keys() == others.keys()
    return max(float((grads[name] - others[name]).norm() / others[name].norm()) for name in grads)


# ------------------------------------------------------------------------------------------------------------- the loss

SMOOTH = {"robust": 0.1, "exo_pair": 0.1}
ORDINARY = {"loss_weights", "precompute_ref_log_probs", "max_length", "shared_prefix"}
OPTIONS: list[dict[str, Any]] = [
    {"loss_type": ["apo_zero", "ipo"], "loss_weights": [0.7, 2.0], "use_weighting": True},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    {"loss_type": ["sigmoid"], "use_weighting": True},
    {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"loss_type": ["sigmoid"], "precompute_ref_log_probs": True},
    {"loss_type": ["sigmoid"], "pad_to_multiple_of": 16},
    {"loss_type": ["sigmoid"], "max_length": 32},
    {"loss_type": ["sigmoid"], "shared_prefix": False},
]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"loss_type": [loss], "label_smoothing": SMOOTH.get(loss, 0.0)},
            marks=[] if loss == "sigmoid" else pytest.mark.slow,
        )
        for loss in LOSSES
        if cannot_be_cut([loss]) is None
    ]
    + [pytest.param(options, marks=[] if ORDINARY & options.keys() else pytest.mark.slow) for options in OPTIONS],
    ids=lambda options: " ".join(f"{value}" for value in options.values()),
)
def test_a_cut_step_is_the_whole_step(build: Trainers, options: dict[str, Any]) -> None:
    cut, plain = build(24, budget=150, **options), build(24, **{**options, "shared_prefix": True})
    seen = passes(cut)
    (loss, grads, metrics), (wanted, wanted_grads, wanted_metrics) = step(cut), step(plain)
    assert len(seen) > 8, "cut in several"
    assert loss == pytest.approx(wanted, abs=CLOSE, rel=CLOSE)
    assert difference(grads, wanted_grads) < 2e-5
    assert metrics == pytest.approx(wanted_metrics, rel=2e-6, abs=2e-6)
    assert cut._total_train_tokens == plain._total_train_tokens > 0


def test_every_loss_of_trl_is_known() -> None:
    assert {loss for loss in LOSSES if cannot_be_cut([loss])} == OVER_BATCH
    assert cannot_be_cut(["sigmoid", "ipo"]) is None
    assert cannot_be_cut(["sigmoid", "sft"]) == "the loss sft averages over the tokens of the batch"
    assert "not known" in str(cannot_be_cut(["next_years"]))


@pytest.mark.parametrize(
    "losses",
    [["aot"], ["sigmoid", "sft"], *(pytest.param(one, marks=pytest.mark.slow) for one in (["aot_unpaired"], ["sft"]))],
    ids=str,
)
def test_what_is_said_to_be_over_the_batch_is(
    build: Trainers, losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays whole, to the last bit; and cut all the same, it would be another loss."""
    plain = step(build(24, loss_type=losses))
    trainer = build(24, budget=150, loss_type=losses)
    seen = passes(trainer)
    loss, grads, metrics = step(trainer)
    assert len(seen) == 2
    assert (loss, metrics) == (plain[0], plain[2])
    assert difference(grads, plain[1]) == 0.0
    monkeypatch.setattr(token_budget, "stays_whole", lambda trainer: None)
    loss, grads, _ = step(trainer)
    assert abs(loss - plain[0]) > 100 * CLOSE
    assert difference(grads, plain[1]) > 0.01


def test_a_mixture_of_experts_stays_whole(build: Trainers) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    trainer = build(24, budget=150, base=Qwen3MoeForCausalLM(config))
    assert "mixture of experts" in str(stays_whole(trainer))
    seen = passes(trainer)
    step(trainer)
    assert len(seen) == 2


def test_trainers_whose_steps_would_change_stay_whole(build: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(4, 6, count=60)
    assert stays_whole(trainer) is None
    for optimizer in ("lomo", "galore_adamw_layerwise"):
        trainer.args.optim = optimizer
        assert "within the backward pass" in str(stays_whole(trainer))
    trainer.args.optim, trainer.args.dataloader_drop_last = "adamw_torch", True
    assert "dropped or filled up" in str(stays_whole(trainer))
    trainer.train_dataset = trainer.train_dataset.select(range(48))
    assert stays_whole(trainer) is None
    trainer.is_deepspeed_enabled = True
    assert stays_whole(trainer)
    trainer.is_deepspeed_enabled = trainer.args.dataloader_drop_last = False
    assert stays_whole(trainer) is None
    monkeypatch.setattr(type(trainer.args), "world_size", 2)  # two take 48 pairs a step
    assert stays_whole(trainer) is None
    trainer.train_dataset = trainer.train_dataset.select(range(40))
    assert "dropped or filled up" in str(stays_whole(trainer))


# ----------------------------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize(("shared_prefix", "multiple"), [(True, 1), (False, 1), (False, 16)])
def test_no_pass_takes_more_than_the_budget(build: Trainers, shared_prefix: bool, multiple: int) -> None:
    budget = 170
    trainer = build(24, budget=budget, shared_prefix=shared_prefix, pad_to_multiple_of=multiple)
    inputs = batch_of(trainer)
    seen = passes(trainer)
    step(trainer)
    policy, reference = seen[::2], seen[1::2]
    assert [mask.shape for mask in policy] == [mask.shape for mask in reference]
    assert sum(len(mask) for mask in policy) == 48
    assert len({len(mask) for mask in policy}) > 1, "by tokens, not by count"
    # Shared, a pair is its two rows less their common opening.
    pairs = [trainer.train_dataset[n] for n in range(24)]
    opening = {}
    for one in pairs:
        chosen, rejected = one["prompt_ids"] + one["chosen_ids"], one["prompt_ids"] + one["rejected_ids"]
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        opening[len(chosen), len(rejected)] = [*same, False].index(False)
    assert len(opening) == 24, "each pair is known by the lengths of its rows"
    for mask in policy:
        lengths = mask.sum(1).tolist()
        half = len(lengths) // 2
        both = list(zip(lengths[:half], lengths[half:], strict=True))
        shared = sum(sum(pair) - opening[pair] for pair in both)
        assert half == 1 or (shared if shared_prefix else mask.numel()) <= budget
        assert 0 <= mask.shape[1] - max(lengths) < multiple and mask.shape[1] % multiple == 0, "cut to its longest row"
    total = sum(mask.numel() for mask in policy)
    assert total < inputs["input_ids"].numel()


def test_what_fits_one_pass_goes_the_untouched_way(build: Trainers) -> None:
    plain, roomy = build(24), build(24, budget=10**6)
    handed: list[int] = []
    inputs, compute = batch_of(roomy), roomy._compute_loss

    def look(model: Any, inputs: Any, *rest: Any) -> Any:
        handed.append(id(inputs["input_ids"]))
        return compute(model, inputs, *rest)

    roomy._compute_loss = look
    roomy.training_step(roomy.model, inputs)
    assert handed == [id(inputs["input_ids"])], "the very tensors"
    wanted, grads, metrics = step(plain)
    for budget in (10**6, None):
        roomy.token_budget = budget
        loss, others, logged = step(roomy)
        assert (loss, logged) == (wanted, metrics)
        assert difference(others, grads) == 0.0


def test_a_batch_with_columns_of_another_shape_stays_whole_and_an_error_within_a_pass_leaves_nothing(
    build: Trainers,
) -> None:
    """Such as `token_type_ids`, or the patches of a picture, whose rows are no pairs."""
    import torch

    trainer = build(24, budget=150)
    seen = passes(trainer)
    inputs = batch_of(trainer)
    trainer.training_step(trainer.model, inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]})
    assert len(seen) == 2
    wanted = trainer.compute_loss(trainer.model, inputs).item()
    compute, calls = trainer._compute_loss, []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return compute(*args)

    trainer._compute_loss = fail
    with pytest.raises(torch.OutOfMemoryError):
        trainer.training_step(trainer.model, inputs)
    assert trainer.compute_loss(trainer.model, inputs).item() == wanted


# ------------------------------------------------------------------------------------------------------- the whole run


def run(trainer: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What was logged at each step, and the trained parameters."""
    trainer.train()
    assert all(parameter.grad is None for parameter in trainer.model.parameters()), "no gradient left behind"
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return rows, {name: one.detach().clone() for name, one in trainer.model.named_parameters() if ".default." in name}


@pytest.mark.parametrize("shared_prefix", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_is_trls_own_run(build: Trainers, shared_prefix: bool) -> None:
    """36 pairs in steps of 24 and 12; clipped, and with a learning rate that falls."""
    options: dict[str, Any] = {"count": 36, "max_grad_norm": 0.5}
    cut = build(24, budget=150, shared_prefix=shared_prefix, **options)
    (rows, trained), (at_once, once), (one_by_one, single) = (
        run(cut), run(build(24, **options)), run(build(1, 24, **options))
    )  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0.5 for row in rows), "clipped"
    for row, stock in zip(rows, at_once, strict=True):
        assert row.keys() == stock.keys()
        for name, value in stock.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert row["loss"] == pytest.approx(stock["loss"], abs=CLOSE)
        assert row["learning_rate"] == stock["learning_rate"]
    over_tokens = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}  # TRL's means of means
    for row, stock in zip(rows, one_by_one, strict=True):
        assert row["loss"] == pytest.approx(stock["loss"], abs=CLOSE)
        for name in stock.keys() - over_tokens:
            if name not in ("num_tokens", "epoch"):  # transformers' epoch counts micro-batches, not pairs
                assert row[name] == pytest.approx(stock[name], rel=1e-5, abs=1e-5), name
    for others in (once, single):
        assert max(float((trained[name] - others[name]).abs().max()) for name in trained) < 2e-5
