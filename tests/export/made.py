"""Exports to check: a base, what was trained on it, the merge of the two, and their outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dpo_cli import smoke
from dpo_cli.export import gguf_parity, merge, outputs
from dpo_cli.export.outputs import Expected, Outputs, Placement, Probes
from dpo_cli.export.parity import Check
from dpo_cli.inference import token_logps
from dpo_cli.recipe import GgufType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

CPU = Placement("cpu", torch.float32)
TINY = smoke.resolve("builtin:tiny-qwen3")
SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
QUESTIONS = ["How do I water succulents?", "请介绍多肉浇水。", "Name two uses of baking soda. 🙂\n\n\t12345"]


@dataclass(frozen=True)
class Exported:
    """`expected`: what the adapter on the base says in float32, and the base alone; `adapter` of LoRA alone."""

    base: Path
    merged: Path
    expected: Expected
    adapter: Path = Path()

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.merged)


def failed(checks: Iterable[Check]) -> list[str]:
    return [check["name"] for check in checks if not check["ok"]]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def write_merged(adapter: Path, folder: Path, base: Path = TINY, **options: Any) -> Path:
    merge.write_merged(base, adapter, folder, **options)
    merge.write_files(merge.tokenizer_files(base, adapter), folder)
    return folder


def store(model: Any, folder: Path) -> None:
    """In bfloat16 and several shards, beside the built-in model's tokenizer."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size="1MB")
    edit(folder / "config.json", dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of every shard at once, each of which stays in its file."""
    files = {file: load_file(file) for file in folder.glob("*.safetensors")}
    weights = {name: tensor for inside in files.values() for name, tensor in inside.items()}
    change(weights)
    for file, inside in files.items():
        kept = {name: weights[name].contiguous().clone() for name in inside if name in weights}
        save_file(kept, file, metadata={"format": "pt"})


def with_random_lora(model: Any, folder: Path, std: float = 0.1, **config: Any) -> Any:
    """Save a LoRA that changes something; returns PEFT's model."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    tuned: Any = get_peft_model(model, LoraConfig(**options | config))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or (name.endswith("bias") and parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=std)
    tuned.save_pretrained(str(folder))
    return tuned


def asked(tokenizer: Any) -> Probes:
    """Rows with an answer of sorts, and the questions alone."""
    prompts: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        for text in QUESTIONS
    ]
    return Probes([[*prompt, *prompt[4:-4]] for prompt in prompts], prompts)


def expected(probes: Probes, base: Any, tuned: Any) -> Expected:
    """Of two models that only their log-probabilities are wanted of."""
    one, other = (token_logps(model, probes.rows, outputs.LAST) for model in (base, tuned))
    return Expected(probes, one, Outputs(other, []))


def checks(exported: Exported, path: Path, kind: GgufType) -> dict[str, Any]:
    """The checks that a GGUF fails, and their values."""
    found = gguf_parity.check_gguf(path, kind, exported.merged, exported.expected)
    return {check["name"]: check["value"] for check in found if not check["ok"]}
