"""dpo-cli as it is installed: from a clone or from a wheel, with its recipes and optional packages."""

from __future__ import annotations

import shlex
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = Path(__file__).parent
CLONE = PACKAGE.parent


def install_command(extra: str) -> str:
    """The command that installs an extra, such as `gguf`: of the clone, or of a wheel the packages that it names."""
    if (CLONE / "pyproject.toml").is_file():
        folder = "." if Path.cwd() == CLONE else CLONE
        return shlex.join(["pip", "install", "-e", f"{folder}[{extra}]"])
    wanted = map(Requirement, metadata.requires("dpo-cli") or [])
    named = [one for one in wanted if one.marker and one.marker.evaluate({"extra": extra})]
    return shlex.join(["pip", "install", *(str(one).partition(";")[0].strip() for one in named)])


def shipped(path: Path) -> Path:
    """Where `recipes/…` lies in the clone or the wheel, if there is no such file here; any other path as it is."""
    if path.parts[:1] != ("recipes",) or path.exists():
        return path
    return next((root / path for root in (PACKAGE, CLONE) if (root / path).is_file()), path)
