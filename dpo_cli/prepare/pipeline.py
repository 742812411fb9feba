"""`prepare` from end to end: clean row by row, then compare prompts, count tokens, split, mix and write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import chat
from dpo_cli.disk import sha256
from dpo_cli.language import language
from dpo_cli.prepare import filters, remarks, report, scoring, tokens
from dpo_cli.prepare.audit import Audit
from dpo_cli.prepare.contamination import read_contamination
from dpo_cli.prepare.dedup import Sketches, drop_duplicates
from dpo_cli.prepare.feed import BATCH, Broken
from dpo_cli.prepare.formats import FORMATS
from dpo_cli.prepare.funnel import Entry, Funnel, RowStore, row_id
from dpo_cli.prepare.own_answers import Looked, OwnAnswers, own_answers
from dpo_cli.prepare.read import look
from dpo_cli.prepare.sources import is_hub, source_files
from dpo_cli.prepare.split import Chosen, split
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.records import CandidateSet, write_jsonl

if TYPE_CHECKING:  # for it costs two seconds, and without token filters nothing needs it
    from transformers import PreTrainedTokenizerBase

Rows = RowStore[CandidateSet]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made.

    Attributes:
        report: what stands in report.json.
        inputs: every local file that was read, `<source label>/<name below its folder>` -> sha256.
        revisions: Hub data set id -> the commit that was read.
    """

    report: dict[str, Any]
    inputs: dict[str, str]
    revisions: dict[str, str]


def prepare(recipe: Recipe, folder: Path, *, kept: Path | None = None, quiet: bool = False) -> Prepared:
    """Write train.jsonl, eval.jsonl, report.json and report.md (dropped.jsonl with data.keep_dropped) into `folder`.

    Where answers are sampled or rated, answers.jsonl too; what they were stays in the folder `kept` (default: the one
    that holds `folder`), for every run that asks for the same.

    The same recipe and rows give the same files, whatever the order of the rows, but for the line numbers in the
    report. `folder` has to exist and be empty; what stands in it after an error or Ctrl-C is of no use.

    Raises:
        DpoError: an input is missing or empty (exit code 1), its layout can't be detected (2), or nothing is left.
    """
    files = source_files(recipe)  # before anything else: a missing file is an error at once
    wanted = recipe.data.filters
    with ExitStack() as stack:
        funnel = Funnel()
        if recipe.data.keep_dropped:
            funnel.file = stack.enter_context(open(folder / "dropped.jsonl", "w", encoding="utf-8", newline="\n"))
        store = stack.enter_context(closing(Rows(folder)))
        tokenizer = chat.load_tokenizer(recipe) if wanted.too_long or wanted.length_ratio else None
        looked, own = _look_at(recipe, tokenizer), None
        read = [one for one, _ in looked]
        if recipe.data.rater is not None:
            own = own_answers(recipe, looked, folder, kept or folder.parent, tokenizer, quiet)
            stack.callback(own.rows.close)
        sketches = Sketches()
        entries = read_rows(recipe, looked, own, store, funnel, sketches)
        with step("comparing prompts"):
            duplicates = drop_duplicates(entries, sketches, store, wanted)
        if tokenizer is not None:
            count_tokens(recipe, tokenizer, entries, store)
        book(entries, store, funnel)
        if not funnel.kept:
            raise remarks.nothing_left(recipe, funnel, {one.layout for one in read})
        mix = split(recipe, named_rows(entries, several=recipe.data.pairs.pick == "all"))
        if not mix.train:
            raise remarks.nothing_to_train_on(recipe, funnel, len(mix.held))
        audit, labels = Audit(), Counter[bool]()
        write_jsonl(folder / "train.jsonl", _rows(recipe, store, mix.train, audit, labels))
        write_jsonl(folder / "eval.jsonl", _rows(recipe, store, mix.held, None, Counter()))
        remarks.check_labels(recipe, labels)
        with step("hashing the inputs"):
            inputs = {name: sha256(path) for name, path in files.items()}
    figures = own.figures if own else {}
    found = report.build(recipe, funnel, entries, read, mix, duplicates, audit, figures, inputs)
    report.write(found, folder)
    return Prepared(found, inputs, {one.source.id: one.commit for one in read if one.commit})


def step(name: str, unit: str = "", live: bool = True) -> Step:
    """Return a step of prepare: where there is no terminal the command's first line names them all."""
    return Step(name, unit=unit, live=live, named=False)


def _look_at(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> list[Looked]:
    """What each source is read as, and what its filters need to know."""
    base = filters.Context(recipe, read_contamination(recipe), tokens.special(tokenizer))
    looked = []
    for rank, source in enumerate(recipe.data.sources):
        with step(f"looking at {source.label}", live=not is_hub(source)):  # which may be downloaded, with its own bars
            one = look(recipe, rank)
        context = replace(base, keep_refusals=source.keep_refusals, repeats_prompts=one.repeats_prompts)
        looked.append((one, context))
    return looked


def read_rows(
    recipe: Recipe, looked: list[Looked], own: OwnAnswers | None, store: Rows, funnel: Funnel, sketches: Sketches
) -> list[Entry]:
    """Return every prompt that reached the duplicates; its sketch goes into `sketches`."""
    entries = list[Entry]()
    for rank, (one, context) in enumerate(looked):
        label, leads, stated = one.source.label, Counter[bool](), list[str]()
        answered = own if own is not None and rank in own.places else None
        with step(f"reading {label}", "prompts") as shown:
            for item in answered.of_source(rank) if answered else one.sets():
                shown.count += 1
                if shown.count % BATCH == 0:
                    shown.at(shown.count / len(answered.places[rank]) if answered else one.share)
                funnel.came[label] += 1
                if isinstance(item, Broken):
                    tongue, drop = one.source.language or "und", (item.reason, item.detail)
                    funnel.drop(label, tongue, drop, hash64(item.detail), lambda item=item: item)  # type: ignore[misc]
                    continue
                funnel.notes.update((label, note) for note in set(item.notes))
                lead = item.lead()
                if lead is not None:
                    leads[lead >= 0] += 1
                    stated = list(item.stated)
                key = prompt_key(item.prompt)
                entry = _judge(recipe, item, rank, hash64(key), context, funnel)
                if entry is not None:
                    sketches.add(entry.hash, key)
                    entry.place = store.add(item)
                    entries.append(entry)
        remarks.check_scores(recipe, rank, leads, stated, funnel.came[label])
    return entries


def _judge(
    recipe: Recipe, item: CandidateSet, rank: int, hashed: int, context: filters.Context, funnel: Funnel
) -> Entry | None:
    """One prompt through every filter that needs no other row; None where it is gone before the duplicates.

    What comes after the duplicates is asked here already, for the row is at hand; being a duplicate then comes first.
    """
    asked = item.prompt[-1]["content"]
    if item.language is None:  # that of the question; where it has no letters, of the first answer that has
        found = (language(text) for text in [asked, *(candidate.text for candidate in item.candidates)])
        item.language = next((one for one in found if one != "und"), "und")
    parts = [text for turn in item.prompt for text in turn.values()]
    content = hash64(*parts, *(part for one in item.candidates for part in (one.text, one.score)))
    came = len(item.candidates)
    drop = filters.screen(item, context)
    if drop is not None:
        funnel.drop(item.source, item.language, drop, hashed, lambda: item)
        return None
    edits, picks = Counter(item.lost), list[tuple[int, ...]]()
    if len(item.candidates) < came:
        edits["garbled"] = came - len(item.candidates)
    drop = item.drop or filters.clean(item, context, edits)
    if drop is None:
        picks, drop = filters.compare(item, _picks(recipe, item, hashed, context), context)
    if drop is not None:
        item.candidates = []
    return Entry(item.source, rank, item.language, hashed, content, picks, drop, edits)


def _picks(recipe: Recipe, item: CandidateSet, key: int, context: filters.Context) -> list[tuple[int, ...]]:
    """The candidates of each row, by `data.format`: two, all of them in order, or one with a label of its own."""
    if filters.min_answers(item, context) == 1:
        return [(index,) for index in range(len(item.candidates))]
    if recipe.data.format == "ranked":
        return [tuple(scoring.ranking(item))]
    policy = recipe.data.pairs
    if recipe.data.format == "unpaired" and policy.pick == "all":  # a middle answer would be both good and bad
        policy = policy.model_copy(update={"pick": "best_worst"})
    return list(scoring.pick(item, policy, recipe.seed, key))


TOKEN_BATCH = 64  # prompts counted together


def count_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, entries: list[Entry], store: Rows) -> None:
    """Drop what is too long for the model, or too unequal in length: the slowest filter, so only on what is left."""
    alive = [entry for entry in entries if entry.drop is None]
    kwargs = chat.chat_template_kwargs(recipe)
    with step("counting tokens", "prompts") as shown:
        for start in range(0, len(alive), TOKEN_BATCH):
            batch = alive[start : start + TOKEN_BATCH]
            needed = [sorted({index for picked in entry.picks for index in picked}) for entry in batch]
            items = [(store.get(entry.place), indexes) for entry, indexes in zip(batch, needed, strict=True)]
            for entry, sizes in zip(batch, tokens.lengths(tokenizer, kwargs, items), strict=True):
                entry.tokens = sizes
                entry.picks, entry.drop = filters.fit(recipe, entry.picks, *sizes)
            shown.count += len(batch)
            shown.at(shown.count / len(alive))


def book(entries: list[Entry], store: Rows, funnel: Funnel) -> None:
    """Count every entry as kept or dropped."""
    for entry in entries:
        if entry.drop is None or entry.drop[0] not in ("duplicate", "near_duplicate"):
            for kind, count in (+entry.edits).items():  # + leaves out zeros
                funnel.edits[entry.source, kind] += count
        item = partial(store.get, entry.place)
        if entry.drop is None:
            funnel.keep(entry.source, entry.language, entry.hash, item, entry.picks[0])
        else:
            funnel.drop(entry.source, entry.language, entry.drop, entry.hash, item)


def named_rows(entries: list[Entry], several: bool = False) -> list[Chosen]:
    """The rows of all entries that are not dropped, in the order of their hashes; `several` may share a prompt."""
    rows: list[Chosen] = []
    used = Counter[str]()
    alive = [entry for entry in entries if entry.drop is None]
    for entry in sorted(alive, key=lambda entry: (entry.rank, entry.hash, entry.content)):
        for picked in entry.picks:
            name = row_id(entry.source, entry.hash, picked if several else ())
            used[name] += 1
            if used[name] > 1:  # the same prompt again, where duplicates may stay
                name = row_id(name, used[name])
            rows.append((entry, picked, name))
    return rows


def _rows(
    recipe: Recipe, store: Rows, chosen: list[Chosen], audit: Audit | None, labels: Counter[bool]
) -> Iterator[dict[str, Any]]:
    """The rows of a file in `data.format`; counts their labels, where they have one, in `labels`."""
    write = FORMATS[recipe.data.format]
    kwargs = chat.chat_template_kwargs(recipe)
    get = lru_cache(64)(store.get)  # for a prompt of thousands of labelled answers has a row of each
    with step("writing", "rows") as shown:
        for entry, picked, name in chosen:
            item = get(entry.place)
            if audit is not None and len(picked) > 1:
                audit.add(item, picked[0], picked[-1], entry)
            for row in write(item, picked, name, kwargs):
                if "label" in row:
                    labels[row["label"]] += 1
                yield row
            shown.count += 1
            shown.at(shown.count / len(chosen))
