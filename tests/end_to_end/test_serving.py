"""Serving: a real server on the merged model says what the model says, and the commands of README and cards are right.

It is a judge, too, that speaks OpenAI's protocol and judges badly.

`transformers serve` runs here. vLLM, Ollama and llama.cpp's server do not; their commands are only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli import smoke as builtin
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.winrate import judge_metrics
from dpo_cli.export import card
from dpo_cli.judging import judge
from dpo_cli.judging.judgment import Match
from dpo_cli.recipe import OpenAIJudge
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
def address(smoke: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` on the merged model, from the moment it answers."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, address = tmp_path_factory.mktemp("serve") / "log", f"http://127.0.0.1:{port}"
    command = ["-m", "transformers.cli.transformers", "serve", str(smoke.folder / "export" / "merged")]
    command += ["--reasoning", "off", "--dtype", "float32", "--device", "cpu"]
    with log.open("w") as file:
        server = program.python(*command, "--host", "127.0.0.1", "--port", str(port), stdout=file, stderr=file)
    try:
        while not _answers(f"{address}/health"):  # pytest's own limit on a test's time ends it otherwise
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
                pytest.fail(log.read_text())
        yield address
    finally:
        server.kill()
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


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


PROMPTS = ("How do I water a cactus?", "怎样给多肉浇水？", "Name three rivers.")
MATCHES = [Match(str(row), [{"role": "user", "content": text}], "Once.", "三条。") for row, text in enumerate(PROMPTS)]


@pytest.fixture
def badly(smoke: Any, address: str) -> OpenAIJudge:
    model = str(smoke.folder / "export" / "merged")
    return OpenAIJudge(kind="openai", base_url=f"{address}/v1", model=model, max_tokens=16, concurrency=2, timeout=120)


def test_a_judge_that_never_gives_a_verdict_ends_well(badly: OpenAIJudge, tmp_path: Path) -> None:
    judgments = judge(badly, MATCHES, tmp_path / "said.sqlite", progress=False)
    assert [one.score for one in judgments] == [None] * 3
    for one in judgments:
        for order in one.orders:
            assert order["text"].endswith("(cut: see eval.judge.max_tokens)")  # it did speak, all 16 tokens
    metrics = judge_metrics(badly, judgments, [], {}, seed=0)
    assert (metrics["asked"], metrics["judged"], metrics["failures"]) == (3, 0, 3)
    assert metrics["win_rate"]["value"] is None


def test_a_wrong_address_on_a_real_server_is_told(badly: OpenAIJudge, tmp_path: Path) -> None:
    wrong = badly.model_copy(update={"base_url": badly.base_url.removesuffix("/v1")})
    with pytest.raises(DpoError) as caught:
        judge(wrong, MATCHES, tmp_path / "said.sqlite", progress=False)
    assert "HTTP 404" in str(caught.value)
    assert "mostly ends in /v1" in str(caught.value)


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
