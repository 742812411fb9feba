"""A stand-in for unsloth 2026.10 on a machine without a GPU: its names and its observable habits, none of its kernels.

Put this folder on PYTHONPATH and set UNSLOTH_ALLOW_CPU=1. Kept are the habits that a caller has to cope with: a name
is swapped for Unsloth's own 4-bit repository unless exact names are asked for; a dead bitsandbytes loads 16-bit with
one printed line (DOUBLE_DEAD_BITSANDBYTES=1 plays that); TRL's classes are replaced at import, with other defaults,
unknown arguments dropped, and `peft_config` ignored. Signatures were compared with the package, by name and default.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import warnings
from typing import Any

late = [name for name in ("trl", "transformers", "peft") if name in sys.modules]
if late:
    warnings.warn(f"Unsloth should be imported before {', '.join(late)}", stacklevel=2)

import torch  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from peft import get_peft_model as peft_get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed  # noqa: E402

trl: Any = importlib.import_module("trl")
dpo_trainer: Any = importlib.import_module("trl.trainer.dpo_trainer")

__version__ = "2026.10.7"

SWAPPED = {"Qwen/Qwen3-1.7B": "unsloth/Qwen3-1.7B-unsloth-bnb-4bit"}
CHANGED_DEFAULTS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-5, "warmup_steps": 0.1,
    "optim": "adamw_8bit", "weight_decay": 0.001, "logging_steps": 1, "seed": 3407,
}  # fmt: skip


class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        use_gradient_checkpointing: Any = "unsloth",
        revision: str | None = None,
        use_exact_model_name: bool = False,
        random_state: int = 3407,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        name = model_name if use_exact_model_name or not load_in_4bit else SWAPPED.get(model_name, model_name)
        options: dict[str, Any] = {}
        if load_in_4bit and os.environ.get("DOUBLE_DEAD_BITSANDBYTES") == "1":
            print("Unsloth: bitsandbytes is broken, loading in 16bit")
        elif load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype or torch.float32,
            )
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32, **options)
        model.max_seq_length = max_seq_length
        return model, AutoTokenizer.from_pretrained(name)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Any = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: Any = "none",
        use_gradient_checkpointing: Any = "unsloth",
        random_state: int = 3407,
        **kwargs: Any,
    ) -> PeftModel:
        if type(r) is not int or r <= 0:
            raise TypeError(f"Unsloth: Rank of {r} must be a positive integer.")
        set_seed(random_state)
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            lora_dropout=lora_dropout,
            bias=bias,
            target_modules=target_modules,
            task_type="CAUSAL_LM",
        )
        return peft_get_peft_model(model, config)


class UnslothDPOConfig(trl.DPOConfig):
    def __init__(self, output_dir: str | None = None, **arguments: Any) -> None:
        known = {field.name for field in dataclasses.fields(UnslothDPOConfig.__mro__[1])}
        for name in [name for name in arguments if name not in known]:
            print(f"Unsloth: dropping unknown argument {name}")
            del arguments[name]
        super().__init__(output_dir=output_dir or "unsloth_training_checkpoints", **{**CHANGED_DEFAULTS, **arguments})


class UnslothDPOTrainer(dpo_trainer.DPOTrainer):
    def __init__(self, model: Any = None, args: Any = None, peft_config: Any = None, **options: Any) -> None:
        super().__init__(model=model, args=args, **options)  # peft_config goes nowhere, as in the package


trl.DPOConfig = UnslothDPOConfig
trl.DPOTrainer = dpo_trainer.DPOTrainer = UnslothDPOTrainer
