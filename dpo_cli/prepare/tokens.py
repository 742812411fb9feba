"""Lengths in the model's own tokens, through its own chat template; and what it sees of a pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from rich.text import Text

from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.prepare.markers import special_tokens
from dpo_cli.recipe import Recipe
from dpo_cli.records import CandidateSet, Message, Pair
from dpo_cli.terminal import terminal

if TYPE_CHECKING:  # for it costs two seconds, and without token filters nothing needs it
    from transformers import PreTrainedTokenizerBase


def rendered(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], talks: list[list[Message]], ask: bool
) -> list[str]:
    """Conversations as text; `ask` opens the assistant's turn, where the loss will start."""
    if not talks:
        return []
    try:
        texts: Any = tokenizer.apply_chat_template(talks, tokenize=False, add_generation_prompt=ask, **kwargs)
    except TemplateError as error:
        raise DpoError(
            f"the model's chat template refuses a conversation: {error}", hint="take another model"
        ) from error
    return list(texts)


def special(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """Return what finds every token that the tokenizer obeys where it stands in a text."""
    if tokenizer is None:
        return special_tokens([])
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return special_tokens([*tokenizer.all_special_tokens, *added])


def lengths(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], items: Sequence[tuple[CandidateSet, Sequence[int]]]
) -> list[tuple[int, dict[int, int]]]:
    """Tokens of each prompt, and of prompt + answer for the candidates asked for."""
    prompts = _counts(tokenizer, rendered(tokenizer, kwargs, [item.prompt for item, _ in items], True))
    talks = [
        [*item.prompt, Message(role="assistant", content=item.candidates[index].text)]
        for item, indexes in items
        for index in indexes
    ]
    wholes = iter(_counts(tokenizer, rendered(tokenizer, kwargs, talks, False)))
    return [
        (size, {index: next(wholes) for index in indexes}) for size, (_, indexes) in zip(prompts, items, strict=True)
    ]


def _counts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {"input_ids": []}
    return [len(ids) for ids in encoded["input_ids"]]


def preview(recipe: Recipe, pairs: Sequence[Pair]) -> None:
    """Print pairs as the model will see them: the prompt as rendered, then what follows it, where the loss counts."""
    tokenizer, console = chat.load_tokenizer(recipe), terminal()
    for number, pair in enumerate(pairs, 1):
        kwargs = pair.chat_template_kwargs
        prompt = rendered(tokenizer, kwargs, [pair.prompt], True)[0]
        [asked] = _counts(tokenizer, [prompt])
        margin = "no scores" if pair.margin is None else f"margin {pair.margin:.3f}"
        console.rule(Text(f"{number}  {pair.source}, {pair.language}, {margin}, {pair.id}"), align="left")
        console.print(Text(prompt, style="dim"), soft_wrap=True)
        for name, answer, style in (("chosen", pair.chosen, "green"), ("rejected", pair.rejected, "red")):
            whole = rendered(tokenizer, kwargs, [[*pair.prompt, *answer]], False)[0]
            [size] = _counts(tokenizer, [whole])
            counted = f"{asked:,} prompt tokens + {size - asked:,} in the loss"
            console.print(Text(f"{name}: {counted}", style=f"bold {style}"))
            console.print(Text(whole.removeprefix(prompt), style=style), soft_wrap=True)
