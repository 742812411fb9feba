"""Base model, tokenizer and adapter, from either backend. The only importer of unsloth.

Every stage gets its model here, so that a recipe means the same weights, dtype and chat template everywhere.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from dpo_cli import smoke
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def location(model_id: str) -> str:
    """What transformers should load: the folder of a `builtin:` id (built on first use), else the id itself."""
    return str(smoke.resolve(model_id)) if model_id.startswith("builtin:") else model_id


def chat_template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """The one switch for Qwen3's thinking mode, as `apply_chat_template` takes it."""
    return {"enable_thinking": recipe.model.thinking}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.id`, with its chat template.

    Raises:
        DpoError: it can't be found, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location(recipe.model.id), revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        raise DpoError(
            f"can't load the tokenizer of {recipe.model.id}: {str(error).splitlines()[0]}",
            where=recipe.where("model", "id"),
            hint="check the id or folder; behind a firewall set HF_ENDPOINT to a mirror",
        ) from error
    if not tokenizer.chat_template:
        raise DpoError(
            f"the tokenizer of {recipe.model.id} has no chat template, so there is no telling prompt from answer",
            where=recipe.where("model", "id"),
            hint="take an instruct model, or put chat_template.jinja into its folder",
        )
    return tokenizer


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
