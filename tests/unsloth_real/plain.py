"""`python plain.py FOLDER METHOD …`: a small project, and its trainings by plain TRL; Unsloth is not imported.

Writes `model` (a Qwen3 of random weights whose texts are short, since kernels are interpreted here), `model-4bit` (the
same in NF4 but for the last MLP, as Unsloth's "dynamic" repositories have it), `texts.pt` (some pairs and what the
stock model makes of them), `demo.yaml` with its rows, and `plain-METHOD`, the runs.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
IN_16_BIT = "model.layers.1.mlp"
RECIPE = """\
model: {id: ./model, load_in_4bit: false, max_length: 64}
lora: {r: 4, alpha: 8, dropout: 0.0}
data:
  sources: [{id: ./rows, layout: pairs, language: en}]
  total: null
  languages: null
  eval_fraction: 0.2
  filters: {short: false}
train:
  learning_rate: 5.0e-2
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  max_steps: 3
  logging_steps: 1
  save_steps: 2
"""
STOCK = ("engine.shared_prefix=off", "engine.token_budget=off", "engine.reference_cache=off", "engine.preflight=false")


def write_project(folder: Path) -> None:
    import torch
    from dpo_cli import smoke
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

    tiny = smoke.resolve("builtin:tiny-qwen3")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config.from_pretrained(
        tiny, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder / "model")
    torch.save(texts(model), folder / "texts.pt")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", IN_16_BIT],
    )
    small = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=nf4, dtype=torch.float32)
    small.save_pretrained(folder / "model-4bit")
    for name in ("model", "model-4bit"):
        tokenizer.save_pretrained(folder / name)

    rng, words = random.Random(0), ("light", "paper", "warm", "list", "read", "very", "what")  # a token each
    (folder / "rows").mkdir()
    with (folder / "rows" / "pairs.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(16):
            prompt, chosen, rejected = (" ".join(rng.choices(words, k=count)) for count in (3, 1, 2))
            lines.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    (folder / "demo.yaml").write_text(RECIPE, encoding="utf-8")


def texts(model: Any) -> dict[str, Any]:
    """Three right-padded pairs `[6, 24]` with openings in common, and the log-probability of each of their tokens."""
    import torch

    ids = torch.randint(10, 1000, (6, 24))
    for row in range(3):
        ids[3 + row, : 8 + row] = ids[row, : 8 + row]
    lengths = torch.tensor([24, 20, 15, 22, 24, 13])
    mask = (torch.arange(24) < lengths[:, None]).long()
    ids = ids * mask
    with torch.no_grad():
        every = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return {"input_ids": ids, "attention_mask": mask, "log_probs": every.gather(-1, ids[:, 1:, None]).squeeze(-1)}


def main(folder: Path, methods: list[str]) -> None:
    from dpo_cli.cli import app

    write_project(folder)
    for method in methods:
        steps = 3 if method == "dpo" else 2
        settings = ("engine.backend=hf", f"train.method={method}", f"train.max_steps={steps}", *STOCK)
        options = [part for setting in settings for part in ("--set", setting)]
        command = [
            "train",
            str(folder / "demo.yaml"),
            "--runs-dir",
            str(folder / f"plain-{method}"),
            "--debug",
            *options,
        ]
        if app(command, standalone_mode=False):
            sys.exit(f"{method} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
