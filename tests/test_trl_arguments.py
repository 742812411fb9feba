"""`check` knows TRL's arguments from a generated file; it has to be what the installed TRL declares."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from dpo_cli.recipe.train import OLD_TRAIN_ARGUMENTS, OWNED_TRAIN_ARGUMENTS, trl_arguments
from dpo_cli.train.methods import METHODS, describe_arguments

PINNED = "1.16.0"


@pytest.mark.skipif(version("trl") != PINNED, reason=f"trl_arguments.json describes TRL {PINNED}, not {version('trl')}")
def test_the_file_says_what_the_installed_trl_declares() -> None:
    assert trl_arguments() == describe_arguments(), "write it anew: python -m dpo_cli.train.methods"


@pytest.mark.parametrize("method", METHODS)
def test_a_name_is_either_trls_or_an_old_one(method: str) -> None:
    """A hint on what replaced a name would be wrong where TRL (again) has it."""
    arguments = trl_arguments()[method]["arguments"]
    assert not set(OLD_TRAIN_ARGUMENTS) & set(arguments)
    assert not set(OLD_TRAIN_ARGUMENTS) & set(OWNED_TRAIN_ARGUMENTS)
