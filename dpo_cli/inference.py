"""What models are asked: log-probabilities of answers, and answers, in batches that fit the memory.

Sampling is by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030): with g_v = -log e_v, where the
e_v are exponential of rate 1, argmax_v (log p_v + g_v) is a draw from p. So a greedy search over the warped logits plus
noise samples exactly from the distribution that temperature, top-k and top-p leave. What it buys: each answer has noise
of its own, by its seed, and is the same in whatever batch and after whatever interruption it is drawn (up to the
rounding of 16-bit arithmetic, which does look at the batch); and two models that share it differ only as the models do
(common random numbers), so that their comparison is the tighter for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.families import THINK
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.progress import Step
from dpo_cli.records import Pair

HEAD_CHUNK = 128  # positions whose logits are float32 at once: 78 MB for a vocabulary of 152,000

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], Result],
    too_large: Callable[[Item], DpoError],
) -> Iterator[Result]:
    """Yield `work` of all the items, `size` at once, and from where memory runs out half as many.

    Raises:
        DpoError: `too_large(item)`, where not even that one alone fits.
    """
    begin = 0
    while begin < len(items):
        batch, error = items[begin : begin + size], None
        try:
            result = work(batch)
        except (RuntimeError, MemoryError) as found:
            if not ran_out_of_memory(found):
                raise
            error = found.with_traceback(None)  # which would keep the failed batch's tensors alive
        if error:
            if len(batch) == 1:
                raise too_large(batch[0]) from error
            torch.cuda.empty_cache()
            size = len(batch) // 2
            continue
        yield result
        begin += len(batch)


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str, *, left: bool = False, value: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of token ids and their attention mask, both [rows, longest], padded on the right or on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[line, place] = torch.tensor(row, dtype=torch.long)
        mask[line, place] = 1
    return ids.to(device), mask.to(device)


# -------------------------------------------------------------------------------------------------- log-probabilities


@dataclass(frozen=True)
class Tokens:
    """A prompt and one answer as token ids; the answer, which the loss counts, begins at `start`."""

    ids: list[int]
    start: int


def encode(tokenizer: Any, pair: Pair, max_length: int) -> tuple[Tokens, Tokens]:
    """Return (chosen, rejected) of a pair in tokens, split into prompt and answer as TRL's DPOTrainer does.

    TRL renders prompt and prompt + answer apart and lets the answer begin where the two part, at the same place for
    both answers; what is over `max_length` is cut from the end.
    """
    kwargs = pair.chat_template_kwargs
    prompt = chat.chat_tokens(tokenizer, pair.prompt, add_generation_prompt=True, **kwargs)
    whole = [chat.chat_tokens(tokenizer, pair.prompt + answer, **kwargs) for answer in (pair.chosen, pair.rejected)]
    start = max(1, min(_common_prefix(prompt, ids) for ids in whole))  # nothing predicts the very first token
    chosen, rejected = (Tokens(ids[:max_length], start) for ids in whole)
    return chosen, rejected


def _common_prefix(one: list[int], other: list[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def answer_logps(model: Any, rows: Sequence[Tokens], batch_size: int) -> list[list[float]]:
    """Compute each row's per-token log-probabilities of its answer, in nats.

    Rows are sorted by length and padded on the right. The head runs only where answers stand, and its logits become
    float32 a few positions at a time, so that a vocabulary of 150,000 words does not fill the memory; where a batch
    does not fit, it is halved.

    Raises:
        DpoError: not even one row fits into the GPU's memory.
    """
    # The same answer in several pairs is computed once, and two equal answers are equal to the last bit.
    keys = [(row.start, *row.ids) for row in rows]
    distinct = dict(sorted(zip(keys, rows, strict=True), key=lambda one: len(one[0])))

    def too_large(row: Tokens) -> DpoError:
        return DpoError(
            f"the GPU's memory does not hold one answer of {len(row.ids)} tokens with its prompt",
            where="model.max_length",
            hint="end what else runs on the GPU, or lower model.max_length",
        )

    found: list[list[float]] = []
    batches = in_batches([*distinct.values()], batch_size, lambda batch: _batch_logps(model, batch), too_large)
    with Step("scoring answers", total=len(distinct), named=False) as step:
        for batch in batches:
            found += batch
            step.advance(len(batch))
    logps = dict(zip(distinct, found, strict=True))
    return [logps[key] for key in keys]


def _batch_logps(model: Any, rows: Sequence[Tokens]) -> list[list[float]]:
    ids, mask = padded([row.ids for row in rows], next(model.parameters()).device)
    longest = ids.shape[1]
    keep = longest - min(row.start for row in rows) + 1  # positions that predict an answer token, and the last
    results = []
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
        offset = longest - logits.shape[1]
        for line, row in enumerate(rows):
            # The logits at position t score token t + 1.
            scores = logits[line, row.start - 1 - offset : len(row.ids) - 1 - offset].split(HEAD_CHUNK)
            tokens = ids[line, row.start : len(row.ids), None].split(HEAD_CHUNK)
            chunks = [one.float().log_softmax(-1).gather(1, of) for one, of in zip(scores, tokens, strict=True)]
            results.append(torch.cat(chunks).squeeze(1).tolist())
    return results


def token_logps(model: Any, rows: Sequence[list[int]], last: int) -> list[torch.Tensor]:
    """For each row of token ids the log-probabilities [up to `last`, vocabulary] at its last positions, on the CPU."""
    device = next(model.parameters()).device
    results = []
    for ids in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=device), logits_to_keep=last, use_cache=False).logits
        results.append(logits[0].float().log_softmax(-1).cpu())
    return results


# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else among what top-k (0: all) and top-p (1: all) leave."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    text: what a reader sees, without special tokens and thinking, stripped of white space at its ends.
    ids: all generated tokens with the end token, never empty.
    finished: it ended with an end token, not at `max_new_tokens`.
    thought: how many of `ids` are thinking (they stand first).
    """

    text: str
    ids: list[int]
    finished: bool
    thought: int = 0

    @property
    def answer_ids(self) -> list[int]:
        """The tokens after the thinking, with the end token; empty where the thinking never ended."""
        return self.ids[self.thought :]


def seed_of(*parts: object) -> int:
    """Return a 64-bit seed, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] = ()
) -> list[Answer]:
    """Answer the prompts in one batch, padded on the left; they end where `chat.end_tokens` says.

    Only `sampling` decides the answers: what the model's folder says of sampling is left out.

    Args:
        model: a causal language model, with an adapter on it or without.
        prompts: token ids.
        seeds: one a prompt, where it samples.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # with the adapter in its layers
    own = base.generation_config
    ends = chat.end_tokens(own.eos_token_id if own else None, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = padded(prompts, base.device, left=True, value=pad)
    warpers = LogitsProcessorList()
    if sampling.temperature > 0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        warpers.append(_GumbelNoise(seeds, base.device))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=ends, pad_token_id=pad
    )
    base.generation_config = GenerationConfig()  # generate would fill what ours leaves open from the model's folder
    try:
        rows = base.generate(ids, attention_mask=mask, generation_config=config, logits_processor=warpers)
    finally:
        base.generation_config = own
    return [_answer(tokenizer, row, ends) for row in rows[:, ids.shape[1] :].tolist()]


class _GumbelNoise:
    """Adds Gumbel noise to logits [rows, words], each row's from a generator of its own."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()
        return torch.sub(scores, noise, out=noise)  # in its own memory: with a real vocabulary it is megabytes a token


def _answer(tokenizer: Any, ids: list[int], ends: Sequence[int]) -> Answer:
    """Cut a row of generated tokens, which goes on with padding after its end token."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    if end is not None:
        ids = ids[: end + 1]
    # Qwen3's thinking: up to </think>, or everything where it was opened and not closed.
    opened, closed = (tokenizer.get_added_vocab().get(mark) for mark in THINK)
    thought = ids.index(closed) + 1 if closed in ids else len(ids) if ids[0] == opened else 0
    text = tokenizer.decode(ids[thought:end], skip_special_tokens=True)
    return Answer(str(text).strip(), ids, end is not None, thought)
