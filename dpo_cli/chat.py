"""The tokenizer and its chat template: how messages become tokens, and what ends an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpo_cli.errors import DpoError
from dpo_cli.model_files import cannot_load, location
from dpo_cli.recipe import Recipe
from dpo_cli.records import Message

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def chat_template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """The one switch for Qwen3's thinking mode, as `apply_chat_template` takes it."""
    return {"enable_thinking": recipe.model.thinking}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model.id`, with its chat template; of named ones `default`.

    Raises:
        DpoError: it can't be found, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location(recipe.model.id), revision=recipe.model.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise cannot_load(recipe, "id", "the tokenizer", error) from error
    if isinstance(tokenizer.chat_template, dict):  # an export holds one, and the others are for tools and documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise DpoError(
            f"the tokenizer of {recipe.model.id} has no chat template, so there is no telling prompt from answer",
            where=recipe.where("model", "id"),
            hint="take an instruct model, or put chat_template.jinja into its folder",
        )
    return tokenizer


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> list[int]:
    """A chat as token ids, by the tokenizer's own template and its options (`add_generation_prompt`, …)."""
    chat: Any = list(messages)  # transformers doesn't take a TypedDict for a dict
    rendered: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return list(rendered["input_ids"])


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that the chat template writes behind an answer; None where it writes none."""
    # Three words, so that of the last three tokens none is from before the answer.
    answer = [Message(role="user", content="a"), Message(role="assistant", content="b c d")]
    special = {*tokenizer.all_special_ids, *(at for at, one in tokenizer.added_tokens_decoder.items() if one.special)}
    behind = [token for token in chat_tokens(tokenizer, answer)[-3:] if token in special]
    return behind[0] if behind else None


def end_tokens(of_model: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List what ends an answer: the model's `eos_token_id`, the tokenizer's, and what the chat template writes.

    The last is none of the others where a base model that was made for text takes a template for chats.
    """
    return sorted({*_as_list(of_model), tokenizer.eos_token_id, turn_end(tokenizer)} - {None})


def unnamed_end(own: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that the template writes behind an answer, where the model's own config doesn't name it."""
    end = turn_end(tokenizer)
    if end is None or end in _as_list(own.eos_token_id if own else None):
        return None
    return str(tokenizer.convert_ids_to_tokens(end))


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or [])


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
