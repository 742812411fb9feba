"""An Ollama Modelfile: the prompt that training used, in Ollama's template language, and the sampling of `eval`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export.outputs import fixtures
from dpo_cli.families import Turn, family_of
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
    if prompts_differ(modelfile("", tokenizer, recipe), tokenizer, recipe):
        dated = ", which writes the date," if "strftime_now" in tokenizer.chat_template else ""
        raise DpoError(
            f"a Modelfile can't say this model's chat template{dated} as training used it",
            where=recipe.where("export", "formats"),
            hint="leave ollama out; gguf keeps the chat template itself, and llama.cpp reads it (--jinja)",
        )


def modelfile(weights: str, tokenizer: Any, recipe: Recipe) -> str:
    """Compose a Modelfile, for `ollama create NAME -f Modelfile`.

    The sampling is that of `eval`, so that what Ollama answers is what was judged; penalties, which Ollama has on by
    default and eval has not, are off.

    Args:
        weights: the GGUF file beside it.
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
        f"FROM ./{weights}",
        f'TEMPLATE """{_template(tokenizer, recipe)}"""',
        *(f"PARAMETER {name} {value}" for name, value in parameters),
    ]
    return "\n".join(lines) + "\n"


def prompts_differ(text: str, tokenizer: Any, recipe: Recipe) -> int:
    """Count the fixtures that a Modelfile makes another prompt of than the chat template does."""
    template = text.split('"""')[1]
    bos = tokenizer.bos_token or ""  # which llama.cpp puts in front
    return sum(
        render(template, messages) != _prompt(tokenizer, recipe, messages).removeprefix(bos)
        for messages in fixtures(tokenizer)
    )


def render(template: str, messages: Iterable[Message]) -> str:
    """Render a template of the form below as Ollama does; tests run Go's own engine on that."""
    before, _, opening = template.rpartition("{{ end }}")
    turn = re.sub("{{ if false }}.*?{{ end }}", "", before.removeprefix("{{ range .Messages }}"))
    turns = [turn.replace("{{ .Role }}", one["role"]).replace("{{ .Content }}", one["content"]) for one in messages]
    return "".join(turns) + opening


def _template(tokenizer: Any, recipe: Recipe) -> str:
    """Write the turns of a family in Go's template language, and what the chat template opens an answer with.

    All roles alike, system prompts among them: Ollama puts one from a SYSTEM line or a request first in .Messages.
    """
    family = family_of(config_of(base16.name(recipe), base16.revision(recipe)))
    before, between, after = (family and family.turn) or Turn("", "", "")
    turn = f"{before}{{{{ .Role }}}}{between}{{{{ .Content }}}}{after}"
    if family and family.thinking and recipe.model.thinking:
        # Never printed, for the thoughts of earlier turns are dropped: Ollama looks for .Thinking between two texts to
        # learn which tags to cut an answer at, and that the model thinks at all.
        opens, closes = family.thinking
        turn += f"{{{{ if false }}}}{opens}{{{{ .Thinking }}}}{closes}{{{{ end }}}}"
    hi: list[Message] = [{"role": "user", "content": "Hi"}]
    # Its role, and without thinking Qwen3's empty think block.
    opening = _prompt(tokenizer, recipe, hi).removeprefix(_prompt(tokenizer, recipe, hi, opened=False))
    return f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}{opening}"


def _prompt(tokenizer: Any, recipe: Recipe, messages: list[Message], opened: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, **chat.chat_template_kwargs(recipe)
    )
