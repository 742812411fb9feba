"""The test sets of `eval.sets`: pairs of other sources, which `eval` scores beside the held-out ones.

A test set is scored whole, so that its figures mean the same in every run: the recipe's own filters, which choose what
is worth learning, have no say in it. Only what is no pair, or can't be read by the model, is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from dpo_cli import chat
from dpo_cli.disk import write_json
from dpo_cli.prepare import filters, pipeline, remarks, tokens
from dpo_cli.prepare.dedup import Sketches
from dpo_cli.prepare.formats import pair_rows
from dpo_cli.prepare.funnel import Entry, Funnel, RowStore
from dpo_cli.prepare.pipeline import Rows
from dpo_cli.prepare.read import look
from dpo_cli.prepare.sources import source_files
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.sections import FILTERS, Filters, NearDuplicate, TooLong
from dpo_cli.records import read_jsonl, write_jsonl
from dpo_cli.run import Run

# Thoughts and end tokens around an answer are cut as in training; what would steer the chat template drops the pair.
FILTERS = Filters(
    **{
        **dict.fromkeys(FILTERS, False),
        **dict.fromkeys(("think", "markers", "contradicts_scores", "tie"), True),
        "too_long": TooLong(max_prompt=1),
    }
)


def read_sets(recipe: Recipe, run: Run) -> None:
    """Read the test sets into the run's `sets`, a part of `eval` with a state of its own; see `prepare_sets`."""
    with run.stage("sets", recipe) as draft:
        draft.record["revisions"] = prepare_sets(recipe, run.train_pairs, draft.folder)


def prepare_sets(recipe: Recipe, train_pairs: Path, folder: Path) -> dict[str, str]:
    """Write pairs.jsonl, the pairs of every test set with its name as their source, and report.json into `folder`.

    report.json has of every set {in, kept, dropped, overlap}: its prompts, and how many of those kept are, or nearly
    are, prompts that were trained on.

    Returns:
        The commit of each set that is on the Hub.

    Raises:
        DpoError: a set is missing, can't be read, or holds no pair.
    """
    asked = [recipe.of_test_set(index, FILTERS) for index in range(len(recipe.eval.sets))]
    for one in asked:
        source_files(one)
    found, revisions = dict[str, Any](), dict[str, str]()
    with ExitStack() as stack:
        store = stack.enter_context(closing(Rows(folder)))
        tokenizer = chat.load_tokenizer(recipe)
        sketches, entries = Sketches(), list[Entry]()
        for one in asked:
            read, funnel = look(one, 0), Funnel()
            context = filters.Context(one, special=tokens.special(tokenizer))
            rows = pipeline.read_rows(one, [(read, context)], None, store, funnel, sketches)
            pipeline.count_tokens(one, tokenizer, rows, store)
            pipeline.book(rows, store, funnel)
            if not funnel.kept:
                raise remarks.nothing_left(one, funnel, set())
            label = read.source.label
            found[label] = {
                "id": read.source.id, "layout": read.layout, "in": funnel.came[label],
                "kept": sum(funnel.kept.values()), "dropped": funnel.reasons(),
            }  # fmt: skip
            if read.commit:
                found[label]["revision"] = revisions[read.source.id] = read.commit
            entries += rows
        with pipeline.step("comparing with the training prompts"):
            trained = _trained_on(entries, train_pairs, store, sketches, folder)
        kept = [entry for entry in entries if entry.drop is None]
        for label, one in found.items():
            one["overlap"] = sum(entry.hash in trained for entry in kept if entry.source == label)
        write_jsonl(folder / "pairs.jsonl", _pairs(recipe, entries, store))
    write_json(folder / "report.json", found)
    return revisions


def _trained_on(entries: list[Entry], train_pairs: Path, store: Rows, sketches: Sketches, folder: Path) -> set[int]:
    """The hashes of those prompts in the sets that duplicate, or nearly duplicate, a training prompt."""
    tested = {entry.hash: entry.place for entry in entries}
    trained: dict[int, int] = {}
    with closing(RowStore[str](folder)) as keys:
        for row in read_jsonl(train_pairs):
            key = prompt_key(row["prompt"])
            hashed = hash64(key)
            if hashed not in trained:
                trained[hashed] = keys.add(key)
                sketches.add(hashed, key)

        def text_of(hashed: int) -> str:
            if hashed in trained:
                return keys.get(trained[hashed])
            return prompt_key(store.get(tested[hashed]).prompt)

        clusters = sketches.clusters(text_of, NearDuplicate().similarity)
        return {one for cluster in clusters if not trained.keys().isdisjoint(cluster) for one in cluster}


def _pairs(recipe: Recipe, entries: list[Entry], store: Rows) -> Iterator[dict[str, Any]]:
    kwargs = chat.chat_template_kwargs(recipe)
    for entry, picked, name in pipeline.named_rows(entries):
        item = store.get(entry.place)
        for row in pair_rows(item, picked, name, kwargs):
            yield {**row, "subset": item.subset}
