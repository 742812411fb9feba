"""The memory plan's rule for Unsloth's kernels against what they keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "widths", [(96, 160, 6, 2, 32), pytest.param((128, 384, 4, 4, 32), marks=pytest.mark.slow)], ids=["grouped", "wide"]
)
def test_the_plan_counts_what_unsloths_functions_save_for_their_backward(
    widths: tuple[int, int, int, int, int], tmp_path: Path
) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kept.py")), *map(str, widths)]
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from dpo_cli.train.shape import Shape  # here, for it imports transformers, and Unsloth comes first

    shape = Shape(1, *widths, vocabulary=64, tied=True)
    assert json.loads(done.stdout.splitlines()[-1]) == shape.kept_fused(2, flex=False)
