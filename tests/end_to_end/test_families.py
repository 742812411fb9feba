"""All four commands on a tiny random model of each family: the real architecture, the real chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from dpo_cli import adapters, recipe
from dpo_cli.families import family_of
from tests import families
from tests.conftest import DpoCli, Project

RECIPE = """\
model: {id: ./model, load_in_4bit: false, max_length: 512}
lora: {r: 4, alpha: 8, rslora: true}
data:
  sources: [{id: ./rows, layout: pairs, language: en}]
  total: null
  languages: null
  eval_fraction: 0.25
train: {max_steps: 2, gradient_accumulation_steps: 2, learning_rate: 1.0e-2}
eval: {prompts: 2, max_new_tokens: 8}
"""
ORDINARY = ("llama",)  # qwen3 is the smoke run's


@pytest.mark.parametrize(
    "kind", [kind if kind in ORDINARY else pytest.param(kind, marks=pytest.mark.slow) for kind in families.CONFIGS]
)
def test_prepare_train_eval_export(project: Project, dpo_cli: DpoCli, kind: str) -> None:
    project.recipe.write_text(RECIPE, encoding="utf-8")
    project.write_rows(12)
    families.build(kind, project.folder / "model")
    for stage in ("train", "eval", "export"):
        done = dpo_cli(stage, project.recipe, timeout=300)
        assert done.returncode == 0, done.stderr

    def read(name: str) -> Any:
        return json.loads((project.run / name).read_text(encoding="utf-8"))

    family = family_of({"model_type": kind})
    assert family and sorted(read("train/adapter/adapter_config.json")["target_modules"]) == sorted(family.linear)
    resolved = yaml.safe_load((project.run / "recipe.yaml").read_text(encoding="utf-8"))
    assert resolved["lora"]["target_modules"] == list(family.linear)
    checks = {check["name"]: check for check in read("export/verify.json")}
    assert {"merged.effect", "merged.carried", "adapter.mean_kl"} <= checks.keys()
    assert checks["merged.effect"]["value"] > 1e-4, "an adapter that changes nothing proves nothing"
    going_on = recipe.load(project.recipe, ["model.adapter=runs/demo/train/adapter", "lora={}"])
    assert adapters.lora_of(going_on, Path(str(going_on.model.adapter))).rslora
