"""The wheel: it holds the recipes and the built-in files, and its hints install what they name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dpo_cli.distribution import install_command

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, beside the packages that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run([*pip, *built], check=True, capture_output=True)
    (wheel,) = folder.glob("dpo_cli-*.whl")
    assert wheel.stat().st_size < 5_000_000
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, capture_output=True)
    return folder / "site"


def test_a_wheel_runs_its_own_recipes(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import dpo_cli; print(dpo_cli.__file__)").startswith(str(installed))
    assert run("-m", "dpo_cli", "check", "recipes/smoke.yaml").startswith("ok: recipes/smoke.yaml")
    run("-m", "dpo_cli", "prepare", "recipes/smoke.yaml")
    assert (tmp_path / "runs" / "smoke" / "data" / "train.jsonl").is_file()
    hint = run("-c", "from dpo_cli.distribution import install_command; print(install_command('gguf'))")
    assert hint.startswith("pip install gguf==")


def test_a_clone_installs_its_own_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert install_command("gguf") == "pip install -e '.[gguf]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("gguf") == f"pip install -e '{REPOSITORY}[gguf]'"
