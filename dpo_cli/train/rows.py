"""The rows that train: those of `data/train.jsonl` and `data/eval.jsonl`, with the types that `prepare` gave them.

Nothing is inferred from the text, as Arrow's own JSON reader does it: an answer that looks like a date stays text, and
a score that only a late row has is a number from the first row on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, disable_progress_bars

from dpo_cli import processes
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.train import language_of
from dpo_cli.records import chooses, read_jsonl
from dpo_cli.run import fingerprint
from dpo_cli.train.methods import METHODS

# What trainers call a row's tokens: its prompt's, and its answers', of a pair and a labelled row, or of a list.
PROMPT, ANSWERS, LIST = "prompt_ids", ("chosen_ids", "rejected_ids", "completion_ids"), "answer_ids"


def train_rows(recipe: Recipe, path: Path) -> Dataset:
    """The training rows as the method's trainer reads them; on disk, so that TRL's tokenisation is cached.

    Datasets caches by the file's content, whatever its name and its time.
    """
    features = _features(path)

    def columns() -> Iterator[dict[str, Any]]:
        for row in read_jsonl(path):
            yield {name: row[name] for name in features}

    disable_progress_bars()  # a line for each pass over the rows, here and in TRL
    content = fingerprint({"features": str(features)}, {"rows": sha256(path)})
    dataset = Dataset.from_generator(columns, features=features, fingerprint=content)
    return METHODS[recipe.train.method].rows(dataset, recipe.seed)


def held_out_rows(recipe: Recipe, path: Path) -> dict[str, Dataset]:
    """The held-out rows by language, so that TRL logs `eval_en_loss`, `eval_zh_loss` and so on.

    Where they choose the adapter it is half of them: `eval` reports the others.

    Raises:
        DpoError: nothing was held out, or `engine.early_stopping` waits for a language that no held-out row has.
    """
    by_language: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(path):
        if chooses(row) or not recipe.keeps_best:
            by_language.setdefault(row["language"], []).append(row)
    if not by_language:
        raise DpoError(
            "nothing was held out, so there is nothing to evaluate on while training",
            where=recipe.where("train", "eval_strategy"),
            hint="raise data.eval_fraction, add data, or leave out train.eval_strategy",
        )
    stopping = recipe.engine.early_stopping
    metric = stopping.metric if stopping else recipe.train.metric_for_best_model or ""
    metric = f"eval_{metric.removeprefix('eval_')}"
    language = language_of(metric)
    if language and language not in by_language:
        key = ("engine", "early_stopping", "metric") if stopping else ("train", "metric_for_best_model")
        raise DpoError(
            f"{metric} is never measured: the held-out pairs are in {', '.join(sorted(by_language))}",
            where=recipe.where(*key),
            hint="name one of these languages, or none for all of them: eval_loss",
        )
    features = _features(path)

    def dataset(rows: list[dict[str, Any]]) -> Dataset:
        wanted = [{name: row[name] for name in features} for row in rows]
        return METHODS[recipe.train.method].rows(Dataset.from_list(wanted, features=features), recipe.seed)

    return {language: dataset(rows) for language, rows in sorted(by_language.items())}


def check_answers(recipe: Recipe, tokenised: Dataset, what: str) -> list[str]:
    """Whether the answers are there once they are tokens: a chat template may leave them out, or cut them.

    Args:
        tokenised: the trainer's own rows, which are called `what`: pairs, rows or prompts.

    Returns:
        A remark where single rows teach nothing.

    Raises:
        DpoError: rows have no answer tokens, or nothing tells most rows' answers apart.
    """
    columns = [name for name in (*ANSWERS, LIST) if name in tokenised.column_names]
    empty, alike, seen = list[str](), list[str](), set[tuple[int, ...]]()
    for row in tokenised.select_columns(["id", *columns]):
        answers = _answers(row)
        different = {tuple(answer) for answer in answers}
        if not all(answers):
            empty.append(row["id"])
        if len(answers) > 1 and len(different) == 1:
            alike.append(row["id"])
        seen = seen if len(seen) > 1 else seen | different
    total = len(tokenised)
    differ = len(seen) > 1 or (total == 1 and not alike)
    if not seen or (differ and not empty and len(alike) <= total / 2):
        return [f"! in {len(alike)} of {total} {what} all answers have the same tokens"] if alike else []
    named = [*empty, *alike]
    problem = "have an answer without tokens" if empty else "have answers that all come to the same tokens"
    which = f": {', '.join(named[:3])}{' …' if named[3:] else ''}" if named else ""
    raise DpoError(
        f"{len(empty or alike) or total} of {total} {what} {problem}, so there is nothing to learn{which}",
        where=recipe.where("model", "id"),
        hint="the chat template leaves answers out: look at them with `dpo-cli prepare --preview 3`",
    )


def check_fills_a_step(recipe: Recipe, rows: int) -> None:
    """Raise a DpoError where `dataloader_drop_last` would leave nothing of so many rows."""
    train = recipe.train
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes.count()
    if train.dataloader_drop_last and rows < step:
        raise DpoError(
            f"nothing to train on: a step takes {step} rows, there are {rows}, and what fills no step is dropped",
            where=recipe.where("train", "dataloader_drop_last"),
            hint="remove it, or lower train.gradient_accumulation_steps",
        )


def lengths_of(data: Dataset) -> list[tuple[int, ...]]:
    """Of each tokenised row the tokens of its prompt and of each of its answers."""
    columns = [name for name in (PROMPT, *ANSWERS, LIST) if name in data.column_names]
    return [row_lengths(row) for row in data.select_columns(columns)]


def row_lengths(row: dict[str, Any]) -> tuple[int, ...]:
    """`lengths_of` a row."""
    return len(row[PROMPT]), *map(len, _answers(row))


def _answers(row: dict[str, Any]) -> list[list[int]]:
    return [row[name] for name in ANSWERS if name in row] + row.get(LIST, [])


def _features(path: Path) -> Features:
    """The columns of a `data/*.jsonl` that trainers read, with their types; which ones, its first row says."""
    first = next(read_jsonl(path))
    messages = List({"role": Value("string"), "content": Value("string")})
    known = {
        "id": Value("string"),
        **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), messages),
        "label": Value("bool"),
        "candidates": List({"text": Value("string"), "score": Value("float64")}),
        "chat_template_kwargs": {name: Value("bool") for name in first["chat_template_kwargs"]},
    }
    return Features({name: kind for name, kind in known.items() if name in first})
