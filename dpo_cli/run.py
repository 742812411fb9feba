"""A run's folder: its paths, its manifest, and the rules that keep it honest.

Disk is the only channel between stages. A stage writes aside, its results are renamed into place, and the manifest
is written last: what the manifest calls complete is complete. The manifest also holds what each stage read, so a
later stage can tell, and say, what has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_cli import __version__
from dpo_cli.disk import (
    LARGE,
    aside,
    linked,
    read_json,
    remove,
    replace,
    sha256,
    stamp,
    write_json,
    write_text,
    writing,
)
from dpo_cli.errors import DpoError
from dpo_cli.machine import device_name, git_commit, versions
from dpo_cli.recipe import Recipe, dump
from dpo_cli.recipe.reads import recipe_keys

# The stages whose results each stage starts from, and the folder its own results are in. `sets`, the pairs of
# `eval.sets`, is a part of `eval` with a state of its own: another test set makes nothing else stale.
BEFORE: dict[str, tuple[str, ...]] = {
    "prepare": (), "train": ("prepare",), "sets": ("prepare",), "eval": ("train", "sets"), "export": ("train",),
}  # fmt: skip
FOLDERS = {"prepare": "data", "train": "train", "sets": "sets", "eval": "eval", "export": "export"}

# A finished training goes on where one of these was raised, and nothing else has changed.
GO_ON = ("train.num_train_epochs", "train.max_steps")

InputFiles = Callable[[Recipe], dict[str, Path]]


@dataclass(frozen=True)
class Reason:
    """Why a stage's results are not what a run of it would make now.

    Attributes:
        text: the reason in words.
        kind: `setting` (a recipe key), `input` (a file that it read), `edited` (a result), or `missing`.
        stage: whose setting, input or result it is.
        name: the key or the file.
    """

    text: str
    kind: str
    stage: str
    name: str = ""


@dataclass
class Draft:
    """A stage's results while they are being made: files go into `folder`, facts into `record`."""

    folder: Path
    record: dict[str, Any]


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

    def manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            match read_json(path):
                case {"stages": dict(stages)} as manifest if all(isinstance(one, dict) for one in stages.values()):
                    return dict(manifest)
            raise ValueError("it lists no stages")
        except FileNotFoundError:
            return {"name": self.folder.name, "stages": {}}
        except ValueError as error:  # not UTF-8, not JSON, or not a manifest
            raise DpoError(
                f"the run's manifest can't be read: {error}", where=str(path), hint=f"delete {path} and run again"
            ) from error

    def record(self, stage: str) -> dict[str, Any]:
        """What the manifest says of a stage; empty where it never ran."""
        return dict(self.manifest()["stages"].get(stage, {}))

    def forget(self, stage: str) -> None:
        """Take a stage's record out of the manifest, before its results go."""
        manifest = self.manifest()
        if manifest["stages"].pop(stage, None) is not None:
            write_json(self.folder / "manifest.json", manifest)

    def write_record(self, stage: str, recipe: Recipe, record: dict[str, Any]) -> None:
        """Put a stage's record into the manifest, and beside it the recipe that the stage was run with."""
        write_text(self.folder / "recipe.yaml", dump(recipe))
        manifest = self.manifest()
        manifest["dpo_cli"] = __version__
        manifest["stages"][stage] = record
        write_json(self.folder / "manifest.json", manifest)

    def stale(self, stage: str, recipe: Recipe) -> list[Reason]:
        """Say why a stage's results are not whole and made from this recipe and these inputs; empty where they are."""
        record = self.record(stage)
        if not record:
            return [Reason(f"{stage} has not been run", "missing", stage)]
        if record["status"] != "complete":
            how = "did not pass its checks" if record["status"] == "unverified" else "was cut short"
            return [Reason(f"{stage} {how}", "missing", stage)]
        found = [reason for before in stages_before(stage, recipe) for reason in self.stale(before, recipe)]
        found += self._changed(stage, recipe)
        for name, digest in record["outputs"].items():
            path = self.folder / name
            if not path.is_file():
                found.append(Reason(f"{name} is missing", "missing", stage, name))
            elif self.digest(name, path) != digest:
                found.append(Reason(f"{name} has been changed since {stage} wrote it", "edited", stage, name))
        return found

    def fresh(self, stage: str, recipe: Recipe) -> bool:
        """Whether a stage's results are complete and nothing that they were made from has changed."""
        return not self.stale(stage, recipe)

    def changes(self, stage: str, recipe: Recipe) -> list[Reason]:
        """What this recipe and these inputs have otherwise than the record of a stage, and of the stages before it."""
        before = [one for one in stages_before(stage, recipe) if self.record(one)]
        return [*(reason for one in before for reason in self.changes(one, recipe)), *self._changed(stage, recipe)]

    def _changed(self, stage: str, recipe: Recipe) -> list[Reason]:
        """Keys and files that a stage reads and that are not as its record has them."""
        record = self.record(stage)
        then, now = record["recipe"], recipe_keys(recipe, stage)
        if now.get("lora.target_modules") == "auto":  # the model's config, which would say more, is not here
            now["lora.target_modules"] = then.get("lora.target_modules")
        reasons = [
            Reason(f"{key} is {_brief(now.get(key))}, was {_brief(then.get(key))}", "setting", stage, key)
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        ]
        try:
            inputs = self.input_hashes(stage, recipe)
        except DpoError:
            return reasons  # sources that are not on this machine can't be compared with what was made of them
        groups = {name.partition("/")[0] for name in inputs}
        for name in dict.fromkeys([*record["inputs"], *inputs]):
            if name in inputs and record["inputs"].get(name) != inputs[name]:
                reasons.append(Reason(f"{name} has changed", "input", stage, name))
            # A whole source or model that is not on this machine can't be compared with what was made of it.
            elif name not in inputs and name.partition("/")[0] in groups:
                reasons.append(Reason(f"{name} is gone", "input", stage, name))
        return reasons

    def input_hashes(self, stage: str, recipe: Recipe) -> dict[str, str]:
        """sha256 of all that a stage reads and that is on this machine: outside files, and the stage before."""
        return {name: self.digest(name, path) for name, path in self._input_files(stage, recipe).items()}

    def _input_files(self, stage: str, recipe: Recipe) -> dict[str, Path]:
        files = dict(self.inputs[stage](recipe)) if stage in self.inputs else {}
        for before in stages_before(stage, recipe):
            results = self.record(before).get("outputs", {})
            files |= {name: self.folder / name for name in results if _is_read_by(stage, name)}
        return {name: path for name, path in sorted(files.items()) if path.is_file()}

    def digest(self, name: str, path: Path) -> str:
        """sha256 of a file by its name in the manifest; a large one is read again only where size or times changed."""
        facts = stamp(path)
        for record in self.manifest()["stages"].values() if facts[0] >= LARGE else ():
            *known, digest = record.get("large", {}).get(name, [""])
            if known == facts:
                return str(digest)
        return sha256(path)

    def require(self, stage: str, recipe: Recipe, command: str) -> None:
        """Refuse to go on unless a stage's results are fresh.

        Raises:
            DpoError: with what is missing or has changed, and `command` as the fix.
        """
        found = self.stale(stage, recipe)
        if not found:
            return
        texts = list(dict.fromkeys(reason.text for reason in found))
        more = f" (and {len(texts) - 5} more)" if len(texts) > 5 else ""
        what = f"what {stage} made is stale: {'; '.join(texts[:5])}{more}"
        if (found[0].kind, found[0].stage, found[0].name) == ("missing", stage, ""):
            what = texts[0]
        hint = f"run `{command}` first"
        if stage == "train" and any(one.kind != "missing" and one.name not in GO_ON for one in found):
            hint = f"run `{command} --fresh` first"  # without it a finished adapter is not replaced
        if any(one.kind == "setting" for one in found):
            hint += ", or set again what it was run with (--set)"
        raise DpoError(what, where=str(self.folder), hint=hint)

    def unwritable(self, error: OSError) -> DpoError:
        """Say that this run's folder can't be there."""
        what = f"can't write to {self.folder} ({error.strerror})"
        return DpoError(what, hint="choose another folder with --runs-dir")

    @contextmanager
    def lock(self, view: bool = False) -> Iterator[None]:
        """Keep a second dpo-cli out of this run; clear away what a kill may have left half-renamed.

        Args:
            view: nothing will be written, so that a run which may only be read needs no lock.
        """
        if view and not os.access(self.folder, os.W_OK):
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from error
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                self._clear()
                yield
        except Timeout:
            raise DpoError(
                "another dpo-cli is working on this run", where=str(self.folder), hint="wait for it, or stop it"
            ) from None
        except OSError as error:
            error.filename = error.filename or str(self.folder)  # a failed write does not say where
            raise

    def _clear(self) -> None:
        """Move back what was moved aside and never replaced; remove what else a killed stage left behind."""
        paths = [self.folder / name for name in (*FOLDERS.values(), "recipe.yaml", "manifest.json")]
        paths += [self["train"] / name for name in ("adapter", "log.jsonl", "metrics.json")]
        for path in paths:
            old = aside(path, "old")
            if old.exists() and not path.exists():
                old.rename(linked(path))
            remove(old)
            remove(aside(path, "new"))
        work, done = self.folder / ".eval", self.record("eval").get("samples")
        if done and any(done[:16] in path.name for path in work.glob("*")):
            remove(work)  # answers that stand in the results by now

    def started(self, stage: str, recipe: Recipe) -> dict[str, Any]:
        """A record of a stage that begins now: what it reads, and with what."""
        large = _stamps(self._input_files(stage, recipe))  # before they are read, so that no later change is missed
        keys, inputs = recipe_keys(recipe, stage), self.input_hashes(stage, recipe)
        return {
            "status": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": recipe.seed,
            "fingerprint": fingerprint(keys, inputs),
            "recipe": keys,
            "inputs": inputs,
            "large": {name: [*facts, inputs[name]] for name, facts in large.items() if name in inputs},
            "versions": versions(),
            "device": device_name(stage),
            "git_commit": git_commit(),
        }

    @contextmanager
    def stage(self, stage: str, recipe: Recipe, record: dict[str, Any] | None = None) -> Iterator[Draft]:
        """Make a stage's results aside; on leaving, rename them into place and write the manifest.

        Everything in the draft's folder replaces its namesake in the stage's folder; for all stages but `train`,
        which keeps its checkpoints, the other results that the manifest names go. A person's own files stay. Left by
        an exception, nothing changes.
        """
        start = time.monotonic()
        record = record or self.started(stage, recipe)
        draft = Draft(aside(self[stage], "new"), record)
        shutil.rmtree(draft.folder, ignore_errors=True)
        draft.folder.mkdir(parents=True)
        try:
            with writing(draft.folder):
                yield draft
            files = [path for path in sorted(draft.folder.rglob("*")) if path.is_file()]
            outputs = {self._name(stage, draft.folder, path): sha256(path) for path in files}
            self._keep_own_files(stage, draft.folder)
            if stage == "train":
                linked(self[stage]).mkdir(parents=True, exist_ok=True)
                for item in sorted(draft.folder.iterdir()):
                    replace(item, self[stage] / item.name)
                draft.folder.rmdir()
            else:
                replace(draft.folder, self[stage])
        except BaseException:
            shutil.rmtree(draft.folder, ignore_errors=True)
            raise
        record.setdefault("seconds", round(time.monotonic() - start, 3))
        large = _stamps({name: self.folder / name for name in outputs})
        record["large"] |= {name: [*facts, outputs[name]] for name, facts in large.items()}
        self.write_record(stage, recipe, {**record, "status": "complete", "outputs": outputs})

    @staticmethod
    def _name(stage: str, folder: Path, path: Path) -> str:
        """A result as the manifest calls it, such as data/train.jsonl."""
        return f"{FOLDERS[stage]}/{path.relative_to(folder).as_posix()}"

    def _keep_own_files(self, stage: str, draft: Path) -> None:
        """Link what a person put among a stage's results into the folder that takes their place."""
        results = self.record(stage).get("outputs", {})
        folders = [path for path in draft.iterdir() if path.is_dir()] if stage == "train" else [draft]
        for folder in folders:
            there = self[stage] / folder.relative_to(draft)
            for path in sorted(there.rglob("*")):
                kept = folder / path.relative_to(there)
                own = self._name(stage, self[stage], path) not in results
                if results and own and (path.is_file() or path.is_symlink()) and not kept.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        os.link(path, kept, follow_symlinks=False)
                    except OSError:  # a file system without links
                        shutil.copy2(path, kept, follow_symlinks=False)


def fingerprint(keys: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """One sha256 over what a stage reads; equal on every machine for equal recipe and data."""
    text = json.dumps([keys, inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamps(files: Mapping[str, Path]) -> dict[str, list[int]]:
    """Size and times of those files that are too large to be read each time."""
    found = {name: stamp(path) for name, path in files.items()}
    return {name: facts for name, facts in found.items() if facts[0] >= LARGE}


def stages_before(stage: str, recipe: Recipe) -> list[str]:
    """The stages that a stage starts from with this recipe, which may have no test sets."""
    return [one for one in BEFORE[stage] if one != "sets" or recipe.eval.sets]


def _is_read_by(stage: str, output: str) -> bool:
    """Whether a stage reads that file of a stage before it (reports and logs change nothing)."""
    if stage in ("eval", "export"):
        return output.startswith(("train/adapter/", "sets/"))
    return output in ("data/train.jsonl", "data/eval.jsonl")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
