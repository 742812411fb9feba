"""`prepare` from end to end: clean row by row, then compare prompts, count tokens, split, mix and write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import chat
from dpo_cli.disk import sha256
from dpo_cli.language import language, latin_language
from dpo_cli.prepare import filters, refusals, remarks, report, scoring, split, tokens
from dpo_cli.prepare.audit import Audit
from dpo_cli.prepare.contamination import read_contamination
from dpo_cli.prepare.dedup import Sketches, drop_duplicates
from dpo_cli.prepare.detect import candidate_sets
from dpo_cli.prepare.feed import Broken
from dpo_cli.prepare.formats import FORMATS
from dpo_cli.prepare.funnel import Entry, Funnel, excerpt, kept_example, row_id
from dpo_cli.prepare.layouts import LAYOUTS
from dpo_cli.prepare.own_answers import Looked, OwnAnswers, own_answers
from dpo_cli.prepare.row_store import RowStore
from dpo_cli.prepare.sources import is_hub, source_files
from dpo_cli.prepare.split import Chosen, Mix
from dpo_cli.prepare.survey import look
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.records import CandidateSet, write_jsonl

if TYPE_CHECKING:  # for it costs two seconds, and without token filters nothing needs it
    from transformers import PreTrainedTokenizerBase


Rows = RowStore[tuple[str, CandidateSet]]  # a prompt's key, and its candidates


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
    funnel = Funnel(folder / "dropped.jsonl" if recipe.data.keep_dropped else None)
    with ExitStack() as stack:
        stack.callback(funnel.close)
        store = stack.enter_context(closing(Rows(folder)))
        tokenizer = chat.load_tokenizer(recipe) if wanted.too_long or wanted.length_ratio else None
        sources = look_at(recipe, tokenizer)
        read, own = [one for one, _ in sources], None
        if recipe.data.rater is not None:
            made = own_answers(recipe, sources, folder, kept or folder.parent, tokenizer, quiet)
            own = stack.enter_context(closing(made))
        sketches = Sketches()
        entries = read_rows(recipe, sources, own, store, funnel, sketches)
        with step("comparing prompts"):
            duplicates = drop_duplicates(entries, sketches, lambda entry: store.get(entry.place)[0], wanted)
        if tokenizer is not None:
            count_tokens(recipe, tokenizer, entries, store)
        book(entries, store, funnel)
        if not funnel.kept:
            raise refusals.nothing_left(recipe, funnel, {one.layout for one in read})
        mix = _choose(recipe, entries)
        if not mix.train:
            raise refusals.nothing_to_train_on(recipe, funnel, len(mix.held))
        audit, labels = Audit(), Counter[bool]()
        write_jsonl(folder / "train.jsonl", _rows(recipe, store, mix.train, audit, labels))
        write_jsonl(folder / "eval.jsonl", _rows(recipe, store, mix.held, None, Counter()))
        refusals.check_labels(recipe, labels)
        with step("hashing the inputs"):
            inputs = {name: sha256(path) for name, path in files.items()}
    left = sum(len(entry.picks) for entry in entries if entry.drop is None) - len(mix.train) - len(mix.held)
    rows = {"train": len(mix.train), "eval": len(mix.held), "quota": left}
    clusters = [{entry.cluster for entry, _, _ in chosen} for chosen in (mix.train, mix.held)]
    duplicates["train_eval_overlap"] = len(clusters[0] & clusters[1])
    found = report.build(recipe, funnel, rows, mix, duplicates, audit) | (own.figures if own else {})
    found["warnings"] = [*remarks.all_of(recipe, funnel, entries, rows, read), *found["warnings"]]
    found["warnings"] += remarks.own_answers(recipe, found)
    found["provenance"] = report.provenance(recipe, read, inputs)
    report.write(found, folder)
    return Prepared(found, inputs, {one.source.id: one.commit for one in read if one.commit})


# -------------------------------------------------------------------------------------------------- row by row


def step(name: str, unit: str = "", live: bool = True) -> Step:
    """A step of prepare: where there is no terminal the command's first line names them all."""
    return Step(name, unit=unit, live=live, named=False)


def look_at(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> list[Looked]:
    """What each source is read as, and what its filters need to know."""
    base = filters.Context.of(recipe, read_contamination(recipe), tokens.special(tokenizer) if tokenizer else [])
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
    """Every prompt that reached the duplicates; its sketch goes into `sketches`."""
    entries = list[Entry]()
    for rank, (one, context) in enumerate(looked):
        label, language = one.source.label, one.source.language or "und"
        contradictions = refusals.Contradictions()
        with step(f"reading {label}", "prompts") as shown:
            answered = own is not None and rank in own.places
            sets = candidate_sets(one.source, one.feeds, LAYOUTS[one.layout], one.settings, shown.at)
            for item in own.of_source(rank, shown.at) if own and answered else sets:
                shown.count += 1
                funnel.came[label] += 1
                for note in set(item.notes):
                    funnel.notes[label, note] += 1
                if isinstance(item, Broken):
                    drop, at = (item.reason, item.detail), ("", item.place)
                    funnel.drop(label, language, drop, hash64(item.detail), lambda at=at: at)  # type: ignore[misc]
                    continue
                contradictions.add(item)
                key = prompt_key(item.prompt)
                entry = _judge(recipe, item, rank, hash64(key), context, funnel)
                if entry is not None:
                    sketches.add(entry.hash, key)
                    entry.place = store.add((key, item))
                    entries.append(entry)
        contradictions.check(recipe, rank, funnel.came[label])
    return entries


def _judge(
    recipe: Recipe, item: CandidateSet, rank: int, hashed: int, context: filters.Context, funnel: Funnel
) -> Entry | None:
    """One prompt through every filter that needs no other row; None where it is gone before the duplicates.

    What comes after the duplicates is asked here already, for the row is at hand; being a duplicate then comes first.
    """
    options, asked = recipe.data.filters, item.prompt[-1]["content"]
    if item.language is None:
        item.language = _language(item)
        if item.language == "en":
            looks = latin_language(asked)
            if looks is not None:
                funnel.latin.setdefault(item.source, Counter())[looks] += 1
    parts = [text for turn in item.prompt for text in turn.values()]
    content = hash64(*parts, *(part for one in item.candidates for part in (one.text, one.score)))
    came = len(item.candidates)
    drop = filters.screen(item, options, context)
    if drop is not None:
        funnel.drop(item.source, item.language, drop, hashed, lambda: (excerpt(asked), item.place))
        return None
    edits, picks = Counter(item.lost), list[tuple[int, ...]]()
    if len(item.candidates) < came:
        edits["garbled"] = came - len(item.candidates)
    drop = item.drop or filters.clean(item, options, context, edits)
    if drop is None:
        picks, drop = filters.compare(item, _picks(recipe, item, hashed, context), options, context)
    if drop is not None:
        item.candidates = []
    return Entry(item.source, rank, item.language, hashed, content, picks, drop, edits)


def _language(item: CandidateSet) -> str:
    """What the question is written in; where it has no letters, the first answer that has."""
    found = (language(text) for text in [item.prompt[-1]["content"], *(c.text for c in item.candidates)])
    return next((one for one in found if one != "und"), "und")


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


# ------------------------------------------------------------------------------------------------- across prompts

TOKEN_BATCH = 64  # prompts counted together


def count_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, entries: list[Entry], store: Rows) -> None:
    """Drop what is too long for the model, or too unequal in length. The slowest filter, so only on what is left."""
    alive = [entry for entry in entries if entry.drop is None]
    kwargs = chat.chat_template_kwargs(recipe)
    limit, wanted = recipe.model.max_length, recipe.data.filters
    with step("counting tokens", "prompts") as shown:
        for start in range(0, len(alive), TOKEN_BATCH):
            batch = alive[start : start + TOKEN_BATCH]
            needed = [sorted({index for picked in entry.picks for index in picked}) for entry in batch]
            items = [(store.get(entry.place)[1], indexes) for entry, indexes in zip(batch, needed, strict=True)]
            for entry, sizes in zip(batch, tokens.lengths(tokenizer, kwargs, items), strict=True):
                entry.tokens = sizes
                entry.picks, entry.drop = filters.fit(entry.picks, *sizes, limit, wanted)
            shown.count += len(batch)
            shown.at(shown.count / len(alive))


def book(entries: list[Entry], store: Rows, funnel: Funnel) -> None:
    """Count every entry as kept or dropped, and assert that nothing got lost."""

    def asked(entry: Entry) -> tuple[str, str]:
        item = store.get(entry.place)[1]
        return excerpt(item.prompt[-1]["content"]), item.place

    def example(entry: Entry) -> dict[str, Any]:
        return kept_example(store.get(entry.place)[1], entry.picks[0])

    for entry in entries:
        if entry.drop is None or entry.drop[0] not in ("duplicate", "near_duplicate"):
            for kind, count in (+entry.edits).items():  # + leaves out zeros
                funnel.edits[entry.source, kind] += count
        if entry.drop is None:
            funnel.keep(entry.source, entry.language, entry.hash, lambda entry=entry: example(entry))  # type: ignore[misc]
        else:
            funnel.drop(entry.source, entry.language, entry.drop, entry.hash, lambda entry=entry: asked(entry))  # type: ignore[misc]
    funnel.check()


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


def _choose(recipe: Recipe, entries: list[Entry]) -> Mix:
    """Split what is kept by the hash of its cluster, and mix what is not held out."""
    data, rows = recipe.data, named_rows(entries, recipe.data.pairs.pick == "all")
    held, free = [], []
    below = split.held_below((entry.cluster for entry, _, _ in rows), data.eval_fraction)
    for place, (entry, _, name) in enumerate(rows):
        if entry.cluster < below:
            held.append(split.Choice(place, entry.cluster, entry.language, entry.source))
        else:
            free.append(split.Choice(place, hash64(recipe.seed, name), entry.language, entry.source))
    quotas = {source.label: source.quota for source in data.sources if source.quota is not None}
    train, wanted = split.mix(free, data.total, data.languages, quotas)
    kept = split.hold(held, data.eval_size, data.languages)
    over = Counter(choice.language for choice in free) - Counter(choice.language for choice in train)
    outside = {"held out": Counter(choice.language for choice in held), "over a source's quota": over}
    return Mix([rows[one.place] for one in train], [rows[one.place] for one in kept], wanted, outside)


# --------------------------------------------------------------------------------------------------------- writing


def _rows(
    recipe: Recipe, store: Rows, chosen: list[Chosen], audit: Audit | None, labels: Counter[bool]
) -> Iterator[dict[str, Any]]:
    """The rows of a file in `data.format`; counts their labels, where they have one, in `labels`."""
    write = FORMATS[recipe.data.format]
    kwargs = chat.chat_template_kwargs(recipe)
    shared: dict[int, CandidateSet] = {}  # labelled prompts, which give a row an answer; to read each but once
    with step("writing", "rows") as shown:
        for entry, picked, name in chosen:
            item = shared.get(entry.place) or store.get(entry.place)[1]
            if item.labelled and len(entry.picks) > 1:
                shared[entry.place] = item
            if audit is not None and len(picked) > 1:
                audit.add(item, picked[0], picked[-1], entry)
            for row in write(item, picked, name, kwargs):
                if "label" in row:
                    labels[row["label"]] += 1
                yield row
            shown.count += 1
            shown.at(shown.count / len(chosen))
