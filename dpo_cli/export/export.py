"""The stage: write each format, read it back, and compare it with the trained adapter on the 16-bit base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

from dpo_cli import backends, models
from dpo_cli.disk import replace, write_json
from dpo_cli.distribution import install_command
from dpo_cli.errors import UNVERIFIED, DpoError
from dpo_cli.export import base as base16
from dpo_cli.export import card, hub, merge, ollama, outputs
from dpo_cli.export.formats import FORMATS, Work, link, planned, start, sums_of
from dpo_cli.export.parity import Check, equal, passed
from dpo_cli.export.upkeep import FOLDERS, checks_of, evaluated, format_of
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.run import Draft, Run
from dpo_cli.show import say

FAILED = "export.failed"  # where an export that fails its checks goes, while `export` holds one that passed


@dataclass(frozen=True)
class Exported:
    """What `export` prints: the folders it wrote and every check; or, of a dry run, the files it would write."""

    folders: list[Path] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    planned: list[tuple[str, int]] = field(default_factory=list)


def export(recipe: Recipe, run: Run, *, dry_run: bool = False, quiet: bool = False) -> Exported:
    """Write `export.formats` under `runs/<name>/export` with `verify.json`; `upkeep.push` does the rest of hub.

    Args:
        dry_run: write nothing, fetch no weights, and list the files instead, with about their sizes.

    Raises:
        DpoError: a format can't be made here, or the 16-bit base can't be had or is not the adapter's; nothing has been
            written then. (exit code 3) a check failed: the files stay for a look, in `export` with status unverified,
            or in `export.failed` where `export` holds what has passed.
    """
    backends.import_backend(backends.Backend("hf", "export"))
    written = recipe
    recipe = models.as_trained(recipe, run.record("train"))  # for what is loaded; what is recorded is the user's
    kinds: list[str] = [kind for kind in FORMATS if kind in recipe.export.formats]
    base = _require(recipe, run, kinds, weights=not dry_run)
    if dry_run:
        return Exported(planned=planned(recipe, run, base, kinds))
    try:
        tensors = base16.stored(base)
    except ValueError as error:
        raise DpoError(
            f"the 16-bit base can't be read: {error}", where=str(base), hint="fetch or write it anew"
        ) from error
    merge.read_adapter(run.adapter, base, tensors)

    def say(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    figures = evaluated(written, run)
    if not figures:
        say("  ! eval has not seen this adapter, so the cards say nothing of how good it is")
    with run.stage("export", written) as draft:
        placement = outputs.placement(tensors)
        say(f"  compared with the trained adapter on the 16-bit base, {placement}")
        draft.record["merge_base"] = {"id": base16.name(recipe), "commit": base16.commit_of(base)}
        checks = _make(start(recipe, run, base, placement, draft.folder, say), kinds)
        kept, gone = _keep_others(written, run, kinds, draft)
        made = {one["name"] for one in checks}
        checks += [one for one in checks_of(run) if format_of(one) in kept and one["name"] not in made]
        write_json(draft.folder / "verify.json", checks)
        draft.record |= {"device": str(placement), "evaluated": figures}
        verified = passed(checks)
        if not verified and run.record("export").get("status") == "complete":
            replace(draft.folder, run.folder / FAILED)
            raise _unverified(checks, run.folder / FAILED, f"; {run['export']} is still the one that passed before")
        draft.status = "complete" if verified else "unverified"
    if not verified:
        raise _unverified(checks, run["export"])
    shutil.rmtree(run.folder / FAILED, ignore_errors=True)
    if kept:
        say(f"  kept: {', '.join(kept)}, made before of the same adapter (--prune removes what is not named)")
    if gone:
        say(f"  removed: {', '.join(gone)}, made of another adapter or base, or changed since")
    return Exported([run["export"] / kind for kind in kinds], checks)


def print_planned(recipe: Recipe, planned: Sequence[tuple[str, int]]) -> None:
    """Print what `export --dry-run` found: the run's files with their sizes in bytes, and the repository's."""
    formats = recipe.export.formats
    say(f"export would write {len(planned)} files, about {sum(size for _, size in planned) / 1e6:,.1f} MB")
    for name, size in planned:
        say(f"  {f'{size / 1e6:,.1f} MB' if size else '':>15}  {name}")
    if "hub" in formats:
        parts = ((name.split("/", 1), size) for name, size in planned)
        sent = {hub.path_in_repo(kind, name, formats): size for (kind, name), size in parts} | {"verify.json": 0}
        say(hub.listing(recipe, sorted(sent.items())))


def _require(recipe: Recipe, run: Run, kinds: list[str], *, weights: bool) -> Path:
    """Find out whether all can be made here, before anything is written; returns the base's folder."""
    if "hub" in recipe.export.formats:
        hub.repository(recipe)
        if weights:
            hub.login(recipe)
    base = base16.find(recipe, weights=weights)
    if {"gguf", "ollama"} & set(kinds):
        if not find_spec("gguf"):
            raise DpoError("a GGUF needs the gguf package", where="export.gguf", hint=install_command("gguf"))
        from dpo_cli.export import gguf

        gguf.require(base, recipe.export.gguf, recipe.export.llama_cpp)
    if "ollama" in kinds:
        ollama.require(AutoTokenizer.from_pretrained(run.adapter), recipe)
    base16.compare(recipe, base)
    return base


def _make(work: Work, kinds: list[str]) -> list[Check]:
    """Write the formats, each read back before the next; then the cards, which show the checks."""
    for kind in kinds:
        with Step(f"writing and comparing {kind}", named=False):  # where there is no terminal `written` says as much
            work.checks += FORMATS[kind].write(work)
    if "merged" not in kinds:
        shutil.rmtree(work.out / "merged", ignore_errors=True)
    folders = {kind: work.out / kind for kind in kinds}
    for kind, folder in folders.items():
        if folder.is_dir():
            card.write_card(work.recipe, work.run, folder, kind, work.checks)
    for kind, folder in folders.items():
        checked = {path: digest for path, digest in work.sums.items() if path.parent == folder}
        changed = {path.name for path, _ in sums_of(folder).items() ^ checked.items()} - {"README.md"}
        work.checks.append(equal(f"{kind}.changed_since", sorted(changed), []))
    return work.checks


def _keep_others(recipe: Recipe, run: Run, kinds: list[str], draft: Draft) -> tuple[list[str], list[str]]:
    """Take over formats that are not made now and still are what was checked; returns these and the rest.

    Kept is what was made of the same adapter and base and is unchanged on disk. Its files are linked where the file
    system can, for they are gigabytes.
    """
    record = run.record("export")
    there = [kind for kind in FOLDERS if kind not in kinds and (run["export"] / kind).is_dir()]
    same = record.get("status") == "complete" and record["inputs"] == run.input_hashes("export", recipe)
    same = same and record.get("merge_base") == draft.record["merge_base"]
    kept = [kind for kind in there if same and _unchanged(run, record["outputs"], f"export/{kind}/")]
    for kind in kept:
        shutil.copytree(run["export"] / kind, draft.folder / kind, copy_function=link)
    return kept, [kind for kind in there if kind not in kept]


def _unchanged(run: Run, results: Mapping[str, str], folder: str) -> bool:
    names = [name for name in results if name.startswith(folder)]
    return bool(names) and all(
        (run.folder / name).is_file() and run.digest(name, run.folder / name) == results[name] for name in names
    )


def _unverified(checks: list[Check], folder: Path, more: str = "") -> DpoError:
    failed = [check for check in checks if not check["ok"]]
    listed = "; ".join(f"{check['name']} is {check['value']}, limit {check['limit']}" for check in failed[:4])
    listed += f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
    return DpoError(
        f"the export is not the model that was trained: {listed}{more}",
        where=str(folder / "verify.json"),
        hint="check model.merge_base, then run export again",
        exit_code=UNVERIFIED,
    )
