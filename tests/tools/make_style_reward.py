"""Makes `builtin:style-reward`: a reward model of 0.2 M weights that prefers the answer with more direct sentences.

    python -m tests.tools.make_style_reward [--steps N] [--into FOLDER]

A Qwen3 sequence classifier with one output and the tokenizer of `builtin:tiny-qwen3`, which is made first. It is
trained by the loss of Bradley and Terry, -log σ(r(better) - r(worse)), on pairs of answers written anew by the
generator, whose direct sentences are counted; an answer that is spoilt (cut off, in the other language, repeating
itself, its words mixed up) loses to any that is whole. None of the prompts that `recipes/smoke.yaml` holds out is among
its texts. Seeded. About two minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from dpo_cli.chat import chat_tokens
from dpo_cli.inference import padded
from dpo_cli.records import Message
from tests.tools.make_tiny_qwen3 import (
    SEED,
    SHIPPED,
    Question,
    config,
    follow,
    minimise,
    save,
    training_questions,
)
from tests.tools.smoke_data import answer
from transformers import AutoTokenizer, Qwen3ForSequenceClassification

STEPS, PAIRS, LEARNING_RATE = 500, 16, 1e-3
SPOILT = 0.3  # share of the pairs whose worse answer is spoilt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--into", type=Path, default=SHIPPED / "style-reward")
    given = parser.parse_args()
    follow(make(given.into, given.steps))


def make(folder: Path, steps: int) -> Iterator[float]:
    """Train and write the reward model with its tokenizer; yields the loss of each step, nats a pair.

    Args:
        folder: where to write; made if it does not exist.
        steps: of `PAIRS` pairs.
    """
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    questions = training_questions()
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED / "tiny-qwen3")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForSequenceClassification(config(tokenizer, num_labels=1, **shape))
    rng = Random(SEED)

    def loss() -> torch.Tensor:
        pairs = [pair(rng, rng.choice(questions), questions) for _ in range(PAIRS)]
        better, worse = scores(model, tokenizer, [row for one in pairs for row in one]).view(-1, 2).unbind(1)
        return -torch.nn.functional.logsigmoid(better - worse).mean()

    yield from minimise(model, loss, steps, LEARNING_RATE)
    save(model, tokenizer, folder)


def scores(model: Any, tokenizer: Any, rows: Sequence[tuple[Sequence[Message], str]]) -> torch.Tensor:
    """The reward [rows] of answers to conversations, rendered as `eval` shows them to a reward model."""
    rendered = [chat_tokens(tokenizer, [*prompt, Message(role="assistant", content=said)]) for prompt, said in rows]
    ids, mask = padded(rendered, "cpu", value=tokenizer.pad_token_id)
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return found


Row = tuple[list[Message], str]


def pair(rng: Random, question: Question, others: Sequence[Question]) -> tuple[Row, Row]:
    """A better and a worse answer to a question."""
    low, high = sorted(rng.sample(range(4), 2))

    def written(quality: int, about: Question = question) -> str:
        return answer(rng, about.language, about.slots, quality)

    if rng.random() < SPOILT:
        foreign = rng.choice([one for one in others if one.language != question.language])
        better = written(rng.randrange(4))
        worse = written(3, foreign) if rng.random() < 0.25 else spoilt(rng, written(rng.randrange(4)))
        return (question.prompt, better), (question.prompt, worse)
    return (question.prompt, written(high)), (question.prompt, written(low))


def spoilt(rng: Random, said: str) -> str:
    """An answer cut off, repeating a piece of itself, or with its words (in Chinese: its characters) mixed up."""
    kind = rng.randrange(3)
    if kind == 0:
        return said[: rng.randrange(1, len(said) - 2)]
    if kind == 1:
        begin = rng.randrange(len(said) // 2)
        piece = said[begin : begin + rng.randrange(4, 30)]
        return said[:begin] + piece * rng.randrange(3, 9)
    parts = said.split(" ") if " " in said else list(said)
    rng.shuffle(parts)
    return (" " if " " in said else "").join(parts)


if __name__ == "__main__":
    main()
