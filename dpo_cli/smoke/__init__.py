"""The built-in model and preference sets: `builtin:...` ids. The sets are files of this package."""

import hashlib
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dpo_cli.errors import DpoError, did_you_mean

HERE = Path(__file__).parent
BUILTINS: tuple[str, ...] = (
    "builtin:tiny-qwen3",
    "builtin:style-ultrafeedback-en",
    "builtin:style-ultrafeedback-zh",
    "builtin:style-helpsteer2",
)


def resolve(builtin_id: str) -> Path:
    """The path behind a built-in id: a model folder for `builtin:tiny-qwen3`, a .jsonl.gz file for a source.

    The model is built into the user's cache folder where it is not there yet. All else imports nothing heavy.

    Raises:
        DpoError: no such id, or the cache folder cannot be written.
    """
    if builtin_id not in BUILTINS:
        near = did_you_mean(builtin_id, list(BUILTINS))
        raise DpoError(
            f"There is no {builtin_id}.",
            hint=(f"did you mean {near}? " if near else "") + f"The built-in ids are {', '.join(BUILTINS)}.",
        )
    name = builtin_id.removeprefix("builtin:")
    if name != "tiny-qwen3":
        return HERE / f"{name}.jsonl.gz"
    target = cache_folder() / f"{name}-{_content_key()}"
    if target.exists():
        return target
    try:
        _build_aside(target)
    except OSError as error:
        raise DpoError(
            f"Could not build {builtin_id}: {error}",
            where=str(target),
            hint="point the environment variable DPO_CLI_CACHE at a folder that can be written",
        ) from error
    return target


def cache_folder() -> Path:
    """`$DPO_CLI_CACHE`, else `$XDG_CACHE_HOME/dpo-cli`, else `~/.cache/dpo-cli`; absolute, perhaps not there yet."""
    if own := os.environ.get("DPO_CLI_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "dpo-cli"
    return Path.home() / ".cache" / "dpo-cli"


def _content_key() -> str:
    """Ten hex digits of what determines the model's content, so that an upgrade builds afresh."""
    parts = [path.read_bytes() for path in (HERE / "model.py", *sorted(HERE.glob("*.jsonl.gz")))]
    for library in ("torch", "transformers", "trl"):
        try:
            parts.append(f"{library} {version(library)}".encode())
        except PackageNotFoundError as error:
            raise DpoError(
                f"builtin:tiny-qwen3 needs {library}, which is not installed.",
                hint="dpo-cli doctor says what to install",
            ) from error
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:10]


def _build_aside(target: Path) -> None:
    """Build under a name of this process's own and rename, so that `target` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as workshop:
        built = Path(workshop, target.name)
        from dpo_cli.smoke.model import build_tiny_qwen3

        build_tiny_qwen3(built)
        try:
            built.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster; its build is the same
                raise
