"""A source whose prompts the model answers itself: what is read of it, sampled, rated, and made into pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.prepare.detect import candidate_sets
from dpo_cli.prepare.layouts import LAYOUTS
from dpo_cli.prepare.survey import look

RATER = {"kind": "reward_model", "id": "nobody/none"}
ASKED = "把开水倒进杯子里要注意什么？"
TURN = {"role": "user", "content": ASKED}
ANSWER = {"role": "assistant", "content": "Slowly."}


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": ASKED}, "prompts"),
        ({"prompt": [TURN], "topic": "kitchen"}, "prompts"),
        ({"messages": [TURN]}, "prompts"),
        ({"messages": [TURN, ANSWER]}, "prompts"),
        ({"conversations": [{"from": "human", "value": ASKED}]}, "prompts"),
        ({"instruction": ASKED, "input": ""}, "prompts"),
        ({"question": ASKED}, "prompts"),
        ({"prompt": f"\n\nHuman: {ASKED}\n\nAssistant:"}, "prompts"),
        ({"prompt": ASKED, "chosen": "Slowly.", "rejected": "Fast."}, "pairs"),
    ],
)
def test_a_prompt_is_read_from_any_layout(kit: Any, tmp_path: Path, row: dict[str, Any], layout: str) -> None:
    path = kit.write_rows(tmp_path / "rows.jsonl", [row])
    read = look(kit.recipe([{"id": str(path), "sample": {}}], rater=RATER), 0)
    items: list[Any] = list(
        candidate_sets(read.source, read.feeds, LAYOUTS[read.layout], read.settings, lambda share: None)
    )
    assert (read.layout, [item.prompt for item in items]) == (layout, [[TURN]])


def test_prompts_without_sample_are_refused_with_the_line_to_write(kit: Any, tmp_path: Path) -> None:
    path = kit.write_rows(tmp_path / "rows.jsonl", [{"prompt": ASKED, "topic": "kitchen"}])
    with pytest.raises(DpoError, match="has prompts and no answers") as caught:
        look(kit.recipe([{"id": str(path)}]), 0)
    assert "add sample: {answers: 4} to the source, and data.rater" in str(caught.value)
    assert caught.value.exit_code == USAGE


def test_a_column_of_prompts_can_be_mapped(kit: Any, tmp_path: Path) -> None:
    path = kit.write_rows(tmp_path / "rows.jsonl", [{"frage": ASKED}])
    source = {"id": str(path), "sample": {}, "columns": {"prompt": "frage"}}
    read = look(kit.recipe([source], rater=RATER), 0)
    assert read.layout == "prompts"
