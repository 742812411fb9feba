"""Unsloth's own Qwen3 forward under the shared prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def test_sharing_gives_transformers_log_probs_for_fewer_tokens(unsloth: Any, plain: Path) -> None:
    """Also where the row of all texts is longer than the sequences that Unsloth was told of: 91 tokens, not 64."""
    from dpo_cli import models, recipe
    from dpo_cli.backends import Backend
    from dpo_cli.train import shared_prefix
    from trl.trainer import utils

    loaded = recipe.load(plain / "demo.yaml", ["engine.backend=unsloth"])
    assert loaded.model.max_length == 64
    model: Any = models.load_for_training(loaded, Backend("unsloth", "asked for"))[0]
    utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    shared = shared_prefix.install(model, unsloth=True)
    model.train()
    texts = torch.load(plain / "texts.pt")
    ids, mask, expected = texts["input_ids"], texts["attention_mask"], texts["log_probs"]
    scored = (mask == 1) & (torch.arange(ids.shape[1]) >= 6)
    labels = ids.masked_fill(~scored, -100)

    def log_probs() -> Any:
        with torch.no_grad():
            options = {"use_cache": False, "fused_lm_head": True}
            return model(input_ids=ids, attention_mask=mask, labels=labels, **options).log_probs[scored[:, 1:]]

    shared.enabled = False
    torch.testing.assert_close(log_probs(), expected[scored[:, 1:]], atol=1e-5, rtol=0)
    assert shared.stream_tokens == 0
    shared.enabled = True
    torch.testing.assert_close(log_probs(), expected[scored[:, 1:]], atol=1e-5, rtol=0)
    assert (shared.stream_tokens, shared.padded_tokens) == (91, 144)
