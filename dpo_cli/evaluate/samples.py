"""Answers of base and tuned model to the same prompts, and how far the tuned model went from its reference in its own.

Both models share their noise, see `inference`: they differ only as the models do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dpo_cli import backends, chat, models
from dpo_cli.errors import DpoError
from dpo_cli.inference import HEAD_CHUNK, Answer, Sampling, generate, in_batches, seed_of
from dpo_cli.progress import Step
from dpo_cli.recipe import Eval, Recipe
from dpo_cli.records import Message, Pair
from dpo_cli.run import Run
from dpo_cli.store import Store


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the answers of the base (the reference) and of the tuned model; a line of samples.jsonl.

    `kl_total` is Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) in nats over all positions of the tuned answer's `ids`.
    """

    id: str
    language: str
    source: str
    prompt: list[Message]
    base: Answer
    tuned: Answer
    kl_total: float

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sample:
        return cls(**{**row, "base": Answer(**row["base"]), "tuned": Answer(**row["tuned"])})


def load_both(recipe: Recipe, run: Run) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the tuned model with what it is compared with, by `eval.against`, and the tokenizer."""
    backends.import_backend(backends.Backend("hf", "evaluation"))
    trained = models.as_trained(recipe, run.record("train"))
    if recipe.eval.against == "base":  # the run's adapter holds what it started from, so that the base alone is left
        trained = trained.model_copy(update={"model": trained.model.model_copy(update={"adapter": None})})
    return models.load_tuned(trained, run.adapter)


def sample_pairs(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    settings: Eval,
    seed: int,
    store: Store,
    *,
    progress: bool,
) -> list[Sample]:
    """Sample answers of base and tuned model to the first `settings.prompts` prompts of the pairs.

    data/eval.jsonl is ordered by hash, so the first prompts are a random choice. A prompt of several pairs is answered
    once, under the first one's id. Answers are kept batch by batch, so a killed run goes on.

    Args:
        model: of `load_both`.
        settings: how to sample, and `batch_size` answers at once, halved where the GPU's memory runs out.
        store: samples of this very model and these very settings, by a pair's id.

    Returns:
        One sample a prompt, in the order of the pairs.

    Raises:
        DpoError: the memory is too small for one answer.
    """
    asked = first_of_each_prompt(pairs)[: settings.prompts]
    done = {key: Sample.from_json(row) for key, row in store.get(pair.id for pair in asked).items()}
    prompts = {
        pair.id: chat.chat_tokens(tokenizer, pair.prompt, add_generation_prompt=True, **pair.chat_template_kwargs)
        for pair in asked
        if pair.id not in done
    }
    # Prompts of like length share a batch, to pad little; the longest go first, to run out of memory at once or never.
    left = sorted((pair for pair in asked if pair.id in prompts), key=lambda pair: -len(prompts[pair.id]))

    def work(batch: Sequence[Pair]) -> list[Sample]:
        ids = [prompts[pair.id] for pair in batch]
        base, tuned = answer_both(model, tokenizer, ids, ids, [seed_of(seed, pair.id, 0) for pair in batch], settings)
        return [
            Sample(pair.id, pair.language, pair.source, pair.prompt, b, t, _kl(model, prompt, t.ids))
            for pair, prompt, b, t in zip(batch, ids, base, tuned, strict=True)
        ]

    name, there = f"answering {len(asked)} prompts", len(asked) - len(left)
    with Step(name, quiet=not progress, total=len(asked), done=there) as step:
        for samples in in_batches(left, settings.batch_size, work, lambda _: too_large(settings)):
            store.put({sample.id: asdict(sample) for sample in samples})
            done |= {sample.id: sample for sample in samples}
            step.advance(len(samples))
    return [done[pair.id] for pair in asked]


def first_of_each_prompt(pairs: Sequence[Pair]) -> list[Pair]:
    """Return one pair a prompt, so that a figure over them counts prompts, as its interval assumes."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(json.dumps([pair.prompt, pair.chat_template_kwargs], sort_keys=True), pair)
    return list(first.values())


def draws(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    settings: Eval,
    seed: int,
    count: int,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[list[Answer], list[Answer]]:
    """`count` answers to one prompt by the base and as many by the tuned model; with temperature 0 they are all alike.

    Raises:
        DpoError: the memory is too small for one answer.
    """
    ids = chat.chat_tokens(tokenizer, prompt, add_generation_prompt=True, **chat_template_kwargs)

    def work(batch: Sequence[int]) -> list[tuple[Answer, Answer]]:
        prompts, seeds = [ids] * len(batch), [seed_of(seed, "", draw) for draw in batch]
        return list(zip(*answer_both(model, tokenizer, prompts, prompts, seeds, settings), strict=True))

    found = chain(*in_batches(range(count), settings.batch_size, work, lambda _: too_large(settings)))
    base, tuned = zip(*found, strict=True)
    return list(base), list(tuned)


def answer_both(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base_prompts: Sequence[list[int]],
    tuned_prompts: Sequence[list[int]],
    seeds: Sequence[int],
    settings: Eval,
) -> tuple[list[Answer], list[Answer]]:
    """Answer one batch of prompts by the base (the reference) and by the tuned model, with the same noise."""
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)
    with models.as_reference(model):
        base = generate(model, tokenizer, base_prompts, sampling, seeds)
    return base, generate(model, tokenizer, tuned_prompts, sampling, seeds)


def chat_prompt(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    settings: Eval,
    options: Mapping[str, Any],
    hint: str,
) -> list[int]:
    """Render a conversation that is to be answered.

    Raises:
        DpoError: with an answer it is longer than the model's positions; `hint` says what to do.
    """
    ids = chat.chat_tokens(tokenizer, messages, add_generation_prompt=True, **options)
    room = getattr(model.config, "max_position_embeddings", None)
    if room and len(ids) + settings.max_new_tokens > room:
        raise DpoError(f"{len(ids):,} tokens are too many to answer: the model has {room:,} positions", hint=hint)
    return ids


def _kl(model: PeftModel, prompt: list[int], answer: list[int]) -> float:
    """`Sample.kl_total` of one answer, exact at every position: the sum runs over the vocabulary, not over samples.

    One row at a time and without padding, so that it does not depend on the batch; in float32 few positions at a time,
    so that a long answer under a large vocabulary fits.
    """
    ids = torch.tensor([prompt + answer[:-1]], device=model.device)  # the last token predicts nothing
    with torch.no_grad():
        tuned = model(input_ids=ids, logits_to_keep=len(answer), use_cache=False).logits[0]
        with models.as_reference(model):
            reference = model(input_ids=ids, logits_to_keep=len(answer), use_cache=False).logits[0]
    total = 0.0
    for some in zip(tuned.split(HEAD_CHUNK), reference.split(HEAD_CHUNK), strict=True):
        log_p, log_q = (logits.float().log_softmax(-1) for logits in some)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return total


def too_large(settings: Eval) -> DpoError:
    return DpoError(
        f"the GPU's memory is too small for one answer of {settings.max_new_tokens} tokens",
        where="eval.max_new_tokens",
        hint="lower eval.max_new_tokens; eval.batch_size is halved automatically and came down to 1",
    )
