"""What can be wrong before the first step: each is one block that names the place and the mend, with its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke
from dpo_cli.cli import app
from typer.testing import CliRunner, Result

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Run `dpo-cli train` on the smoke recipe with some settings, in one folder of runs."""
    runs = tmp_path_factory.mktemp("runs")

    def go(*settings: str) -> Result:
        options = [part for setting in ("train.max_steps=1", *settings) for part in ("--set", setting)]
        return CliRunner().invoke(app, ["train", str(SMOKE), "--runs-dir", str(runs), "--quiet", *options])

    return go


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return shutil.copytree(smoke.resolve("builtin:tiny-qwen3"), tmp_path / "model")


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content), encoding="utf-8")


def said(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    assert "where:" in result.stderr and "fix:" in result.stderr
    return result.stderr


def test_a_tokenizer_without_a_chat_template(train: Callable[..., Result], model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    message = said(train(f"model.id={model}"))
    assert "no chat template" in message and "model.id" in message


def test_a_base_that_is_no_causal_language_model(train: Callable[..., Result], model: Path) -> None:
    edit(model / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    message = said(train(f"model.id={model}"))
    assert "can't load the model" in message and "AutoModelForCausalLM" in message


def test_a_folder_without_weights(train: Callable[..., Result], model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in said(train(f"model.id={model}"))


def test_max_length_beyond_the_models_positions(train: Callable[..., Result]) -> None:
    message = said(train("model.max_length=9000"))
    assert "more than the model's 8192" in message and "model.max_length: 8192" in message


@pytest.mark.parametrize("setting", ["train.fp16=true", "model.dtype=float16"])
def test_float16_on_a_cpu(train: Callable[..., Result], setting: str) -> None:
    message = said(train(setting))
    assert "needs a GPU" in message and setting.split("=")[0] in message


def test_every_prompt_too_long(train: Callable[..., Result]) -> None:
    message = said(train("model.max_length=16"))
    assert "too_long" in message and "max_length" in message


def test_lora_on_layers_that_are_not_there(train: Callable[..., Result]) -> None:
    message = said(train("lora.target_modules=[w_proj]"))
    assert "w_proj" in message and "lora.target_modules" in message


def test_quantised_weights_against_the_recipe(train: Callable[..., Result], model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    message = said(train(f"model.id={model}"))
    assert "quantised" in message and "model.load_in_4bit: true" in message


def test_pairs_are_needed(train: Callable[..., Result]) -> None:
    message = said(train("data.format=ranked"))
    assert "needs pairs" in message and "data.format: pairs" in message


def test_a_memory_limit_that_is_no_size(train: Callable[..., Result]) -> None:
    assert "engine.memory_limit" in said(train("engine.memory_limit=lots"), code=2)
