"""Files and folders that are written whole or not at all, and what they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

LARGE = 2**24  # bytes from which a file is read again only where its size or times have changed


def stamp(path: Path) -> list[int]:
    """Size in bytes, and when content and inode were last changed (ns): another one where a file was written to."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def sha256(path: Path) -> str:
    """Of a file's content. A model's weights are read once a process, as long as the file stays the same one."""
    facts = stamp(path)
    return _sha256(path) if facts[0] < LARGE else _sha256_of_large(path, path.stat().st_ino, *facts)


@cache
def _sha256_of_large(path: Path, *facts: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make an OSError of what libraries say when the disk is full: safetensors, tokenizers and torch have their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not re.search(r"No space left|os error 28|inline_container.*unexpected pos", str(error), re.DOTALL):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def read_if_there(path: Path) -> str:
    """The text of a file that only some machines have; "" where it is not there or can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def aside(path: Path, kind: str) -> Path:
    """Where a file or folder is made (`new`), or moved to (`old`): beside it, or beside what it is a link to."""
    real = linked(path)
    return real.with_name(f".{real.name}.{kind}")


def linked(path: Path) -> Path:
    """What a link leads to, so that the link stays; anything else as it is."""
    return path.resolve() if path.is_symlink() else path


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # on NFS what is still open leaves a file behind
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: aside, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = aside(path, "new")
    with open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(linked(path))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a folder that stands there is moved aside first and removed last.

    Where `target` is a link, what it leads to is replaced, on whatever disk that is.
    """
    real, old = linked(target), aside(target, "old")
    if target.is_symlink() and new != aside(target, "new"):
        new = Path(shutil.move(new, aside(target, "new")))
    remove(old)
    if real.is_dir():
        real.rename(old)
    new.replace(real)
    remove(old)
