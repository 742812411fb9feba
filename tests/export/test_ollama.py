"""The Modelfile: Ollama's prompt is training's prompt, and what would make it another is noticed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.export import ollama
from dpo_cli.export.outputs import FIXTURES
from dpo_cli.families import FAMILIES
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message
from tests.export.made import SMOKE, TINY, failed
from transformers import AutoTokenizer

ROWS = {family.name: family for family in FAMILIES}
TEMPLATES = ("qwen3", "qwen3_instruct_2507")  # the second knows no thinking, so no empty think block either

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


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ollama").mkdir()
    (tmp_path / "ollama" / "mine.gguf").write_bytes(b"GGUF")
    return tmp_path / "ollama"


def loaded(*settings: str) -> Recipe:
    return recipe.load(SMOKE, list(settings))


def write(tokenizer: Any, of: Recipe, folder: Path, weights: Path | None = None) -> str:
    text = ollama.modelfile(weights or folder / "mine.gguf", tokenizer, of, folder)
    (folder / ollama.NAME).write_text(text, encoding="utf-8")
    return text


def with_template(tokenizer: Any, name: str) -> None:
    spec = find_spec("trl")
    assert spec and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja")
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def wrong(folder: Path, tokenizer: Any, of: Recipe) -> list[str]:
    file = next(folder.parent.rglob("*.gguf"))
    return failed(ollama.check_modelfile(file, tokenizer, of, folder))


@pytest.mark.parametrize("thinking", ["false", "true"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_chat_templates(tokenizer: Any, folder: Path, name: str, thinking: str) -> None:
    with_template(tokenizer, name)
    of = loaded(f"model.thinking={thinking}")
    template = write(tokenizer, of, folder).split('"""')[1]
    assert wrong(folder, tokenizer, of) == []
    assert template.endswith("<think>\n\n</think>\n\n") is (name == "qwen3" and thinking == "false")
    assert (".Thinking" in template) is (thinking == "true")


def render(template: str, messages: list[Message]) -> str:
    """Execute the one form of Go template that `ollama.template` writes, but for joining neighbours of one role."""
    template = template.replace("{{ if false }}<think>{{ .Thinking }}</think>{{ end }}", "")
    parts = re.fullmatch(r"{{ range \.Messages }}(.*){{ end }}([^{}]*)", template, re.DOTALL)
    assert parts and "{{" not in re.sub(r"{{ \.(Role|Content) }}", "", parts[1])
    fields = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    turns = [re.sub(r"{{ \.(Role|Content) }}", lambda found, of=one: of[found[1]], parts[1]) for one in fields]
    return "".join(turns) + parts[2]


@pytest.mark.parametrize("kind", [kind for kind, family in ROWS.items() if family.turn])
@pytest.mark.parametrize("thinking", ["false", "true"])
def test_the_template_says_what_is_compared_with_the_chat_template(tokenizer: Any, kind: str, thinking: str) -> None:
    with_template(tokenizer, "qwen3")
    of, family = loaded(f"model.thinking={thinking}"), ROWS[kind]
    written = ollama.template(tokenizer, of, family)
    for messages in FIXTURES:
        assert render(written, messages) == ollama.prompt(messages, family, ollama._opening(tokenizer, of))


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
@pytest.mark.parametrize("thinking", ["false", "true"])
def test_go_renders_as_our_renderer_does(tokenizer: Any, folder: Path, thinking: str) -> None:
    with_template(tokenizer, "qwen3")
    template = write(tokenizer, loaded(f"model.thinking={thinking}"), folder).split('"""')[1]
    chats = [[{**message, "thinking": "unseen"} for message in messages] for messages in FIXTURES]
    (folder / "main.go").write_text(GO)
    command = ["go", "run", str(folder / "main.go"), template]
    done = subprocess.run(command, input=json.dumps(chats), capture_output=True, text=True, check=True)
    assert done.stdout == "".join(str(render(template, messages)) for messages in FIXTURES)


def test_what_the_modelfile_says(tokenizer: Any, folder: Path) -> None:
    with_template(tokenizer, "qwen3")
    of = loaded("eval.temperature=0", "eval.top_k=7", "model.max_length=8000")
    lines = write(tokenizer, of, folder).splitlines()
    assert lines[0] == "FROM ./mine.gguf"
    assert {
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER temperature 0.0",
        "PARAMETER top_k 7",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 8000",
    } <= set(lines)
    weights = folder.parent / "gguf" / "my model.gguf"
    assert "FROM ./../gguf/my model.gguf\n" in write(tokenizer, of, folder, weights)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<think>\n\n</think>\n\n", ""),
        ("<|im_end|>\n{{ end }}", "<|im_end|>{{ end }}"),
        ('PARAMETER stop "<|im_end|>"\n', ""),
        ("PARAMETER repeat_penalty 1", "PARAMETER repeat_penalty 1.1"),
        ("FROM ./mine.gguf", "FROM ./mine.gguf\nADAPTER ./other.gguf"),
        ("PARAMETER top_p", 'system """Lie."""\nPARAMETER top_p'),
    ],
)
def test_a_modelfile_that_says_something_else(tokenizer: Any, folder: Path, old: str, new: str) -> None:
    with_template(tokenizer, "qwen3")
    text = write(tokenizer, loaded(), folder)
    assert old in text
    (folder / ollama.NAME).write_text(text.replace(old, new), encoding="utf-8")
    assert "ollama.modelfile_differs" in wrong(folder, tokenizer, loaded())


def test_a_chat_template_that_is_not_chatml(tokenizer: Any, folder: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    write(tokenizer, loaded(), folder)
    assert wrong(folder, tokenizer, loaded()) == ["ollama.prompts_differ"]
