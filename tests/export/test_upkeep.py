"""A finished export is changed so that a kill at any moment leaves one that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.disk import write_json
from dpo_cli.export import upkeep
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
CHECKS = [{"name": f"{kind}.mean_kl", "value": 0, "limit": 1, "ok": True} for kind in ("adapter", "merged")]


@pytest.fixture
def loaded() -> Recipe:
    return recipe.load(SMOKE, ["export.formats=[adapter]"])


@pytest.fixture
def run(tmp_path: Path, loaded: Recipe) -> Run:
    """A run with all stages complete, and a format in its export that the recipe does not name."""
    made = Run(tmp_path / "run")
    for stage, names in {"prepare": ["train.jsonl"], "train": ["adapter/x"], "eval": ["metrics.json"]}.items():
        with made.stage(stage, loaded) as draft:
            for name in names:
                (draft.folder / name).parent.mkdir(exist_ok=True)
                (draft.folder / name).write_text(name)
    with made.stage("export", loaded) as draft:
        for kind in ("adapter", "merged"):
            (draft.folder / kind).mkdir()
            (draft.folder / kind / "README.md").write_text(kind)
        write_json(draft.folder / "verify.json", CHECKS)
        draft.record["evaluated"] = "before"
    return made


class Killed(BaseException):
    pass


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Kill at a moment: when the manifest is written for the nth time, or when a function is called."""
    if not moment.isdigit():
        monkeypatch.setattr("shutil.rmtree" if moment == "rmtree" else f"dpo_cli.export.upkeep.{moment}", killed)
        return
    write, left = Run.write_record, [int(moment)]

    def count(self: Run, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(self, *arguments)

    monkeypatch.setattr(Run, "write_record", count)


@pytest.mark.parametrize("moment", ["0", "rmtree", "write_json", "1"])
def test_a_prune_that_is_killed_leaves_a_whole_export_and_goes_on(
    run: Run, loaded: Recipe, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with monkeypatch.context() as patch:
        at(patch, moment)
        with pytest.raises(Killed):
            upkeep.prune(loaded, run)
    assert run.fresh("export", loaded)
    upkeep.prune(loaded, run)
    assert run.fresh("export", loaded) and "export/verify.json" in run.record("export")["outputs"]
    assert sorted(path.name for path in run["export"].iterdir()) == ["adapter", "verify.json"]
    assert json.loads((run["export"] / "verify.json").read_text()) == CHECKS[:1]
    assert upkeep.prune(loaded, run) == []


@pytest.mark.parametrize("moment", ["0", "write_card", "1"])
def test_cards_that_were_being_renewed_are_renewed_again(
    run: Run, loaded: Recipe, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from dpo_cli.export import card

    def write_card(recipe: Recipe, run: Run, folder: Path, kind: str, checks: Any) -> None:
        (folder / "README.md").write_text("renewed")
        if moment == "write_card" and kind == "merged" and not done:
            raise Killed

    done: list[int] = []
    monkeypatch.setattr(card, "write_card", write_card)
    with monkeypatch.context() as patch:
        if moment.isdigit():
            at(patch, moment)
        with pytest.raises(Killed):
            upkeep.renew_cards(loaded, run)
    assert run.fresh("export", loaded)
    done.append(1)
    assert upkeep.renew_cards(loaded, run) and not upkeep.renew_cards(loaded, run)
    assert run.fresh("export", loaded)
    assert {f"export/{kind}/README.md" for kind in ("adapter", "merged")} <= run.record("export")["outputs"].keys()
