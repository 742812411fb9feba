"""Recipes of LLaMA-Factory, Axolotl and TRL: what their keys are called here."""

from __future__ import annotations

from collections.abc import Collection

# Keys that show together whose recipe it is.
MARKS: dict[str, tuple[str, ...]] = {
    "LLaMA-Factory": (
        "stage", "finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_target", "lora_rank", "pref_beta",
        "pref_loss", "pref_ftx", "quantization_bit", "adapter_name_or_path", "overwrite_cache", "plot_loss",
        "preprocessing_num_workers", "max_samples",
    ),
    "Axolotl": (
        "base_model", "sequence_len", "rl", "rl_beta", "datasets", "val_set_size", "micro_batch_size", "num_epochs",
        "sample_packing", "lora_target_linear", "dataset_prepared_path", "lr_scheduler", "optimizer",
    ),
    "TRL": (
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft", "lora_r",
        "lora_target_modules", "model_revision", "attn_implementation", "lora_task_type", "bnb_4bit_quant_type",
    ),
}  # fmt: skip

_ONLY_LORA = "a LoRA is all that is trained: remove it"
_ITSELF = "dpo-cli chooses that itself: remove it"
# What to write instead: a key of ours, or a sentence.
NAMES: dict[str, str] = {
    # the model
    "model_name_or_path": "model.id",
    "base_model": "model.id",
    "model_revision": "model.revision",
    "adapter_name_or_path": "model.adapter",
    "lora_model_dir": "model.adapter",
    "quantization_bit": "model.load_in_4bit",
    "cutoff_len": "model.max_length",
    "sequence_len": "model.max_length",
    "max_seq_length": "model.max_length",
    "max_seq_len": "model.max_length",
    "enable_thinking": "model.thinking",
    "torch_dtype": "model.dtype",
    "template": "the model's own chat template is taken: remove it",
    "chat_template": "the model's own chat template is taken: remove it",
    "tokenizer_type": _ITSELF,
    "model_type": _ITSELF,
    "attn_implementation": _ITSELF,
    "flash_attn": _ITSELF,
    "flash_attention": _ITSELF,
    "use_unsloth": "engine.backend",
    "trust_remote_code": "code that comes with a model is not run: remove it",
    # the LoRA
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_bias": "lora.bias",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: auto, the default",
    "use_rslora": "lora.rslora",
    "peft_use_rslora": "lora.rslora",
    "use_peft": _ONLY_LORA,
    "finetuning_type": _ONLY_LORA,
    "adapter": _ONLY_LORA,
    "load_in_8bit": "8-bit weights are not trained: set model.load_in_4bit",
    # the data
    "dataset": "data.sources",
    "datasets": "data.sources",
    "dataset_name": "data.sources",
    "dataset_dir": "data.sources",
    "dataset_prepared_path": "prepared data live in the run's folder: remove it",
    "train_file": "data.sources",
    "max_samples": "data.total",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "test_datasets": "held-out pairs are split off by data.eval_fraction: remove it",
    "eval_dataset": "held-out pairs are split off by data.eval_fraction: remove it",
    "overwrite_cache": "prepare --force does it again",
    "preprocessing_num_workers": _ITSELF,
    "sample_packing": "engine.shared_prefix pads nothing: remove it",
    "packing": "engine.shared_prefix pads nothing: remove it",
    # training
    "stage": "train.method",
    "rl": "train.method",
    "pref_beta": "train.beta",
    "rl_beta": "train.beta",
    "dpo_beta": "train.beta",
    "pref_loss": "train.loss_type",
    "dpo_loss": "train.loss_type",
    "pref_ftx": "train.loss_type: [sigmoid, sft], with train.loss_weights",
    "rpo_alpha": "train.loss_type: [sigmoid, sft], with train.loss_weights",
    "dpo_label_smoothing": "train.label_smoothing",
    "micro_batch_size": "train.per_device_train_batch_size",
    "batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_steps, where a number below 1 is a ratio",
    "optimizer": "train.optim",
    "evals_per_epoch": "train.eval_strategy and train.eval_steps",
    "saves_per_epoch": "train.save_strategy and train.save_steps",
    "wandb_project": "train.report_to: wandb, and the variable WANDB_PROJECT",
    "wandb_entity": "train.report_to: wandb, and the variable WANDB_ENTITY",
    "output_dir": "choose the folder with --runs-dir, and the run in it with name:",
    "overwrite_output_dir": "start over with train --fresh",
    "do_train": "each command says what it does: remove it",
    "do_eval": "each command says what it does: remove it",
    "plot_loss": "the report draws the curves: remove it",
    "strict": "every recipe is read strictly: remove it",
    "tf32": "train.tf32",
    "hub_model_id": "export.hub",
    "push_to_hub": "export.formats: [hub]",
    "export_dir": "choose the folder with --runs-dir",
    "export_hub_model_id": "export.hub",
}
# Names that people give to a key of that very section.
SYNONYMS: dict[tuple[str, str], str] = {
    ("lora", "rank"): "lora.r",
    ("lora", "lora_alpha"): "lora.alpha",
    ("lora", "modules"): "lora.target_modules",
    ("model", "name"): "model.id",
    ("model", "path"): "model.id",
    ("model", "name_or_path"): "model.id",
    ("sources", "path"): "id",
    ("sources", "file"): "id",
    ("sources", "dataset"): "id",
    ("sources", "files"): "data_files",
    ("sources", "type"): "layout",
    ("sources", "format"): "layout",
    ("sources", "lang"): "language",
    ("sources", "weight"): "quota",
}


def program(keys: Collection[str]) -> str | None:
    """The program whose recipe these are the top keys of; None where fewer than two tell."""
    found = {name: sum(one in keys for one in marks) for name, marks in MARKS.items()}
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= 2 else None


def ours(key: tuple[str | int, ...]) -> str | None:
    """What an unknown key is called here, or what to do instead of it; None where nothing is known of it."""
    sections = [str(part) for part in key[:-1] if isinstance(part, str)]
    said = SYNONYMS.get((sections[-1], str(key[-1]))) if sections else None
    said = said or NAMES.get(str(key[-1]))
    return said if said is None or said != ".".join(map(str, key)) else None
