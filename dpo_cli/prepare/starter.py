"""`dpo-cli init`: a first recipe for a data file and this machine."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.driver import Driver, find_driver
from dpo_cli.errors import DpoError
from dpo_cli.language import language
from dpo_cli.prepare.detect import ONE_ANSWER, WRITE_COLUMNS
from dpo_cli.prepare.feed import Broken
from dpo_cli.prepare.read import Read, look
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.train import train_model
from dpo_cli.records import CandidateSet

LOOKED_AT = 2000  # rows from which languages, lengths and answers are read off
LANGUAGES = 0.02  # share of the prompts below which a language is not named
# Models by the memory of the card in GB: Qwen3 in 4 bits for DPO at 1,024 tokens leaves a third of it free.
MODELS = ((22, "Qwen/Qwen3-8B"), (15, "unsloth/Qwen3-4B-unsloth-bnb-4bit"), (7, "unsloth/Qwen3-1.7B-unsloth-bnb-4bit"))
SMALLEST = "Qwen/Qwen3-0.6B"
BUILT_IN = "builtin:tiny-qwen3"
BUILT_IN_DATA = "builtin:style-ultrafeedback-en"
FEW = 1000  # prompts below which a step of 24 pairs leaves too few steps


def starter(source: str = BUILT_IN_DATA, folder: Path = Path()) -> str:
    """Write a recipe for a data file, data folder or Hub data set, as YAML with comments.

    Args:
        source: its path, or its id on the Hub.
        folder: where the recipe will stand; a path is written relative to it.

    Raises:
        DpoError: it can't be read, or its layout can't be detected.
    """
    local = Path(source).expanduser()
    known = str(local.resolve()) if local.exists() else source
    folder = folder.resolve()
    read, columns = _look(known)
    sets = [row for row in islice(read.sets(), LOOKED_AT) if not isinstance(row, Broken)]
    if not sets:
        raise DpoError(
            f"no row of {source} can be read as {read.layout}",
            hint="dpo-cli prepare says why, row by row",
            where=source,
        )
    model, why = _model(find_driver())
    method, reason = _method(sets)
    given: Any = train_model(method)()
    step = 8 if len(sets) < FEW else 24
    rate = 8.5e-4 if model == BUILT_IN else given.learning_rate
    written = source
    if local.exists():
        path = local.resolve()
        written = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
    spoken = Counter(one.language or language(one.prompt[-1]["content"]) for one in sets)
    [tongue, *others] = spoken
    agreed = "" if others or tongue == "und" else f", language: {tongue}"  # else each row decides
    lines = [
        f"# {_seen(sets, read.layout, spoken)}",
        "# The rest has defaults: dpo-cli check … --all prints them. Every key: recipes/README.md.",
        f"model: {{id: {model}}}  # {why}",
        "data:",
        "  sources:",
        f"    - {{id: {_scalar(written)}, layout: {read.layout}{columns}{agreed}}}",
        "train:",
        f"  method: {method}{reason}",
        f"  learning_rate: {rate:.1e}  # lower it where eval says that the text suffers",
        f"  gradient_accumulation_steps: {step // given.per_device_train_batch_size}  # {step} rows a step",
        "  num_train_epochs: 1",
        "export: {formats: [adapter, merged]}  # gguf, ollama and hub are others",
    ]
    return "\n".join(lines) + "\n"


def _look(source: str) -> tuple[Read, str]:
    """Read the data as they are, by the columns that are likely meant, or as one answer a prompt; and those columns."""

    def read(**more: Any) -> Read:
        sources = [{"id": source, **more}]
        return look(Recipe.model_validate({"model": {"id": BUILT_IN}, "data": {"sources": sources}}), 0)

    try:
        return read(), ""
    except DpoError as error:
        if error.hint == ONE_ANSWER:
            return read(layout="chat"), ""
        columns = (error.hint or "").partition(WRITE_COLUMNS)[2]
        if not columns:
            raise
        return read(columns=yaml.safe_load(columns)), f", columns: {columns}"


def _seen(sets: list[CandidateSet], layout: str, spoken: Counter[str]) -> str:
    named = [name for name, count in spoken.most_common() if count >= LANGUAGES * len(sets)]
    answers = sorted(len(answer.text) for one in sets for answer in one.candidates) or [0]
    rows = f"the first {len(sets):,} prompts" if len(sets) == LOOKED_AT else f"{len(sets):,} prompts"
    typical = answers[len(answers) // 2]
    return f"{rows}, layout {layout}, in {' and '.join(named)}; half of the answers have over {typical:,} characters"


def _method(sets: list[CandidateSet]) -> tuple[str, str]:
    if sum(len(one.candidates) > 1 for one in sets) >= len(sets) / 2:
        return "dpo", ""
    scores = {answer.score for one in sets if one.labelled for answer in one.candidates}
    if len(scores) > 1:
        return "kto", "  # one answer a prompt, called good or bad"
    return "sft", "  # one answer a prompt"


def _model(driver: Driver | None) -> tuple[str, str]:
    """The largest Qwen3 that the card takes, and why; the built-in one where there is no card."""
    cards = driver.cards if driver else ()
    if not cards:
        return BUILT_IN, "a toy that trains on any laptop, as there is no NVIDIA card: to try the steps"
    card = max(cards, key=lambda one: one.total)
    size = card.total / 1e9
    return next((name for least, name in MODELS if size >= least), SMALLEST), f"{card.name}, {size:.0f} GB"


def _scalar(text: str) -> str:
    return (
        text if re.fullmatch(r"[\w./~-]+", text) and not text.startswith("-") else json.dumps(text, ensure_ascii=False)
    )
