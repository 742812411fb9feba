"""The wheel: it holds the recipes and the built-in files, and its hints install what they name."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from dpo_cli.distribution import install_command

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new venv with the wheel installed; what it requires is there, out of the venv of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run([*pip, *built], check=True, capture_output=True)
    (wheel,) = folder.glob("dpo_cli-*.whl")
    assert wheel.stat().st_size < 5_000_000
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "required.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("site-packages")), encoding="utf-8"
    )
    python = ["--python", str(folder / "venv" / "bin" / "python")]
    subprocess.run([*pip, *python, "install", "--no-index", str(wheel)], check=True, capture_output=True)
    return folder / "venv" / "bin"


def test_a_wheel_runs_its_own_recipes(programs: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [str(programs / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("python", "-c", "import dpo_cli; print(dpo_cli.__file__)").startswith(str(programs.parent))
    assert run("dpo-cli", "check", "recipes/smoke.yaml").startswith("ok: recipes/smoke.yaml")
    run("dpo-cli", "train", "recipes/smoke.yaml", "--set", "train.max_steps=2")  # and prepare
    assert (tmp_path / "runs" / "smoke" / "train" / "adapter" / "adapter_model.safetensors").is_file()
    hint = run("python", "-c", "from dpo_cli.distribution import install_command; print(install_command('gguf'))")
    assert hint.startswith("pip install gguf==")


def test_a_clone_installs_its_own_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert install_command("gguf") == "pip install -e '.[gguf]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("gguf") == f"pip install -e '{REPOSITORY}[gguf]'"
