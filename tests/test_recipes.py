"""Every recipe that ships loads, and the real one says what its comments promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpo_cli.recipe import load

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_the_promised_recipes_are_there() -> None:
    assert {"smoke.yaml", "ultrafeedback_zh_en.yaml", "ultrafeedback_zh_en_40k.yaml"} <= {p.name for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_loads_from_any_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load(path)
    monkeypatch.chdir(tmp_path)
    assert load(path).model_dump() == here.model_dump()
    assert here.name == path.stem


def test_smoke_stands_alone_and_sets_no_loss() -> None:
    recipe = load(FOLDER / "smoke.yaml")
    assert "extends:" not in (FOLDER / "smoke.yaml").read_text(encoding="utf-8")
    assert "loss_type" not in recipe.train.model_fields_set
    assert recipe.train.per_device_train_batch_size >= 2
    assert recipe.model.id.startswith("builtin:")
    assert all(source.id.startswith("builtin:") for source in recipe.data.sources)


def test_the_40k_recipe_changes_the_size_only() -> None:
    small, large = (load(FOLDER / f"ultrafeedback_zh_en{suffix}.yaml") for suffix in ("", "_40k"))
    assert (small.data.total, large.data.total) == (7500, 40_000)
    one, other = small.model_dump(), large.model_dump()
    for values in (one, other):
        del values["name"], values["data"]["total"]
    assert one == other
