"""An Ollama Modelfile: the prompt that training used, in Ollama's template language, and the sampling of `eval`."""

from __future__ import annotations

import os
import re
from difflib import ndiff
from pathlib import Path
from typing import Any

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.export.outputs import fixtures
from dpo_cli.export.parity import Check, equal
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message

NAME = "Modelfile"
CONTEXT = 4096  # tokens a chat may have at least, its history included; Ollama would else take its own default
ENDS = ("<|im_end|>", "<|endoftext|>")
# All roles alike, system prompts among them: Ollama puts one from a SYSTEM line or a request first in .Messages.
TURNS = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
# Never printed, for Qwen3 drops the thoughts of earlier turns: Ollama looks for .Thinking between two texts to learn
# which tags to cut an answer at, and that the model thinks at all.
TAGS = "{{ if false }}<think>{{ .Thinking }}</think>{{ end }}"


def require(tokenizer: Any, recipe: Recipe) -> None:
    """Find out before anything is written whether Ollama's template language can say training's chat template.

    Raises:
        DpoError: it can't: the template writes a date, or turns of another kind than Qwen's.
    """
    template = _template(tokenizer, recipe)
    if any(render(template, messages) != _prompt(tokenizer, recipe, messages) for messages in fixtures(tokenizer)):
        dated = ", which writes the date," if "strftime_now" in tokenizer.chat_template else ""
        raise DpoError(
            f"a Modelfile can't say this model's chat template{dated} as training used it",
            where=recipe.where("export", "formats"),
            hint="leave ollama out; gguf keeps the chat template itself, and llama.cpp reads it (--jinja)",
        )


def write_modelfile(gguf_file: Path, tokenizer: Any, recipe: Recipe, folder: Path) -> None:
    """Write `folder/Modelfile`, for `ollama create NAME -f Modelfile`.

    The sampling is that of `eval`, so that what Ollama says is what was judged; penalties, which Ollama has on by
    default and eval has not, are off.

    Args:
        gguf_file: the weights; named relative to `folder`, so that both can be moved together.
        tokenizer: of training, with its chat template.
        folder: exists.
    """
    (folder / NAME).write_text(_modelfile(gguf_file, tokenizer, recipe, folder), encoding="utf-8")


def _modelfile(gguf_file: Path, tokenizer: Any, recipe: Recipe, folder: Path) -> str:
    sampling = recipe.eval
    parameters: list[tuple[str, Any]] = [
        *(("stop", f'"{end}"') for end in ENDS),
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("top_k", sampling.top_k),
        ("repeat_penalty", 1),
        ("num_ctx", max(CONTEXT, recipe.model.max_length)),
    ]
    lines = [
        f"FROM ./{Path(os.path.relpath(gguf_file, folder)).as_posix()}",
        f'TEMPLATE """{_template(tokenizer, recipe)}"""',
        *(f"PARAMETER {name} {value}" for name, value in parameters),
    ]
    return "\n".join(lines) + "\n"


def check_modelfile(gguf_file: Path, tokenizer: Any, recipe: Recipe, folder: Path) -> list[Check]:
    """Every line is what was meant, the prompts are the chat template's, and its end of turn stops generation.

    Args:
        as of `write_modelfile`.
    """
    text = (folder / NAME).read_text(encoding="utf-8")
    meant = _modelfile(gguf_file, tokenizer, recipe, folder)
    changed = [line for line in ndiff(meant.splitlines(), text.splitlines()) if line.startswith(("+", "-"))]
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    differ = sum(
        (render(template[1], messages) if template else None) != _prompt(tokenizer, recipe, messages)
        for messages in fixtures(tokenizer)
    )
    ends = [tokenizer.convert_ids_to_tokens(end) for end in chat.end_tokens(None, tokenizer)]
    return [
        equal("ollama.modelfile_differs", changed[:5], []),
        equal("ollama.prompts_differ", differ, 0),
        {"name": "ollama.stops", "value": stops, "limit": ends, "ok": set(ends) <= set(stops)},
    ]


def _template(tokenizer: Any, recipe: Recipe) -> str:
    """The turns, and what the chat template opens an answer with: without thinking Qwen3's empty think block too."""
    hi: list[Message] = [{"role": "user", "content": "Hi"}]
    opening = _prompt(tokenizer, recipe, hi).removeprefix(_prompt(tokenizer, recipe, hi, opened=False))
    return (TURNS.replace("{{ end }}", f"{TAGS}{{{{ end }}}}") if recipe.model.thinking else TURNS) + opening


def render(template: str, messages: list[Message]) -> str | None:
    """A prompt as Ollama makes it, of the one form of Go template that is written here; None of any other.

    Ollama joins neighbouring messages of one role before it renders; here that is left undone.
    """
    parts = re.fullmatch(r"{{ range \.Messages }}(.*){{ end }}([^{}]*)", template.replace(TAGS, ""), re.DOTALL)
    if not parts:
        return None
    turn, opening = parts.groups()
    turn, fields = re.subn(r"{{ \.(Role|Content) }}", lambda found: f"\0{found[1].lower()}\0", turn)
    if not fields or "{{" in turn:
        return None
    pieces = turn.split("\0")  # texts and, at every odd place, the names of fields
    written = (
        str(message[piece]) if place % 2 else piece  # type: ignore[literal-required]
        for message in messages
        for place, piece in enumerate(pieces)
    )
    return "".join(written) + opening


def _prompt(tokenizer: Any, recipe: Recipe, messages: list[Message], opened: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, **chat.chat_template_kwargs(recipe)
    )
