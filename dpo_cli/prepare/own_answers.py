"""Candidate sets whose answers the model gives itself, or whose scores a rater gives: `sample`, `rate`, `data.rater`.

All prompts are answered, then all answers rated, and only then do the sets go the way of any other, since a reward
counts by its rank among all. In between they are on disk, and what was answered and rated is kept beside the runs: a
killed `prepare` goes on, and a changed filter costs nothing.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_cli import chat
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.judging.client import Client
from dpo_cli.judging.judgment import key_of
from dpo_cli.language import language
from dpo_cli.prepare import filters, tokens
from dpo_cli.prepare.feed import Broken
from dpo_cli.prepare.funnel import Drop, RowStore
from dpo_cli.prepare.rating import rate
from dpo_cli.prepare.read import Read, look
from dpo_cli.prepare.sources import is_hub
from dpo_cli.prepare.text import hash64, prompt_key
from dpo_cli.progress import Step
from dpo_cli.published import without_paths
from dpo_cli.recipe import Recipe, Sample, Server
from dpo_cli.records import Candidate, CandidateSet, Message
from dpo_cli.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # prompts answered between two writes of them
ANSWERS, RATINGS = ".answers.sqlite", ".judgments.sqlite"  # beside the runs, for all of them

Looked = tuple[Read, filters.Context]  # what a source is read as, and what its filters need to know


def check_quotas(recipe: Recipe) -> None:
    """Raise a DpoError for a quota over the prompts of a sampled source that lies on this machine."""
    for rank, source in enumerate(recipe.data.sources):
        if source.sample and source.quota is not None and not is_hub(source):
            _prompts_in(recipe, rank, look(recipe, rank))


def _prompts_in(recipe: Recipe, rank: int, one: Read) -> int:
    """How many prompts a sampled source has; a quota that they can't fill is an error with the quota to write."""
    source, sample = one.source, one.source.sample
    assert sample is not None
    prompts = sum(isinstance(item, CandidateSet) for item in _slice(one, Counter()))
    most = prompts * (sample.answers * (sample.answers - 1) // 2 if recipe.data.pairs.pick == "all" else 1)
    if source.quota is not None and source.quota > most:
        raise DpoError(
            f"quota {source.quota:,} is over the {prompts:,} prompts of {source.label}, which give a pair each at most",
            where=recipe.where("data", "sources", rank, "quota"),
            hint=f"write quota: {most}, or remove it",
            exit_code=USAGE,
        )
    return prompts


def _slice(one: Read, counts: Counter[str]) -> Iterator[CandidateSet | Broken]:
    """The rows of a source, of a sampled one those in its slice; `counts` gets the others."""
    part = one.source.sample.slice if one.source.sample else None
    for item in one.sets():
        if part and isinstance(item, CandidateSet) and hash64("slice", prompt_key(item.prompt)) % part[1] != part[0]:
            counts["outside_slice"] += 1
        else:
            yield item


class Drawn(NamedTuple):
    """An answer; `ended`: not at `max_new_tokens`; `tokens`: of prompt and answer, 0 where a server counts none."""

    text: str
    ended: bool
    tokens: int


Prompts = Sequence[list[Message]]
Advance = Callable[[int], None]  # called with the number of answers that are done, the known ones at once


class ServerSampler:
    """Answers of any OpenAI-compatible server, each requested alone and with a seed of its own."""

    def __init__(self, recipe: Recipe, settings: Server, store: Store) -> None:
        self.recipe, self.settings = recipe, settings
        self._client = Client(settings, store)

    def draw(self, prompts: Prompts, sample: Sample, advance: Advance) -> list[list[Drawn]]:
        """Draw `sample.answers` to each prompt, or take them from the store; DpoError where the server is of no use.

        What it refuses to answer counts as an answer without an end.
        """
        server = self.settings.base_url.rstrip("/")
        options = {
            "temperature": sample.temperature, "top_p": sample.top_p, "max_tokens": sample.max_new_tokens,
            "extra_body": {
                "chat_template_kwargs": {"enable_thinking": self.recipe.model.thinking},
                **({"top_k": sample.top_k} if sample.top_k else {}),
            },
        }  # fmt: skip
        requests, keys = {}, []
        for prompt in prompts:
            seeds = [hash64(self.recipe.seed, key_of(prompt), draw) % 2**31 for draw in range(sample.answers)]
            keys.append([key_of("answer", server, self.settings.model, options, prompt, seed) for seed in seeds])
            for key, seed in zip(keys[-1], seeds, strict=True):
                requests[key] = {"messages": prompt, "seed": seed, **options}
        advance(len(prompts) * sample.answers - len(requests))
        good, _ = self._client.ask(requests, lambda reply: True, advance)
        nothing = Drawn("", False, 0)
        drawn = {key: Drawn(reply.text, not reply.cut, reply.tokens) for key, reply in good.items()}
        return [[drawn.get(key, nothing) for key in several] for several in keys]


@dataclass
class OwnAnswers:
    """The candidate sets of sources with `sample` or `rate`, on disk.

    Attributes:
        figures: `sampled` and `rated` of the report.
        places: where the sets of a source are in the store of rows, by its place in the recipe.
        scores: of all answers, in the order of the sets.
    """

    rows: RowStore[CandidateSet | Broken]
    figures: dict[str, Any] = field(default_factory=dict)
    places: dict[int, array[int]] = field(default_factory=dict)
    scores: Iterator[float] = field(default_factory=lambda: iter(()))

    def sets(self) -> Iterator[CandidateSet]:
        """Yield all the sets, without their scores."""
        items = (self.rows.get(place) for places in self.places.values() for place in places)
        return (item for item in items if isinstance(item, CandidateSet))

    def of_source(self, rank: int) -> Iterator[CandidateSet | Broken]:
        """Yield a source's rows with the scores that were given; to be called in the order of the sources, once."""
        for place in self.places[rank]:
            item = self.rows.get(place)
            if isinstance(item, CandidateSet):
                for candidate, score in zip(item.candidates, self.scores, strict=False):
                    candidate.score = None if math.isnan(score) else score
            yield item


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
    made, answers, counts = OwnAnswers(RowStore(folder)), 0, Counter[str]()
    samples = {rank: one.source.sample for rank, (one, _) in enumerate(looked) if one.source.sample}
    asked = sum(_prompts_in(recipe, rank, looked[rank][0]) * sample.answers for rank, sample in samples.items())
    with ExitStack() as stack:
        store = stack.enter_context(Store(kept / ANSWERS))
        step = stack.enter_context(Step("sampling answers", quiet=quiet or not samples, total=asked))
        answering = _Answering(recipe, tokenizer, store, counts, step.advance)
        stack.callback(answering.close)
        for rank, (one, context) in enumerate(looked):
            if one.source.sample or one.source.rate:
                made.places[rank] = array("q")
                for item in answering.sets(one, context):
                    made.places[rank].append(made.rows.add(item))
                    answers += len(item.candidates) if isinstance(item, CandidateSet) else 0
    if samples:
        by = list(dict.fromkeys(" ".join(_name(recipe, sample)) for sample in samples.values()))
        fields = ("prompts", "answers", "cut_off", "identical", "not_asked", "outside_slice", "tokens")
        made.figures["sampled"] = {"by": [name.strip() for name in by], **{name: counts[name] for name in fields}}
    with Store(kept / RATINGS) as store:
        scores, made.figures["rated"] = rate(recipe, made.sets(), answers, store, folder / "answers.jsonl", quiet)
    made.scores = iter(scores)
    return made


def _name(recipe: Recipe, sample: Sample) -> tuple[str, str]:
    """Who answers, and where."""
    if sample.server:
        return without_paths(sample.server.model), "on a server"
    return without_paths(recipe.model.id), "+ its adapter" if recipe.model.adapter else ""


@dataclass
class _Answering:
    """Rows of sources with new answers, or with their own, whose scores are left out."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None
    store: Store
    counts: Counter[str]
    advance: Callable[[int], None]
    opened: dict[str, Any] = field(default_factory=dict)  # samplers, by their server; "" is the model here

    def sets(self, one: Read, context: filters.Context) -> Iterator[CandidateSet | Broken]:
        items = _slice(one, self.counts)
        while chunk := list(islice(items, CHUNK)):
            sets = [item for item in chunk if isinstance(item, CandidateSet)]
            for item in sets:
                item.ranked = item.labelled = False
                item.stated = {}
                for candidate in item.candidates:
                    candidate.score = None
            if one.source.sample:
                self._answer(sets, one.source.sample, context)
            yield from chunk

    def _answer(self, sets: list[CandidateSet], sample: Sample, context: filters.Context) -> None:
        """Draw answers to the prompts that no filter drops anyway."""
        asked = []
        for item in sets:
            item.candidates = item.candidates if sample.keep else []
            drop = self._screen(item, context)
            if drop is None:
                asked.append(item)
                continue
            item.candidates, item.drop = [], drop
        refused = len(sets) - len(asked)
        self.advance(refused * sample.answers)
        drawn = self._sampler(sample).draw([item.prompt for item in asked], sample, self.advance)
        for item, answers in zip(asked, drawn, strict=True):
            self._add(item, answers, _name(self.recipe, sample)[0], sample)
        self.counts.update(
            prompts=len(asked), not_asked=refused, answers=sum(map(len, drawn)),
            tokens=sum(one.tokens for answers in drawn for one in answers),
        )  # fmt: skip

    def _sampler(self, sample: Sample) -> Any:
        key = sample.server.model_dump_json() if sample.server else ""
        if key not in self.opened and sample.server:
            self.opened[key] = ServerSampler(self.recipe, sample.server, self.store)
        elif key not in self.opened:
            from dpo_cli.prepare.local_sampling import LocalSampler  # here, for it imports torch

            self.tokenizer = self.tokenizer or chat.load_tokenizer(self.recipe)
            self.opened[key] = LocalSampler(self.recipe, self.tokenizer, self.store)
        return self.opened[key]

    def close(self) -> None:
        if "" in self.opened:
            self.opened.pop("").close()

    def _screen(self, item: CandidateSet, context: filters.Context) -> Drop | None:
        """Why a prompt would be dropped whatever its answers are."""
        options, asked = self.recipe.data.filters, item.prompt[-1]["content"]
        alone = replace(item, candidates=[], language=item.language or language(asked))
        drop = filters.screen(alone, context) if alone.language != "und" else None
        if drop is not None:
            return drop
        if options.markers and filters.markers("An answer.", alone, options.markers, context) is None:
            return "markers", "in the prompt"
        if options.too_long and self.tokenizer is not None:
            kwargs = chat.chat_template_kwargs(self.recipe)
            count = tokens.lengths(self.tokenizer, kwargs, [(alone, [])])[0][0]
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
