"""`eval --answer FILE`: both models answer a file's prompts, for the judges of AlpacaEval, Arena-Hard or MT-Bench."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dpo_cli import backends, chat, models
from dpo_cli.disk import sha256, write_json
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.samples import too_large
from dpo_cli.inference import Sampling, generate, in_batches, seed_of
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message, read_jsonl, write_jsonl
from dpo_cli.run import Run, fingerprint
from dpo_cli.store import Store

PROMPTS = ("instruction", "prompt", "question", "turns")  # what the benchmarks call a prompt, the first that is there
CARRIED = ("dataset", "question_id", "category", "cluster", "uid")  # by which their judges know a prompt again
Turns = list[
    list[Message]
]  # what is asked, turn after turn: what stands before the first answer, then one message each


def answer_file(recipe: Recipe, run: Run, file: Path, *, quiet: bool = False) -> list[Path]:
    """Answer every prompt of a JSON or JSONL file and write both models' answers into `answers/` in the run.

    Prompts become AlpacaEval's list of {instruction, output, generator}, `<file's stem>-tuned.json`, with what the file
    says of them. Questions of several turns (`turns`, as MT-Bench and Arena-Hard have them) become those benchmarks'
    model_answer lines, `<file's stem>-tuned.jsonl`; each model goes on from its own earlier answers. A killed run goes
    on where it was.

    Raises:
        DpoError: the file can't be read, a row has no prompt, or a conversation outgrows the model's positions.
    """
    rows = [row for _, row in read_prompts(file)]
    asks = {json.dumps(turns): turns for turns in map(asked, rows)}  # a prompt that stands twice is answered once
    talks, numbers = list(asks.values()), {key: number for number, key in enumerate(asks)}
    places = [numbers[json.dumps(asked(row))] for row in rows]
    backends.import_backend(backends.Backend("hf", "evaluation"))
    made_from = fingerprint(
        {"seed": recipe.seed, **recipe.eval.model_dump(mode="json")},
        {"prompts": sha256(file), "adapter": sha256(run.adapter / "adapter_model.safetensors")},
    )
    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)
    model, tokenizer = models.load_tuned(models.as_trained(recipe, run.record("train")), run.adapter)
    kept = folder / f".{file.stem}-{made_from[:16]}.sqlite"
    written = []
    step = Step("answering the prompts", quiet=quiet, total=2 * sum(map(len, talks)))
    with Store(kept) as store, step:
        for name in ("base", "tuned"):
            for steps in _answered(recipe, model, tokenizer, talks, store, name):
                step.advance(steps)
            texts = store.all()
            answers = [[texts[key] for key in _keys(name, place, talks[place])] for place in places]
            called = f"{recipe.name}-{name}"
            if "turns" in rows[0]:
                written.append(folder / f"{file.stem}-{name}.jsonl")
                write_jsonl(written[-1], map(_model_answer, rows, answers, [called] * len(rows)))
            else:
                written.append(folder / f"{file.stem}-{name}.json")
                write_json(written[-1], list(map(_alpaca_eval, rows, answers, [called] * len(rows))))
    for one in folder.glob(f"{kept.name}*"):
        one.unlink()
    return written


def _keys(name: str, number: int, turns: Turns) -> list[str]:
    return [f"{name}/{number}/{turn}" for turn in range(len(turns))]


def _answered(
    recipe: Recipe, model: Any, tokenizer: Any, talks: Sequence[Turns], store: Store, name: str
) -> Iterator[int]:
    """Answer every turn of all conversations by one model into `store`, batch by batch; yields how many are done."""
    settings, options = recipe.eval, chat.chat_template_kwargs(recipe)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)
    for turn in range(max(map(len, talks))):
        prompts: dict[int, list[int]] = {}
        for number, turns in enumerate(talks):
            keys = _keys(name, number, turns)
            said = store.get(keys)
            if turn >= len(turns) or keys[turn] in said:
                yield int(turn < len(turns))
                continue
            talk = [*turns[0]]
            for key, more in zip(keys, turns[1 : turn + 1], strict=False):
                talk += [Message(role="assistant", content=said[key]), *more]
            prompts[number] = chat.chat_tokens(tokenizer, talk, add_generation_prompt=True, **options)
            room = getattr(model.config, "max_position_embeddings", None)
            if room and len(prompts[number]) + settings.max_new_tokens > room:
                what = f"prompt {number + 1} has {len(prompts[number]):,} tokens in turn {turn + 1}"
                raise DpoError(f"{what}, too many for the model's {room:,} positions", hint="lower eval.max_new_tokens")

        def work(batch: Sequence[int], prompts: dict[int, list[int]] = prompts, turn: int = turn) -> dict[str, str]:
            seeds = [seed_of(recipe.seed, str(number), turn) for number in batch]
            ids = [prompts[number] for number in batch]
            with models.as_reference(model) if name == "base" else nullcontext():
                answers = generate(model, tokenizer, ids, sampling, seeds)
            return {f"{name}/{number}/{turn}": one.text for number, one in zip(batch, answers, strict=True)}

        longest_first = sorted(prompts, key=lambda number: -len(prompts[number]))
        for texts in in_batches(longest_first, settings.batch_size, work, lambda _: too_large(settings)):
            store.put(texts)
            yield len(texts)


def _alpaca_eval(row: Mapping[str, Any], answers: Sequence[str], called: str) -> dict[str, Any]:
    carried = {key: row[key] for key in CARRIED if key in row}
    return {**carried, "instruction": asked(row)[-1][-1]["content"], "output": answers[-1], "generator": called}


def _model_answer(row: Mapping[str, Any], answers: Sequence[str], called: str) -> dict[str, Any]:
    """A line of `model_answer/`, whose turns are what the question's are: text, or {content}."""
    turns = [{"content": one} if isinstance(row["turns"][0], dict) else one for one in answers]
    name = hashlib.sha256(json.dumps([called, row["turns"], answers]).encode()).hexdigest()[:22]
    carried = {key: row[key] for key in CARRIED if key in row}
    choices = [{"index": 0, "turns": turns}]
    return {**carried, "answer_id": name, "model_id": called, "choices": choices, "tstamp": time.time()}


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
    if len({"turns" in row for _, row in found}) > 1:
        hint = "put them into two files: their answers are written in different forms"
        raise DpoError("some rows have turns and some have none", where=str(file), hint=hint, exit_code=USAGE)
    if not found:
        raise DpoError("the file holds no prompts", where=str(file), exit_code=USAGE)
    return found


def asked(row: Mapping[str, Any]) -> Turns:
    """What a row asks, turn after turn; empty where it asks nothing."""
    value = next((row[name] for name in PROMPTS if row.get(name)), None)
    if isinstance(value, str):
        value = [value]
    turns = value if isinstance(value, list) else []
    if turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return [[Message(role=turn["role"], content=turn["content"]) for turn in turns]]
    texts = [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]
    known = [text for text in texts if isinstance(text, str) and text.strip()]
    return [[Message(role="user", content=text)] for text in known] if len(known) == len(texts) else []
