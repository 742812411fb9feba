"""What several tests of training start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    from dpo_cli import smoke

    return smoke.resolve("builtin:tiny-qwen3")
