"""The fixture of the tests of `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.prepare import kit


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., kit.Made]:
    """`prepared({"name": rows, …}, settings of each source…, **data)` with files that stay for the test."""

    def go(rows: dict[str, Sequence[Any]], settings: dict[str, kit.Row] | None = None, **data: Any) -> kit.Made:
        sources = []
        for name, several in rows.items():
            path = kit.write_rows(tmp_path / f"{name}.jsonl", several)
            sources.append({"id": str(path), **(settings or {}).get(name, {})})
        number = len(list(tmp_path.glob("out*")))
        return kit.run(kit.recipe(sources, **data), tmp_path / f"out{number}")

    return go
