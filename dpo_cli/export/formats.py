"""The export formats: a row each, with how it is written and read back, what a dry run and a card say of it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer

from dpo_cli import model_files, models
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export import merge, ollama, outputs, parity
from dpo_cli.export.base import INDEX
from dpo_cli.export.outputs import LAST, Expected, Placement
from dpo_cli.export.parity import LIMITS, Check, passed
from dpo_cli.inference import token_logps
from dpo_cli.progress import Step
from dpo_cli.recipe import GgufType, Recipe
from dpo_cli.run import Run

# Bits that llama.cpp's types take a weight on average, for a dry run (its quantize README; the mixed ones are near).
GGUF_BITS: dict[GgufType, float] = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q4_k_m": 4.9,
    "q4_k_s": 4.6, "q3_k_m": 3.9, "q2_k": 3.0,
}  # fmt: skip


@dataclass
class Work:
    """An export that is being made in `out`; `sums` are of its files as they are checked."""

    recipe: Recipe
    run: Run
    base: Path
    placement: Placement
    tokenizer: Any
    expected: Expected
    files: dict[str, bytes]
    out: Path
    say: Callable[[str], None]
    checks: list[Check] = field(default_factory=list)
    sums: dict[Path, str] = field(default_factory=dict)

    def written(self, folder: Path) -> None:
        """Say how large a folder is, and remember what is in it."""
        size = sum(path.stat().st_size for path in folder.iterdir())
        self.say(f"  {folder.name:<8} {size / 1e6:,.1f} MB written, reading it back")
        self.sums |= sums_of(folder)


def start(recipe: Recipe, run: Run, base: Path, placement: Placement, out: Path, say: Callable[[str], None]) -> Work:
    """Compute what every export is compared with, and check what was trained against it."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    files = merge.tokenizer_files(base, run.adapter)
    merge.name_turn_end(files, base, tokenizer)
    asked = outputs.probes(recipe, run, tokenizer)
    # Not the adapter switched off: PEFT leaves trained biases in.
    with Step("asking the trained adapter on the 16-bit base"):
        plain = token_logps(outputs.load(base, placement), asked.rows, LAST)
        tuned = outputs.collect(outputs.load(base, placement, adapter=run.adapter), asked, tokenizer)
    work = Work(recipe, run, base, placement, tokenizer, Expected(asked, plain, tuned), files, out, say)
    work.checks += _check_gap(work)
    return work


def sums_of(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def _check_gap(work: Work) -> list[Check]:
    """From the model that was trained to the adapter on the 16-bit base, where these are two."""
    recipe, adapter, rows, tuned = work.recipe, work.run.adapter, work.expected.probes.rows, work.expected.tuned.logps
    trained = model_files.location(recipe.model.id)
    if recipe.model.load_in_4bit:
        try:
            model: Any = PeftModel.from_pretrained(models.load_base(recipe), str(adapter)).eval()
        except DpoError as error:  # an export does without, on a machine that has not trained
            return [{"name": "gap_to_4bit", "value": f"not measured: {error.message}", "limit": None, "ok": True}]
        same = parity.check_vectors("gap_to_4bit", model.get_base_model(), work.base)
        return same + parity.check_gap("gap_to_4bit", token_logps(model, rows, LAST), tuned)
    if trained == base16.name(recipe):
        return []
    model = outputs.load(trained, work.placement, revision=recipe.model.revision, adapter=adapter)
    return parity.check_gap("gap_to_trained", token_logps(model, rows, LAST), tuned, *LIMITS["bfloat16"][:2])


def link(source: Path | str, target: Path | str) -> None:
    """Link a file under a second name, or copy it where the file system can't."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------------- written, read back


def _adapter(work: Work) -> list[Check]:
    recipe, adapter, folder = work.recipe, work.run.adapter, work.out / "adapter"
    name, revision = base16.name(recipe), base16.revision(recipe)
    merge.write_adapter(adapter, name, revision, folder)
    merge.write_files(work.files, folder)
    work.written(folder)
    checks = parity.check_adapter_files(folder, adapter, name, revision)
    return _compare(work, folder, checks, LIMITS["float32"])  # the very same weights


def _merged(work: Work) -> list[Check]:
    checks = _merge(work)
    work.written(work.out / "merged")
    return _compare(work, work.out / "merged", checks, LIMITS[base16.dtype_16bit(base16.stored(work.base))])


def _merge(work: Work) -> list[Check]:
    """Write the merged model, where it is not there yet."""
    folder, adapter = work.out / "merged", work.run.adapter
    if folder.is_dir():
        return []
    merge.write_merged(work.base, adapter, folder)
    merge.write_files(work.files, folder)
    checks = parity.check_structure(folder, work.base)
    return checks + parity.check_weights(folder, work.base, adapter) if passed(checks) else checks


def _compare(work: Work, folder: Path, checks: list[Check], limits: parity.Limits) -> list[Check]:
    """Load what was written as a user would, and compare; not where its files are broken already."""
    name, trained = folder.name, work.tokenizer
    checks = checks + parity.check_tokenizer_files(name, folder, work.files)
    if not passed(checks):
        return checks
    checks += parity.check_template(name, AutoTokenizer.from_pretrained(folder), trained)
    checks += parity.check_ends(name, work.files, work.base, trained)
    base, adapter = (work.base, folder) if name == "adapter" else (folder, None)
    found = outputs.collect(outputs.load(base, work.placement, adapter=adapter), work.expected.probes, trained)
    checks += parity.check_parity(name, found.logps, work.expected, limits)
    return checks + parity.check_answers(name, found, work.expected, limits)


def _gguf(work: Work, name: str = "gguf") -> list[Check]:
    """One GGUF of the merged model, which is made aside where nobody asked for it."""
    checks = _merge(work)
    if not passed([*work.checks, *checks]):
        return checks
    from dpo_cli.export import gguf, gguf_parity  # an extra: dpo-cli[gguf]

    folder, merged, export = work.out / name, work.out / "merged", work.recipe.export
    folder.mkdir()
    path = folder / _gguf_name(work.recipe)
    gguf.write_gguf(merged, export.gguf, path, export.llama_cpp)
    work.written(folder)
    return checks + gguf_parity.check_gguf(path, export.gguf, merged, work.expected)


def _ollama(work: Work) -> list[Check]:
    """The GGUF, the same file where that format is written too, and its Modelfile."""
    folder, there = work.out / "ollama", work.out / "gguf" / _gguf_name(work.recipe)
    checks: list[Check] = []
    if there.is_file():
        folder.mkdir()
        link(there, folder / there.name)
    else:
        checks = _gguf(work, "ollama")
    if folder.is_dir():  # not where the merged model is wrong already
        file = folder / ollama.NAME
        file.write_text(ollama.modelfile(there.name, work.tokenizer, work.recipe), encoding="utf-8")
        differ = ollama.prompts_differ(file.read_text(encoding="utf-8"), work.tokenizer, work.recipe)
        checks.append(parity.equal("ollama.prompts_differ", differ, 0))
        work.sums |= sums_of(folder)
        if there in work.sums:  # a copy that is cut short is no such file
            work.sums[folder / there.name] = work.sums[there]
    return checks


def _gguf_name(recipe: Recipe) -> str:
    return f"{recipe.name}-{recipe.export.gguf}.gguf"


# ------------------------------------------------------------------------------------------------------- the formats


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        write: writes `export/<name>/`, reads it back, and returns the checks.
        library: what loads it, in the Hub's words.
        sentence: what it is, for its card: of {base}, {training} and {gguf}, the type of the weights.
    """

    write: Callable[[Work], list[Check]]
    library: str
    sentence: str


FORMATS = {
    "adapter": Format(
        _adapter,
        "peft",
        "A LoRA adapter for {base}, trained with {training}. It holds the trained difference alone and is "
        "loaded on the base in 16-bit.",
    ),
    "merged": Format(
        _merged,
        "transformers",
        "{base} after {training}: 16-bit weights with the adapter merged in, which load without it.",
    ),
    "gguf": Format(
        _gguf,
        "gguf",
        "{base} after {training}, with the adapter merged in: one {gguf} GGUF file.",
    ),
    "ollama": Format(
        _ollama,
        "gguf",
        "{base} after {training}, with the adapter merged in: a {gguf} GGUF file and its Modelfile.",
    ),
}


def planned(recipe: Recipe, run: Run, base: Path, kinds: list[str]) -> list[tuple[str, int]]:
    """List the files of an export that is not made yet, with about their bytes; 0 for small ones not known yet."""
    shapes = base16.shapes(base)
    sizes, split = {name: 2 * math.prod(shape) for name, shape in shapes.items()}, merge.shards(shapes)
    merged = {file: sum(map(sizes.__getitem__, names)) for file, names in split.filename_to_tensors.items()}
    merged |= {"config.json": (base / "config.json").stat().st_size} | ({INDEX: 0} if split.is_sharded else {})
    small = {name: len(content) for name, content in merge.tokenizer_files(base, run.adapter).items()}
    # A vocabulary in GGUF's words takes about half of what tokenizer.json does.
    size = sum(sizes.values()) * GGUF_BITS[recipe.export.gguf] / 16 + small.get("tokenizer.json", 0) / 2
    gguf = {_gguf_name(recipe): int(size)}
    adapter = {name: (run.adapter / name).stat().st_size for name in ("adapter_config.json", merge.WEIGHTS)}
    contents = {"adapter": adapter | small, "merged": merged | small, "gguf": gguf, "ollama": gguf | {ollama.NAME: 0}}
    return [
        (f"{kind}/{name}", size) for kind in kinds for name, size in sorted({"README.md": 0, **contents[kind]}.items())
    ]
