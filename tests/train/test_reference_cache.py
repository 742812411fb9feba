"""The reference cache against TRL without it: same losses, metrics and evaluation."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import backends, models, smoke
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.train.engine import cache_reference
from dpo_cli.train.reference_cache import ReferenceCache, facts, row_key, unsupported, use
from tests.train.runs import trl_trainer, untimed

EXACT = 1  # batch_tokens: every row alone, so that nothing is padded
WORDS = "amber basket candle dragon engine falcon garden harbour island jungle kettle ladder marble".split()  # noqa: SIM905


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged conversational pairs with ids, no two alike."""
    rng = random.Random(seed)

    def turn(role: str, least: int, most: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(least, most)))}]

    return [
        {
            "id": f"pair-{seed}-{number}",
            "prompt": turn("user", 4, 12),
            "chosen": turn("assistant", 3, 20),
            "rejected": turn("assistant", 3, 20),
        }
        for number in range(count)
    ]


@dataclass
class Made:
    """A trainer of TRL's as `dpo-cli train` builds it, and what decides its reference."""

    recipe: Recipe
    trainer: Any
    facts: dict[str, Any]

    def losses(self) -> list[dict[str, float]]:
        """Train; every figure that TRL logs, without the times."""
        self.trainer.train()
        return untimed(self.trainer.state.log_history)


def build(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Made:
    """Options: `model` and `lora` update the recipe's sections, `evaluation` is data, the rest TRL's arguments."""
    model = {"id": "builtin:tiny-qwen3", "load_in_4bit": False, "dtype": "float32", "max_length": 256}
    values = {
        "name": "x",
        "seed": options.pop("seed", 1),
        "model": model | options.pop("model", {}),
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0} | options.pop("lora", {}),
        "data": {"sources": [{"id": "x"}]},
    }
    recipe = Recipe.model_validate(values)
    lora, tokenizer = models.load_for_training(recipe, backends.Backend("hf", "a test"))
    arguments: dict[str, Any] = {
        "seed": recipe.seed, "max_length": recipe.model.max_length, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 1e-3,
        "gradient_checkpointing": False, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    trainer = trl_trainer(folder / "trl", lora, tokenizer, rows, **arguments | options)
    if recipe.model.adapter is None:
        trainer.model.delete_adapter("ref")
    return Made(recipe, trainer, facts(recipe, trainer))


Build = Callable[..., Made]


@pytest.fixture
def made(tmp_path: Path) -> Build:
    return lambda rows, **options: build(tmp_path, rows, **options)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs" / ".reference_cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(smoke.resolve("builtin:tiny-qwen3"), tmp_path / "model")


def filled(one: Made, store: Path, batch_tokens: int = 4096) -> ReferenceCache:
    cache = ReferenceCache(store, one.facts)
    use(one.trainer, cache, batch_tokens=batch_tokens)
    return cache


# ------------------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"ld_alpha": 0.5}, {"loss_type": ["ipo"]})),
     pytest.param({"max_length": 60}, marks=pytest.mark.slow)],
    ids=str,
)  # fmt: skip
def test_every_logged_figure_is_the_one_without_the_cache(made: Build, store: Path, options: dict[str, Any]) -> None:
    """Rows alone in their batches, in training and in the cache: to the last bit, truncated rows as well."""
    rows = pairs(6)
    plain = made(rows, **options).losses()
    first, again = made(rows, **options), made(rows, **options)
    assert filled(first, store, EXACT).computed == 6
    assert filled(again, store, EXACT).computed == 0
    assert first.losses() == plain
    assert again.losses() == plain
    assert len(plain) == 7 and "rewards/margins" in plain[0]


def test_other_batches_change_no_more_than_rounding(made: Build, store: Path) -> None:
    rows = pairs(8)
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-4}
    plain, cached = made(rows, **options), made(rows, **options)
    filled(cached, store, 700)
    figures = cached.losses(), plain.losses()
    for rows_logged in figures:
        del rows_logged[0]["rewards/accuracies"]  # at the first step all rewards are 0 but for rounding
    for with_cache, without in zip(*figures, strict=True):
        assert with_cache == pytest.approx(without, rel=1e-6, abs=1e-5)
        assert with_cache.get("loss", 0) == pytest.approx(without.get("loss", 0), abs=1e-6)


def test_no_reference_pass_is_left(made: Build, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a training step and not in an evaluation: the model runs once per micro-batch."""
    one = made(pairs(4), evaluation={"en": pairs(2, 1)}, num_train_epochs=1)
    filled(one, store)
    runs = []
    one.trainer.model.register_forward_hook(lambda *_: runs.append(1))
    one.trainer.train()
    assert len(runs) == 4
    one.trainer.evaluate()
    assert len(runs) == 6


def test_evaluation_gives_the_same_numbers(made: Build, store: Path) -> None:
    options = {"evaluation": {"en": pairs(3, 1), "zh": pairs(2, 2)}, "eval_strategy": "steps", "eval_steps": 2}
    plain, cached = made(pairs(4), **options), made(pairs(4), **options)
    assert filled(cached, store, EXACT).computed == 9
    rows = cached.losses()
    assert rows == plain.losses()
    assert any("eval_zh_loss" in row for row in rows)
    assert untimed([cached.trainer.evaluate()]) == untimed([plain.trainer.evaluate()])


# ------------------------------------------------------------------------------------------------------ what is shared


def test_a_sweep_computes_each_row_once(made: Build, store: Path) -> None:
    """Learning rate, seed, rank, beta and loss, order, a subset, new rows and doubled ones."""
    rows = pairs(6)
    runs: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (rows, {}),
        (rows[::-1], {"learning_rate": 1e-4, "beta": 0.3}),
        (rows[2:5], {"seed": 9, "lora": {"r": 8, "alpha": 4, "target_modules": ["q_proj"]}}),
        (rows + rows[:2], {"loss_type": ["hinge"], "num_train_epochs": 1, "lora": {"dropout": 0.3}}),
        ([*rows[1:], *pairs(1, 5)], {"per_device_train_batch_size": 2, "evaluation": {"en": rows[:2]}}),
    ]
    assert [filled(made(data, **options), store).computed for data, options in runs] == [6, 0, 0, 0, 1]
    assert len(list(store.iterdir())) == 1


def test_what_changes_the_numbers_has_rows_of_its_own(made: Build, store: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    rows = pairs(2)
    local: dict[str, Any] = {"model": {"id": str(folder)}}
    base = made(rows, **local)
    assert {"device": "cpu", "attention": "sdpa", "unsloth": False}.items() <= base.facts.items()
    assert base.facts["versions"]["torch"] == torch.__version__ and "trl" in base.facts["versions"]
    filled(base, store)
    keys = {ReferenceCache(store, base.facts).key: "base"}

    def new(name: str, one: Made) -> None:
        cache = ReferenceCache(store, facts(one.recipe, one.trainer))
        assert cache.key not in keys, f"{name} is taken for {keys[cache.key]}"
        assert cache.missing(one.trainer.train_dataset) == 2
        keys[cache.key] = name

    for name, value in {"max_length": 128, "truncation_mode": "keep_end", "ld_alpha": 0.5}.items():
        before = getattr(base.trainer.args, name)
        setattr(base.trainer.args, name, value)
        new(name, base)
        setattr(base.trainer.args, name, before)
    new("dtype", made(rows, model=local["model"] | {"dtype": "bfloat16"}))
    new("mixed precision", made(rows, **local, bf16=True))
    new("4-bit", made(rows, model=local["model"] | {"load_in_4bit": True}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    new("an edited config", base)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 2**-20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    new("one edited weight", base)


def test_the_same_weights_elsewhere_are_the_same_base(made: Build, store: Path, folder: Path, tmp_path: Path) -> None:
    here = made(pairs(2), model={"id": str(folder)})
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    moved = made(pairs(2), model={"id": str(folder.rename(tmp_path / "moved"))})
    assert here.facts == moved.facts


def test_an_adapter_to_start_from_is_part_of_the_reference(made: Build, store: Path, tmp_path: Path) -> None:
    rows = pairs(4)
    start = made(rows, learning_rate=1e-2)
    start.trainer.train()
    start.trainer.model.save_pretrained(str(tmp_path / "sft"))
    options = {"model": {"adapter": str(tmp_path / "sft")}}
    plain, cached = made(rows, **options), made(rows, **options)
    base = filled(made(rows), store, EXACT)
    cache = filled(cached, store, EXACT)
    assert cache.key != base.key and cache.computed == 4
    assert all(abs(cache.rows[key][0] - base.rows[key][0]) > 1e-3 for key in base.rows)
    figures = plain.losses()
    assert cached.losses() == figures
    assert figures[0]["rewards/margins"] == 0.0  # policy and reference start equal
    again = made(rows, **options, lora={"r": 8})  # the rank is the adapter's own
    assert filled(again, store).computed == 0
    start.trainer.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] += 1e-3
    start.trainer.model.save_pretrained(str(tmp_path / "sft"))
    assert filled(made(rows, **options), store).computed == 4
    settings = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 16}))
    assert filled(made(rows, **options), store).computed == 4, "the same weights, twice as strong"


def test_the_borders_between_the_parts_of_a_row_count() -> None:
    def key(*parts: list[int]) -> str:
        return row_key(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts, strict=True)))

    rows = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3]), ([1, 2, 3], [], [4]), ([2, 1], [3], [4])]
    assert len({key(*row) for row in rows}) == len(rows)
    assert key([1, 2], [3], [4]) == key([1, 2], [3], [4])


def test_batches_hold_at_most_their_tokens_longest_first(made: Build, store: Path) -> None:
    one = made(pairs(12), max_length=90)
    shapes = []
    compute = one.trainer.compute_ref_log_probs
    one.trainer.compute_ref_log_probs = lambda model, batch: (
        shapes.append(tuple(batch["input_ids"].shape)) or compute(model, batch)  # type: ignore[func-returns-value]
    )
    done: list[int] = []
    cache = ReferenceCache(store, one.facts)
    use(one.trainer, cache, 400, done.append)
    assert sum(rows for rows, _ in shapes) == 24
    assert all(rows * length <= 400 for rows, length in shapes)
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert shapes[0] == (4, 90)  # cut as the collator cuts it
    assert sum(done) == 12 and len(done) == len(shapes) < 8
    assert filled(made(pairs(12)[::-1], max_length=90), store.with_name("again"), 400).rows == cache.rows


# ----------------------------------------------------------------------------------------------------- kills and damage


def test_what_was_computed_before_a_kill_is_kept(made: Build, store: Path) -> None:
    one, done = made(pairs(9)), list[int]()

    def killed(rows: int) -> None:
        done.append(rows)
        if len(done) == 4:
            raise KeyboardInterrupt

    cache = ReferenceCache(store, one.facts)
    with pytest.raises(KeyboardInterrupt):
        use(one.trainer, cache, EXACT, killed)
    cache = ReferenceCache(store, one.facts)
    assert cache.missing(one.trainer.train_dataset) == 5
    use(one.trainer, cache, batch_tokens=EXACT)
    assert cache.computed == 5
    assert cache.rows == filled(made(pairs(9)), store.with_name("fresh"), EXACT).rows


def test_two_trainings_fill_one_cache_at_once(made: Build, store: Path) -> None:
    """One begins and ends while the other is between two batches; a third has looked before and fills after both."""
    rows = pairs(4)
    one, other, late = made(rows), made(rows), made(rows)
    cache, third = ReferenceCache(store, one.facts), ReferenceCache(store, late.facts)
    meanwhile: list[ReferenceCache] = []
    use(one.trainer, cache, EXACT, lambda _: None if meanwhile else meanwhile.append(filled(other, store, EXACT)))
    assert (cache.computed, meanwhile[0].computed) == (4, 3), "what the first had put by then was read"
    use(late.trainer, third, EXACT)
    assert third.computed == 0
    assert cache.rows == meanwhile[0].rows == third.rows == ReferenceCache(store, one.facts).rows
    assert json.loads((cache.folder / "facts.json").read_text(encoding="utf-8")) == one.facts


def test_a_reference_that_is_no_number_is_refused_and_not_kept(made: Build, store: Path) -> None:
    one = made(pairs(5))
    compute, calls = one.trainer.compute_ref_log_probs, []

    def broken(model: Any, batch: Any) -> Any:
        calls.append(batch)
        chosen, rejected = compute(model, batch)
        return chosen, rejected if len(calls) < 3 else rejected * math.inf

    one.trainer.compute_ref_log_probs = broken
    longest = sorted(one.trainer.train_dataset, key=lambda row: -len(row["prompt_ids"]) - max(
        len(row["chosen_ids"]), len(row["rejected_ids"])
    ))  # fmt: skip
    cache = ReferenceCache(store, one.facts)
    with pytest.raises(DpoError, match="inf") as caught:
        use(one.trainer, cache, batch_tokens=EXACT)
    assert longest[2]["id"] in str(caught.value.where)
    assert caught.value.hint
    assert len(ReferenceCache(store, one.facts).rows) == 2
    assert not one.trainer.precompute_ref_logps


# -------------------------------------------------------------------------------------------------- where it can't be


def test_what_moves_the_reference_is_not_supported(
    made: Build, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(one: Made) -> str:
        return unsupported(one.recipe, one.trainer) or ""

    assert why(made(pairs(2), disable_dropout=False, lora={"dropout": 0.3})) == ""

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    assert "dropout" in why(made(pairs(2), model={"id": str(folder)}))
    start = made(pairs(2))
    start.trainer.model.save_pretrained(str(tmp_path / "sft"))
    settings = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.2}))
    adapter = {"adapter": str(tmp_path / "sft")}
    assert "lora_dropout" in why(made(pairs(2), model=adapter, disable_dropout=False))
    assert why(made(pairs(2), model=adapter)) == ""

    one = made(pairs(2))
    one.trainer.args.sync_ref_model = True
    assert "sync_ref_model" in why(one)
    engine = one.recipe.engine.model_copy(update={"reference_cache": "on"})
    with pytest.raises(DpoError, match=r"the reference can't be cached: train\.sync_ref_model moves"):
        cache_reference(one.recipe.model_copy(update={"engine": engine}), one.trainer, tmp_path, None, print)
    assert not cache_reference(one.recipe, one.trainer, tmp_path, None, print)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "here are several" in why(one)
    one = made(pairs(2))
    one.trainer.model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)
    assert "model.norm.weight" in why(one)
    of_the_hub = one.recipe.model.model_copy(update={"id": "somebody/some-model"})
    one = Made(one.recipe.model_copy(update={"model": of_the_hub}), made(pairs(2)).trainer, {})
    assert "which commit of somebody/some-model was loaded" in why(one)
