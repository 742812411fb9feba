"""The export formats: a row each, with how it is written and read back, what a dry run and a card say of it."""

from __future__ import annotations

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
from dpo_cli.export.outputs import LAST, Outputs, Placement, Probes
from dpo_cli.export.parity import LIMITS, Check, passed, reported
from dpo_cli.inference import token_logps
from dpo_cli.progress import Step
from dpo_cli.recipe import GgufType, Recipe
from dpo_cli.run import Run

# Bits that llama.cpp's types take a weight on average, for a dry run (its quantize README; the mixed ones are near).
GGUF_BITS: dict[GgufType, float] = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q4_k_m": 4.9,
    "q4_k_s": 4.6, "q3_k_m": 3.9, "q2_k": 3.0,
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What every export is compared with, computed once: the base alone, and the trained adapter on it."""

    base: Path
    placement: Placement
    tokenizer: Any
    probes: Probes
    plain: list[Any]
    tuned: Outputs


@dataclass
class Work:
    """An export that is being made in `out`; `sums` are of its files as they are checked."""

    recipe: Recipe
    run: Run
    expected: Expected
    out: Path
    say: Callable[[str], None]
    files: dict[str, bytes]
    checks: list[Check] = field(default_factory=list)
    sums: dict[Path, str] = field(default_factory=dict)

    def written(self, folder: Path) -> None:
        """Say how large a folder is, and remember what is in it."""
        size = sum(path.stat().st_size for path in folder.iterdir())
        self.say(f"  {folder.name:<8} {size / 1e6:,.1f} MB written, reading it back")
        self.sums |= sums_of(folder)


def sums_of(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def expected(recipe: Recipe, run: Run, base: Path, placement: Placement) -> Expected:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    asked = outputs.probes(recipe, run, tokenizer)
    # Not the adapter switched off: PEFT leaves trained biases in.
    with Step("asking the trained adapter on the 16-bit base"):
        plain = token_logps(outputs.load(base, placement), asked.rows, LAST)
        tuned = outputs.collect(outputs.load(base, placement, adapter=run.adapter), asked, tokenizer)
    return Expected(base, placement, tokenizer, asked, plain, tuned)


def check_gap(recipe: Recipe, run: Run, known: Expected) -> list[Check]:
    """From the model that was trained to the adapter on the 16-bit base, where these are two."""
    rows, tuned = known.probes.rows, known.tuned.logps
    trained = model_files.location(recipe.model.id)
    if recipe.model.load_in_4bit:
        try:
            model: Any = PeftModel.from_pretrained(models.load_base(recipe), str(run.adapter)).eval()
        except DpoError as error:  # an export does without, on a machine that has not trained
            return [reported("gap_to_4bit", f"not measured: {error.message}")]
        same = parity.check_vectors("gap_to_4bit", model.get_base_model(), known.base)
        return same + parity.check_gap("gap_to_4bit", token_logps(model, rows, LAST), tuned, None)
    if trained == base16.name(recipe):
        return []
    model = outputs.load(trained, known.placement, revision=recipe.model.revision, adapter=run.adapter)
    return parity.check_gap("gap_to_trained", token_logps(model, rows, LAST), tuned, LIMITS["bfloat16"])


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
    return _compare(work, work.out / "merged", checks, LIMITS[base16.dtype_16bit(base16.stored(work.expected.base))])


def _merge(work: Work) -> list[Check]:
    """Write the merged model, where it is not there yet."""
    folder, base, adapter = work.out / "merged", work.expected.base, work.run.adapter
    if folder.is_dir():
        return []
    merge.write_merged(base, adapter, folder)
    merge.write_files(work.files, folder)
    checks = parity.check_structure(folder, base)
    return checks + parity.check_weights(folder, base, adapter) if passed(checks) else checks


def _compare(work: Work, folder: Path, checks: list[Check], limits: parity.Limits) -> list[Check]:
    """Load what was written as a user would, and compare; not where its files are broken already."""
    known, name = work.expected, folder.name
    checks = checks + parity.check_tokenizer_files(name, folder, work.files)
    if not passed(checks):
        return checks
    checks += parity.check_template(name, AutoTokenizer.from_pretrained(folder), known.tokenizer)
    checks += parity.check_ends(name, work.files, known.base, known.tokenizer)
    base, adapter = (known.base, folder) if name == "adapter" else (folder, None)
    model = outputs.load(base, known.placement, adapter=adapter)
    found = outputs.collect(model, known.probes, known.tokenizer)
    checks += parity.check_parity(name, found.logps, known.tuned.logps, known.plain, limits)
    return checks + parity.check_answers(name, found, known.tuned, known.probes.texts, limits)


def _gguf(work: Work, folder: Path | None = None) -> list[Check]:
    """One GGUF of the merged model, which is made aside where nobody asked for it."""
    recipe, known, merged = work.recipe, work.expected, work.out / "merged"
    checks = _merge(work)
    if not passed([*work.checks, *checks]):
        return checks
    from dpo_cli.export import gguf, gguf_parity  # an extra: dpo-cli[gguf]

    folder = folder or work.out / "gguf"
    folder.mkdir()
    path = folder / _gguf_name(recipe)
    gguf.write_gguf(merged, recipe.export.gguf, path, recipe.export.llama_cpp)
    work.written(folder)
    return checks + gguf_parity.check_gguf(
        path, recipe.export.gguf, merged, known.probes.rows, known.tuned.logps, known.plain, LAST
    )


def _ollama(work: Work) -> list[Check]:
    """The GGUF, the same file where that format is written too, and its Modelfile."""
    folder, there = work.out / "ollama", work.out / "gguf" / _gguf_name(work.recipe)
    checks: list[Check] = []
    if there.is_file():
        folder.mkdir()
        link(there, folder / there.name)
    elif not (work.out / "gguf").is_dir():
        checks = _gguf(work, folder)
    path = folder / there.name
    if not path.is_file():
        return checks
    ollama.write_modelfile(path, work.expected.tokenizer, work.recipe, folder)
    checks += ollama.check_modelfile(path, work.expected.tokenizer, work.recipe, folder)
    work.sums |= sums_of(folder)
    if there in work.sums:  # a copy that is cut short is no such file
        work.sums[path] = work.sums[there]
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
        beside: what the card of another format in the same repository calls it.
        weights: the format whose checks are about its weights.
    """

    write: Callable[[Work], list[Check]]
    library: str
    sentence: str
    beside: str
    weights: str


FORMATS = {
    "adapter": Format(
        _adapter,
        "peft",
        "A LoRA adapter for {base}, trained with {training}. It holds the trained difference alone and is "
        "loaded on the base in 16-bit.",
        "the adapter alone, in `adapter/`",
        "adapter",
    ),
    "merged": Format(
        _merged,
        "transformers",
        "{base} after {training}: 16-bit weights with the adapter merged in, which load without it.",
        "",  # whose card the repository shows where it is there
        "merged",
    ),
    "gguf": Format(
        _gguf,
        "gguf",
        "{base} after {training}, with the adapter merged in: one {gguf} GGUF file.",
        "a {gguf} GGUF for llama.cpp",
        "gguf",
    ),
    "ollama": Format(
        _ollama,
        "gguf",
        "{base} after {training}, with the adapter merged in: a {gguf} GGUF file and its Modelfile.",
        "a Modelfile for Ollama",
        "gguf",
    ),
}


def planned(recipe: Recipe, run: Run, base: Path, kinds: list[str]) -> list[tuple[str, int]]:
    """List the files of an export that is not made yet, with about their bytes; 0 for small ones not known yet."""
    parameters = base16.parameters(base)
    small = {name: len(content) for name, content in merge.tokenizer_files(base, run.adapter).items()}
    adapter = {name: (run.adapter / name).stat().st_size for name in ("adapter_config.json", merge.WEIGHTS)}
    # A vocabulary in GGUF's words takes about half of what tokenizer.json does.
    size = parameters * GGUF_BITS[recipe.export.gguf] / 8 + small.get("tokenizer.json", 0) / 2
    whole = {_gguf_name(recipe): int(size)}
    contents = {
        "adapter": adapter | small,
        "merged": {"config.json": (base / "config.json").stat().st_size} | merge.planned(2 * parameters) | small,
        "gguf": whole,
        "ollama": whole | {"Modelfile": 0},
    }
    return [
        (f"{kind}/{name}", size) for kind in kinds for name, size in sorted({"README.md": 0, **contents[kind]}.items())
    ]
