"""Eval, its reward model, export and doctor on a pretended card: devices never mix, and the figures are the CPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import smoke
from dpo_cli.export import outputs
from dpo_cli.imports import torch_facts
from tests.pretend_cuda.card_runs import OUT_OF_MEMORY, Runs, small_card
from tests.pretend_cuda.pretended import Card
from tests.pretend_cuda.pretended_torch import pretending
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

QUICK = ("train.max_steps=1", "eval.prompts=1", "eval.max_new_tokens=2")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random reward model, as a setting of the recipe."""
    source, folder = smoke.resolve("builtin:tiny-qwen3"), tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return f"eval.judge={{kind: reward_model, id: {folder}, max_length: 512}}"


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval" / name).read_text(encoding="utf-8").splitlines()]


def numbers(row: Any) -> list[float]:
    """All numbers of a row, in order."""
    if isinstance(row, dict):
        return [number for value in row.values() for number in numbers(value)]
    if isinstance(row, list):
        return [number for value in row for number in numbers(value)]
    return [row] if isinstance(row, (int, float)) else []


@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["card", "small card"])
def test_eval_on_a_card_gives_the_figures_of_the_cpu(
    trained: Runs, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Log-probabilities, sampled answers, their KL and their scores; the small card holds one row at a time.

    Their scores are in bfloat16 there.
    """
    on_card, on_cpu = (trained.copy(tmp_path / name) for name in ("card", "cpu"))
    card, large = Card(), Card()
    on_cpu.go("eval", judge)
    if small:
        trained.copy(tmp_path / "other").go("eval", judge, card=large)
        small_card(monkeypatch, OUT_OF_MEMORY[1], lambda ids: len(ids) > 1)
    on_card.go("eval", judge, card=card)
    assert (
        not small or card.emptied >= large.emptied + 6
    )  # halved to one row while scoring (twice), answering and judging
    for name, apart in (("pairs.jsonl", 1e-4), ("samples.jsonl", 1e-4), ("judgments.jsonl", 1e-2)):
        found, wanted = (sorted(rows(one.run, name), key=json.dumps) for one in (on_card, on_cpu))
        assert len(found) == len(wanted) > 0
        for one, other in zip(found, wanted, strict=True):
            assert numbers(one) == pytest.approx(numbers(other), rel=1e-3, abs=apart), name


def test_export_on_a_card_is_verified(trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MAX_NEW_TOKENS", 12)
    runs = trained.copy(tmp_path / "runs")
    said = runs.go("export", "export.formats=[adapter, merged, gguf]", card=Card())
    assert "float32 on cuda" in said
    checks = runs.read("export/verify.json")
    assert len(checks) > 30 and all(check["ok"] for check in checks)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float16"), pytest.param((8, 9), "bfloat16", marks=pytest.mark.slow)],
    ids=["T4", "RTX 4080"],
)
def test_every_stage_takes_the_dtype_that_the_card_computes_in(
    capability: tuple[int, int], dtype: str, runs: Runs, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[Any] = set()
    forward = Qwen3Model.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(self.embed_tokens.weight.dtype)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", watched)
    for command in ("train", "eval"):  # and eval's reward model
        runs.go(command, "model.dtype=auto", *QUICK, judge, card=Card(capability))
        assert seen == {getattr(torch, dtype)}
    with pretending(Card(capability)):
        assert torch_facts()["card"]["bf16"] is (dtype == "bfloat16")  # what doctor prints
