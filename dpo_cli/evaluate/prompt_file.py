"""`eval --answer FILE`: both models answer a file's prompts, for the judges of AlpacaEval, Arena-Hard or MT-Bench."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli import chat
from dpo_cli.disk import sha256, write_json
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.samples import answer_both, chat_prompt, load_both, too_large
from dpo_cli.inference import in_batches, seed_of
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message, read_jsonl, write_jsonl
from dpo_cli.run import Run, fingerprint
from dpo_cli.store import Store

PROMPTS = ("instruction", "prompt", "question", "turns")  # what the benchmarks call a prompt, the first that is there
CARRIED = ("dataset", "question_id", "category", "cluster", "uid")  # by which their judges know a prompt again
# What is asked, turn after turn: what stands before the first answer, then one message each.
Turns = list[list[Message]]


def answer_file(recipe: Recipe, run: Run, file: Path, *, quiet: bool = False) -> list[Path]:
    """Answer every prompt of a JSON or JSONL file and write both models' answers into `answers/` in the run.

    Prompts become AlpacaEval's list of {instruction, output, generator}, `<file's stem>-tuned.json`, with what the file
    says of them. Questions of several turns (`turns`, as MT-Bench and Arena-Hard have them) become those benchmarks'
    model_answer lines, `<file's stem>-tuned.jsonl`; each model goes on from its own earlier answers. A killed run goes
    on where it was.

    Raises:
        DpoError: the file can't be read, a row has no prompt, or a conversation outgrows the model's positions.
    """
    rows = read_prompts(file)
    numbers: dict[str, int] = {}  # of conversations; one that stands twice is answered once
    places = [numbers.setdefault(json.dumps(asked(row)), len(numbers)) for row in rows]
    talks: list[Turns] = list(map(json.loads, numbers))
    made_from = fingerprint(
        {"seed": recipe.seed, **recipe.eval.model_dump(mode="json")},
        {"prompts": sha256(file), "adapter": sha256(run.adapter / "adapter_model.safetensors")},
    )
    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)
    models = load_both(recipe, run)
    kept = folder / f".{file.stem}-{made_from[:16]}.sqlite"
    step = Step("answering the prompts", quiet=quiet, total=sum(map(len, talks)))
    with Store(kept) as store, step:
        for count in _answer(recipe, *models, talks, store):
            step.advance(count)
        texts = store.all()
    written = []
    for name in ("base", "tuned"):
        answers = [[texts[f"{place}/{turn}"][name] for turn in range(len(talks[place]))] for place in places]
        in_turns = "turns" in rows[0]
        lines = map(_model_answer if in_turns else _alpaca_eval, rows, answers, [f"{recipe.name}-{name}"] * len(rows))
        written.append(folder / f"{file.stem}-{name}.{'jsonl' if in_turns else 'json'}")
        if in_turns:
            write_jsonl(written[-1], lines)
        else:
            write_json(written[-1], list(lines))
    for one in folder.glob(f"{kept.name}*"):
        one.unlink()
    return written


def _answer(recipe: Recipe, model: Any, tokenizer: Any, talks: Sequence[Turns], store: Store) -> Iterator[int]:
    """Answer every turn of all conversations by both models into `store`, batch by batch; yields how many are done."""
    settings, options = recipe.eval, chat.chat_template_kwargs(recipe)
    histories: list[tuple[list[Message], list[Message]]] = [([], []) for _ in talks]  # of base and tuned model
    for turn in range(max(map(len, talks))):
        keys = {f"{number}/{turn}": number for number, talk in enumerate(talks) if turn < len(talk)}
        for number in keys.values():
            for history in histories[number]:
                history += talks[number][turn]
        known = store.get(keys)
        yield len(known)
        prompts = {}
        for key, number in keys.items():
            if key not in known:
                hint = f"prompt {number + 1}: lower eval.max_new_tokens"
                both = histories[number]
                prompts[key] = [chat_prompt(model, tokenizer, one, settings, options, hint) for one in both]

        def work(batch: Sequence[str], prompts: Any = prompts) -> dict[str, dict[str, str]]:
            seeds = [seed_of(recipe.seed, *key.split("/")) for key in batch]
            base, tuned = ([prompts[key][side] for key in batch] for side in (0, 1))
            both = zip(*answer_both(model, tokenizer, base, tuned, seeds, settings), strict=True)
            return {key: {"base": one.text, "tuned": other.text} for key, (one, other) in zip(batch, both, strict=True)}

        longest_first = sorted(prompts, key=lambda key: -len(prompts[key][0]))  # memory runs out at once, or never
        for found in in_batches(longest_first, settings.batch_size, work, lambda _: too_large(settings)):
            store.put(found)
            known |= found
            yield len(found)
        for key, number in keys.items():
            for history, text in zip(histories[number], known[key].values(), strict=True):
                history.append(Message(role="assistant", content=text))


def _alpaca_eval(row: Mapping[str, Any], answers: Sequence[str], called: str) -> dict[str, Any]:
    return _carried(row) | {"instruction": asked(row)[-1][-1]["content"], "output": answers[-1], "generator": called}


def _model_answer(row: Mapping[str, Any], answers: Sequence[str], called: str) -> dict[str, Any]:
    """A line of `model_answer/`, whose turns are what the question's are: text, or {content}."""
    turns = [{"content": one} if isinstance(row["turns"][0], dict) else one for one in answers]
    name = hashlib.sha256(json.dumps([called, row["turns"], answers]).encode()).hexdigest()[:22]
    choices = [{"index": 0, "turns": turns}]
    return _carried(row) | {"answer_id": name, "model_id": called, "choices": choices, "tstamp": time.time()}


def _carried(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in CARRIED if key in row}


def read_prompts(file: Path) -> list[Mapping[str, Any]]:
    """The rows of a JSON list, or of JSONL.

    Raises:
        DpoError: it is no such file, or has a row without a prompt.
    """

    hint = f'write a list of {{"instruction": "…"}}; {", ".join(PROMPTS[1:])} are read too, each kind in its own file'
    try:
        whole = json.loads(file.read_text(encoding="utf-8-sig"))
        rows = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        rows = list(read_jsonl(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DpoError(f"can't read the prompts: {error}", where=str(file), exit_code=USAGE) from error
    for number, row in enumerate(rows or [None], 1):
        if not isinstance(row, dict) or not asked(row) or ("turns" in row) != ("turns" in rows[0]):
            what = f"row {number} has no prompt, or is of another kind than the first"
            raise DpoError(what, where=str(file), hint=hint, exit_code=USAGE)
    return rows


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
