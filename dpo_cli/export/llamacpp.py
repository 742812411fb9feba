"""llama.cpp, where the user has one: it makes K-quants, and it is the runtime that will serve a GGUF.

llama-cpp-python runs in a process of its own, for a build that does not fit the CPU ends its process without a word.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dpo_cli.errors import DpoError
from dpo_cli.recipe import GgufType

Quantiser = Callable[[Path, Path], None]  # (GGUF of 16 or 32 bits, GGUF to write)
CRASHED = "llama-cpp-python crashed: rebuild it for this CPU, or uninstall it"


def installed() -> bool:
    """Whether llama-cpp-python is."""
    return find_spec("llama_cpp") is not None


def quantiser(kind: GgufType) -> Quantiser:
    """What makes K-quants here: llama-quantize in $LLAMA_CPP_DIR or on PATH, else llama-cpp-python.

    What it returns raises DpoError, with llama.cpp's last words, where it fails.

    Raises:
        DpoError: there is neither.
    """
    own = os.environ.get("LLAMA_CPP_DIR")
    folders = [str(Path(own, *parts)) for parts in ((), ("build", "bin"), ("bin",))] if own else []
    program = shutil.which("llama-quantize", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if program:
        return lambda source, target: _run_program(program, kind, source, target)
    if installed():
        return lambda source, target: _run_package(kind, source, target)
    raise DpoError(
        f"{kind} needs llama.cpp's llama-quantize, and none is on PATH or in $LLAMA_CPP_DIR",
        where="export.gguf",
        hint="set LLAMA_CPP_DIR to a built llama.cpp, or pip install llama-cpp-python; or export with "
        f"--set export.gguf=bf16, then: llama-quantize NAME-bf16.gguf NAME-{kind}.gguf {kind.upper()}",
    )


def read(path: Path, texts: Sequence[str], rows: Sequence[list[int]], last: int) -> tuple[list[list[int]], list[Any]]:
    """Load a GGUF by the runtime: the token ids of `texts`, and each row's logits at its `last` positions.

    Returns:
        ids by text, and by row a float32 array [up to `last`, vocabulary].

    Raises:
        RuntimeError: it can't be loaded, with llama.cpp's own words, or the runtime crashed.
    """
    return _apart(_read, path, texts, rows, last)


def _run_program(program: str, kind: GgufType, source: Path, target: Path) -> None:
    command = [program, str(source), str(target), kind.upper()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise _failed(program, _last_line(done.stdout) or f"exit status {done.returncode}")


def _run_package(kind: GgufType, source: Path, target: Path) -> None:
    try:
        _apart(_quantise, kind, source, target)
    except RuntimeError as error:
        raise _failed("llama-cpp-python", str(error)) from error


def _failed(program: str, words: str) -> DpoError:
    return DpoError(
        f"quantising failed: {words}",
        where=program,
        hint="fix what it says, or take export.gguf: q8_0, which needs no llama.cpp",
    )


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, by a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(CRASHED) from None


def _quantise(kind: GgufType, source: Path, target: Path) -> None:
    import llama_cpp

    said, keep = _listen(llama_cpp)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise RuntimeError(_last_line("".join(said)) or "it said nothing")
    del keep


def _read(path: Path, texts: Sequence[str], rows: Sequence[list[int]], last: int) -> tuple[list[list[int]], list[Any]]:
    import llama_cpp

    said, keep = _listen(llama_cpp)
    try:
        model = llama_cpp.Llama(str(path), n_ctx=max(map(len, rows)), logits_all=True, verbose=False)
    except ValueError as error:
        raise RuntimeError(_last_line("".join(said)) or str(error)) from None
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    logits = []
    for row in rows:
        model.reset()
        model.eval(row)
        logits.append(model.scores[max(0, len(row) - last) : len(row)].copy())
    model.close()
    del keep
    return ids, logits


def _listen(llama_cpp: Any) -> tuple[list[str], Any]:
    """What llama.cpp logs from now on, and the callback, which must live for as long."""
    said: list[str] = []

    def note(level: int, text: bytes, data: Any) -> None:
        said.append(text.decode(errors="replace"))

    keep = llama_cpp.llama_log_callback(note)
    llama_cpp.llama_log_set(keep, None)
    return said, keep


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
