"""The stage: write each format, read it back, and compare it with the trained adapter on the 16-bit base."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli import backends, model_files, models
from dpo_cli.disk import replace, sha256, write_json
from dpo_cli.errors import UNVERIFIED, DpoError
from dpo_cli.export import base as base16
from dpo_cli.export import card, gguf, gguf_parity, hub, merge, ollama, outputs, parity
from dpo_cli.export.outputs import Outputs, Placement, Probes
from dpo_cli.export.parity import LIMITS, Check, equal, passed, reported
from dpo_cli.inference import token_logps
from dpo_cli.recipe import GgufType, Recipe
from dpo_cli.run import Draft, Run

Say = Callable[[str], None]

FOLDERS: tuple[str, ...] = ("adapter", "merged", "gguf", "ollama")  # formats that are written, in this order
FAILED = "export.failed"  # where an export that fails its checks goes, while `export` holds one that passed

# Bits that llama.cpp's types take a weight on average, for a dry run (its quantize README; the mixed ones are near).
GGUF_BITS: dict[GgufType, float] = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q4_k_m": 4.9,
    "q4_k_s": 4.6, "q3_k_m": 3.9, "q2_k": 3.0,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What `export` prints: the folders it wrote and every check; or, of a dry run, the files it would write."""

    folders: list[Path] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    planned: list[tuple[str, int]] = field(default_factory=list)


def export(recipe: Recipe, run: Run, *, dry_run: bool = False, quiet: bool = False) -> Exported:
    """Write `export.formats` under `runs/<name>/export` with `verify.json`; `push` does the rest of hub.

    Args:
        dry_run: write nothing, fetch no weights, and list the files instead.

    Raises:
        DpoError: a format can't be made here, or the 16-bit base can't be had or is not the adapter's; nothing has been
            written then. (exit code 3) a check failed: the files stay for a look, in `export` with status unverified,
            or in `export.failed` where `export` holds what has passed.
    """
    backends.import_backend(backends.Backend("hf", "export"))
    written = recipe
    recipe = models.as_trained(recipe, run.record("train"))  # for what is loaded; what is recorded is the user's
    kinds: list[str] = [kind for kind in FOLDERS if kind in recipe.export.formats]
    if "hub" in recipe.export.formats:
        hub.repository(recipe)
        if not dry_run:
            hub.login(recipe)
    base = base16.find(recipe, weights=not dry_run)
    if {"gguf", "ollama"} & set(kinds):
        gguf.require(base, recipe.export.gguf)
    if "ollama" in kinds:
        ollama.require(_tokenizer(run.adapter), recipe)
    base16.compare(recipe, base)
    if dry_run:
        return Exported(planned=_plan(recipe, run, base, kinds))
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
        place = outputs.placement(tensors)
        say(f"  compared with the trained adapter on the 16-bit base, {place}")
        expected = _expected(recipe, run, base, place)
        draft.record["merge_base"] = {"id": base16.name(recipe), "commit": base16.commit_of(base)}
        checks = _make(recipe, run, expected, kinds, draft.folder, say)
        kept, gone = _keep_others(written, run, kinds, draft)
        made = {one["name"] for one in checks}
        checks += [one for one in _checks(run) if _format_of(one) in kept and one["name"] not in made]
        write_json(draft.folder / "verify.json", checks)
        draft.record["device"] = str(place)
        draft.record["evaluated"] = figures
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


def prune(recipe: Recipe, run: Run) -> list[str]:
    """Remove the formats of a complete export that `export.formats` does not name; returns their names."""
    record = run.record("export")
    gone = [kind for kind in FOLDERS if kind not in recipe.export.formats and (run["export"] / kind).is_dir()]
    if not gone or record.get("status") != "complete":
        return []
    write_json(run["export"] / "verify.json", [one for one in _checks(run) if _format_of(one) not in gone])
    removed = tuple(f"export/{kind}/" for kind in gone)
    record["outputs"] = {name: digest for name, digest in record["outputs"].items() if not name.startswith(removed)}
    record["outputs"]["export/verify.json"] = sha256(run["export"] / "verify.json")
    run.write_record("export", recipe, record)  # first: a kill leaves folders that nothing lists, not a broken record
    for kind in gone:
        shutil.rmtree(run["export"] / kind)
    return gone


def _keep_others(recipe: Recipe, run: Run, kinds: list[str], draft: Draft) -> tuple[list[str], list[str]]:
    """Take over formats that are not made now and still are what was checked; returns these and the rest.

    Kept is what was made of the same adapter and base and is unchanged on disk. Its files are linked where the file
    system can, for they are gigabytes.
    """
    record, others = run.record("export"), [kind for kind in FOLDERS if kind not in kinds]
    there = [kind for kind in others if (run["export"] / kind).is_dir()]
    same = record.get("status") == "complete" and record["inputs"] == run.input_hashes("export", recipe)
    same = same and record.get("merge_base") == draft.record["merge_base"]
    kept = [kind for kind in there if same and _unchanged(run, record["outputs"], kind)]
    for kind in kept:
        shutil.copytree(run["export"] / kind, draft.folder / kind, copy_function=link)
    return kept, [kind for kind in there if kind not in kept]


def _unchanged(run: Run, outputs: Mapping[str, str], kind: str) -> bool:
    listed = {name: digest for name, digest in outputs.items() if name.startswith(f"export/{kind}/")}
    return bool(listed) and all(
        (run.folder / name).is_file() and run.digest(name, run.folder / name) == digest
        for name, digest in listed.items()
    )


def _checks(run: Run) -> list[Check]:
    """The checks of the export that is there; none before the first."""
    file = run["export"] / "verify.json"
    return base16.read_json(file) if file.is_file() else []


def _format_of(check: Check) -> str:
    return check["name"].partition(".")[0]


def evaluated(recipe: Recipe, run: Run) -> str | None:
    """What tells one evaluation of this very adapter from another, for the cards show its figures; None without."""
    if not run.state("eval", recipe).fresh:
        return None
    digest: str = run.record("eval")["outputs"]["eval/metrics.json"]
    return digest


def renew_cards(recipe: Recipe, run: Run) -> bool:
    """Write the cards of a complete export anew where an evaluation has come after it; else do nothing.

    What has been pushed counts as not pushed then.
    """
    record, figures = run.record("export"), evaluated(recipe, run)
    if record.get("status") != "complete" or figures in (None, record.get("evaluated")):
        return False
    checks = _checks(run)
    for kind in FOLDERS:
        if (run["export"] / kind).is_dir():
            card.write_card(recipe, run, run["export"] / kind, kind, checks)
            record["outputs"][f"export/{kind}/README.md"] = sha256(run["export"] / kind / "README.md")
    record["evaluated"], record["hub"] = figures, None
    run.write_record("export", recipe, record)
    return True


def push(recipe: Recipe, run: Run, *, quiet: bool = False) -> str | None:
    """Push a complete export where `export.formats` names hub and this one has not been pushed yet.

    By itself, for a push that fails must not cost the export. The manifest keeps the address. The cards are brought up
    to date first.

    Returns:
        The repository's address; None where there is nothing to push.

    Raises:
        DpoError: as `hub.push` has it.
    """
    if renew_cards(recipe, run) and not quiet:
        print("export: eval's figures are in the cards now", flush=True)
    record = run.record("export")
    if "hub" not in recipe.export.formats or record.get("status") != "complete" or record.get("hub"):
        return None
    record["hub"] = hub.push(recipe, run["export"], recipe.export.formats, quiet)
    run.write_record("export", recipe, record)
    return str(record["hub"])


# ------------------------------------------------------------------------------------------------------------ pieces


@dataclass(frozen=True)
class Expected:
    """What every export is compared with, computed once: the base by itself, and the trained adapter on it."""

    base: Path
    place: Placement
    tokenizer: Any
    probes: Probes
    plain: list[Any]
    tuned: Outputs

    def ask(self, folder: Path, adapter: Path | None = None) -> Outputs:
        return outputs.collect(outputs.load(folder, self.place, adapter=adapter), self.probes, self.tokenizer)


def _expected(recipe: Recipe, run: Run, base: Path, place: Placement) -> Expected:
    tokenizer = _tokenizer(run.adapter)
    asked = outputs.probes(recipe, run, tokenizer)
    # Not the adapter switched off: PEFT leaves trained biases in.
    plain = token_logps(outputs.load(base, place), asked.rows, outputs.LAST)
    tuned = outputs.collect(outputs.load(base, place, adapter=run.adapter), asked, tokenizer)
    return Expected(base, place, tokenizer, asked, plain, tuned)


def _make(recipe: Recipe, run: Run, expected: Expected, kinds: list[str], out: Path, say: Say) -> list[Check]:
    """Write the formats, each read back before the next; then the cards, which tell of the checks."""
    checks = _gap(recipe, run, expected)
    seals: dict[Path, str] = {}
    files = merge.tokenizer_files(expected.base, run.adapter)
    merge.name_turn_end(files, expected.base, expected.tokenizer)
    if "adapter" in kinds:
        name = base16.name(recipe)
        merge.write_adapter(run.adapter, name, base16.revision(recipe), out / "adapter")
        merge.write_files(files, out / "adapter")
        say(_written(out / "adapter"))
        seals |= _seals(out / "adapter")
        own = parity.check_adapter_files(out / "adapter", run.adapter, name, base16.revision(recipe))
        checks += _read_back(expected, out / "adapter", own, files)
    if kinds != ["adapter"]:
        merge.write_merged(expected.base, run.adapter, out / "merged")
        merge.write_files(files, out / "merged")
        seals |= _seals(out / "merged")
        own = parity.check_structure(out / "merged", expected.base)
        if passed(own):
            own += parity.check_weights(out / "merged", expected.base, run.adapter)
        if "merged" in kinds:
            say(_written(out / "merged"))
            checks += _read_back(expected, out / "merged", own, files)
        else:  # made aside, for the GGUF, whose own checks read the weights back
            checks += own
    if {"gguf", "ollama"} & set(kinds) and passed(checks):
        checks += _ggufs(recipe, expected, kinds, out, say, seals)
    if "merged" not in kinds:
        shutil.rmtree(out / "merged", ignore_errors=True)
    for kind in kinds:
        if (out / kind).is_dir():
            card.write_card(recipe, run, out / kind, kind, checks)
    return checks + _unbroken(kinds, out, seals)


def _seals(folder: Path) -> dict[Path, str]:
    """The sha256 of every file as it is checked."""
    return {path: sha256(path) for path in folder.iterdir() if path.is_file()}


def _unbroken(kinds: list[str], out: Path, seals: Mapping[Path, str]) -> list[Check]:
    """What leaves is what was checked: the same files, to the bit, and the cards."""
    checks = []
    for kind in kinds:
        now = _seals(out / kind) if (out / kind).is_dir() else {}
        sealed = {path: digest for path, digest in seals.items() if path.parent == out / kind}
        changed = {path.name for path, _ in now.items() ^ sealed.items()} - {"README.md"}
        checks.append(equal(f"{kind}.changed_since", sorted(changed), []))
    return checks


def _read_back(expected: Expected, folder: Path, checks: list[Check], files: dict[str, bytes]) -> list[Check]:
    """Load what was written as a user would, and compare; not where its files are broken already."""
    kind = folder.name
    checks = checks + parity.check_tokenizer_files(kind, folder, files)
    if not passed(checks):
        return checks
    checks += parity.check_template(kind, _tokenizer(folder), expected.tokenizer)
    checks += parity.check_ends(kind, files, expected.base, expected.tokenizer)
    if kind == "adapter":
        said, limits = expected.ask(expected.base, folder), LIMITS["float32"]  # the very same weights
    else:
        said, limits = expected.ask(folder), LIMITS[base16.dtype_16bit(base16.stored(folder))]
    checks += parity.check_parity(kind, said.logps, expected.tuned.logps, expected.plain, limits)
    return checks + parity.check_answers(kind, said, expected.tuned, expected.probes.texts, limits)


def _ggufs(
    recipe: Recipe, expected: Expected, kinds: list[str], out: Path, say: Say, seals: dict[Path, str]
) -> list[Check]:
    """One GGUF, in every folder that wants it."""
    folders = [out / kind for kind in ("gguf", "ollama") if kind in kinds]
    files = [folder / _gguf_name(recipe) for folder in folders]
    for folder in folders:
        folder.mkdir()
    gguf.write_gguf(out / "merged", recipe.export.gguf, files[0])
    say(_written(folders[0]))
    seals |= _seals(folders[0])
    rows, tuned = expected.probes.rows, expected.tuned.logps
    kind, merged = recipe.export.gguf, out / "merged"
    checks = gguf_parity.check_gguf(files[0], kind, merged, rows, tuned, expected.plain, outputs.LAST)
    for file in files[1:]:
        link(files[0], file)
    if "ollama" in kinds:
        ollama.write_modelfile(files[-1], expected.tokenizer, recipe, folders[-1])
        checks += ollama.check_modelfile(files[-1], expected.tokenizer, recipe, folders[-1])
        seals |= _seals(folders[-1]) | {files[-1]: seals[files[0]]}  # a copy that is cut short is no such file
    return checks


def _gap(recipe: Recipe, run: Run, expected: Expected) -> list[Check]:
    """From the model that was trained to the adapter on the 16-bit base, where these are two."""
    rows, tuned = expected.probes.rows, expected.tuned.logps
    trained = model_files.location(recipe.model.id)
    if recipe.model.load_in_4bit:
        from peft import PeftModel

        try:
            model: Any = PeftModel.from_pretrained(models.load_base(recipe), str(run.adapter)).eval()
        except DpoError as error:  # an export does without, on a machine that has not trained
            return [reported("gap_to_4bit", f"not measured: {error.message}")]
        same = parity.check_vectors("gap_to_4bit", model.get_base_model(), expected.base)
        return same + parity.check_gap("gap_to_4bit", token_logps(model, rows, outputs.LAST), tuned, None)
    if trained == base16.name(recipe):
        return []
    model = outputs.load(trained, expected.place, revision=recipe.model.revision, adapter=run.adapter)
    said = token_logps(model, rows, outputs.LAST)
    return parity.check_gap("gap_to_trained", said, tuned, LIMITS["bfloat16"])


def _plan(recipe: Recipe, run: Run, base: Path, kinds: list[str]) -> list[tuple[str, int]]:
    """The files of an export that is not made yet, with their bytes: (`merged/model.safetensors`, 3441150000), …

    Bytes of weights are exact for adapter and merged and near for a GGUF; small files that are not there yet count 0.
    """
    tensors = base16.expected(base)
    merge.read_adapter(run.adapter, base, tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    small = {name: len(content) for name, content in merge.tokenizer_files(base, run.adapter).items()}
    config = (run.adapter / "adapter_config.json").stat().st_size
    adapter = {"adapter_config.json": config, merge.WEIGHTS: (run.adapter / merge.WEIGHTS).stat().st_size}
    # A vocabulary in GGUF's words takes about half of what tokenizer.json does.
    size = parameters * GGUF_BITS[recipe.export.gguf] / 8 + small.get("tokenizer.json", 0) / 2
    whole = {_gguf_name(recipe): int(size)}
    contents = {
        "adapter": adapter | small,
        "merged": {"config.json": (base / "config.json").stat().st_size} | merge.planned(tensors) | small,
        "gguf": whole,
        "ollama": whole | {"Modelfile": 0},
    }
    return [
        (f"{kind}/{name}", size) for kind in kinds for name, size in sorted({"README.md": 0, **contents[kind]}.items())
    ]


def link(source: Path | str, target: Path | str) -> None:
    """Link a file under a second name, or copy it where the file system can't."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _gguf_name(recipe: Recipe) -> str:
    return f"{recipe.name}-{recipe.export.gguf}.gguf"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _written(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"  {folder.name:<8} {size / 1e6:,.1f} MB written, reading it back"


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
