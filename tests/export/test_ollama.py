"""The Modelfile: Ollama's prompt is training's prompt, and what would make it another is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.export import ollama
from dpo_cli.export.outputs import FIXTURES
from dpo_cli.recipe import Recipe
from tests.export.made import SMOKE, TINY
from transformers import AutoTokenizer

# Go's own template engine as Ollama calls it; argument: the template, input: chats as JSON.
GO = """
package main
import ("encoding/json"; "os"; "text/template")
type message struct{ Role, Content, Thinking string }
func main() {
    var chats [][]*message
    if err := json.NewDecoder(os.Stdin).Decode(&chats); err != nil { panic(err) }
    t := template.Must(template.New("").Option("missingkey=zero").Parse(os.Args[1]))
    for _, chat := range chats {
        if err := t.Execute(os.Stdout, map[string]any{"Messages": chat}); err != nil { panic(err) }
    }
}
"""


def tokenizer(template: str = "qwen3") -> Any:
    """With a chat template that TRL ships."""
    spec = find_spec("trl")
    assert spec and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "chat_templates", f"{template}.jinja")
    made: Any = AutoTokenizer.from_pretrained(TINY)
    made.chat_template = path.read_text(encoding="utf-8")
    return made


def loaded(*settings: str) -> Recipe:
    return recipe.load(SMOKE, list(settings))


@pytest.mark.parametrize("thinking", ["false", "true"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507"])  # the second knows no thinking
def test_prompts_are_the_chat_templates(name: str, thinking: str) -> None:
    of = loaded(f"model.thinking={thinking}")
    text = ollama.modelfile("mine.gguf", tokenizer(name), of)
    assert ollama.prompts_differ(text, tokenizer(name), of) == 0
    template = text.split('"""')[1]
    assert template.endswith("<think>\n\n</think>\n\n") is (name == "qwen3" and thinking == "false")
    assert (".Thinking" in template) is (thinking == "true")


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
@pytest.mark.parametrize("thinking", ["false", "true"])
def test_go_renders_as_we_do(tmp_path: Path, thinking: str) -> None:
    text = ollama.modelfile("mine.gguf", tokenizer(), loaded(f"model.thinking={thinking}"))
    template = text.split('"""')[1]
    chats = [[{**message, "thinking": "unseen"} for message in messages] for messages in FIXTURES]
    (tmp_path / "main.go").write_text(GO)
    command = ["go", "run", str(tmp_path / "main.go"), template]
    done = subprocess.run(command, input=json.dumps(chats), capture_output=True, text=True, check=True)
    assert done.stdout == "".join(ollama.render(template, messages) for messages in FIXTURES)


def test_what_the_modelfile_says() -> None:
    of = loaded("eval.temperature=0", "eval.top_k=7", "model.max_length=8000")
    lines = ollama.modelfile("my model.gguf", tokenizer(), of).splitlines()
    assert lines[0] == "FROM ./my model.gguf"
    assert {
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER temperature 0.0",
        "PARAMETER top_k 7",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 8000",
    } <= set(lines)


@pytest.mark.parametrize(
    ("old", "new"), [("<think>\n\n</think>\n\n", ""), ("<|im_end|>\n{{ end }}", "<|im_end|>{{ end }}")]
)
def test_a_template_that_says_something_else_is_noticed(old: str, new: str) -> None:
    text = ollama.modelfile("mine.gguf", tokenizer(), loaded())
    assert old in text
    assert ollama.prompts_differ(text.replace(old, new), tokenizer(), loaded()) == len(FIXTURES)
