"""What rounds cost: the sampler beside a plain `generate` loop, and the memory of rating.

    .venv/bin/python tests/benchmarks/bench_rounds.py

Sampling: prompts per CPU second of `prepare`'s sampler, with its store and its seeds, and of transformers' own
`generate` on batches of the same size, in alternated runs of one process; the goal is a ratio of 1 at least. Both draw
4 answers to each prompt with the built-in model, and with a random one of Qwen3's vocabulary, whose noise is large.
Rating: peak memory of a process that rates 1,000 answers with the built-in reward model, and of one that rates 10,000.
"""

from __future__ import annotations

import gzip
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dpo_cli import chat, models, smoke
from dpo_cli.prepare.local_sampling import LocalSampler
from dpo_cli.prepare.rating import rate
from dpo_cli.recipe import Recipe, Sample
from dpo_cli.records import Candidate, CandidateSet, Message
from dpo_cli.store import Store
from transformers import AutoConfig, AutoModelForCausalLM

ROUNDS = 5
PROMPTS, ANSWERS, BATCH = 64, 4, 16
QWEN3_VOCABULARY = 151_936
MODEL, REWARD_MODEL = "builtin:tiny-qwen3", "builtin:style-reward"


def recipe(model: str) -> Recipe:
    source = {"id": "builtin:style-ultrafeedback-en", "sample": {"answers": ANSWERS}}
    return Recipe.model_validate(
        {
            "name": "bench", "model": {"id": model, "load_in_4bit": False, "max_length": 512},
            "data": {"sources": [source], "rater": {"kind": "reward_model", "id": REWARD_MODEL}},
            "eval": {"batch_size": BATCH},
        }
    )  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """The built-in data's rows, of both languages in turn."""
    both = [
        [json.loads(line) for line in gzip.decompress(smoke.resolve(f"builtin:{name}").read_bytes()).splitlines()]
        for name in ("style-ultrafeedback-en", "style-ultrafeedback-zh")
    ]
    return [row for pair in zip(*both, strict=False) for row in pair if row["completions"]]


# --------------------------------------------------------------------------------------------------------- sampling


def plain_loop(model: Any, tokenizer: Any, prompts: list[list[Message]], sample: Sample) -> int:
    """What one writes by hand: every prompt four times, in the order of the file, a batch after the other."""
    tokenizer.padding_side, tokens = "left", 0
    repeated = [prompt for prompt in prompts for _ in range(sample.answers)]
    for begin in range(0, len(repeated), BATCH):
        batch = tokenizer.apply_chat_template(
            repeated[begin : begin + BATCH], add_generation_prompt=True, padding=True, return_tensors="pt",
            return_dict=True, enable_thinking=False,
        )  # fmt: skip
        with torch.inference_mode():
            made = model.generate(
                **batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=sample.max_new_tokens
            )[:, batch["input_ids"].shape[1] :]
        tokenizer.batch_decode(made, skip_special_tokens=True)
        tokens += int((made != tokenizer.pad_token_id).sum())
    return tokens


def sampler(made: Recipe, tokenizer: Any, model: Any, prompts: list[list[Message]], sample: Sample) -> int:
    """The same answers by `prepare`'s sampler, each kept in a store that was empty."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "answers.sqlite")) as store:
        drawing = LocalSampler(made, tokenizer, store)
        drawing._model = model  # both load none
        return sum(one.tokens for several in drawing.draw(prompts, sample, lambda done: None) for one in several)


def prompts_per_cpu_second(work: Callable[[], int]) -> float:
    start = time.process_time()
    work()
    return PROMPTS / (time.process_time() - start)


def compare_sampling(name: str, made: Recipe, sample: Sample) -> None:
    tokenizer, model = chat.load_tokenizer(made), models.load_base(made).eval()
    prompts: list[list[Message]] = [[{"role": "user", "content": row["instruction"]}] for row in rows()[:PROMPTS]]
    ways = {
        "plain generate loop": lambda: plain_loop(model, tokenizer, prompts, sample),
        "dpo-cli's sampler": lambda: sampler(made, tokenizer, model, prompts, sample),
    }
    for work in ways.values():
        work()  # warms up
    speed: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(ROUNDS):
        for label, work in ways.items():
            speed[label].append(prompts_per_cpu_second(work))
    ratios = [ours / theirs for theirs, ours in zip(*speed.values(), strict=True)]
    for label, found in speed.items():
        print(f"{name}: {label}: {statistics.median(found):.2f} prompts per CPU s ({min(found):.2f}-{max(found):.2f})")
    print(f"{name}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), goal 1")


def with_qwen3_vocabulary(folder: Path) -> str:
    """A random model in the built-in one's shape, with its tokenizer and as many words as Qwen3 has."""
    where = smoke.resolve(MODEL)
    config = AutoConfig.from_pretrained(where)
    config.vocab_size = QWEN3_VOCABULARY
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in where.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


# ----------------------------------------------------------------------------------------------------------- rating


def sets(answers: int) -> Iterator[CandidateSet]:
    """As many answers as that, four to a prompt and no two alike."""
    found = rows()
    for number in range(answers // ANSWERS):
        row = found[number % len(found)]
        prompt: list[Message] = [{"role": "user", "content": f"{row['instruction']} {number}"}]
        texts = [row["completions"][place % len(row["completions"])]["response"] for place in range(ANSWERS)]
        candidates = [Candidate(f"{text} {place}", None, "bench") for place, text in enumerate(texts)]
        yield CandidateSet(prompt=prompt, candidates=candidates, source="bench", language="en")


def rate_in_this_process(answers: int) -> None:
    """Print the peak memory in MB, and the CPU seconds."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "ratings.sqlite")) as store:
        start = time.process_time()
        scores, _ = rate(recipe(MODEL), sets(answers), answers, store, Path(folder, "answers.jsonl"), quiet=True)
        seconds = time.process_time() - start
    assert len(scores) == answers
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} {seconds:.1f}")


def compare_rating() -> None:
    peaks = []
    for answers in (1_000, 10_000):
        command = [sys.executable, __file__, "rate", str(answers)]
        peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        peaks.append(float(peak))
        print(f"rating {answers:,} answers: {float(peak):.0f} MB at most, {float(seconds):.1f} CPU s")
    print(f"rating: ten times the answers take {peaks[1] - peaks[0]:+.0f} MB")


def main() -> None:
    torch.set_num_threads(1)
    compare_sampling("built-in model", recipe(MODEL), Sample(answers=ANSWERS, max_new_tokens=96))
    with tempfile.TemporaryDirectory() as folder:
        wide = recipe(with_qwen3_vocabulary(Path(folder)))
        compare_sampling("vocabulary of 151,936", wide, Sample(answers=ANSWERS, max_new_tokens=16))
    compare_rating()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rate"]:
        rate_in_this_process(int(sys.argv[2]))
    else:
        main()
