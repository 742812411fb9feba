"""The NVIDIA driver as `nvidia-smi` shows it, and why torch can't use it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import driver, gpu
from dpo_cli.driver import CUDA_12, CUDA_13, QWEN3_GIB, Card, Driver, find_driver, torch_index
from dpo_cli.gpu import cuda_problem
from tests.fake_machine import RTX_4080, RTX_5090, broken_nvidia_smi, nvidia_smi

MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; no driver is loaded."""
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.setattr(driver, "LOADED_DRIVER", tmp_path / "no-driver")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("UNSLOTH_ALLOW_CPU", raising=False)
    return tmp_path / "tools"


@pytest.fixture
def torch_built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`torch_built("13.0", unsloth=True)`: torch is that build and finds no GPU; Unsloth is or is not installed."""
    import torch

    def set_up(cuda: str | None, unsloth: bool = False, usable: bool = False) -> None:
        def is_available() -> bool:
            if not usable:
                warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
            return usable

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.14.1+cu130" if cuda else "2.14.1+cpu")
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        found = ModuleSpec("unsloth", None) if unsloth else None
        monkeypatch.setattr(gpu, "find_spec", lambda name: found)

    return set_up


def test_a_machine_without_a_driver(tools: Path) -> None:
    assert find_driver() is None


def test_cards_with_their_memory(tools: Path) -> None:
    nvidia_smi(tools, "580.95.05", RTX_4080, RTX_5090)
    found = find_driver()
    assert found is not None
    assert (found.version, found.branch, found.error) == ("580.95.05", 580, "")
    assert found.cards[0] == Card("NVIDIA GeForce RTX 4080", 16376 << 20, 15012 << 20, (8, 9))
    assert found.cards[1].capability == (12, 0)


def test_a_driver_that_does_not_know_compute_cap(tools: Path) -> None:
    nvidia_smi(tools, "470.223.02", RTX_4080, knows_capability=False)
    assert find_driver() == Driver("470.223.02", (Card("NVIDIA GeForce RTX 4080", 16376 << 20, 15012 << 20),))


def test_memory_that_the_driver_does_not_count(tools: Path) -> None:
    nvidia_smi(tools, "580.95.05", "NVIDIA GB10, [N/A], [N/A], 12.1")
    assert find_driver() == Driver("580.95.05", (Card("NVIDIA GB10", 0, 0, (12, 1)),))


@pytest.mark.parametrize(("said", "code"), [(MISMATCH, 18), ("No devices were found", 0)])
def test_an_nvidia_smi_that_fails(tools: Path, said: str, code: int) -> None:
    broken_nvidia_smi(tools, said, code)
    found = find_driver()
    assert found is not None
    assert (found.cards, found.error) == ((), said)


def test_a_loaded_driver_without_nvidia_smi(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, line = (
        tools.parent / "version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release",
    )
    loaded.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n", encoding="utf-8")
    monkeypatch.setattr(driver, "LOADED_DRIVER", loaded)
    assert find_driver() == Driver("535.129.03")


@pytest.mark.parametrize(
    ("version", "card", "index"),
    [
        ("580.95.05", (8, 9), CUDA_13),
        ("590.44", (12, 0), CUDA_13),
        ("535.129.03", (8, 9), CUDA_12),
        ("580.95.05", (6, 1), CUDA_12),  # CUDA 13 has no kernels for it
        ("570.86.15", (12, 0), None),  # CUDA 12.6 has none for it, and the driver is too old for 13
        ("", (8, 9), CUDA_13),
    ],
)
def test_the_index_of_a_build_that_runs(version: str, card: tuple[int, int], index: str | None) -> None:
    assert torch_index(Driver(version, (Card("a card", 0, 0, card),))) == index


# ------------------------------------------------------------------------------------------- why torch finds no GPU


def test_no_problem_where_torch_finds_the_card(tools: Path, torch_built: Any) -> None:
    nvidia_smi(tools, "535.129.03", RTX_4080)
    torch_built("13.0", unsloth=True, usable=True)
    assert cuda_problem() is None


TOO_OLD = [
    ("13.0", "535.129.03", RTX_4080, ("CUDA 13.0", "580", "is 535.129.03", "update the", "torch==2.14.1", CUDA_12)),
    ("12.8", "470.223.02", RTX_4080, ("CUDA 12.8", "525", "470.223.02")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cuda", "unsloth", "version", "card", "hidden", "parts"),
    [
        # torch's CUDA, whether Unsloth is there, the driver, its card, CUDA_VISIBLE_DEVICES; none: no problem
        ("13.0", False, None, None, None, ()),
        (None, False, None, None, None, ()),
        ("13.0", True, None, None, None, ("no NVIDIA driver", "580 or newer", "--gpus all", "make smoke")),
        *((cuda, unsloth, *of_driver, None, parts) for unsloth in (False, True) for cuda, *of_driver, parts in TOO_OLD),
        (None, False, "580.95.05", RTX_4080, None, ()),  # the hf backend trains small models with it
        (None, True, "580.95.05", RTX_4080, None, ("CPU build", CUDA_13)),
        (None, True, "535.129.03", RTX_4080, None, ("CPU build", CUDA_12)),
        (None, True, "470.223.02", RTX_4080, None, ("CPU build", "update its driver")),
        ("13.0", False, "580.95.05", RTX_4080, "", ()),  # hidden on purpose
        ("13.0", False, "580.95.05", RTX_4080, "-1", ()),
        ("13.0", True, "580.95.05", RTX_4080, "", ("CUDA_VISIBLE_DEVICES",)),
        ("13.0", False, "580.95.05", RTX_4080, "3", ("CUDA_VISIBLE_DEVICES='3'",)),
    ],
)
def test_why_torch_finds_no_gpu(
    tools: Path, torch_built: Any, monkeypatch: pytest.MonkeyPatch, cuda: str | None, unsloth: bool,
    version: str | None, card: str | None, hidden: str | None, parts: tuple[str, ...],
) -> None:  # fmt: skip
    if version and card:
        nvidia_smi(tools, version, card)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    torch_built(cuda, unsloth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own words on an old driver would stand above ours
        problem = cuda_problem()
    assert (problem is None) == (parts == ())
    assert all(part in str(problem) for part in parts), problem
    assert (CUDA_12 in str(problem)) == (CUDA_12 in parts)


def test_a_driver_that_does_not_run(tools: Path, torch_built: Any) -> None:
    broken_nvidia_smi(tools, MISMATCH, 18)
    torch_built("13.0")
    problem = str(cuda_problem())
    assert MISMATCH in problem and "restart" in problem


def test_what_torch_says_where_the_driver_should_do(
    tools: Path, torch_built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def init() -> None:
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment\nmore")

    nvidia_smi(tools, "580.95.05", RTX_4080)
    torch_built("13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    problem = str(cuda_problem())
    assert "CUDA unknown error" in problem and "more" not in problem and "restart" in problem


def test_only_what_is_made_for_a_cpu_trains_beside_a_card_that_fails(tools: Path, torch_built: Any) -> None:
    """`make smoke` on a laptop whose driver is older than the torch that pip took."""
    from dpo_cli.backends import choose_backend
    from dpo_cli.errors import DpoError
    from dpo_cli.recipe import Recipe

    def recipe(model: str, **engine: Any) -> Recipe:
        sources = {"sources": [{"id": "a"}]}
        return Recipe.model_validate({"name": "x", "model": {"id": model}, "data": sources, "engine": engine})

    nvidia_smi(tools, "535.129.03", RTX_4080)
    torch_built("13.0")
    assert choose_backend(recipe("builtin:tiny-qwen3")).name == "hf"
    assert choose_backend(recipe("a/b", allow_cpu=True)).name == "hf"
    with pytest.raises(DpoError, match="driver is 535"):
        choose_backend(recipe("a/b"))
    torch_built("13.0", unsloth=True)
    with pytest.raises(DpoError, match="driver is 535"):
        choose_backend(recipe("a/b", backend="hf"))


def test_the_memory_that_each_size_takes_is_the_formulas() -> None:
    """Rank 32 on all linear layers, one pair of 2 x 1,024 tokens at once, two thirds of them answers."""
    from dpo_cli.train.memory import predict
    from dpo_cli.train.shape import LINEARS, Shape

    shapes = {
        "0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151936, True),
        "1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151936, True),
        "4B": Shape(36, 2560, 9728, 32, 8, 128, 151936, True),
        "8B": Shape(36, 4096, 12288, 32, 8, 128, 151936, False),
    }
    assert list(QWEN3_GIB) == list(shapes)
    for size, shape in shapes.items():
        memory = predict(
            shape, precision="nf4", rank=32, targets=LINEARS, optimizer="adamw_torch_fused", checkpointing=True,
            tokens=2048, scored=1365,
        )  # fmt: skip
        assert QWEN3_GIB[size] == pytest.approx(memory.total / 2**30, rel=0.1), size
