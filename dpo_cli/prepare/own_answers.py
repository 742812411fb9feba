"""Candidate sets whose answers the model gives itself, or whose scores a rater gives: `sample`, `rate`, `data.rater`.

All prompts are answered, then all answers rated, and only then do the sets go the way of any other, since a reward
counts by its rank among all. In between they are on disk, and what was answered and rated is kept beside the runs: a
killed `prepare` goes on, and a changed filter costs nothing.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import chat
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.language import language
from dpo_cli.prepare import filters, tokens
from dpo_cli.prepare.detect import candidate_sets
from dpo_cli.prepare.feed import Broken, Ticker
from dpo_cli.prepare.funnel import Drop
from dpo_cli.prepare.layouts import LAYOUTS
from dpo_cli.prepare.rating import rate
from dpo_cli.prepare.row_store import RowStore
from dpo_cli.prepare.sampling import Drawn, Sampler, ServerSampler
from dpo_cli.prepare.sources import is_hub
from dpo_cli.prepare.survey import Read, look
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.progress import Step
from dpo_cli.published import without_paths
from dpo_cli.recipe import Recipe, Sample
from dpo_cli.records import Candidate, CandidateSet
from dpo_cli.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # prompts answered between two writes of them
ANSWERS, RATINGS = ".answers.sqlite", ".judgments.sqlite"  # beside the runs, for all of them

Looked = tuple[Read, filters.Context]  # what a source is read as, and what its filters need to know


def prompts_of(one: Read, tick: Ticker, outside: Counter[str] | None = None) -> Iterator[CandidateSet | Broken]:
    """The rows of a source, of a sampled one those in its slice; `outside` counts the others."""
    part = one.source.sample.slice if one.source.sample else None
    for item in candidate_sets(one.source, one.feeds, LAYOUTS[one.layout], one.settings, tick):
        if part and isinstance(item, CandidateSet) and hash64("slice", prompt_key(item.prompt)) % part[1] != part[0]:
            if outside is not None:
                outside[one.source.label] += 1
        else:
            yield item


def check_quota(recipe: Recipe, rank: int, one: Read) -> int:
    """Count a sampled source's prompts, and refuse a quota that they can't fill.

    Raises:
        DpoError: (exit code 2) with the quota to write.
    """
    source, sample = one.source, one.source.sample
    assert sample is not None
    prompts = sum(isinstance(item, CandidateSet) for item in prompts_of(one, lambda share: None))
    most = prompts * (sample.answers * (sample.answers - 1) // 2 if recipe.data.pairs.pick == "all" else 1)
    if source.quota is not None and source.quota > most:
        raise DpoError(
            f"quota {source.quota:,} is over the {prompts:,} prompts of {source.label}, which give a pair each at most",
            where=recipe.where("data", "sources", rank, "quota"),
            hint=f"write quota: {most}, or remove it",
            exit_code=USAGE,
        )
    return prompts


def check_quotas(recipe: Recipe) -> None:
    """Check the quotas of sampled sources that lie on this machine; see `check_quota`."""
    for rank, source in enumerate(recipe.data.sources):
        if source.sample and source.quota is not None and not is_hub(source):
            check_quota(recipe, rank, look(recipe, rank))


@dataclass
class OwnAnswers:
    """The candidate sets of sources with `sample` or `rate`, on disk.

    Attributes:
        figures: `sampled` and `rated` of the report.
        places: where the sets of a source are in the store of rows, by its place in the recipe.
        starts: which of the scores are its answers', by the first.
        scores: of all answers, in the order of the sets.
    """

    rows: RowStore[CandidateSet | Broken]
    figures: dict[str, Any] = field(default_factory=dict)
    places: dict[int, array[int]] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    answers: int = 0
    scores: array[float] = field(default_factory=lambda: array("d"))

    def sets(self) -> Iterator[CandidateSet]:
        """All the sets, without their scores."""
        for places in self.places.values():
            for place in places:
                item = self.rows.get(place)
                if isinstance(item, CandidateSet):
                    yield item

    def add(self, rank: int, items: Iterator[CandidateSet | Broken]) -> None:
        """Put a source's rows aside."""
        self.places[rank], self.starts[rank] = array("q"), self.answers
        for item in items:
            self.places[rank].append(self.rows.add(item))
            self.answers += len(item.candidates) if isinstance(item, CandidateSet) else 0

    def of_source(self, rank: int, tick: Ticker) -> Iterator[CandidateSet | Broken]:
        """A source's rows with the scores that were given."""
        at, places = self.starts[rank], self.places[rank]
        for number, place in enumerate(places):
            item = self.rows.get(place)
            if isinstance(item, CandidateSet):
                for candidate in item.candidates:
                    candidate.score = None if math.isnan(self.scores[at]) else self.scores[at]
                    at += 1
            yield item
            tick(number / len(places))

    def close(self) -> None:
        self.rows.close()


def own_answers(
    recipe: Recipe,
    looked: list[Looked],
    folder: Path,
    kept: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    quiet: bool,
) -> OwnAnswers:
    """Sample and rate what the recipe says.

    Args:
        looked: the sources, in the order of the recipe.
        folder: where the sets are put aside, and `answers.jsonl` is written.
        kept: the folder of what was answered and rated before.
        tokenizer: the model's, where lengths count.

    Raises:
        DpoError: model, server or rater can't be had; a quota is over its prompts.
    """
    made, counts, asked = OwnAnswers(RowStore(folder)), Counter[str](), 0
    sampled = [(rank, one, one.source.sample) for rank, (one, _) in enumerate(looked) if one.source.sample]
    for rank, one, sample in sampled:
        asked += check_quota(recipe, rank, one) * sample.answers
    with ExitStack() as stack:
        store = stack.enter_context(Store(kept / ANSWERS))
        step = Step("sampling answers", quiet=quiet or not sampled, total=asked)
        advance = stack.enter_context(step).advance
        samplers = _Samplers(recipe, tokenizer, store)
        stack.callback(samplers.close)
        for rank, (one, context) in enumerate(looked):
            if one.source.sample or one.source.rate:
                made.add(rank, _Answering(recipe, one, context, samplers, counts, advance).sets())
    if sampled:
        fields = ("prompts", "answers", "cut_off", "identical", "not_asked", "outside_slice", "tokens")
        made.figures["sampled"] = {"by": samplers.names(), **{name: counts[name] for name in fields}}
    with Store(kept / RATINGS) as store:
        rated = rate(recipe, made.sets(), made.answers, store, folder / "answers.jsonl", quiet)
    made.scores, made.figures["rated"] = rated.scores, rated.figures
    return made


class _Samplers:
    """One for the model here, and one for each server; each is opened when it is needed."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, store: Store) -> None:
        self.recipe, self.tokenizer, self.store = recipe, tokenizer, store
        self._opened: dict[str, Any] = {}
        self._names: dict[str, None] = {}

    def of(self, sample: Sample) -> tuple[Sampler, str]:
        """The sampler, and the name of who answers."""
        server, model = sample.server, self.recipe.model
        name = server.model if server else without_paths(model.id)
        self._names[f"{name} on a server" if server else f"{name} + its adapter" if model.adapter else name] = None
        key = server.model_dump_json() if server else ""
        if key not in self._opened:
            if server:
                self._opened[key] = ServerSampler(self.recipe, server, self.store)
            else:
                from dpo_cli.prepare.local_sampling import LocalSampler  # here, for it imports torch

                self.tokenizer = self.tokenizer or chat.load_tokenizer(self.recipe)
                self._opened[key] = LocalSampler(self.recipe, self.tokenizer, self.store)
        return self._opened[key], name

    def names(self) -> list[str]:
        return list(self._names)

    def close(self) -> None:
        if "" in self._opened:
            self._opened.pop("").close()


@dataclass
class _Answering:
    """A source's rows with new answers, or with its own, whose scores are left out."""

    recipe: Recipe
    one: Read
    context: filters.Context
    samplers: _Samplers
    counts: Counter[str]
    advance: Callable[[int], None]

    def sets(self) -> Iterator[CandidateSet | Broken]:
        outside = Counter[str]()
        items = prompts_of(self.one, lambda share: None, outside)
        sample = self.one.source.sample
        while chunk := list(islice(items, CHUNK)):
            sets = [item for item in chunk if isinstance(item, CandidateSet)]
            for item in sets:
                item.ranked = item.labelled = False
                item.stated = {}
                for candidate in item.candidates:
                    candidate.score = None
            if sample:
                self._answer(sets, sample)
            yield from chunk
        self.counts["outside_slice"] += outside.total()

    def _answer(self, sets: list[CandidateSet], sample: Sample) -> None:
        """Draw answers to the prompts that no filter drops anyway."""
        asked = []
        for item in sets:
            item.candidates = item.candidates if sample.keep else []
            drop = self._screen(item)
            if drop is None:
                asked.append(item)
                continue
            item.candidates = []
            if drop[0] not in filters.PROMPT_FILTERS:  # those look at it again
                item.drop = drop
        refused = len(sets) - len(asked)
        self.advance(refused * sample.answers)
        sampler, name = self.samplers.of(sample)
        drawn = sampler.draw([item.prompt for item in asked], sample, self.advance)
        for item, answers in zip(asked, drawn, strict=True):
            self._add(item, answers, name, sample)
        self.counts.update(
            prompts=len(asked), not_asked=refused, answers=sum(map(len, drawn)),
            tokens=sum(one.tokens for answers in drawn for one in answers),
        )  # fmt: skip

    def _screen(self, item: CandidateSet) -> Drop | None:
        """Why a prompt would be dropped whatever its answers are."""
        options, asked = self.recipe.data.filters, item.prompt[-1]["content"]
        alone = replace(item, candidates=[], language=item.language or language(asked))
        drop = filters.screen(alone, options, self.context) if alone.language != "und" else None
        if drop is not None:
            return drop
        if options.markers and filters.markers("An answer.", alone, options.markers, self.context) is None:
            return "markers", "in the prompt"
        tokenizer = self.samplers.tokenizer
        if options.too_long and tokenizer is not None:
            kwargs = chat.chat_template_kwargs(self.recipe)
            count = tokens.lengths(tokenizer, kwargs, [(alone, [])])[0][0]
            if count > options.too_long.max_prompt * self.recipe.model.max_length:
                return "too_long", f"prompt of {count:,} tokens"
        return None

    def _add(self, item: CandidateSet, answers: list[Drawn], name: str, sample: Sample) -> None:
        """Make candidates of the answers that ended, each text once; say why where fewer than two are left."""
        ended = [one.text for one in answers if one.ended]
        own = [candidate.text for candidate in item.candidates]
        texts = [text for text in dict.fromkeys(ended) if text not in own]
        item.candidates += [Candidate(text, None, name) for text in texts]
        lost = {"cut_off": len(answers) - len(ended), "identical": len(ended) - len(texts)}
        self.counts.update(lost)
        item.lost = {reason: count for reason, count in lost.items() if count}
        if len(item.candidates) >= 2:
            return
        item.candidates = []
        if lost["cut_off"] >= lost["identical"]:
            limit = f"{sample.max_new_tokens} tokens"
            item.drop = ("cut_off", f"{lost['cut_off']} of {len(answers)} answers found no end within {limit}")
        else:
            item.drop = ("identical", f"{lost['identical'] + 1} of {len(answers)} answers are the same")
