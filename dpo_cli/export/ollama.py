"""An Ollama Modelfile: the prompt that training used, in Ollama's template language, and the sampling of `eval`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import ndiff
from pathlib import Path
from typing import Any

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export.outputs import fixtures
from dpo_cli.export.parity import Check, equal
from dpo_cli.families import Family, Turn, family_of
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.paths import config_of
from dpo_cli.records import Message

NAME = "Modelfile"
CONTEXT = 4096  # tokens a chat may have at least, its history included; Ollama would else take its own default


def require(tokenizer: Any, recipe: Recipe) -> None:
    """Find out before anything is written whether Ollama's template language can say training's chat template.

    Raises:
        DpoError: it can't: the template writes a date, or turns of another kind than its family's.
    """
    if _prompts_differ(tokenizer, recipe):
        dated = ", which writes the date," if "strftime_now" in tokenizer.chat_template else ""
        raise DpoError(
            f"a Modelfile can't say this model's chat template{dated} as training used it",
            where=recipe.where("export", "formats"),
            hint="leave ollama out; gguf keeps the chat template itself, and llama.cpp reads it (--jinja)",
        )


def modelfile(gguf_file: Path, tokenizer: Any, recipe: Recipe, folder: Path) -> str:
    """Compose `folder/Modelfile`, for `ollama create NAME -f Modelfile`.

    The sampling is that of `eval`, so that what Ollama answers is what was judged; penalties, which Ollama has on by
    default and eval has not, are off.

    Args:
        gguf_file: the weights; named relative to `folder`, so that both can be moved together.
        tokenizer: of training, with its chat template.
    """
    ends = [tokenizer.convert_ids_to_tokens(end) for end in chat.end_tokens(None, tokenizer)]
    parameters: list[tuple[str, Any]] = [
        *(("stop", f'"{end}"') for end in sorted({*ends, tokenizer.pad_token} - {None}, reverse=True)),
        ("temperature", recipe.eval.temperature),
        ("top_p", recipe.eval.top_p),
        ("top_k", recipe.eval.top_k),
        ("repeat_penalty", 1),
        ("num_ctx", max(CONTEXT, recipe.model.max_length)),
    ]
    lines = [
        f"FROM ./{Path(os.path.relpath(gguf_file, folder)).as_posix()}",
        f'TEMPLATE """{template(tokenizer, recipe, _family(recipe))}"""',
        *(f"PARAMETER {name} {value}" for name, value in parameters),
    ]
    return "\n".join(lines) + "\n"


def check_modelfile(gguf_file: Path, tokenizer: Any, recipe: Recipe, folder: Path) -> list[Check]:
    """Check that every line is what was meant, and the prompts are the chat template's."""
    text, meant = (folder / NAME).read_text(encoding="utf-8"), modelfile(gguf_file, tokenizer, recipe, folder)
    changed = [line for line in ndiff(meant.splitlines(), text.splitlines()) if line.startswith(("+", "-"))]
    return [
        equal("ollama.modelfile_differs", changed[:5], []),
        equal("ollama.prompts_differ", _prompts_differ(tokenizer, recipe), 0),
    ]


def template(tokenizer: Any, recipe: Recipe, family: Family | None) -> str:
    """Write the turns of a family in Go's template language, and what the chat template opens an answer with.

    All roles alike, system prompts among them: Ollama puts one from a SYSTEM line or a request first in .Messages.
    """
    before, between, after = _turn(family)
    turn = f"{before}{{{{ .Role }}}}{between}{{{{ .Content }}}}{after}"
    if family and family.thinking and recipe.model.thinking:
        # Never printed, for the thoughts of earlier turns are dropped: Ollama looks for .Thinking between two texts to
        # learn which tags to cut an answer at, and that the model thinks at all.
        opens, closes = family.thinking
        turn += f"{{{{ if false }}}}{opens}{{{{ .Thinking }}}}{closes}{{{{ end }}}}"
    return f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}{_opening(tokenizer, recipe)}"


def prompt(messages: Iterable[Message], family: Family | None, opening: str) -> str:
    """Make a prompt as Ollama does by `template`; tests run Go's own engine on that."""
    before, between, after = _turn(family)
    return "".join(before + one["role"] + between + one["content"] + after for one in messages) + opening


def _turn(family: Family | None) -> Turn:
    return (family and family.turn) or Turn("", "", "")


def _opening(tokenizer: Any, recipe: Recipe) -> str:
    """What comes before an answer: its role, and without thinking Qwen3's empty think block."""
    hi: list[Message] = [{"role": "user", "content": "Hi"}]
    return _prompt(tokenizer, recipe, hi).removeprefix(_prompt(tokenizer, recipe, hi, opened=False))


def _prompts_differ(tokenizer: Any, recipe: Recipe) -> int:
    family, opening = _family(recipe), _opening(tokenizer, recipe)
    bos = tokenizer.bos_token or ""  # which llama.cpp puts in front
    return sum(
        prompt(messages, family, opening) != _prompt(tokenizer, recipe, messages).removeprefix(bos)
        for messages in fixtures(tokenizer)
    )


def _family(recipe: Recipe) -> Family | None:
    return family_of(config_of(base16.name(recipe), base16.revision(recipe)))


def _prompt(tokenizer: Any, recipe: Recipe, messages: list[Message], opened: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, **chat.chat_template_kwargs(recipe)
    )
