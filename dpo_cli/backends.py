"""Who loads and patches the model, Unsloth or transformers alone, and whether this machine will do."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]

from dpo_cli import progress
from dpo_cli.distribution import install_command
from dpo_cli.environment import cache_folder
from dpo_cli.errors import DpoError
from dpo_cli.gpu import cuda_problem
from dpo_cli.recipe import Recipe

# GPUs with 99 KB of shared memory a block (CUDA programming guide, compute capabilities). Unsloth's attention kernel
# takes tiles of 128 rows: 104,448 bytes with the pipelining that inductor gives it. Tiles of 64 rows take 94,208.
SMALL_TILES = ((8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Backend:
    """Who loads and patches the model: `unsloth` or `hf`, and why that one."""

    name: str
    why: str


def choose_backend(recipe: Recipe) -> Backend:
    """Choose the backend that this recipe gets on this machine.

    Raises:
        DpoError: `engine.backend: unsloth` where Unsloth is not installed or finds no GPU, or torch can't use the GPU
            that is there.
    """
    asked = recipe.engine.backend
    problem, unsloth = cuda_problem(), find_spec("unsloth")
    meant_for_cpus = recipe.engine.allow_cpu or (recipe.model.id.startswith("builtin:") and not unsloth)
    if problem and not meant_for_cpus:
        raise problem
    # Unsloth's own switch for machines without a GPU (its CI, and our tests).
    accelerated = torch.cuda.is_available() or os.environ.get("UNSLOTH_ALLOW_CPU") == "1"
    missing = None if unsloth else "Unsloth is not installed"
    missing = missing or (None if accelerated else "Unsloth needs an NVIDIA GPU, and torch sees none")
    if asked == "hf":
        return Backend("hf", "engine.backend: hf")
    if asked == "unsloth" and missing:
        raise DpoError(
            missing,
            where=recipe.where("engine", "backend"),
            hint=f"set engine.backend: auto, or `{install_command('unsloth')}` on a machine with a GPU",
        )
    if asked == "unsloth":
        return Backend("unsloth", "engine.backend: unsloth")
    if missing or not torch.cuda.is_available():
        return Backend("hf", missing or "torch sees no GPU")
    return Backend("unsloth", "it is installed and there is a GPU")


def before_unsloth() -> None:
    """Choose the tile of Unsloth's attention kernel for the card; after torch is imported, before Unsloth is."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in SMALL_TILES:
        os.environ.setdefault("PG_FLEX_BF16_BLOCK_M", "64")


def import_backend(backend: Backend) -> None:
    """Import Unsloth, if it is the backend, before anything imports TRL; and make the libraries keep quiet."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    if backend.name == "unsloth":
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled"))
        os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")  # else an export may install system packages
        before_unsloth()
        import unsloth  # noqa: F401
    import transformers  # draws bars of its own, and switches off those of downloads with them

    transformers.utils.logging.disable_progress_bar()
    if progress.drawn():
        enable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


def patched_by_unsloth(trainer_class: type) -> bool:
    """Whether a trainer is, or is made of, the one that Unsloth puts in the place of TRL's."""
    return any(one.__name__.startswith("Unsloth") for one in trainer_class.__mro__)
