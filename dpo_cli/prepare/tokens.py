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
    """Tokens of each prompt, and of prompt + answer for the candidates asked for.

    An answer is counted from where its prompt ends, so a prompt is cut into tokens once and not once per answer.
    """
    prompts = rendered(tokenizer, kwargs, [item.prompt for item, _ in items], True)
    wanted = [(number, index) for number, (_, indexes) in enumerate(items) for index in indexes]
    talks = [
        [*items[number][0].prompt, Message(role="assistant", content=items[number][0].candidates[index].text)]
        for number, index in wanted
    ]
    whole = rendered(tokenizer, kwargs, talks, False)
    starts = [
        len(prompts[number]) if text.startswith(prompts[number]) else 0
        for text, (number, _) in zip(whole, wanted, strict=True)
    ]
    answers = [text[start:] for text, start in zip(whole, starts, strict=True)]
    encoded: Any = tokenizer(prompts + answers, add_special_tokens=False, verbose=False)
    sizes = [len(ids) for ids in encoded["input_ids"]]
    found: list[tuple[int, dict[int, int]]] = [(size, {}) for size in sizes[: len(prompts)]]
    for (number, index), size, start in zip(wanted, sizes[len(prompts) :], starts, strict=True):
        found[number][1][index] = size + (found[number][0] if start else 0)
    return found


def preview(recipe: Recipe, pairs: Sequence[Pair]) -> None:
    """Print pairs as the model will see them: the text as rendered, then token by token where the loss starts."""
    tokenizer, console = chat.load_tokenizer(recipe), terminal()
    for number, pair in enumerate(pairs, 1):
        kwargs = pair.chat_template_kwargs
        prompt = rendered(tokenizer, kwargs, [pair.prompt], True)[0]
        asked = len(_ids(tokenizer, prompt))
        margin = "no scores" if pair.margin is None else f"margin {pair.margin:.3f}"
        console.rule(Text(f"{number}  {pair.source}, {pair.language}, {margin}, {pair.id}"), align="left")
        console.print(Text(prompt, style="dim"), soft_wrap=True)
        for name, answer, style in (("chosen", pair.chosen, "green"), ("rejected", pair.rejected, "red")):
            whole = rendered(tokenizer, kwargs, [[*pair.prompt, *answer]], False)[0]
            ids = _ids(tokenizer, whole)
            console.print(
                Text(f"{name}: {asked:,} prompt tokens + {len(ids) - asked:,} in the loss", style=f"bold {style}")
            )
            console.print(Text(whole.removeprefix(prompt), style=style), soft_wrap=True)
            console.print(_around(tokenizer, ids, asked, style), soft_wrap=True)


BEFORE, AFTER, LAST = 8, 12, 3  # tokens shown on both sides of where the loss starts, and at the end


def _around(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, style: str) -> Text:
    """The tokens around `start`, decoded one by one and set apart by `|`; the loss counts those after the arrow."""

    def shown(some: list[int]) -> str:
        return "|".join(str(tokenizer.decode([one])).replace("\n", "\\n") for one in some)

    cut = start + AFTER < len(ids) - LAST
    after = shown(ids[start : start + AFTER]) + "| … |" + shown(ids[-LAST:]) if cut else shown(ids[start:])
    return Text.assemble(
        ("tokens ", "bold"), (("… |" if start > BEFORE else "") + shown(ids[max(start - BEFORE, 0) : start]), "dim"),
        (" ▶ loss ▶ ", "bold reverse"), (after, style),
    )  # fmt: skip


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])
