"""The waits for the GPU that our own code asks for in a training step: no more than when they were last looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.pretend_cuda.card_runs import Runs
from tests.pretend_cuda.waits import Step, count

# tests/benchmarks/RESULTS.md has them with the libraries' own. One more needs a reason, and one fewer a lower number.
WAITS = {"stock": 1, "each_pass": 5, "beside": 11}
COPIES = {"stock": 0, "each_pass": 10, "beside": 0}


def ours(step: Step) -> tuple[float, float]:
    return step.waits.get("ours", 0), step.copies.get("ours", 0)


@pytest.mark.slow  # a figure of speed
def test_our_code_waits_no_more_often_than_it_did(prepared: Runs, tmp_path: Path) -> None:
    counted = count(prepared, tmp_path)
    for name in WAITS:
        waits, copies = ours(getattr(counted, name))
        assert waits <= WAITS[name], f"{name}: {waits:g} waits; python -m tests.pretend_cuda.waits"
        assert copies <= COPIES[name], f"{name}: {copies:g} copies"
    assert counted.stock.waits["trl"] > 10, "TRL's own, or the counting is broken"
