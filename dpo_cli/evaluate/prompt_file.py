"""`eval --answer FILE`: both models answer a file's prompts, for the judges of AlpacaEval, Arena-Hard or MT-Bench."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli import backends, chat, models
from dpo_cli.disk import sha256, write_json
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.samples import sample_pairs
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message, Pair, read_jsonl
from dpo_cli.run import Run, fingerprint
from dpo_cli.store import Store

PROMPTS = ("instruction", "prompt", "question", "turns")  # what the benchmarks call a prompt, the first that is there
CARRIED = ("dataset", "question_id", "category", "cluster", "uid")  # by which their judges know a prompt again


def answer_file(recipe: Recipe, run: Run, file: Path, *, quiet: bool = False) -> list[Path]:
    """Answer every prompt of a JSON or JSONL file and write `answers/<file's stem>-base.json` and `-tuned.json`.

    Each is AlpacaEval's list of {instruction, output, generator}, with what the file says of the prompt. A killed run
    goes on where it was.

    Raises:
        DpoError: the file can't be read, or a row has no prompt.
    """
    rows = read_prompts(file)
    options = chat.chat_template_kwargs(recipe)
    pairs = [Pair(str(number), asked(row), [], [], "", "", chat_template_kwargs=options) for number, row in rows]
    backends.import_backend(backends.Backend("hf", "evaluation"))
    settings = recipe.eval.model_copy(update={"prompts": len(pairs)})
    made_from = fingerprint(
        {"seed": recipe.seed, **settings.model_dump(mode="json")},
        {"prompts": sha256(file), "adapter": sha256(run.adapter / "adapter_model.safetensors")},
    )
    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)
    model, tokenizer = models.load_tuned(models.as_trained(recipe, run.record("train")), run.adapter)
    kept = folder / f".{file.stem}-{made_from[:16]}.sqlite"
    with Store(kept) as store:
        found = sample_pairs(model, tokenizer, pairs, settings, recipe.seed, store, progress=not quiet)
    samples = {json.dumps(one.prompt): one for one in found}  # a prompt that stands twice is answered once
    written = []
    for name in ("base", "tuned"):
        answers = [
            {
                **{key: row[key] for key in CARRIED if key in row},
                "instruction": pair.prompt[-1]["content"],
                "output": getattr(samples[json.dumps(pair.prompt)], name).text,
                "generator": f"{recipe.name}-{name}",
            }
            for (_, row), pair in zip(rows, pairs, strict=True)
        ]
        written.append(folder / f"{file.stem}-{name}.json")
        write_json(written[-1], answers)
    for one in folder.glob(f"{kept.name}*"):
        one.unlink()
    return written


def read_prompts(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows of a JSON list, or of JSONL, with their numbers from 1.

    Raises:
        DpoError: it is no such file, or has a row without a prompt.
    """
    if not file.is_file():
        raise DpoError("there is no such file of prompts", where=str(file), exit_code=USAGE)
    try:
        whole = json.loads(file.read_text(encoding="utf-8-sig"))
        rows = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        rows = list(read_jsonl(file))
    except UnicodeDecodeError as error:
        raise DpoError("the file of prompts is not UTF-8", where=str(file), exit_code=USAGE) from error
    found = list(enumerate(rows, 1))
    for number, row in found:
        if not isinstance(row, dict) or not asked(row):
            raise DpoError(
                f"row {number} has no prompt",
                where=str(file),
                hint=f'write a list of {{"instruction": "…"}}; {", ".join(PROMPTS[1:])} are read too',
                exit_code=USAGE,
            )
    if not found:
        raise DpoError("the file holds no prompts", where=str(file), exit_code=USAGE)
    return found


def asked(row: Mapping[str, Any]) -> list[Message]:
    """The conversation that a row asks to be continued; empty where it holds none. Of several turns, the first."""
    value = next((row[name] for name in PROMPTS if row.get(name)), None)
    if isinstance(value, Sequence) and not isinstance(value, str) and value and "role" not in value[0]:
        value = value[0]["content"] if isinstance(value[0], dict) else value[0]
    if isinstance(value, str):
        return [Message(role="user", content=value)] if value.strip() else []
    turns = value if isinstance(value, list) else []
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns]
