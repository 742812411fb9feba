"""Answers of base and tuned model to the same prompts, and how far the tuned model went from its reference in its own.

Sampling is by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030): with g_v = -log e_v, where the
e_v are exponential of rate 1, argmax_v (log p_v + g_v) is a draw from p. So a greedy search over the warped logits plus
noise samples exactly from the distribution that temperature, top-k and top-p leave. What it buys: each answer has noise
of its own, by seed, id and draw, and is the same in whatever batch and after whatever interruption it is drawn (up to
the rounding of 16-bit arithmetic, which does look at the batch); and base and tuned model share it, so that the two
differ only as the models do (common random numbers), and their comparison is the tighter for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.inference import bar, in_batches
from dpo_cli.recipe import Eval
from dpo_cli.records import Message, Pair, read_jsonl

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# Positions whose distributions are held at once for the KL: 0.2 GB a float32 tensor of Qwen3's 151,936 words.
KL_POSITIONS = 256


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    text: what a reader sees, without special tokens and thinking, stripped of white space at its ends.
    ids: all generated tokens with the end token, never empty.
    finished: it ended by itself, not at `eval.max_new_tokens`.
    thought: how many of `ids` are thinking (they stand first).
    """

    text: str
    ids: list[int]
    finished: bool
    thought: int = 0

    @property
    def said(self) -> list[int]:
        """The tokens after the thinking, with the end token; empty where the thinking never ended."""
        return self.ids[self.thought :]


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sample:
        return cls(**{**row, "base": Answer(**row["base"]), "tuned": Answer(**row["tuned"])})


def sample_pairs(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    settings: Eval,
    seed: int,
    path: Path,
    *,
    progress: bool,
) -> list[Sample]:
    """The first `settings.prompts` prompts of the pairs, answered by base and tuned model.

    data/eval.jsonl is ordered by hash, so the first prompts are a random choice. A prompt of several pairs is answered
    once, under the first one's id. The answers are appended to `path` batch by batch; what already stands there is
    taken from there, so a killed run goes on, and a line that was only half written is cut off. Rows of other prompts
    are left alone.

    Args:
        model: of `models.load_tuned`.
        settings: how to sample, and `batch_size` answers at once, halved where the GPU's memory runs out.
        seed: of the sampling.
        path: a JSONL file of this very model and these very settings; made if it does not exist.
        progress: draw a bar on stderr, if that is a terminal.

    Returns:
        One sample a prompt, in the order of the pairs.

    Raises:
        DpoError: the memory is too small for one answer.
    """
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(json.dumps([pair.prompt, pair.chat_template_kwargs], sort_keys=True), pair)
    asked = list(first.values())[: settings.prompts]
    done = _read(path)
    prompts = {
        pair.id: models.chat_tokens(tokenizer, pair.prompt, add_generation_prompt=True, **pair.chat_template_kwargs)
        for pair in asked
        if pair.id not in done
    }
    # Prompts of like length share a batch, to pad little; the longest go first, to run out of memory at once or never.
    left = sorted((pair for pair in asked if pair.id in prompts), key=lambda pair: -len(prompts[pair.id]))

    def work(batch: Sequence[Pair]) -> list[Sample]:
        ids = [prompts[pair.id] for pair in batch]
        base, tuned = _both(model, tokenizer, ids, [_seed(seed, pair.id, 0) for pair in batch], settings)
        return [
            Sample(pair.id, pair.language, pair.source, pair.prompt, b, t, _kl(model, prompt, t.ids))
            for pair, prompt, b, t in zip(batch, ids, base, tuned, strict=True)
        ]

    with bar("answering", len(asked), progress) as advance, open(path, "a", encoding="utf-8", newline="\n") as file:
        advance(len(asked) - len(left))
        for samples in in_batches(left, settings.batch_size, work, lambda _: _too_large(settings)):
            file.writelines(json.dumps(sample.to_json(), ensure_ascii=False) + "\n" for sample in samples)
            file.flush()
            done |= {sample.id: sample for sample in samples}
            advance(len(samples))
    return [done[pair.id] for pair in asked]


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
    ids = models.chat_tokens(tokenizer, prompt, add_generation_prompt=True, **chat_template_kwargs)

    def work(batch: Sequence[int]) -> tuple[list[Answer], list[Answer]]:
        return _both(model, tokenizer, [ids] * len(batch), [_seed(seed, "", draw) for draw in batch], settings)

    base, tuned = [], []
    for answers in in_batches(range(count), settings.batch_size, work, lambda _: _too_large(settings)):
        base += answers[0]
        tuned += answers[1]
    return base, tuned


# ----------------------------------------------------------------------------------------------------------- one batch


def _both(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    settings: Eval,
) -> tuple[list[Answer], list[Answer]]:
    with models.as_reference(model):
        base = _generate(model, tokenizer, prompts, seeds, settings)
    return base, _generate(model, tokenizer, prompts, seeds, settings)


def _generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    settings: Eval,
) -> list[Answer]:
    """An answer to each prompt, one batch, padded on the left."""
    import torch
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    base: Any = model.get_base_model()  # with the adapter in its layers
    own = base.generation_config
    ends = models.end_tokens(own.eos_token_id, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)

    warpers = LogitsProcessorList()
    if settings.temperature > 0:
        warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
        warpers.append(_GumbelNoise(seeds, base.device))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=ends, pad_token_id=pad
    )
    base.generation_config = GenerationConfig()  # generate would fill what ours leaves open from the model's folder
    try:
        rows = base.generate(ids, attention_mask=mask, generation_config=config, logits_processor=warpers)
    finally:
        base.generation_config = own
    return [_answer(tokenizer, row, ends) for row in rows[:, longest:].tolist()]


class _GumbelNoise:
    """Adds Gumbel noise to logits [rows, words], each row's from a generator of its own."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: Sequence[int]) -> Answer:
    """The answer in a row of generated tokens, which goes on with padding after its end token."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    if end is not None:
        ids = ids[: end + 1]
    # Qwen3's thinking: up to </think>, or everything where it was opened and not closed.
    opened, closed = (tokenizer.get_added_vocab().get(mark) for mark in ("<think>", "</think>"))
    thought = ids.index(closed) + 1 if closed in ids else len(ids) if ids[0] == opened else 0
    text = tokenizer.decode(ids[thought:end], skip_special_tokens=True)
    return Answer(str(text).strip(), ids, end is not None, thought)


def _kl(model: PeftModel, prompt: list[int], answer: list[int]) -> float:
    """`Sample.kl_total` of one answer, exact at every position: the sum runs over the vocabulary, not over samples.

    One row at a time and without padding, so that it does not depend on the batch; and few positions at a time, both
    models going on from their caches, so that a long answer under a large vocabulary fits.
    """
    import torch

    ids = torch.tensor([prompt + answer[:-1]], device=model.device)  # the last token predicts nothing
    start = len(prompt) - 1  # the position that predicts the first token
    edges = sorted({0, *range(start, ids.shape[1], KL_POSITIONS), ids.shape[1]})
    tuned_cache = reference_cache = None
    total = 0.0
    for begin, end in pairwise(edges):
        part = {"input_ids": ids[:, begin:end], "use_cache": True, "logits_to_keep": 1 if end <= start else 0}
        with torch.no_grad():
            tuned = model(**part, past_key_values=tuned_cache)
            with models.as_reference(model):
                reference = model(**part, past_key_values=reference_cache)
        tuned_cache, reference_cache = tuned.past_key_values, reference.past_key_values
        if begin >= start:
            log_p, log_q = (found.logits[0].float().log_softmax(-1) for found in (tuned, reference))
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return total


# -------------------------------------------------------------------------------------------------------------- helpers


def _seed(*parts: object) -> int:
    """A 64-bit seed, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _too_large(settings: Eval) -> DpoError:
    return DpoError(
        f"the GPU's memory is too small for one answer of {settings.max_new_tokens} tokens",
        where="eval.max_new_tokens",
        hint="lower eval.max_new_tokens; eval.batch_size is halved by itself and came down to 1",
    )


def _read(path: Path) -> dict[str, Sample]:
    """The samples of an earlier run by id; a last line without its end is cut off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return {sample.id: sample for sample in map(Sample.from_json, read_jsonl(path))}
