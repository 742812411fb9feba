"""The speed comparison's gate and its counts: what runs in CI, where no time can be trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
import lengths  # noqa: E402


@pytest.mark.slow
def test_quick_ends_with_one_line_of_json_within_the_bounds() -> None:
    command = [sys.executable, str(FOLDER / "bench_train.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["max_loss_difference", "max_gradient_relative_error", "token_ratio"]
    assert 0 <= found["max_loss_difference"] <= 1e-5
    assert 0 < found["max_gradient_relative_error"] <= 2e-5  # twice what TRL's micro-batches differ by, see its gate
    assert found["token_ratio"] == {"1": pytest.approx(1.49, abs=0.01), "4": pytest.approx(2.22, abs=0.01)}


def test_a_sample_stands_for_all_pairs_and_its_tokens_have_these_lengths() -> None:
    rows = lengths.load("en")
    some = lengths.sample(rows, 8)
    assert some == lengths.sample(rows, 8)
    for size in (1, 4):
        whole, part = (
            lengths.padded_tokens(those, size) / lengths.shared_tokens(those) for those in (rows[:132], some)
        )
        assert part == pytest.approx(whole, rel=0.03)
    for row, pair in zip(some, lengths.tokens(some, vocabulary=16), strict=True):
        assert [len(ids) for ids in pair] == list(row[:3])
        assert pair.chosen[: row.opening] == pair.rejected[: row.opening]
        assert pair.chosen[row.opening] != pair.rejected[row.opening]
    assert max(row.row for row in rows) == 1024
