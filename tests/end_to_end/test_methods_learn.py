"""Each method learns the smoke data's rule, from the recipes that compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.cli import app
from dpo_cli.recipe import load
from typer.testing import CliRunner

RECIPES = Path(__file__).parents[2] / "recipes"
COMPARED = sorted((RECIPES / "compare").glob("*.yaml"))
OFTEN = ("kto", "lipo")  # rows and lists; the others take the same code as DPO, with another loss
LEARNERS = [
    *(
        pytest.param(path, (), marks=[] if path.stem in OFTEN else pytest.mark.slow)
        for path in COMPARED
        if path.stem != "dpo"
    ),
    pytest.param(RECIPES / "smoke.yaml", ("train.method=cpo",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "settings"), LEARNERS, ids=lambda value: getattr(value, "stem", None))
def test_a_method_learns(recipe: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    few = ("train.max_steps=16", "data.eval_size=60", "eval.prompts=0", "eval.judge=null")  # a third of an epoch
    settings = (*settings, *few, "name=run")
    options = [part for setting in settings for part in ("--set", setting)]
    for command in ("train", "eval"):  # an adapter is exported alike, whatever trained it
        done = CliRunner().invoke(app, [command, str(recipe), "--runs-dir", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text(encoding="utf-8"))
    accuracy = metrics["pairs"]["reward_accuracy"]
    assert accuracy["value"] >= 0.85 and accuracy["low"] > metrics["pairs"]["longer_wins"]["value"]


def test_they_differ_in_nothing_but_the_method() -> None:
    recipes = {path.stem: load(path) for path in COMPARED}
    assert {"dpo", "dpo_norm", "ipo", "simpo", "orpo", "kto", "lipo"} <= recipes.keys()

    def rest(name: str) -> dict[str, Any]:
        values = recipes[name].model_dump(exclude={"name", "extends", "train"})
        values["data"].pop("format")
        return values

    for name, recipe in recipes.items():
        assert rest(name) == rest("dpo"), name
        assert recipe.data.format == ("ranked" if name == "lipo" else "pairs")
        train = recipe.train
        pairs = train.per_device_train_batch_size * train.gradient_accumulation_steps / (2 if name == "kto" else 1)
        assert (pairs, train.learning_rate, train.num_train_epochs) == (8, 8.5e-4, 2.0), name
