"""What differs between families of models: one row each, and all that is known of one. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """The texts around a message in a chat template: before its role, between role and content, behind the content."""

    before: str
    between: str
    after: str


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
        name: as its makers write it.
        types: `model_type` in config.json, or in the `text_config` there.
        linear: names of the linear modules in its layers, which LoRA adapts and 4 bits quantise.
        tokens: the special tokens that its chat template writes, none of which belongs into a text.
        turn: how its chat template writes a message; None where that depends on the role or on other messages.
        thinking: what its chat template puts around thoughts.
        norms: norms in a layer that are as wide as the hidden state.
        qk_norm: whether the heads' queries and keys are normalised too.
        gguf: llama.cpp's name for the architecture, where `export` writes GGUF files of it.
        words: the regex in its tokenizer.json that splits text into words, and llama.cpp's name for it.
    """

    name: str
    types: tuple[str, ...]
    linear: tuple[str, ...]
    tokens: tuple[str, ...]
    turn: Turn | None = None
    thinking: tuple[str, str] | None = None
    norms: int = 2
    qk_norm: bool = False
    gguf: str | None = None
    words: tuple[str, str] | None = None


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")  # of linear attention
THINK = ("<think>", "</think>")
CHATML = Turn("<|im_start|>", "\n", "<|im_end|>\n")
QWEN = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
LLAMA = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<|finetune_right_pad_id|>",
)  # fmt: skip
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2",
)

# tests/test_families.py compares each row with transformers' architecture and with the chat template.
FAMILIES = (
    Family(
        "Qwen3", ("qwen3",), LINEAR, QWEN, CHATML, THINK, qk_norm=True, gguf="qwen3", words=QWEN_WORDS,
    ),
    Family("Qwen3.5", ("qwen3_5", "qwen3_5_text"), LINEAR + DELTA_NET, QWEN, CHATML, THINK, qk_norm=True),
    Family("Qwen2.5", ("qwen2",), LINEAR, QWEN, CHATML),
    Family("Llama 3", ("llama",), LINEAR, LLAMA, Turn("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")),
    Family("SmolLM3", ("smollm3",), LINEAR, ("<|im_start|>", "<|im_end|>", "<|end_of_text|>"), CHATML, THINK),
    Family("Mistral", ("mistral", "ministral", "ministral3"), LINEAR, ("[INST]", "[/INST]")),
    Family(
        "Gemma 3", ("gemma3", "gemma3_text"), LINEAR, ("<start_of_turn>", "<end_of_turn>"), norms=4, qk_norm=True,
    ),
    Family(
        "Phi-4-mini", ("phi3",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), Turn("<|", "|>", "<|end|>"),
    ),
)  # fmt: skip


# What no text holds that a model wrote: tokens of its chat template, and marks of thoughts.
MARKERS = re.compile(
    "|".join(sorted({re.escape(mark) for one in FAMILIES for mark in (*one.tokens, *(one.thinking or ()))}))
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Find a model's family by its `config.json`, or by a transformers config's `to_dict()`; None of others."""
    types = {config.get("model_type"), (config.get("text_config") or {}).get("model_type")}
    return next((family for family in FAMILIES if types & set(family.types)), None)


def with_targets(recipe: Any, config: Mapping[str, Any]) -> Any:
    """Write out a recipe's `lora.target_modules: auto`, where it counts and the family of its model is known."""
    family = family_of(config)
    if recipe.lora.target_modules != "auto" or recipe.model.adapter is not None or family is None:
        return recipe
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"target_modules": list(family.linear)})})
