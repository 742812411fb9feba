"""What makes the built-in models: a few steps lower the loss, write whole models, and are the same each time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tests.tools import make_style_reward, make_tiny_qwen3
from tests.tools.make_tiny_qwen3 import all_questions, held_out_prompts, training_questions


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow  # tests/smoke has the sums of what was made
def test_a_few_steps_teach_it_something(tmp_path: Path) -> None:
    losses = list(make_tiny_qwen3.make(tmp_path / "one", steps=10))
    assert len(losses) == 30 and sum(losses[-3:]) < 0.97 * sum(losses[:3])

    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]


@pytest.mark.slow
def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    one, two = (list(make_tiny_qwen3.make(tmp_path / name, steps=10)) for name in ("one", "two"))
    assert one == two
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.mark.slow
def test_a_few_steps_teach_the_reward_model_something(tmp_path: Path) -> None:
    losses = list(make_style_reward.make(tmp_path, steps=60))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])

    from transformers import AutoModelForSequenceClassification

    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]


@pytest.fixture(scope="module")
def held_out() -> set[str]:
    return held_out_prompts()


def test_no_held_out_prompt_is_trained_on(held_out: set[str]) -> None:
    questions, texts = all_questions(), {turn["content"] for one in training_questions() for turn in one.prompt}
    assert len(held_out) > 100 and not held_out & texts
    # A near-duplicate of a held-out prompt is its question too.
    assert not {prompt.removesuffix(" Thank you!").removesuffix("谢谢！")[:-1] for prompt in held_out} & {
        text[:-1] for text in texts
    }
    assert 0.7 * len(questions) < len(training_questions()) < 0.85 * len(questions)
