"""Tiny random models of the families in `dpo_cli.families`: the real architectures, the real chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_cli import smoke

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "dtype": "float32",
}  # fmt: skip
HEADS = {"head_dim": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
# By `model_type` of config.json: what the family's real ones have otherwise than the rest.
CONFIGS: Mapping[str, dict[str, Any]] = {
    "qwen3": HEADS | {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "llama": HEADS | {"tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    "mistral": HEADS | {"sliding_window": None},
    "gemma3_text": HEADS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256},
    "phi3": {"partial_rotary_factor": 0.75, "rope_parameters": LONGROPE, "original_max_position_embeddings": 1024},
    "qwen3_5": {
        "vision_config": VISION,
        "text_config": TINY | HEADS | {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
    },
}  # fmt: skip
# The templates of three families that TRL ships none of, less their tools; the first two as their cards describe them.
SMOLLM3 = """\
{%- set thinks = enable_thinking is not defined or enable_thinking -%}
{%- set system = messages[0].content if messages[0].role == "system" else "You are SmolLM." -%}
{{- "<|im_start|>system\\n## Metadata\\n\\nToday Date: " + strftime_now("%d %B %Y") -}}
{{- "\\nReasoning Mode: " + ("/think" if thinks else "/no_think") + "\\n\\n" + system + "<|im_end|>\\n" -}}
{%- set opening = "<|im_start|>assistant\\n" + ("" if thinks else "<think>\\n\\n</think>\\n") -%}
{%- for message in messages if message.role != "system" -%}
{{- opening if message.role == "assistant" else "<|im_start|>user\\n" }}{{- message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- opening }}{%- endif -%}
"""
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}{%- set ns.system = message.content + "\\n\\n" -%}
{%- elif message.role == "user" -%}{{- "[INST] " + ns.system + message.content + "[/INST]" }}{%- set ns.system = "" -%}
{%- else -%}{{- " " + message.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
PHI4 = """\
{%- for message in messages -%}{{- "<|" + message.role + "|>" + message.content + "<|end|>" -}}{%- endfor -%}
{{- "<|assistant|>" if add_generation_prompt else eos_token -}}
"""
# Template (a file of TRL's, or a text), what opens a text, what ends one, what fills up.
CHATS: Mapping[str, tuple[str, str | None, str, str]] = {
    "qwen3": ("qwen3.jinja", None, "<|im_end|>", "<|endoftext|>"),
    "qwen2": ("qwen2_5.jinja", None, "<|im_end|>", "<|endoftext|>"),
    "qwen3_5": ("qwen3_5_think.jinja", None, "<|im_end|>", "<|endoftext|>"),
    "llama": ("llama3_2.jinja", "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "gemma3_text": ("gemma3.jinja", "<bos>", "<end_of_turn>", "<pad>"),
    "smollm3": (SMOLLM3, None, "<|im_end|>", "<|end_of_text|>"),
    "mistral": (MISTRAL, "<s>", "</s>", "<pad>"),
    "phi3": (PHI4, None, "<|endoftext|>", "<|endoftext|>"),
}


def template(kind: str) -> str:
    """The chat template of a family."""
    name = CHATS[kind][0]
    if not name.endswith(".jinja"):
        return name
    spec = find_spec("trl")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "chat_templates", name).read_text(encoding="utf-8")


def config(kind: str, **changes: Any) -> Any:
    """A transformers config of the family, tiny."""
    from transformers import AutoConfig

    own = CONFIGS[kind] if "text_config" in CONFIGS[kind] else TINY | CONFIGS[kind]
    return AutoConfig.for_model(kind, **{"pad_token_id": 0} | own | changes)


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random model of the family with a tokenizer and its chat template, as its repositories hold them."""
    import torch
    from dpo_cli.families import family_of
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    _, opens, ends, pads = CHATS[kind]
    family = family_of({"model_type": kind})
    assert family
    tokenizer = AutoTokenizer.from_pretrained(smoke.resolve("builtin:tiny-qwen3"))
    special: Any = {"eos_token": ends, "pad_token": pads} | ({"bos_token": opens} if opens else {})
    special["extra_special_tokens"] = sorted({*family.tokens} - {opens, ends, pads})
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template(kind)
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    rows = {"vocab_size": 64 * (len(tokenizer) // 64 + 1)}
    if "text_config" in CONFIGS[kind]:
        made = config(kind, text_config=CONFIGS[kind]["text_config"] | rows | ids)
    else:
        made = config(kind, **rows, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole: Any = AutoModelForImageTextToText if "text_config" in CONFIGS[kind] else AutoModelForCausalLM
        whole.from_config(made).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return folder
