"""llama.cpp, where the user has one: it converts what dpo-cli doesn't, makes K-quants, and serves a GGUF."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_cli.errors import DpoError
from dpo_cli.recipe import GgufType

CONVERTER = "convert_hf_to_gguf.py"


def installed() -> bool:
    """Whether llama-cpp-python is."""
    return find_spec("llama_cpp") is not None


def _folder(named: str | None) -> Path:
    return Path(named or os.environ.get("LLAMA_CPP_DIR") or os.devnull)


def converter(named: str | None) -> Path | None:
    """Find llama.cpp's script that converts models, in `export.llama_cpp` or $LLAMA_CPP_DIR."""
    script = _folder(named) / CONVERTER
    return script if script.is_file() else None


def quantiser(kind: GgufType, named: str | None) -> str:
    """Find llama-quantize, which makes K-quants: in `export.llama_cpp`, $LLAMA_CPP_DIR or on PATH.

    Raises:
        DpoError: there is none.
    """
    folders = [str(_folder(named) / inside) for inside in (".", "build/bin", "bin")]
    program = shutil.which("llama-quantize", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if program:
        return program
    raise DpoError(
        f"{kind} needs llama.cpp's llama-quantize, and none is on PATH or in export.llama_cpp",
        where="export.gguf",
        hint="set export.llama_cpp (or $LLAMA_CPP_DIR) to a built llama.cpp; or export with "
        f"--set export.gguf=bf16, then: llama-quantize NAME-bf16.gguf NAME-{kind}.gguf {kind.upper()}",
    )


def run(command: list[str], what: str) -> None:
    """Run a program of llama.cpp.

    Raises:
        DpoError: it failed, with its last line.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        last = next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "")
        raise DpoError(
            f"{what} failed: {last or f'exit status {done.returncode}'}",
            where=command[1] if command[0] == sys.executable else command[0],
            hint="fix what it says, or leave gguf and ollama out of export.formats",
        )


def read(path: Path, texts: Sequence[str], rows: Sequence[list[int]], last: int) -> tuple[list[list[int]], list[Any]]:
    """Load a GGUF by llama-cpp-python: the token ids of `texts`, and each row's logits at its `last` positions.

    Returns:
        ids by text, and by row a float32 array [up to `last`, vocabulary].

    Raises:
        ValueError: it can't be loaded.
    """
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=max(map(len, rows)), logits_all=True, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    logits = []
    for row in rows:
        model.reset()
        model.eval(row)
        logits.append(model.scores[max(0, len(row) - last) : len(row)].copy())
    model.close()
    return ids, logits
