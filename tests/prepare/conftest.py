"""The fixture of the tests of `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Hub whose data sets hold 20 pairs, of a commit named after the branch; what is loaded goes into the list."""
    from datasets import Dataset

    loaded: list[Any] = []

    def load(name: str, **how: Any) -> Any:
        loaded.append((name, how))
        return Dataset.from_list([kit.pair(number) for number in range(20)])

    monkeypatch.setattr("datasets.load_dataset", load)
    commit = "huggingface_hub.HfApi.dataset_info"
    monkeypatch.setattr(commit, lambda self, name, revision=None: SimpleNamespace(sha=f"commit-{revision or 'main'}"))
    return loaded
