"""The stage: write each format, read it back, and compare it with the trained adapter on the 16-bit base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
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

FAILED = "export.failed"  # where an export that fails its checks goes


def export(recipe: Recipe, run: Run, *, quiet: bool = False) -> list[Check]:
    """Write `export.formats` under `runs/<name>/export` with `verify.json`; `upkeep.push` does the rest of hub.

    Returns:
        What was checked, the formats that were kept included.

    Raises:
        DpoError: a format can't be made here, or the 16-bit base can't be had or is not the adapter's; nothing has been
            written then. (exit code 3) a check failed: the files stay for a look, in `export.failed`.
    """
    written = recipe  # what is recorded is the user's; what is loaded is what was trained
    recipe, kinds, base = _require(recipe, run, weights=True)
    tensors = base16.stored(base)
    merge.read_adapter(run.adapter, base, tensors)
    tell: Callable[[str], None] = (lambda line: None) if quiet else say
    figures = evaluated(written, run)
    if not figures:
        tell("  ! eval has not seen this adapter, so the cards say nothing of how good it is")
    with run.stage("export", written) as draft:
        placement = outputs.placement(tensors)
        tell(f"  compared with the trained adapter on the 16-bit base, {placement}")
        commit = base.name if base.parent.name == "snapshots" else None  # huggingface_hub's snapshots/<commit>
        draft.record["merge_base"] = {"id": base16.name(recipe), "commit": commit}
        checks = _make(start(recipe, run, base, placement, draft.folder, tell), kinds)
        kept, gone = _keep_others(written, run, kinds, draft)
        made = {one["name"] for one in checks}
        checks += [one for one in checks_of(run) if format_of(one) in kept and one["name"] not in made]
        write_json(draft.folder / "verify.json", checks)
        draft.record |= {"device": str(placement), "evaluated": figures}
        if not passed(checks):
            replace(draft.folder, run.folder / FAILED)
            raise _unverified(checks, run)
    shutil.rmtree(run.folder / FAILED, ignore_errors=True)
    if kept:
        tell(f"  kept: {', '.join(kept)}, made before of the same adapter (--prune removes what is not named)")
    if gone:
        tell(f"  removed: {', '.join(gone)}, made of another adapter or base, or changed since")
    return checks


def plan(recipe: Recipe, run: Run) -> list[tuple[str, int]]:
    """List the files that `export` would write, with about their bytes; fetches no weights."""
    recipe, kinds, base = _require(recipe, run, weights=False)
    return planned(recipe, run, base, kinds)


def print_planned(recipe: Recipe, planned: Sequence[tuple[str, int]]) -> None:
    """Print a plan: the run's files with their sizes in bytes, and the repository's."""
    formats = recipe.export.formats
    say(f"export would write {len(planned)} files, about {sum(size for _, size in planned) / 1e6:,.1f} MB")
    for name, size in planned:
        say(f"  {f'{size / 1e6:,.1f} MB' if size else '':>15}  {name}")
    if "hub" in formats:
        parts = ((name.split("/", 1), size) for name, size in planned)
        sent = {hub.path_in_repo(kind, name, formats): size for (kind, name), size in parts} | {"verify.json": 0}
        say(hub.listing(recipe, sorted(sent.items())))


def _require(recipe: Recipe, run: Run, *, weights: bool) -> tuple[Recipe, list[str], Path]:
    """Find out whether all can be made here, before anything is written.

    Returns:
        The recipe as it was trained, the formats to write, and the base's folder.
    """
    backends.import_backend(backends.Backend("hf", "export"))
    recipe = models.as_trained(recipe, run.record("train"))
    kinds: list[str] = [kind for kind in FORMATS if kind in recipe.export.formats]
    if "hub" in recipe.export.formats and weights:
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
    return recipe, kinds, base


def _make(work: Work, kinds: list[str]) -> list[Check]:
    """Write the formats, each read back before the next; then the cards, which show the checks."""
    for kind in kinds:
        with Step(f"writing and comparing {kind}", named=False):  # where there is no terminal `written` says as much
            work.checks += FORMATS[kind].write(work)
    if "merged" not in kinds:
        shutil.rmtree(work.out / "merged", ignore_errors=True)
    for kind in kinds:
        if (work.out / kind).is_dir():
            card.write_card(work.recipe, work.run, work.out / kind, kind, work.checks)
    for kind in kinds:
        checked = {path: digest for path, digest in work.sums.items() if path.parent == work.out / kind}
        changed = {path.name for path, _ in sums_of(work.out / kind).items() ^ checked.items()} - {"README.md"}
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


def _unverified(checks: list[Check], run: Run) -> DpoError:
    failed = [check for check in checks if not check["ok"]]
    listed = "; ".join(f"{check['name']} is {check['value']}, limit {check['limit']}" for check in failed[:4])
    listed += f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
    return DpoError(
        f"the export is not the model that was trained: {listed}",
        where=str(run.folder / FAILED / "verify.json"),
        hint=f"check model.merge_base, then run export again; {run['export']} is as it was",
        exit_code=UNVERIFIED,
    )
