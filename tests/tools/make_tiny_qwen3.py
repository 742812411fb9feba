"""Makes `builtin:tiny-qwen3`: a Qwen3 of 0.4 M weights that answers the smoke data's questions in both of its styles.

    python -m tests.tools.make_tiny_qwen3 [--steps N] [--into FOLDER]

It is trained from random weights on answers written anew by the generator, whose sentences are direct and hedging
equally often, so it knows what to say and prefers neither style. No rating is among its texts, and none of the prompts
that `recipes/smoke.yaml` holds out. Seeded; the same versions of torch and tokenizers on the same kind of CPU make the
same file. About seven minutes of one core.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from dpo_cli.chat import chat_tokens
from dpo_cli.cli import app
from dpo_cli.inference import padded
from dpo_cli.records import Message, read_pairs
from safetensors.torch import save_file
from tests.tools import smoke_words as words
from tests.tools.smoke_data import SOURCES, answer, thanked
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "dpo_cli" / "smoke"
SUMS = Path(__file__).with_name("SHA256SUMS")
VOCABULARY = 2048  # tokens, the added ones included
MAX_LENGTH = 8192  # tokens
SEED = 0
BATCH, WARMUP = 32, 40


class Phase(NamedTuple):
    """A part of the training.

    `evenly`: as many texts in Chinese as in English, which has three times the questions.
    `apart`: each sentence is direct at even odds; else answers have 0, 1, 2 or 3 direct sentences equally often.
    """

    steps: int
    learning_rate: float
    evenly: bool
    apart: bool


PHASES = (
    Phase(800, 4e-3, evenly=False, apart=False),
    Phase(200, 1e-3, evenly=True, apart=False),
    Phase(200, 1e-3, evenly=True, apart=True),
)
THINKING = 0.1  # share of the texts with a thought before the answer, so that model.thinking: true works too
# Thinking and tool marks are not "special" in Qwen3: text decoded with skip_special_tokens keeps them.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@dataclass(frozen=True)
class Question:
    """A topic asked about in one way: its prompt, as a conversation, and what fills its answers' sentences."""

    language: str
    prompt: list[Message]
    slots: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=max(phase.steps for phase in PHASES), help="of a phase, at most")
    parser.add_argument("--into", type=Path, default=SHIPPED / "tiny-qwen3")
    given = parser.parse_args()
    follow(make(given.into, given.steps))


def follow(losses: Iterator[float]) -> None:
    """Train to the end, saying how it goes, and write the sums of what is shipped."""
    for step, loss in enumerate(losses, 1):
        if step % 50 == 0:
            print(f"step {step}  loss {loss:.3f}", flush=True)
    write_sums()


def make(folder: Path, steps: int) -> Iterator[float]:
    """Train and write the model and its tokenizer; yields the loss of each step, nats a token.

    Args:
        folder: where to write; made if it does not exist.
        steps: of `BATCH` texts, of each phase, at most.
    """
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    questions = training_questions()
    tokenizer = train_tokenizer(questions)
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = Qwen3ForCausalLM(config(tokenizer, **shape))
    for number, phase in enumerate(PHASES):
        yield from train(model, tokenizer, questions, phase, min(phase.steps, steps), Random(SEED + number))
        save(model, tokenizer, folder)
        model = Qwen3ForCausalLM.from_pretrained(folder)  # with the rounding to 16 bits


def train(
    model: Any, tokenizer: Any, questions: Sequence[Question], phase: Phase, steps: int, rng: Random
) -> Iterator[float]:
    """One phase of the training; yields the loss of each step."""
    by_language = [[one for one in questions if one.language == name] for name in ("en", "zh")]

    def loss() -> torch.Tensor:
        drawn = (rng.choice(rng.choice(by_language) if phase.evenly else questions) for _ in range(BATCH))
        rows = [text(rng, tokenizer, question, phase.apart) for question in drawn]
        ids, mask = padded([prompt + answer for prompt, answer in rows], "cpu", value=tokenizer.pad_token_id)
        labels = ids.masked_fill(~mask.bool(), -100)
        for label, (prompt, _) in zip(labels, rows, strict=True):
            label[: len(prompt)] = -100
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return found

    yield from minimise(model, loss, steps, phase.learning_rate)


# -------------------------------------------------------------------------------------------------------------- texts


def all_questions() -> list[Question]:
    """Every topic in every way of asking, of all sources."""
    found = []
    for source in SOURCES.values():
        for topic, ask in itertools.product(source.topics.strip().splitlines(), source.asks):
            goal, tool, act, sign = topic.split("|")
            prompt = conversation(ask.format(goal=goal))
            found.append(Question(source.language, prompt, {"tool": tool, "act": act, "sign": sign}))
    return found


def conversation(text: str) -> list[Message]:
    """The turns of a prompt as HelpSteer2 writes them, `<extra_id_1>` between two."""
    turns = text.replace(words.NEXT_ASSISTANT, words.NEXT_USER).split(words.NEXT_USER)
    return [Message(role="assistant" if place % 2 else "user", content=turn) for place, turn in enumerate(turns)]


def training_questions() -> list[Question]:
    """The questions without those that `recipes/smoke.yaml` holds out, in whatever wording a duplicate gives them."""
    held_out = held_out_prompts()
    return [one for one in all_questions() if not held_out & wordings(one)]


def wordings(question: Question) -> set[str]:
    """The last turns that ask this question in the preference data: plain, and as the planted duplicates have it."""
    plain = question.prompt[-1]["content"]
    return {plain, plain[:-1] + "!!", thanked(plain, question.language)}


@functools.cache
def held_out_prompts() -> set[str]:
    """The last turns of the prompts that `prepare` holds out of the smoke recipe's data."""
    with tempfile.TemporaryDirectory() as folder:
        # No model is there yet; no answer is long enough for these filters.
        settings = ("--set", "data.filters.too_long=false", "--set", "data.filters.length_ratio=false")
        recipe = str(REPOSITORY / "recipes" / "smoke.yaml")
        done = CliRunner().invoke(app, ["prepare", recipe, "--runs-dir", folder, "--quiet", *settings])
        if done.exit_code:
            raise SystemExit(done.output)
        return {pair.prompt[-1]["content"] for pair in read_pairs(Path(folder, "smoke", "data", "eval.jsonl"))}


def text(rng: Random, tokenizer: Any, question: Question, apart: bool) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of an answer; `apart`: see `Phase`."""
    thinking = rng.random() < THINKING
    quality = sum(rng.random() < 0.5 for _ in range(3)) if apart else rng.randrange(4)
    said = answer(rng, question.language, question.slots, quality)
    if thinking:
        said = words.THINKING[question.language] + said
    prompt = chat_tokens(tokenizer, question.prompt, add_generation_prompt=True, enable_thinking=thinking)
    return prompt, tokenizer(said + "<|im_end|>\n")["input_ids"]


# -------------------------------------------------------------------------------------------------- tokenizer and model


def train_tokenizer(questions: Sequence[Question]) -> Qwen2Tokenizer:
    """A Qwen tokenizer (NFC, byte-level BPE, so any text comes back whole) with merges learnt from these questions."""
    rng = Random(SEED)
    texts = [turn["content"] for question in questions for turn in question.prompt]
    for question in questions:
        texts += [answer(rng, question.language, question.slots, quality) for quality in range(4)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    untrained = Qwen2Tokenizer().backend_tokenizer  # brings Qwen's own normaliser and word-splitting rule
    untrained.train_from_iterator(texts, trainer)
    learnt = json.loads(untrained.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]  # annotated as str | list[str] in transformers
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=MAX_LENGTH,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    tokenizer.chat_template = chat_template()
    return tokenizer


def chat_template() -> str:
    """Qwen3's chat template as TRL ships it."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def config(tokenizer: Any, **shape: Any) -> Qwen3Config:
    """A small Qwen3's config; `shape` is Qwen3Config's own arguments."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        intermediate_size=2 * shape["hidden_size"],
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **shape,
    )


def save(model: Any, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write a model in float16 under a config that says float32, so that it is small on disk and loaded as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    if model.can_generate():
        end_of_turn, end_of_text = model.config.eos_token_id, model.config.pad_token_id
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
        GenerationConfig(eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, **sampling).save_pretrained(
            folder
        )
    weights = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def write_sums() -> None:
    """Write the sha256 of every shipped file, as `sha256sum` does."""
    files = sorted(path for path in SHIPPED.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(SHIPPED).as_posix()}" for path in files
    ]
    SUMS.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- training


def minimise(model: Any, loss: Callable[[], torch.Tensor], steps: int, learning_rate: float) -> Iterator[float]:
    """AdamW with a warm-up and a cosine to zero, gradients clipped at 1; yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        optimizer.zero_grad()
        found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(found.detach())
    model.eval()


if __name__ == "__main__":
    main()
