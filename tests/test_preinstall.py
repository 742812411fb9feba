"""`make check-gpu` and `make check-cpu`: what is found before gigabytes are downloaded, and what to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fake_machine import GTX_1080, HAS_DRIVER, RTX_4080, RTX_5090, broken_nvidia_smi, nvidia_smi, write_tool

CU126, CU130 = "https://download.pytorch.org/whl/cu126", "https://download.pytorch.org/whl/cu130"
CPU = "https://download.pytorch.org/whl/cpu"
Make = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make")


@pytest.fixture
def make(tmp_path: Path, repository: Path) -> Make:
    """`make("check-gpu", free=100)`: the real thing, with this PATH's nvidia-smi and so many GB of free disk."""

    def go(target: str, *settings: str, free: float = 100.0, python: str = sys.executable) -> Any:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(
            f"import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free={free} * 1e9)\n",
            encoding="utf-8",
        )
        environment = {
            name: value for name, value in os.environ.items() if name not in ("ANYWAY", "TORCH_INDEX", "MAKEFLAGS")
        }
        environment |= {"PYTHONPATH": str(site), "PATH": str(tmp_path / "tools"), "HF_HOME": str(repository)}
        command = [str(shutil.which("make")), target, f"PYTHON={python}", *settings]
        return subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return go


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder on PATH with a compiler; Python's headers are this machine's."""
    return write_tool(tmp_path / "tools", "cc", "exit 0")


def test_a_good_machine_is_told_what_will_be_downloaded(make: Make, tools: Path) -> None:
    nvidia_smi(tools, "580.95.05", RTX_4080)
    done = make("check-gpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3.2 GB" in done.stdout


@pytest.mark.parametrize(
    ("driver", "card", "index", "parts"),
    [
        (
            "535.129.03",
            RTX_4080,
            "",
            ("535.129.03", "CUDA 13.0 needs 580", "update the driver", f"TORCH_INDEX={CU126}"),
        ),
        ("570.86.15", RTX_5090, "", ("570.86.15", "580", "fix: update the driver\n")),
        ("470.223.02", RTX_4080, CU126, ("CUDA 12.6 needs 525",)),
        ("580.95.05", GTX_1080, "", ("no kernels for the NVIDIA GeForce GTX 1080 Ti", f"TORCH_INDEX={CU126}")),
        ("580.95.05", "GeForce GTX 1650, 2048, 1900, 7.5", "", ("2.0 GiB", "smaller model")),
        ("580.95.05", "NVIDIA GeForce RTX 4080, 16376, 1024, 8.9", "", ("1.0 of the card's 16.0 GiB",)),
    ],
)
def test_what_a_card_or_its_driver_lacks(
    make: Make, tools: Path, driver: str, card: str, index: str, parts: tuple[str, ...]
) -> None:
    nvidia_smi(tools, driver, card)
    done = make("check-gpu", *([f"TORCH_INDEX={index}"] if index else []))
    assert done.returncode == 2
    assert all(part in done.stderr for part in parts), done.stderr
    assert done.stderr.count("check: ") == done.stderr.count("fix: ") == 1
    assert "ANYWAY=1" in done.stderr and "GB" not in done.stdout


@pytest.mark.parametrize(
    ("driver", "card", "index"),
    [
        ("535.129.03", RTX_4080, CU126),
        ("470.1", RTX_4080, CPU),
    ],
)
def test_a_build_that_runs_is_not_complained_of(make: Make, tools: Path, driver: str, card: str, index: str) -> None:
    nvidia_smi(tools, driver, card)
    done = make("check-gpu", f"TORCH_INDEX={index}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a driver")
def test_no_driver(make: Make, tools: Path) -> None:
    done = make("check-gpu")
    assert done.returncode == 2
    assert "no NVIDIA driver" in done.stderr and "make smoke" in done.stderr


def test_a_driver_that_does_not_run(make: Make, tools: Path) -> None:
    broken_nvidia_smi(tools, "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9)
    done = make("check-gpu")
    assert done.returncode == 2
    assert "could not communicate" in done.stderr and "restart" in done.stderr


def test_too_little_disk(make: Make, tools: Path) -> None:
    nvidia_smi(tools, "580.95.05", RTX_4080)
    done = make("check-gpu", free=3)
    assert done.returncode == 2
    assert "3.0 GB are free" in done.stderr and "HF_HOME" in done.stderr
    assert make("check-cpu", free=3).returncode == 2
    assert "this takes 24 GB" in make("check-gpu", free=20).stderr  # 11.4 here, and 12.2 on the same disk for downloads
    assert make("check-cpu", f"TORCH_INDEX={CPU}", free=3).returncode == 0


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a driver")
def test_make_goes_on_all_the_same_when_asked(make: Make, tools: Path) -> None:
    done = make("check-gpu", "ANYWAY=1", free=3)
    assert done.returncode == 0
    assert "no NVIDIA driver" in done.stderr and "3.0 GB are free" in done.stderr
    assert "3.2 GB" in done.stdout


@pytest.mark.parametrize("target", ["check-gpu", "check-cpu"])
def test_a_python_that_is_too_old_or_missing(make: Make, tools: Path, target: str) -> None:
    old = write_tool(tools, "python-old", "exit 1") / "python-old"  # what `-c "sys.exit(version < …)"` comes to
    for python in (str(old), "python-that-is-not-there"):
        done = make(target, "ANYWAY=1", python=python)
        assert done.returncode == 2
        assert f"{python} is not Python 3.11 or newer" in done.stderr and "PYTHON=python3.12" in done.stderr


def test_without_cuda_it_is_less(make: Make, tools: Path) -> None:
    done = make("check-cpu")
    assert done.returncode == 0
    assert "3.2 GB" in done.stdout and f"0.4 GB: make smoke TORCH_INDEX={CPU}" in done.stdout
    assert "about 0.4 GB" in make("check-cpu", f"TORCH_INDEX={CPU}").stdout


@pytest.mark.parametrize("target", ["train", "smoke"])
def test_a_target_checks_before_it_installs(repository: Path, target: str) -> None:
    command = ["make", "-n", "-W", "pyproject.toml", target, "RECIPE=recipes/smoke.yaml", f"TORCH_INDEX={CU126}"]
    shown = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=True).stdout
    places = map(
        shown.index, ("dpo_cli.preinstall", f"--index-url {CU126} torch==", "dpo-cli train recipes/smoke.yaml")
    )
    assert sorted(found := list(places)) == found


def test_the_makefile_installs_the_torch_of_the_extra(repository: Path) -> None:
    project = (repository / "pyproject.toml").read_text(encoding="utf-8")
    shown = subprocess.check_output(["make", "-n", "-W", "pyproject.toml", "train", f"TORCH_INDEX={CU126}"], text=True,
                                    cwd=repository)  # fmt: skip
    assert '"torch==2.14.1"' in project and "torch==2.14.1 torchvision" in shown


def test_what_is_imported_stays_compiled(repository: Path) -> None:
    """Images of containers forbid it, and then every command compiles torch and transformers anew."""
    forbidden = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.check_output(["make", "--eval=seen:; @env", "seen"], text=True, cwd=repository, env=forbidden)
    names = {line.partition("=")[0] for line in shown.splitlines()}
    assert "PATH" in names and "PYTHONDONTWRITEBYTECODE" not in names
