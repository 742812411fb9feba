"""`prepare` from end to end: clean row by row, then compare prompts, count tokens, split, mix and write."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import models
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError
from dpo_cli.language import language, latin_language
from dpo_cli.prepare import filters, refusals, remarks, report, scoring, sources, split, survey, tokens
from dpo_cli.prepare.audit import Audit
from dpo_cli.prepare.contamination import read_contamination
from dpo_cli.prepare.dedup import Sketches, clusters
from dpo_cli.prepare.detect import candidate_sets, layout_of
from dpo_cli.prepare.feed import Broken
from dpo_cli.prepare.files import file_feed
from dpo_cli.prepare.formats import FORMATS
from dpo_cli.prepare.funnel import Entry, Funnel, excerpt, kept_example, row_id
from dpo_cli.prepare.layouts import LAYOUTS
from dpo_cli.prepare.preferred import Settings
from dpo_cli.prepare.progress import Progress
from dpo_cli.prepare.row_store import RowStore
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.recipe import NearDuplicate, Recipe
from dpo_cli.records import ROWS_ARE, CandidateSet, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chosen = tuple[Entry, tuple[int, ...], str]  # a row to write: its prompt, which of the candidates, and its id


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


def prepare(recipe: Recipe, folder: Path, *, quiet: bool = False) -> Prepared:
    """Write train.jsonl, eval.jsonl, report.json and report.md (dropped.jsonl with data.keep_dropped) into `folder`.

    The same recipe and rows give the same files, whatever the order of the rows, but for the line numbers in the
    report. `folder` has to exist and be empty; what stands in it after an error or Ctrl-C is of no use.

    Raises:
        DpoError: an input is missing or empty (exit code 1), its layout can't be told (2), or nothing is left.
    """
    files = sources.source_files(recipe)  # before anything else: a missing file is said at once
    funnel = Funnel(folder / "dropped.jsonl" if recipe.data.keep_dropped else None)
    store = RowStore(folder)
    options = recipe.data.filters
    try:
        with Progress(quiet) as progress:
            tokenizer = models.load_tokenizer(recipe) if options.too_long or options.length_ratio else None
            entries, sketches, read = _read(recipe, store, funnel, progress, tokenizer)
            progress.stage("comparing prompts", "prompts")
            duplicates = _compare_prompts(recipe, entries, sketches, store)
            if tokenizer is not None:
                _count_tokens(recipe, tokenizer, entries, store, progress)
            _settle(recipe, entries, store, funnel, {one.layout for one in read.values()})
            train, held, wanted, outside = _choose(recipe, entries)
            sides = [{entry.cluster for entry, _, _ in rows} for rows in (train, held)]
            duplicates["train_eval_overlap"] = len(sides[0] & sides[1])
            if not train:
                data_format, gone = recipe.data.format, funnel.reasons()
                biggest = ", ".join(f"{count:,} {reason}" for reason, count in list(gone.items())[:3])
                lost = f"; of {funnel.came.total():,} prompts went {biggest}" if gone else ""
                raise DpoError(
                    f"none of the {len(held)} {ROWS_ARE[data_format]} that are left is for training{lost}",
                    where=recipe.where("data", "languages" if not held else "eval_fraction"),
                    hint="give it more data, or look at data.languages, data.total and data.eval_fraction",
                )
            audit, labels = Audit(), Counter[bool]()
            progress.stage("writing", "rows")
            rows = {
                "train": write_jsonl(folder / "train.jsonl", _rows(recipe, store, train, audit, progress, labels)),
                "eval": write_jsonl(folder / "eval.jsonl", _rows(recipe, store, held, None, progress, Counter())),
            }
            refusals.check_labels(recipe, labels)
            progress.stage("hashing the inputs", "files")
            inputs = {name: sha256(path) for name, path in files.items()}
    finally:
        store.close()
        funnel.close()
    left = sum(len(entry.units) for entry in entries if entry.fate is None) - len(train) - len(held)
    got = {"train": Counter(entry.language for entry, _, _ in train), "eval": Counter(e.language for e, _, _ in held)}
    rows["quota"] = left
    said = [*remarks.losses(recipe, funnel, entries), *remarks.languages(funnel), *remarks.held_out(recipe, rows)]
    said += remarks.left_out(funnel)
    for rank, one in read.items():
        label = recipe.data.sources[rank].label
        said += [
            *remarks.files(label, one.feeds, one.overlooked),
            *remarks.unread(label, one.layout, one.unread_columns),
        ]
    found = report.build(
        recipe, funnel, rows, got, wanted, outside, duplicates, audit, said, _provenance(recipe, read, inputs)
    )
    report.write(found, folder)
    return Prepared(
        found, inputs, {recipe.data.sources[rank].id: one.commit for rank, one in read.items() if one.commit}
    )


# -------------------------------------------------------------------------------------------------- row by row


def _read(
    recipe: Recipe, store: RowStore, funnel: Funnel, progress: Progress, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[Entry], Sketches, dict[int, survey.Read]]:
    """Every prompt that reached the duplicates, its sketch, and what each source was read as."""
    data = recipe.data
    contamination = read_contamination(recipe)
    weights = tuple(data.score_weights.model_dump().items())
    entries: list[Entry] = []
    sketches = Sketches()
    read: dict[int, survey.Read] = {}
    special = filters.special_tokens(tokens.special(tokenizer) if tokenizer is not None else [])
    for rank, source in enumerate(data.sources):
        progress.stage(f"reading {source.label}", "prompts")
        commit = None
        if sources.is_hub(source):
            feed, commit = sources.hub_feed(recipe, rank)
            feeds = [feed]
        else:
            feeds = [file_feed(name, path) for name, path in sources.local_files(recipe, rank).items()]
        layout = layout_of(recipe, rank, feeds)
        if layout is None:
            raise DpoError(
                f"{source.label} has no rows",
                where=recipe.where("data", "sources", rank, "id"),
                hint="check that the file is whole, and data_files and split",
            )
        columns = Settings(weights, source.columns or {})
        read[rank] = survey.look(recipe, rank, layout, commit, feeds, columns)
        context = filters.Context(
            languages=frozenset(data.languages) if data.languages is not None else None,
            thinking=recipe.model.thinking,
            keep_refusals=source.keep_refusals,
            contamination=contamination,
            min_margin=data.pairs.min_margin,
            min_chosen_score=data.pairs.min_chosen_score,
            unpaired=data.format == "unpaired",
            special=special,
            repeats_prompts=read[rank].repeats_prompts,
        )
        contradictions = refusals.Contradictions()
        for item in candidate_sets(source, feeds, LAYOUTS[layout], columns, progress.tick):
            progress.count += 1
            funnel.came[source.label] += 1
            funnel.notes.update((source.label, note) for note in set(item.notes))
            if isinstance(item, Broken):
                fate, at = (item.reason, item.detail), ("", item.place)
                funnel.drop(source.label, source.language or "und", fate, hash64(item.detail), lambda at=at: at)  # type: ignore[misc]
                continue
            contradictions.add(item)
            entry = _judge(recipe, item, rank, context, store, funnel, sketches)
            if entry is not None:
                entries.append(entry)
        contradictions.check(recipe, rank, funnel.came[source.label])
    return entries, sketches, read


def _judge(
    recipe: Recipe,
    item: CandidateSet,
    rank: int,
    context: filters.Context,
    store: RowStore,
    funnel: Funnel,
    sketches: Sketches,
) -> Entry | None:
    """One prompt through every filter that needs no other row; None where it is gone before the duplicates.

    What comes after the duplicates is asked here already, for the row is at hand; a duplicate's fate then wins.
    """
    data = recipe.data
    if item.language is None:
        item.language = _language(item)
        if item.language == "en":
            looks = latin_language(item.prompt[-1]["content"])
            funnel.latin.setdefault(item.source, Counter()).update(filter(None, [looks]))
    key = prompt_key(item.prompt)
    hashed = hash64(key)
    content = hash64(item.prompt, *((c.text, c.score) for c in item.candidates))
    came = len(item.candidates)
    fate = filters.screen(item, data.filters, context)
    if fate is not None:
        asked = item.prompt[-1]["content"]
        funnel.drop(item.source, item.language, fate, hashed, lambda: (excerpt(asked), item.place))
        return None
    edits = Counter(garbled=came - len(item.candidates))
    units: list[tuple[int, ...]] = []
    if item.labelled:
        edits += scoring.settle_labels(item)
    if edits["identical"] and not item.candidates:
        fate = ("identical", "each answer is called both good and bad")
    fate = fate or filters.clean(item, data.filters, context, edits)
    if fate is None and item.labelled:  # again, for a cut may have made answers equal
        edits += scoring.settle_labels(item)
        if len(item.candidates) < filters.least(item, context):
            fate = ("identical", "each answer is called both good and bad")
    if fate is None:
        units = _units(recipe, item, hashed, lone=filters.least(item, context) == 1)
        units, fate = filters.compare(item, units, data.filters, context)
    if fate is not None:
        item.candidates = []
    sketches.add(key)
    place = store.add((key, item))
    return Entry(item.source, rank, item.language, hashed, content, place, units, fate, edits)


def _language(item: CandidateSet) -> str:
    """What the question is written in; where it has no letters, the first answer that has."""
    told = (language(text) for text in [item.prompt[-1]["content"], *(c.text for c in item.candidates)])
    return next((one for one in told if one != "und"), "und")


def _units(recipe: Recipe, item: CandidateSet, key: int, lone: bool) -> list[tuple[int, ...]]:
    """What a row is made of, by `data.format`: two candidates, all of them in order, or one with a label of its own."""
    if lone:
        return [(index,) for index in range(len(item.candidates))]
    if recipe.data.format == "ranked":
        return [tuple(scoring.ranking(item))]
    policy = recipe.data.pairs
    if recipe.data.format == "unpaired" and policy.pick == "all":  # a middle answer would be both good and bad
        policy = policy.model_copy(update={"pick": "best_worst"})
    return list(scoring.pick(item, policy, recipe.seed, key))


# ------------------------------------------------------------------------------------------------- across prompts


def _compare_prompts(recipe: Recipe, entries: list[Entry], sketches: Sketches, store: RowStore) -> dict[str, int]:
    """Settle duplicates and near-duplicates, give every entry its cluster, and count them for the report.

    Of a cluster stays what would be kept, from the first source, of the lowest hash: the order of rows plays no part.
    """

    def preference(number: int) -> tuple[bool, int, int, int]:
        entry = entries[number]
        return entry.fate is not None, entry.rank, entry.hash, entry.content

    options = recipe.data.filters
    same: dict[int, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        same[entry.hash].append(number)
    hashes = sorted(same)
    firsts = [min(same[value], key=preference) for value in hashes]
    similarity = options.near_duplicate.similarity if options.near_duplicate else NearDuplicate().similarity
    # Clusters are found even where they stay in: both halves of one must not end up on two sides of the split.
    found = clusters(sketches.keys()[firsts], hashes, lambda one: store.get(entries[firsts[one]].place)[0], similarity)
    members: dict[int, list[int]] = defaultdict(list)
    for number, leader in enumerate(found):
        members[leader].append(number)
    stats = Counter[str]()
    for leader, numbers in members.items():
        best = min(numbers, key=lambda number: preference(firsts[number]))
        everyone = [entries[one] for number in numbers for one in same[hashes[number]]]
        stats["cross_source"] += len({entry.source for entry in everyone}) > 1
        stats["largest_cluster"] = max(stats["largest_cluster"], len(everyone))
        for number in numbers:
            for one in same[hashes[number]]:
                entry = entries[one]
                entry.cluster = hashes[leader]
                if one != firsts[number]:
                    stats["exact"] += 1
                    if options.duplicate:
                        entry.fate = ("duplicate", f"same prompt as {_name(entries[firsts[number]])}")
                        continue
                if number != best:
                    stats["near"] += one == firsts[number]
                    if options.near_duplicate:
                        entry.fate = ("near_duplicate", f"near {_name(entries[firsts[best]])}")
    return {name: stats[name] for name in ("exact", "near", "cross_source", "largest_cluster")}


def _name(entry: Entry) -> str:
    """The id of a prompt's first row, by which another row may refer to it."""
    return f"{row_id(entry.source, entry.hash)} of {entry.source}"


TOKEN_BATCH = 64  # prompts counted together


def _count_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, entries: list[Entry], store: RowStore, progress: Progress
) -> None:
    """Drop what is too long for the model, or too unequal in length. The slowest filter, so only on what is left."""
    options = recipe.data.filters
    alive = [entry for entry in entries if entry.fate is None]
    kwargs = models.chat_template_kwargs(recipe)
    progress.stage("counting tokens", "prompts")
    for start in range(0, len(alive), TOKEN_BATCH):
        batch = alive[start : start + TOKEN_BATCH]
        needed = [sorted({index for unit in entry.units for index in unit}) for entry in batch]
        items = [(store.get(entry.place)[1], indexes) for entry, indexes in zip(batch, needed, strict=True)]
        for entry, sizes in zip(batch, tokens.lengths(tokenizer, kwargs, items), strict=True):
            entry.tokens = sizes
            entry.units, entry.fate = filters.fit(entry.units, *sizes, recipe.model.max_length, options)
        progress.count += len(batch)
        progress.tick(progress.count / len(alive))


def _settle(recipe: Recipe, entries: list[Entry], store: RowStore, funnel: Funnel, layouts: set[str]) -> None:
    """Book every entry as kept or dropped, and assert that nothing got lost; `layouts` are those of the sources.

    Raises:
        DpoError: nothing is left.
    """

    def asked(entry: Entry) -> tuple[str, str]:
        item = store.get(entry.place)[1]
        return excerpt(item.prompt[-1]["content"]), item.place

    def example(entry: Entry) -> dict[str, Any]:
        return kept_example(store.get(entry.place)[1], entry.units[0])

    for entry in entries:
        if entry.fate is None or entry.fate[0] not in ("duplicate", "near_duplicate"):
            funnel.edits.update({(entry.source, kind): count for kind, count in entry.edits.items() if count})
        if entry.fate is None:
            funnel.keep(entry.source, entry.language, entry.hash, lambda entry=entry: example(entry))  # type: ignore[misc]
        else:
            funnel.drop(entry.source, entry.language, entry.fate, entry.hash, lambda entry=entry: asked(entry))  # type: ignore[misc]
    funnel.check()
    if not funnel.kept:
        raise refusals.nothing_left(recipe, funnel, layouts)


def _choose(
    recipe: Recipe, entries: list[Entry]
) -> tuple[list[Chosen], list[Chosen], dict[str, int], dict[str, Counter[str]]]:
    """The rows to train on, those to evaluate on, how many to train on were wanted by language, and how many of the
    others were held out or left over."""
    data = recipe.data
    rows: list[Chosen] = []
    used = Counter[str]()
    alive = [entry for entry in entries if entry.fate is None]
    for entry in sorted(alive, key=lambda entry: (entry.rank, entry.hash, entry.content)):
        for unit in entry.units:
            name = row_id(entry.source, entry.hash, unit if data.pairs.pick == "all" else ())
            used[name] += 1
            if used[name] > 1:  # the same prompt again, where duplicates may stay
                name = row_id(name, used[name])
            rows.append((entry, unit, name))
    held, free = [], []
    for place, (entry, _, name) in enumerate(rows):
        if split.held_out(entry.cluster, data.eval_fraction):
            held.append(split.Choice(place, entry.cluster, entry.language, entry.source))
        else:
            free.append(split.Choice(place, hash64(recipe.seed, name), entry.language, entry.source))
    quotas = {source.label: source.quota for source in data.sources if source.quota is not None}
    train, wanted = split.mix(free, data.total, data.languages, quotas)
    kept = split.hold(held, data.eval_size, data.languages)
    outside = {
        "held out": Counter(choice.language for choice in held),
        "over a source's quota": Counter(choice.language for choice in free)
        - Counter(choice.language for choice in train),
    }
    return [rows[choice.place] for choice in train], [rows[choice.place] for choice in kept], wanted, outside


# --------------------------------------------------------------------------------------------------------- writing


def _rows(
    recipe: Recipe,
    store: RowStore,
    chosen: list[Chosen],
    audit: Audit | None,
    progress: Progress,
    labels: Counter[bool],
) -> Iterator[dict[str, Any]]:
    """The rows of a file in `data.format`; counts their labels, where they have one, in `labels`."""
    write = FORMATS[recipe.data.format]
    kwargs = models.chat_template_kwargs(recipe)
    shared: dict[int, CandidateSet] = {}  # labelled prompts, which give a row an answer; to read each but once
    for number, (entry, unit, name) in enumerate(chosen):
        item = shared.get(entry.place) or store.get(entry.place)[1]
        if item.labelled and len(entry.units) > 1:
            shared[entry.place] = item
        if audit is not None and len(unit) > 1:
            audit.add(item, unit[0], unit[-1], entry)
        for row in write(item, unit, name, kwargs):
            if "label" in row:
                labels[row["label"]] += 1
            yield row
        progress.count += 1
        progress.tick(number / len(chosen))


def _provenance(recipe: Recipe, read: dict[int, survey.Read], inputs: dict[str, str]) -> dict[str, Any]:
    """Where the data come from, what was read of them, and with what they were made."""
    from importlib.metadata import version

    import dpo_cli

    found = {}
    for rank, one in read.items():
        files = {feed.name: {"rows": feed.count, **({"notes": feed.notes} if feed.notes else {})} for feed in one.feeds}
        more = {
            "columns_not_read": one.unread_columns,
            "files_not_read": one.left_out,
            "short_prompts_cut_from_answers": one.repeats_prompts,
        }
        found[recipe.data.sources[rank].label] = {
            "id": recipe.data.sources[rank].id, "layout": one.layout, "revision": one.commit, "files": files,
            **{name: value for name, value in more.items() if value},
        }  # fmt: skip
    return {
        "dpo_cli": dpo_cli.__version__,
        "datasets": version("datasets"),
        "seed": recipe.seed,
        "model": recipe.model.id,
        "format": recipe.data.format,
        "sources": found,
        "inputs": inputs,
    }
