"""Qwen's tokenizer in GGUF's words: what llama.cpp needs to turn the same text into the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from dpo_cli.disk import read_json
from dpo_cli.families import FAMILIES

# How llama.cpp is to cut text into words before BPE, by the regex in tokenizer.json. A wrong name tokenises wrongly
# without any error.
PRE_TOKENIZERS = dict(one.words for one in FAMILIES if one.words)


def add_tokenizer(writer: Any, merged: Path, size: int) -> None:
    """Add vocabulary, merges, special tokens and chat template to a GGUFWriter.

    Args:
        merged: folder with `tokenizer.json`, `tokenizer_config.json`, `config.json` and the template.
        size: rows of the embedding, which has more than the tokenizer has tokens.
    """
    tokenizer = read_json(merged / "tokenizer.json")
    tokens, types = vocabulary(tokenizer, size)
    writer.add_tokenizer_model("gpt2")  # GGUF's name for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(merged, load_merges=True, special_token_types=("bos", "eos", "pad"), n_vocab=size)
    special.add_special_token = {"bos": False}  # Qwen3 has none, whatever id the config names
    special.add_to_gguf(writer, quiet=True)
    generation = merged / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    text = str(special.chat_template)
    ends = [end for end in (named if isinstance(named, list) else [named]) if end is not None and tokens[end] in text]
    if ends and special.special_token_ids.get("eos") not in ends:  # of a base made for text, whose eos ends no turn
        writer.add_eot_token_id(ends[0])


def vocabulary(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """List tokens and llama.cpp's types of them, by id; ids up to `size` without a token are padding of the matrix."""
    by_id = {number: (token, gguf.TokenType.NORMAL) for token, number in tokenizer["model"]["vocab"].items()}
    for one in tokenizer["added_tokens"]:
        token = one["content"]
        if one["special"] or (token.startswith("<|") and token.endswith("|>")):
            kind = gguf.TokenType.CONTROL  # not shown; by its looks too, as for Qwen3's <|fim_prefix|>
        else:
            kind = gguf.TokenType.USER_DEFINED  # whole, and shown, such as <think>
        by_id[one["id"]] = token, kind
    tokens, types = zip(*(by_id.get(at, (f"[PAD{at}]", gguf.TokenType.UNUSED)) for at in range(size)), strict=True)
    return list(tokens), list(types)


def pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """Find llama.cpp's name for the way a tokenizer.json splits words; None where that is not known.

    NFC is let through as it is by llama.cpp's own converter: llama.cpp does not normalise, so letters typed as base
    and combining accent become other tokens there than here.
    """
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {"type": "NFC"}
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return None
    match tokenizer.get("pre_tokenizer"):
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]
        } if normalizer == {"type": "NFC"}:
            return PRE_TOKENIZERS.get(regex)
    return None
