"""A stand-in for unsloth 2026.10.9 on a machine without a GPU: its names and observable habits, none of its kernels.

Put this folder on PYTHONPATH and set UNSLOTH_ALLOW_CPU=1. Kept are the habits that a caller has to cope with:

- a name is swapped for Unsloth's own 4-bit repository unless exact names are asked for;
- a dead bitsandbytes loads 16-bit with one printed line (DOUBLE_DEAD_BITSANDBYTES=1 plays that);
- the config of 4-bit weights becomes a dict, and weights that are missing are drawn at random without a word;
- the forward of a PeftModel hands `num_logits_to_keep=0, logits_to_keep=0` down;
- `train()` takes the checkpointing that the model was loaded with over the trainer's arguments, warns where a forward
  ran before it, and a trainer's constructor leaves the model as for inference, without checkpointing;
- TRL's classes are replaced at import, with other defaults, unknown arguments dropped, and `peft_config` ignored.

tests/unsloth_real compares signatures and habits with the package. DOUBLE_STEPS names a file that gets a line for each
training step: whether layers are checkpointed in it.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

late = [name for name in ("trl", "transformers", "peft") if name in sys.modules]
if late:
    warnings.warn(f"Unsloth should be imported before {', '.join(late)}", stacklevel=2)

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, PeftModelForCausalLM  # noqa: E402
from peft import get_peft_model as peft_get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

trl: Any = importlib.import_module("trl")
dpo_trainer: Any = importlib.import_module("trl.trainer.dpo_trainer")

__version__ = "2026.10.9"

SWAPPED = {"Qwen/Qwen3-1.7B": "unsloth/Qwen3-1.7B-unsloth-bnb-4bit"}
CHANGED_DEFAULTS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-5, "warmup_steps": 0.1,
    "optim": "adamw_8bit", "weight_decay": 0.001, "logging_steps": 1, "seed": 3407,
}  # fmt: skip
OFFLOADS_FROM = 512  # tokens; below, "unsloth" means PyTorch's own checkpointing


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
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or torch.float32, attn_implementation=ATTENTION, **options
        )
        if options:
            model.config.update({"quantization_config": model.config.quantization_config.to_dict()})
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
        use_rslora: bool = False,
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
            use_rslora=use_rslora,
        )
        made: Any = peft_get_peft_model(model, config)
        if use_gradient_checkpointing == "unsloth" and model.max_seq_length < OFFLOADS_FROM:
            use_gradient_checkpointing = True
        made._unsloth_gradient_checkpointing = use_gradient_checkpointing
        made.for_training = functools.partial(FastLanguageModel.for_training, made)
        made.for_inference = functools.partial(FastLanguageModel.for_inference, made)
        made.enable_input_require_grads()
        FastLanguageModel.for_training(made)
        made._unsloth_pretrain_marker = {"seen": False}
        made.register_forward_pre_hook(_mark_forward)
        return made

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: Any = None) -> Any:
        chosen = use_gradient_checkpointing
        if model._unsloth_gradient_checkpointing if chosen is None else chosen:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        else:
            model.gradient_checkpointing_disable()
        return model.train()

    @staticmethod
    def for_inference(model: Any) -> Any:
        model.gradient_checkpointing_disable()
        return model.eval()


def _mark_forward(model: Any, inputs: Any) -> None:
    if torch.is_grad_enabled():
        model._unsloth_pretrain_marker["seen"] = True


class UnslothDPOConfig(trl.DPOConfig):
    def __init__(self, output_dir: str | None = None, **arguments: Any) -> None:
        known = {field.name for field in dataclasses.fields(UnslothDPOConfig.__mro__[1])}
        for name in [name for name in arguments if name not in known]:
            print(f"Unsloth: dropping unknown argument {name}")
            del arguments[name]
        super().__init__(output_dir=output_dir or "unsloth_training_checkpoints", **{**CHANGED_DEFAULTS, **arguments})


class UnslothDPOTrainer(dpo_trainer.DPOTrainer):
    def __init__(self, model: Any = None, args: Any = None, peft_config: Any = None, **options: Any) -> None:
        model.for_training(use_gradient_checkpointing=model._unsloth_gradient_checkpointing)
        super().__init__(model=model, args=args, **options)  # peft_config goes nowhere, as in the package
        object.__setattr__(self, "train", types.MethodType(_prepared(type(self).train), self))
        model.for_inference()

    def training_step(self, model: Any, *arguments: Any, **options: Any) -> Any:
        if os.environ.get("DOUBLE_STEPS"):
            layers = [one for one in model.modules() if hasattr(one, "gradient_checkpointing")]
            with Path(os.environ["DOUBLE_STEPS"]).open("a") as lines:
                lines.write(f"{any(one.gradient_checkpointing for one in layers)}\n")
        return super().training_step(model, *arguments, **options)


def _prepared(train: Any) -> Any:
    """Wrap `train()` as the package does."""

    @functools.wraps(train)
    def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.model._unsloth_pretrain_marker["seen"]:
            self.model.zero_grad(set_to_none=True)
            warnings.warn(
                "Unsloth: detected a manual forward/backward run before trainer.train(); "
                "reset the torch.compile graph cache it poisoned so training starts clean.",
                stacklevel=2,
            )
        was_training, mode = self.model.training, self.model._unsloth_gradient_checkpointing
        self.model.for_training(use_gradient_checkpointing=mode)
        output = train(self, *arguments, **options)
        if was_training:
            self.model.for_training(use_gradient_checkpointing=mode)
        else:
            self.model.for_inference()
        return output

    return wrapper


# -------------------------------------------------------------------------------------- the hook for shared prefixes

ATTENTION = "unsloth_double"


def build_seg_info_multigroup(group_specs: Any, device: Any) -> Any:
    """[(prefix, [rest, …]), …] in tokens -> of each token its group and its rest, -1 in a prefix."""
    labels = [
        (group, text)
        for group, (prefix, rests) in enumerate(group_specs)
        for text, count in [(-1, prefix), *enumerate(rests)]
        for _ in range(count)
    ]
    return labels, []


def _attend(module: Any, q: Any, k: Any, v: Any, mask: Any, *, prefix_seg_info: Any = None, **options: Any) -> Any:
    if prefix_seg_info is not None:
        sees = [
            [group == other and text in (-1, its) for other, text in prefix_seg_info] for group, its in prefix_seg_info
        ]
        mask = torch.tensor(sees).tril()[None, None]
    return sdpa_attention_forward(module, q, k, v, mask, **options)


def _peft_forward(self: Any, *arguments: Any, **options: Any) -> Any:
    return stock_forward(self, *arguments, **{"num_logits_to_keep": 0, "logits_to_keep": 0, **options})


stock_forward = PeftModelForCausalLM.forward
PeftModelForCausalLM.forward = _peft_forward  # type: ignore[method-assign]
AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
kernel: Any = types.ModuleType("unsloth.utils.prefix_grouper_kernel")
kernel.build_seg_info_multigroup = build_seg_info_multigroup
sys.modules |= {"unsloth.utils": types.ModuleType("unsloth.utils"), kernel.__name__: kernel}

trl.DPOConfig = UnslothDPOConfig
trl.DPOTrainer = dpo_trainer.DPOTrainer = UnslothDPOTrainer
