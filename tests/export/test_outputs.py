"""What the models are asked, and where they are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import chat, machine, recipe, smoke
from dpo_cli.export import outputs
from dpo_cli.export.base import Stored
from dpo_cli.export.outputs import Placement
from dpo_cli.inference import Sampling, generate
from dpo_cli.records import Pair, write_jsonl
from dpo_cli.run import Run

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat.load_tokenizer(recipe.load(SMOKE))


def pair(number: int, language: str, words: int) -> Pair:
    return Pair(
        id=str(number),
        prompt=[{"role": "user", "content": f"question {number}"}],
        chosen=[{"role": "assistant", "content": "word " * words}],
        rejected=[{"role": "assistant", "content": "no"}],
        language=language,
        source="made up",
        chat_template_kwargs={"enable_thinking": False},
    )


def test_every_language_is_asked_and_short_answers_are_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    run, loaded = Run(tmp_path), recipe.load(SMOKE, ["model.max_length=64"])
    pairs = [*(pair(number, "en", 100 - number) for number in range(20)), pair(20, "zh", 90), pair(21, "zh", 5)]
    run.eval_pairs.parent.mkdir()
    write_jsonl(run.eval_pairs, (one.to_json() for one in pairs))
    asked = outputs.probes(loaded, run, tokenizer)
    texts = [tokenizer.decode(ids).split("question ")[1][:2] for ids in asked.prompts]
    assert texts == ["21", "19", "20"]
    assert all(tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n") for ids in asked.prompts)
    starts = [tokenizer.decode(row).split("question ")[1].split("<")[0] for row in asked.rows]
    assert starts == ["0", "20", "1", "21", "2", "3", "4", "5"]
    assert all(len(row) <= 64 for row in asked.rows)

    run.eval_pairs.write_text("")  # without held-out pairs the training pairs are asked
    write_jsonl(run.train_pairs, [pair(7, "en", 3).to_json()])
    assert "question 7" in tokenizer.decode(outputs.probes(loaded, run, tokenizer).prompts[0])


def test_float32_where_the_memory_is_there_else_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(numbers: int, dtype: str) -> dict[str, Stored]:
        return {"w": Stored(Path("model.safetensors"), (numbers, 1), dtype)}

    assert outputs.placement(weights(1000, "BF16")).dtype == torch.float32
    assert outputs.placement(weights(10**13, "BF16")) == Placement("cpu", torch.bfloat16)
    half = weights(10**13, "F16")
    assert outputs.placement(half) == Placement("cpu", torch.float16)
    assert outputs.placement({**half, "norm": Stored(Path("model.safetensors"), (8,), "F32")}).dtype == torch.float16
    for short, dtype in ((0, torch.float32), (1, torch.bfloat16)):
        monkeypatch.setattr(machine, "free_memory", lambda short=short: 4000 + outputs.HEADROOM - short)
        assert outputs.placement(weights(1000, "BF16")).dtype == dtype


def test_an_answer_is_the_same_alone_and_beside_longer_prompts(tokenizer: Any) -> None:
    """Padding on the left is hidden; an answer stops at its end, which is told apart from running out of tokens."""
    model = outputs.load(smoke.resolve("builtin:tiny-qwen3"), Placement("cpu", torch.float32))
    prompts = [tokenizer(text).input_ids for text in ("Why?", "Name two uses of baking soda, please, and say why.")]
    greedy = Sampling(outputs.MAX_NEW_TOKENS)
    together = generate(model, tokenizer, prompts, greedy)
    assert together == [generate(model, tokenizer, [prompt], greedy)[0] for prompt in prompts]
    assert all(answer.finished and len(answer.ids) < outputs.MAX_NEW_TOKENS for answer in together)
    short = generate(model, tokenizer, prompts, Sampling(5))
    assert [answer.ids for answer in short] == [answer.ids[:5] for answer in together]
    assert not any(answer.finished for answer in short)
    third = together[0].ids[2]
    model.generation_config.eos_token_id = [third]
    stopped = generate(model, tokenizer, prompts[:1], greedy)[0]
    assert stopped.finished and stopped.ids.index(third) == len(stopped.ids) - 1
    assert stopped.ids == together[0].ids[: len(stopped.ids)]
