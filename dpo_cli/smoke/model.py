"""A tiny Qwen3 with random weights and the real Qwen3 chat template: what a CPU needs to try the whole pipeline."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.errors import DpoError

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

VOCABULARY = 2048  # tokens, the added ones included
MAX_LENGTH = 8192  # tokens
SEED = 0

# Thinking and tool marks are not "special" in Qwen3: text decoded with skip_special_tokens keeps them.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def build_tiny_qwen3(folder: Path) -> None:
    """Write a Qwen3ForCausalLM of about 0.2 M float32 parameters and its tokenizer, as transformers loads them.

    The same versions of the libraries write the same model, and the global random state stays as it was.

    Args:
        folder: where to write; made if it does not exist.

    Raises:
        DpoError: no TRL is installed, or one without the chat template.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)

    end_of_text, _, end_of_turn = (tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=True, temperature=0.6, top_p=0.95
    ).save_pretrained(folder)

    # Only the CPU's generator is seeded: torch.manual_seed would reach the GPUs' too, which are not ours to touch.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        model = Qwen3ForCausalLM(config).float()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    # Not model.save_pretrained, which draws a progress bar.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer (NFC, byte-level BPE, so any text comes back whole) with merges learnt from the smoke data."""
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    untrained = Qwen2Tokenizer().backend_tokenizer  # brings Qwen's own normaliser and word-splitting rule
    untrained.train_from_iterator(_texts(), trainer)
    learnt = json.loads(untrained.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]  # annotated as str | list[str] in transformers

    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=MAX_LENGTH,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    tokenizer.chat_template = _chat_template()
    return tokenizer


def _texts() -> Iterator[str]:
    """Every prompt and answer of the built-in preference sets."""
    for path in sorted(Path(__file__).parent.glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            row = json.loads(line)
            yield row.get("prompt") or row["instruction"]
            yield from [row["response"]] if "response" in row else (one["response"] for one in row["completions"])


def _chat_template() -> str:
    """Qwen3's chat template as TRL ships it; TRL itself is not imported, since Unsloth wants to come before it."""
    spec = find_spec("trl")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root, "chat_templates", "qwen3.jinja")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise DpoError("No Qwen3 chat template in TRL (trl/chat_templates/qwen3.jinja).", hint="install trl>=1.15")
