"""The built-in model with random weights, for tests of exactness: its figures are small, so that rounding is."""

from __future__ import annotations

import shutil
from pathlib import Path

from dpo_cli import smoke


def write_random_qwen3(folder: Path) -> Path:
    """Write `builtin:tiny-qwen3` with the weights that transformers gives an untrained model, float32; return it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, Qwen3ForCausalLM

    base = smoke.resolve("builtin:tiny-qwen3")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Qwen3ForCausalLM(AutoConfig.from_pretrained(base)).float()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
