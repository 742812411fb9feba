"""Serving: a real server on the merged model says what the model says, and the commands of README and cards are right.

`transformers serve` runs here. vLLM, Ollama and llama.cpp's server do not; their commands are only read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli import smoke as builtin
from dpo_cli.export import card
from dpo_cli.run import Run
from tests import program

REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "recipes" / "smoke.yaml"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "用三句话介绍如何给多肉浇水，谢谢！"}]
# Greedy, and no token twice: left alone the tiny model says one token again and again, which would prove little.
GREEDY = {"do_sample": False, "max_new_tokens": 24, "no_repeat_ngram_size": 1}


def ask(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST of a JSON body; the answer's JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.fixture(scope="module")
def address(smoke: Any, serve: Any) -> str:
    """`transformers serve` on the merged model."""
    return str(serve(smoke.folder / "export" / "merged", "--reasoning", "off", "--dtype", "float32"))


@pytest.fixture(scope="module")
def generate(smoke: Any) -> Callable[..., str]:
    """The answer to CHAT of the very folder that is served: `generate(thinking, **options)`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = smoke.folder / "export" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()

    def answer(thinking: bool, **options: Any) -> str:
        inputs: Any = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, enable_thinking=thinking, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**inputs, **options)
        return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def served(smoke: Any, address: str, **more: Any) -> str:
    """What the server answers to CHAT, its thoughts included."""
    body = {"model": str(smoke.folder / "export" / "merged"), "messages": CHAT, **more}
    message = ask(f"{address}/v1/chat/completions", body)["choices"][0]["message"]
    return (message.get("reasoning_content") or "") + (message["content"] or "")


def test_the_served_model_gives_the_answer_of_the_merged_folder(
    smoke: Any, address: str, generate: Callable[..., str]
) -> None:
    assert served(smoke, address, temperature=0, max_tokens=8) == generate(False, do_sample=False, max_new_tokens=8)
    answer = served(smoke, address, generation_config=json.dumps(GREEDY))
    assert answer == generate(False, **GREEDY) and len(set(answer)) > 8


def test_thinking_is_off_as_told_and_a_request_can_switch_it_on(
    smoke: Any, address: str, generate: Callable[..., str]
) -> None:
    answer = served(
        smoke, address, generation_config=json.dumps(GREEDY), chat_template_kwargs={"enable_thinking": True}
    )
    thought = generate(True, **GREEDY).removeprefix("<think>")  # the server takes thoughts apart by their tags
    assert answer == thought != generate(False, **GREEDY)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_python_in_a_card_runs(smoke: Any, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(smoke.folder / "export" / kind, tmp_path / kind)
    card.write_card(recipe.load(SMOKE), Run(smoke.folder), folder, kind, [])
    base = builtin.resolve("builtin:tiny-qwen3")
    text = (folder / "README.md").read_text(encoding="utf-8")
    text = text.replace("builtin:tiny-qwen3", str(base)).replace("max_new_tokens=256", "max_new_tokens=8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == {"adapter": 1, "merged": 2}[kind]
    done = program.run_python("-c", "\n".join(blocks), cwd=folder, timeout=200)
    assert done.returncode == 0, done.stderr
    if kind == "merged":
        assert float(done.stdout.splitlines()[-1]) > 1e-3, "the adapter is merged in, and the card's own test shows it"


def serve_commands(text: str) -> list[list[str]]:
    """The `transformers serve` commands of a text, as a shell would split them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip().startswith("transformers serve ")]


def test_the_flags_that_readme_and_cards_give_to_transformers_serve_exist(smoke: Any, tmp_path: Path) -> None:
    card.write_card(recipe.load(SMOKE), Run(smoke.folder), tmp_path, "merged", [])
    commands = serve_commands((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert commands
    commands += serve_commands((REPOSITORY / "recipes" / "guide.md").read_text(encoding="utf-8"))
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    usage = program.run_python("-m", "transformers.cli.transformers", "serve", "--help", env=environment).stdout
    assert usage
    for command in commands:
        flags = [word.partition("=")[0] for word in command if word.startswith("--")]
        assert flags and all(re.search(rf"{flag}\b", usage) for flag in flags), command
