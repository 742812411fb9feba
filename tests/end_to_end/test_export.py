"""The verification can fail: each way an export goes wrong in practice, made on purpose and caught."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import models, recipe
from dpo_cli import smoke as builtin
from dpo_cli.export import verify

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def failed(checks: list[verify.Check]) -> list[str]:
    return [check["name"] for check in checks if not check["ok"]]


@pytest.fixture
def merged(smoke: Any, tmp_path: Path) -> Path:
    """A copy of the merged model, to be spoilt."""
    return shutil.copytree(smoke.folder / "export" / "merged", tmp_path / "merged")


@pytest.fixture(scope="module")
def base() -> Path:
    return builtin.resolve("builtin:tiny-qwen3")


def test_an_untouched_base_passed_off_as_merged(smoke: Any, base: Path) -> None:
    from dpo_cli.export.export import PROBE_TOKENS, _adapter_on_base, _load, _probes
    from dpo_cli.run import Run

    loaded = recipe.load(SMOKE)
    rows = _probes(loaded, Run(smoke.folder), models.load_tokenizer(loaded))
    model = _adapter_on_base(loaded, smoke.folder / "train" / "adapter")
    tuned = verify.token_logps(model, rows, PROBE_TOKENS)
    with model.disable_adapter():
        plain = verify.token_logps(model, rows, PROBE_TOKENS)
    unmerged = verify.token_logps(_load(base), rows, PROBE_TOKENS)
    assert "merged.effect" in failed(verify.check_parity("merged", unmerged, tuned, plain))
    merged = verify.token_logps(_load(smoke.folder / "export" / "merged"), rows, PROBE_TOKENS)
    assert failed(verify.check_parity("merged", merged, tuned, plain)) == []


def test_a_shard_that_is_missing_and_one_too_many(merged: Path, base: Path) -> None:
    (merged / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert failed(verify.check_structure(merged, base)) == ["merged.shards"]
    (merged / "model-00002-of-00002.safetensors").unlink()
    (merged / "model.safetensors").unlink()
    assert failed(verify.check_structure(merged, base)) == ["merged.shards"]


def test_quantised_or_32_bit_weights_in_a_merged_model(merged: Path, base: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    spoilt = {**config, "quantization_config": {"load_in_4bit": True}, "dtype": "float32", "tie_word_embeddings": False}
    (merged / "config.json").write_text(json.dumps(spoilt))
    assert failed(verify.check_structure(merged, base)) == ["merged.dtype", "merged.tied", "merged.quantised"]


def test_another_chat_template(merged: Path) -> None:
    from transformers import AutoTokenizer

    trained = models.load_tokenizer(recipe.load(SMOKE))
    template = (merged / "chat_template.jinja").read_text(encoding="utf-8")
    (merged / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")
    checks = verify.check_template("merged", AutoTokenizer.from_pretrained(merged), trained)
    assert failed(checks) == ["merged.template", "merged.template_tokens_differ"]


def test_a_base_with_another_tokenizer_fails_the_export_with_exit_code_3(
    smoke: Any, base: Path, tmp_path: Path, command: Any
) -> None:
    """The files stay for a look and verify.json says what is wrong, but the stage does not count as done."""
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["user"], vocabulary["a"] = vocabulary.get("user", vocabulary["u"]), vocabulary["e"]
    vocabulary["e"] = next(number for number in range(len(vocabulary) + 9) if number not in vocabulary.values())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copytree(smoke.folder, tmp_path / "runs" / "smoke")
    arguments = [SMOKE, "--runs-dir", tmp_path / "runs", "--set", f"model.merge_base={other}"]
    done = command("export", *arguments, ok=False)
    assert done.returncode == 3, done.stderr
    assert "merged.template_tokens_differ" in done.stderr and "verify.json" in done.stderr
    checks = json.loads((tmp_path / "runs" / "smoke" / "export" / "verify.json").read_text())
    assert "merged.template_tokens_differ" in failed(checks)
    stages = json.loads((tmp_path / "runs" / "smoke" / "manifest.json").read_text())["stages"]
    assert stages["export"]["status"] == "unverified"
    assert command("export", *arguments, ok=False).returncode == 3, "it is not skipped as done"
