"""`doctor` on machines with other cards and broken packages: each is a finding, and the last line says what runs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from dpo_cli import doctor, driver
from dpo_cli.cli import app
from tests.fake_machine import RTX_4080, nvidia_smi, write_tool
from typer.testing import CliRunner, Result

VERSIONS = {
    "torch": "2.14.1",
    "bitsandbytes": "0.50.2",
    "transformers": "5.17.0",
    "peft": "0.21.2",
    "datasets": "4.8.5",
    "accelerate": "1.15.0",
    "trl": "1.15.0",
}
TRANSFORMERS = """
    class utils:
        class logging:
            disable_progress_bar = set_verbosity_error = staticmethod(lambda: None)
"""
TORCH = """
    import types
    __version__ = "2.14.1+cu130"
    version = types.SimpleNamespace(cuda={cuda!r}, hip=None)
    card = types.SimpleNamespace(name="NVIDIA GeForce RTX 4080", total_memory={total}, major={major}, minor=9)
    class Cuda:
        def is_available(self): return {usable}
        def get_device_properties(self, index): return card
        def get_device_capability(self): return (card.major, card.minor)
        def mem_get_info(self, index): return ({free}, card.total_memory)
        def is_bf16_supported(self, including_emulation=True): return including_emulation or card.major >= 8
        def init(self): raise RuntimeError("no CUDA-capable device is detected")
    cuda = Cuda()
    class Zeros:
        def add_(self, one): return self
        def cpu(self): return self
    def zeros(*shape, device): return Zeros()
"""
GIB = 1 << 30
ON_IT = "in 4-bit on the NVIDIA GeForce RTX 4080"
Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(usable=True, unsloth="2026.10.9")`: packages of these names and versions, ahead of the real ones.

    Returns their folder, where a test breaks what it wants to see broken.
    """

    def set_up(
        usable: bool = True, cuda: str | None = "13.0", total: int = 16 * GIB, free: int = 15 * GIB, major: int = 8,
        **versions: str,
    ) -> Path:  # fmt: skip
        folder = tmp_path / "packages"
        for name, version in (VERSIONS | versions).items():
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text("DPOTrainer = None\n", encoding="utf-8")
            distribution = folder / f"{name}-{version}.dist-info"
            distribution.mkdir()
            (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        torch = TORCH.format(usable=usable, cuda=cuda, total=total, free=free, major=major)
        (folder / "torch" / "__init__.py").write_text(textwrap.dedent(torch), encoding="utf-8")
        (folder / "bitsandbytes" / "cextension.py").write_text("lib = object()\n", encoding="utf-8")
        (folder / "datasets" / "__init__.py").write_text("def disable_progress_bars(): pass\n", encoding="utf-8")
        (folder / "transformers" / "__init__.py").write_text(textwrap.dedent(TRANSFORMERS), encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(doctor.__file__).parents[1]}")
        return folder

    write_tool(tmp_path / "tools", "cc", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("UNSLOTH_ALLOW_CPU", raising=False)
    monkeypatch.setattr(driver, "LOADED_DRIVER", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    return set_up


def examine() -> Result:
    return CliRunner().invoke(app, ["doctor"])


def last(done: Result) -> str:
    return done.stdout.splitlines()[-1]


def test_a_card_with_unsloth(machine: Machine, tmp_path: Path) -> None:
    machine(unsloth="2026.10.9")
    nvidia_smi(tmp_path / "tools", "580.95.05", RTX_4080)
    done = examine()
    assert done.exit_code == 0, done.output
    assert "NVIDIA 580.95.05; torch for CUDA 13.0 needs 580 or newer" in done.stdout
    assert "NVIDIA GeForce RTX 4080, 16.0 GiB, 15.0 free, CUDA 13.0, bfloat16\n" in done.stdout
    assert "ok   unsloth       2026.10.9\n" in done.stdout
    assert last(done) == f"ok   can run       the smoke run, and training of Qwen3 0.6B, 1.7B, 4B, 8B {ON_IT}"


@pytest.mark.parametrize(
    ("total", "free", "says"),
    [
        (6 * GIB, 5 * GIB, f"of Qwen3 0.6B, 1.7B, 4B {ON_IT}; 4B once more of its memory is free"),
        (16 * GIB, 4 * GIB, f"0.6B, 1.7B, 4B, 8B {ON_IT}; 4B, 8B once more of its memory is free"),
        (1 * GIB, 1 * GIB, "small models on the GPU"),
    ],
)  # fmt: skip
def test_what_a_smaller_or_fuller_card_trains(machine: Machine, total: int, free: int, says: str) -> None:
    machine(total=total, free=free)
    done = examine()
    assert done.exit_code == 0
    assert last(done).endswith(says)


def test_a_card_that_the_build_has_no_kernels_for(machine: Machine) -> None:
    machine(major=6)
    done = examine()
    assert done.exit_code == 1
    assert "no kernels for its compute capability 6.9" in done.stdout and "whl/cu126" in done.stdout
    assert last(done) == "MISS can run       train can't: see gpu above"


@pytest.mark.parametrize("unsloth", [True, False])
def test_a_driver_that_is_too_old(machine: Machine, tmp_path: Path, unsloth: bool) -> None:
    machine(usable=False, **({"unsloth": "2026.10.9"} if unsloth else {"trl": "1.16.0"}))
    nvidia_smi(tmp_path / "tools", "535.129.03", RTX_4080)
    done = examine()
    assert (
        "gpu           torch finds no GPU: the NVIDIA driver is 535.129.03, and torch for CUDA 13.0 needs 580"
        in done.stdout
    )
    assert "--   card          NVIDIA GeForce RTX 4080, not used by torch" in done.stdout
    assert "update the driver" in done.stdout
    if unsloth:
        assert done.exit_code == 1
        assert last(done).startswith("MISS can run       train can't: see gpu")
    else:
        assert done.exit_code == 0
        assert last(done).endswith("small models on the CPU; from Qwen3-0.6B once the GPU works, see above")


BREAKAGES = {
    "a library": (
        'raise OSError("libcudnn.so.9: cannot open shared object file")',
        "OSError: libcudnn.so.9: cannot open",
    ),
    "a package": ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that"),
    "an exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the import crashes Python (signal 11)"),
    "nothing said": ("raise RuntimeError", "RuntimeError\n"),
}


BROKEN = [("torch", breakage) for breakage in BREAKAGES]
BROKEN += [("peft", "a library"), ("bitsandbytes", "a library"), ("bitsandbytes", "a crash"), ("unsloth", "an exit")]


@pytest.mark.parametrize(("package", "breakage"), BROKEN)
def test_a_package_that_does_not_import_is_a_finding(machine: Machine, package: str, breakage: str) -> None:
    code, says = BREAKAGES[breakage]
    folder = machine(unsloth="2026.10.9")
    (folder / package / "__init__.py").write_text(code + "\n", encoding="utf-8")
    done = examine()
    assert done.exception is None or isinstance(done.exception, SystemExit)
    named = {"bitsandbytes": "4-bit"}.get(package, package)
    broken = next(line for line in done.stdout.splitlines(keepends=True) if f" {named} " in line[:18])
    assert f"does not import: {says}" in broken
    for other in ("torch", "transformers", "trl", "unsloth", "disk"):
        assert any(f" {other} " in line[:18] for line in done.stdout.splitlines()), other
    needed = package != "bitsandbytes" or breakage == "a crash"
    assert done.exit_code == (1 if needed else 0)
    assert last(done).startswith(f"MISS can run       train can't: see {named}" if needed else "ok   can run ")
    if package == "bitsandbytes" and not needed:
        assert last(done).endswith("small models on the GPU")


def test_a_package_without_a_version_is_a_finding(machine: Machine) -> None:
    metadata = next(machine().glob("peft-*.dist-info")) / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: peft\n", encoding="utf-8")
    done = examine()
    assert " peft " in done.stdout and "unknown version" in done.stdout
    assert last(done).startswith("ok   can run ")


@pytest.mark.parametrize(("package", "version"), [("transformers", "4.57.1"), ("trl", "1.18.0.dev0")])
def test_a_version_that_dpo_cli_is_not_made_for(machine: Machine, package: str, version: str) -> None:
    machine(**{package: version})
    done = examine()
    assert f"{version}, and dpo-cli is made for" in done.stdout and f"fix: pip install '{package}" in done.stdout
    assert last(done).startswith("ok   can run ")


def test_a_probe_that_fails_does_not_end_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise PermissionError("no way to look at the disk")

    machine()
    monkeypatch.setattr(shutil, "disk_usage", broken)
    done = examine()
    assert done.exit_code == 0
    assert "--   disk          can't be examined: PermissionError: no way to look at the disk" in done.stdout


def test_a_card_without_bfloat16_is_not_said_to_have_it(machine: Machine) -> None:
    """Torch emulates it there, and says that it is supported."""
    machine(major=7, cuda="12.6")
    assert "CUDA 12.6, float16 only\n" in examine().stdout


def test_a_trl_that_trains_on_no_cpu(machine: Machine) -> None:
    machine(usable=False)
    done = examine()
    assert done.exit_code == 1 and "TRL 1.15 computes its log-probabilities on GPUs only" in done.stdout


def test_unsloth_with_a_newer_trl(machine: Machine) -> None:
    machine(unsloth="2026.10.9", trl="1.16.0")
    assert "Unsloth needs trl 1.15.0 or older, and 1.16.0 is installed" in examine().stdout
