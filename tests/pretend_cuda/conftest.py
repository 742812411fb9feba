"""Prepared pairs, and an adapter that a pretended card has trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.pretend_cuda.card_runs import Runs
from tests.pretend_cuda.pretended import Card


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("prepared"))
    runs.go("prepare")
    return runs


@pytest.fixture
def new_runs(prepared: Runs, tmp_path: Path) -> Callable[[], Runs]:
    """Each time a folder of runs with the prepared pairs, and nothing trained."""
    return lambda: prepared.copy(tmp_path / f"runs{len(list(tmp_path.iterdir()))}")


@pytest.fixture
def runs(new_runs: Callable[[], Runs]) -> Runs:
    return new_runs()


@pytest.fixture(scope="session")
def trained(prepared: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With an adapter that a card has trained; not to be written to."""
    runs = prepared.copy(tmp_path_factory.mktemp("trained") / "runs")
    runs.go("train", card=Card())
    return runs
