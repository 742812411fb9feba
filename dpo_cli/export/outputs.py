"""Model outputs to compare: log-probabilities of held-out answers, and greedy answers to held-out prompts."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_cli import chat, machine, models
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export.base import Stored
from dpo_cli.inference import Answer, Sampling, generate, in_batches, token_logps
from dpo_cli.recipe import Recipe
from dpo_cli.records import Answered, Message, read_answers
from dpo_cli.run import Run

ROWS = 8  # held-out answers that the models are compared on
LAST = 64  # the last tokens of each; 8 x 64 rows of 151,936 floats are 311 MB
PROMPTS = 3  # held-out prompts that the models answer
MAX_NEW_TOKENS = 256
HEADROOM = 2 * 10**9  # bytes for log-probabilities and activations beside the weights

FIXTURES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Name two uses of baking soda."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "用三句话介绍如何给多肉浇水，谢谢！"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "你好！How can I help?"},
        {"role": "user", "content": "“引号”、emoji 🙂, and\n\ta tab"},
    ],
)


def fixtures(tokenizer: Any) -> list[list[Message]]:
    """List those of FIXTURES that a chat template takes: some refuse a system turn, and training saw none then."""
    taken = []
    for messages in FIXTURES:
        with suppress(TemplateError):
            tokenizer.apply_chat_template(messages, tokenize=False)
            taken.append(messages)
    return taken


class Probes(NamedTuple):
    """Token ids of held-out prompts with chosen answers, and of prompts alone."""

    rows: list[list[int]]
    prompts: list[list[int]]


class Outputs(NamedTuple):
    """`logps`: per row [up to LAST, vocabulary], on the CPU; `answers`: to the prompts, in their order."""

    logps: list[torch.Tensor]
    answers: list[Answer]


class Expected(NamedTuple):
    """What every export is compared with: log-probabilities of the 16-bit base, outputs of the adapter on it."""

    probes: Probes
    base: list[torch.Tensor]
    tuned: Outputs


@dataclass(frozen=True)
class Placement:
    """Where an export's models are computed: in float32 if it fits, to compare weights and not a dtype's rounding."""

    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"


def probes(recipe: Recipe, run: Run, tokenizer: Any) -> Probes:
    """Take probes from the held-out pairs, or the training pairs where none was held out; all languages take turns.

    Prompts are those with the shortest chosen answers, for they are the likeliest to be answered in MAX_NEW_TOKENS.
    """
    answers = read_answers(run.eval_pairs) or read_answers(run.train_pairs)
    rows = [
        chat.chat_tokens(tokenizer, one.prompt + one.answer, **one.chat_template_kwargs)[: recipe.model.max_length]
        for one in _in_turn(answers)[:ROWS]
    ]
    asked = _in_turn(sorted(answers, key=lambda one: len(one.answer[-1]["content"])))[:PROMPTS]
    prompts = [
        chat.chat_tokens(tokenizer, one.prompt, add_generation_prompt=True, **one.chat_template_kwargs) for one in asked
    ]
    return Probes(rows, prompts)


def _in_turn(answers: Iterable[Answered]) -> list[Answered]:
    by_language: dict[str, list[Answered]] = {}
    for one in answers:
        by_language.setdefault(one.language, []).append(one)
    return [one for turn in zip_longest(*by_language.values()) for one in turn if one]


def placement(tensors: dict[str, Stored]) -> Placement:
    """Choose the GPU before the CPU, float32 before 16 bits, by the memory that is free now.

    `engine.memory_limit` is about training: this holds one model at a time and no optimizer.
    """
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    stored: torch.dtype = getattr(torch, base16.dtype_16bit(tensors))
    free = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    free["cpu"] = machine.free_memory()
    for device, there in free.items():
        for dtype in (torch.float32, stored):
            if parameters * dtype.itemsize + HEADROOM <= there:
                return Placement(device, dtype)
    return Placement("cpu", stored)


def load(folder: Path | str, where: Placement, *, revision: str | None = None, adapter: Path | None = None) -> Any:
    """Load a model, with an adapter on it where one is named; the caller drops it before the next."""
    gc.collect()  # PEFT's models hold circles: the last one would stay beside this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=where.dtype, revision=revision, **models.SAFE)
    model = model.to(where.device)
    return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()


def collect(model: Any, asked: Probes, tokenizer: Any) -> Outputs:
    """Return a model's log-probabilities and greedy answers to the probes."""
    batches = in_batches(
        asked.prompts,
        len(asked.prompts),
        lambda prompts: generate(model, tokenizer, prompts, Sampling(MAX_NEW_TOKENS)),
        lambda prompt: DpoError(
            f"the memory does not hold one answer to a prompt of {len(prompt)} tokens",
            where="export",
            hint="end what else uses it, or export where there is more",
        ),
    )
    return Outputs(token_logps(model, asked.rows, LAST), [one for batch in batches for one in batch])
