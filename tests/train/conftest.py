"""What several tests of training start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape and the tokenizer of `builtin:tiny-qwen3`, with random weights."""
    from tests.random_model import write_random_qwen3

    return write_random_qwen3(tmp_path_factory.mktemp("random-qwen3"))
