"""The real Unsloth, imported on a machine without a GPU by its own switch for that; run by `make test-unsloth`."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def unsloth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    os.environ["UNSLOTH_AUTO_INSTALL"] = "0"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(tmp_path_factory.mktemp("unsloth_compiled"))
    import unsloth

    return unsloth


@pytest.fixture(scope="session")
def patched_trl(unsloth: Any) -> Any:
    """TRL with the classes that Unsloth puts into it; see `on_cpu.py` for why that needs a hand here."""
    runpy.run_path(str(Path(__file__).with_name("on_cpu.py")))["patch_trl"]()
    import trl

    return trl
