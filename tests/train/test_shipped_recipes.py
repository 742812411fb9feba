"""Every recipe that names a card fits it, by the plan, with pairs that fill `max_length` and a desktop on the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cli.recipe import load
from dpo_cli.train.memory import GIB
from dpo_cli.train.methods import METHODS, cannot_be_cut
from dpo_cli.train.plan import plan

RECIPES = Path(__file__).parents[2] / "recipes"
# layers, hidden, intermediate, heads, and whether the head is the embedding: Qwen3's published widths.
WIDTHS = {
    "0.6B": (28, 1024, 3072, 16, True), "1.7B": (28, 2048, 6144, 16, True), "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
}  # fmt: skip
CARDS = {
    "qwen3_0.6b": ("0.6B", 8), "colab_t4": ("0.6B", 16), "ultrafeedback_zh_en": ("1.7B", 16), "qwen3_4b": ("4B", 16),
    "qwen3_8b_24gb": ("8B", 24), "dpo_ultrafeedback": ("1.7B", 16), "simpo_ultrafeedback": ("1.7B", 16),
    "safety": ("1.7B", 16),
}  # fmt: skip


def config(size: str) -> Any:
    from transformers import Qwen3Config

    layers, hidden, intermediate, heads, tied = WIDTHS[size]
    return Qwen3Config(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.mark.parametrize("unsloth", [False, True])
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_the_card_that_it_names(name: str, unsloth: bool) -> None:
    size, card = CARDS[name]
    recipe = load(RECIPES / f"{name}.yaml")
    assert f"-{size}-" in recipe.model.id
    engine = METHODS[recipe.train.method].engine
    longest = [(recipe.model.max_length // 2, *[recipe.model.max_length // 2] * 2)] * 24
    made = plan(
        recipe, longest, config(size), int((0.97 * card - 1) * GIB), unsloth=unsloth,
        shared="shared_prefix" in engine,
        budgeted="token_budget" in engine and cannot_be_cut(recipe.train.losses) is None,
    )  # fmt: skip
    assert made.fits, made.verdict


@pytest.mark.parametrize("name", CARDS)
def test_every_key_of_a_recipe_has_a_comment_near_it(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert sum("#" in line for line in lines) >= sum(":" in line and "#" not in line for line in lines) / 3


def test_the_real_recipe_warms_up_over_a_tenth_of_its_steps() -> None:
    train = load(RECIPES / "ultrafeedback_zh_en.yaml").train
    assert (train.warmup_steps, train.lr_scheduler_type) == (0.1, "linear")
