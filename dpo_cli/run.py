"""A run's folder: its paths, its manifest, and the rules that keep it honest.

Disk is the only channel between stages. A stage writes aside, its results are renamed into place, and the manifest
is written last: what the manifest calls complete is complete. The manifest also holds what each stage read, so a
later stage can tell, and say, what has changed since.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dpo_cli import __version__
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe, dump
from dpo_cli.recipe_yaml import Key, names_a_path, show_key

# The recipe keys that each stage reads. What is not listed can change without making its results stale.
READS: dict[str, tuple[str, ...]] = {
    "prepare": ("seed", "model.id", "model.revision", "model.max_length", "model.thinking", "data"),
    "train": (
        "seed", "model.id", "model.revision", "model.adapter", "model.adapter_revision", "model.load_in_4bit",
        "model.dtype", "model.max_length", "model.thinking", "lora", "train", "engine",
    ),
    "eval": ("seed", "eval"),
    "export": ("model.merge_base", "export", "eval.temperature", "eval.top_p", "eval.top_k"),  # Ollama's parameters
}  # fmt: skip

# The stage whose results each stage starts from, and the folder its own results are in.
BEFORE = {"prepare": None, "train": "prepare", "eval": "train", "export": "train"}
FOLDERS = {"prepare": "data", "train": "train", "eval": "eval", "export": "export"}

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "unsloth")

InputFiles = Callable[[Recipe], dict[str, Path]]


@dataclass(frozen=True)
class State:
    """Where a stage stands: `fresh` (complete, nothing changed), `absent`, `cut_short` or `stale`, and why.

    `settings`: recipe keys are among the reasons.
    """

    kind: str
    reasons: list[str] = field(default_factory=list)
    settings: bool = False

    @property
    def fresh(self) -> bool:
        return self.kind == "fresh"


@dataclass
class Draft:
    """A stage's results while they are being made: files go into `folder`, facts into `record`."""

    folder: Path
    record: dict[str, Any]
    status: str = "complete"


class Run:
    """`runs/<name>/`.

    Args:
        folder: the run's folder; made when first written to.
        inputs: per stage, the files from outside the run that it reads: a name without any absolute path -> path.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, InputFiles] | None = None) -> None:
        self.folder = folder
        self.inputs = dict(inputs or {})

    def __getitem__(self, name: str) -> Path:
        """The folder of a stage's results: `run["prepare"]` is `runs/<name>/data`."""
        return self.folder / FOLDERS[name]

    @property
    def train_pairs(self) -> Path:
        return self["prepare"] / "train.jsonl"

    @property
    def eval_pairs(self) -> Path:
        return self["prepare"] / "eval.jsonl"

    @property
    def adapter(self) -> Path:
        return self["train"] / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self["train"] / "checkpoints"

    # ------------------------------------------------------------------------------------------------- the manifest

    def manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            stages = manifest.get("stages") if isinstance(manifest, dict) else None
            if not isinstance(stages, dict) or not all(isinstance(record, dict) for record in stages.values()):
                raise ValueError("it lists no stages")
            return dict(manifest)
        except FileNotFoundError:
            return {"name": self.folder.name, "stages": {}}
        except ValueError as error:  # not UTF-8, not JSON, or not a manifest
            raise DpoError(
                f"the run's manifest can't be read: {error}", where=str(path), hint=f"delete {path} and run again"
            ) from error

    def record(self, stage: str) -> dict[str, Any]:
        """What the manifest says of a stage; empty where it never ran."""
        return dict(self.manifest()["stages"].get(stage, {}))

    def write_record(self, stage: str, recipe: Recipe, record: dict[str, Any]) -> None:
        """Put a stage's record into the manifest, and beside it the recipe that the stage was run with."""
        write_text(self.folder / "recipe.yaml", dump(recipe))
        manifest = self.manifest()
        manifest["dpo_cli"] = __version__
        manifest["stages"][stage] = record
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    # ---------------------------------------------------------------------------------------------- fresh or stale?

    def state(self, stage: str, recipe: Recipe) -> State:
        """Whether a stage's results are there, whole, and made from this recipe and these inputs."""
        record = self.record(stage)
        if not record:
            return State("absent", [f"{stage} has not been run"])
        if record["status"] != "complete":
            how = "did not pass its checks" if record["status"] == "unverified" else "was cut short"
            return State("cut_short", [f"{stage} {how}"])
        before = BEFORE[stage]
        earlier = self.state(before, recipe) if before else State("fresh")
        keys = self._changed_keys(stage, recipe)
        reasons = [*earlier.reasons, *keys, *self._changed_inputs(stage, recipe)]
        for name, digest in record["outputs"].items():
            path = self.folder / name
            if not path.is_file():
                reasons.append(f"{name} is missing")
            elif sha256(path) != digest:
                reasons.append(f"{name} has been changed since {stage} wrote it")
        if not reasons:
            return State("fresh")
        return State("stale", list(dict.fromkeys(reasons)), settings=bool(keys) or earlier.settings)

    def changes(self, stage: str, recipe: Recipe) -> list[str]:
        """What this recipe and these inputs have otherwise than the stage's record, in words."""
        return self._changed_keys(stage, recipe) + self._changed_inputs(stage, recipe)

    def _changed_keys(self, stage: str, recipe: Recipe) -> list[str]:
        then, now = self.record(stage)["recipe"], recipe_keys(recipe, stage)
        return [
            f"{key} is {_brief(now.get(key))}, was {_brief(then.get(key))}"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        ]

    def _changed_inputs(self, stage: str, recipe: Recipe) -> list[str]:
        record, reasons = self.record(stage), list[str]()
        try:
            inputs = self.input_hashes(stage, recipe)
        except DpoError:
            return reasons  # sources that are not on this machine can't be held against what was made of them
        for name in dict.fromkeys([*record["inputs"], *inputs]):
            if name not in inputs:
                # A whole source or model that is not on this machine can't be held against what was made of it.
                group = name.partition("/")[0] + "/"
                if any(other.startswith(group) for other in inputs):
                    reasons.append(f"{name} is gone")
            elif record["inputs"].get(name) != inputs[name]:
                reasons.append(f"{name} has changed")
        return reasons

    def input_hashes(self, stage: str, recipe: Recipe) -> dict[str, str]:
        """sha256 of all that a stage reads and that is on this machine: outside files, and the stage before."""
        files = self.inputs[stage](recipe) if stage in self.inputs else {}
        before = BEFORE[stage]
        if before:
            results = self.record(before).get("outputs", {})
            files = {**files, **{name: self.folder / name for name in results if _is_read_by(stage, name)}}
        return {name: sha256(path) for name, path in sorted(files.items()) if path.is_file()}

    def require(self, stage: str, recipe: Recipe, command: str) -> None:
        """Refuse to go on unless a stage's results are fresh.

        Raises:
            DpoError: with what is missing or has changed, and `command` as the mend.
        """
        state = self.state(stage, recipe)
        if state.fresh:
            return
        missing = state.kind in ("absent", "cut_short")
        what = state.reasons[0] if missing else f"what {stage} made is stale: {'; '.join(state.reasons[:5])}"
        more = "" if len(state.reasons) <= 5 else f" (and {len(state.reasons) - 5} more)"
        hint = f"run `{command}` first" + (", or set again what it was run with (--set)" if state.settings else "")
        raise DpoError(what + more, where=str(self.folder), hint=hint)

    # ---------------------------------------------------------------------------------------------- writing results

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second dpo-cli out of this run; mend what a kill may have left half-renamed."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                for old in [*self.folder.glob(".*.old"), *self["train"].glob(".*.old")]:
                    target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
                    if not target.exists():
                        old.rename(target)
                yield
        except Timeout:
            raise DpoError(
                "another dpo-cli is working on this run", where=str(self.folder), hint="wait for it, or stop it"
            ) from None
        except OSError as error:
            error.filename = error.filename or str(self.folder)  # a failed write does not say where
            raise

    def started(self, stage: str, recipe: Recipe) -> dict[str, Any]:
        """A record of a stage that begins now: what it reads, and with what."""
        keys, inputs = recipe_keys(recipe, stage), self.input_hashes(stage, recipe)
        return {
            "status": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": recipe.seed,
            "fingerprint": fingerprint(keys, inputs),
            "recipe": keys,
            "inputs": inputs,
            "versions": versions(),
            "device": platform.processor() or platform.machine(),
            "git_commit": _git_commit(),
        }

    @contextmanager
    def stage(self, stage: str, recipe: Recipe, record: dict[str, Any] | None = None) -> Iterator[Draft]:
        """Make a stage's results aside; on leaving, rename them into place and write the manifest.

        Everything in the draft's folder replaces its namesake in the stage's folder; for all stages but `train`,
        which keeps its checkpoints and log, what else was there goes. Left by an exception, nothing changes.
        """
        start = time.monotonic()
        record = record or self.started(stage, recipe)
        draft = Draft(self.folder / f".{FOLDERS[stage]}.new", record)
        shutil.rmtree(draft.folder, ignore_errors=True)
        draft.folder.mkdir(parents=True)
        try:
            with writing(draft.folder):
                yield draft
            outputs = {
                f"{FOLDERS[stage]}/{path.relative_to(draft.folder).as_posix()}": sha256(path)
                for path in sorted(draft.folder.rglob("*"))
                if path.is_file()
            }
            if stage == "train":
                self[stage].mkdir(exist_ok=True)
                for item in sorted(draft.folder.iterdir()):
                    replace(item, self[stage] / item.name)
                draft.folder.rmdir()
            else:
                replace(draft.folder, self[stage])
        except BaseException:
            shutil.rmtree(draft.folder, ignore_errors=True)
            raise
        record.setdefault("seconds", round(time.monotonic() - start, 3))
        self.write_record(stage, recipe, {**record, "status": draft.status, "outputs": outputs})


# ----------------------------------------------------------------------------------------------------------- helpers


def recipe_keys(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The recipe keys that a stage reads, flat and without absolute paths: {"train.beta": 0.1, …}.

    A local path counts by its last part; what the files hold counts through their sha256.
    """
    flat: dict[str, Any] = {}

    def flatten(value: Any, key: Key) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                flatten(inner, (*key, name))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                flatten(inner, (*key, index))
        else:
            if isinstance(value, list):
                value = [_movable(inner, (*key, index)) for index, inner in enumerate(value)]
            flat[show_key(key)] = _movable(value, key)

    values = recipe.model_dump(mode="json")
    for read in READS[stage]:
        section, _, name = read.partition(".")
        flatten(values[section][name] if name else values[section], tuple(read.split(".")))
    return flat


def _movable(value: Any, key: Key) -> Any:
    """A local path by its last part, anything else as it is."""
    local = isinstance(value, str) and names_a_path(key) and Path(value).is_absolute()
    return Path(value).name if local else value


def fingerprint(keys: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """One sha256 over what a stage reads; equal on every machine for equal recipe and data."""
    text = json.dumps([keys, inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content. A model's weights are read once a process, as long as the file stays the same one."""
    facts = path.stat()
    if facts.st_size < 2**24:
        return _sha256(path)
    return _sha256_of_large(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: aside, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a folder that stands there is moved aside first and removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        target.rename(old)
    new.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape results; read without importing them."""
    found = {"python": platform.python_version(), "dpo-cli": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _is_read_by(stage: str, output: str) -> bool:
    """Whether a stage reads that file of the stage before it (reports and logs change nothing)."""
    return output.startswith("train/adapter/") if stage in ("eval", "export") else output.endswith(".jsonl")


def _git_commit() -> str | None:
    """The commit of the repository one works in, to find a recipe's history again; None outside of one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
