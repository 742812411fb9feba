"""Real preference data (LLaMA-Factory's demo sets), which lives outside the repository; skipped where it is absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.prepare import kit

FOLDER = Path(os.environ.get("DPO_CLI_REAL_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.fixture
def real() -> Path:
    if not (FOLDER / "dpo_zh_demo_a.json").is_file():
        pytest.skip(f"no real data in {FOLDER}; point DPO_CLI_REAL_DATA at them")
    return FOLDER


@pytest.mark.parametrize(("name", "language"), [("dpo_en_demo_a", "en"), ("dpo_zh_demo_a", "zh")])
def test_real_pairs_come_through_untouched(real: Path, tmp_path: Path, name: str, language: str) -> None:
    """Recognised, told by language, most kept, and every text of every kept row stands in the source, byte for byte."""
    made = kit.run(kit.recipe([{"id": str(real / f"{name}.json")}]), tmp_path / "out")
    assert made.report["provenance"]["sources"][name]["layout"] == "sharegpt"
    assert made.funnel_holds() and made.source(name)["in"] == 150
    assert made.source(name)["kept"] > 100
    assert sum(row["language"] == language for row in made.rows) >= 0.95 * len(made.rows)
    source = json.loads((real / f"{name}.json").read_text(encoding="utf-8"))
    said = {row[side]["value"] for row in source for side in ("chosen", "rejected")}
    edits = sum(made.source(name)["edits"].values())
    changed = [row[side][0]["content"] for row in made.rows for side in ("chosen", "rejected")]
    assert sum(text not in said for text in changed) <= edits
    asked = {row["conversations"][-1]["value"] for row in source}
    assert all(row["prompt"][-1]["content"] in asked for row in made.rows)
