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


def _by_name(names: dict[str, str]) -> dict[str, str]:
    """{what to write instead: names with spaces between them} -> {name: what to write instead}."""
    return {name: instead for instead, several in names.items() for name in several.split()}


# Arguments of TRL's that belong to another part of the recipe or to dpo-cli itself.
OWNED_TRAIN_ARGUMENTS: dict[str, str] = _by_name(
    {
        "set the recipe's own seed:": "seed data_seed",
        "choose the folder with --runs-dir": "output_dir",
        "set model.max_length": "max_length",
        "use model.id, model.revision, model.dtype and model.load_in_4bit": "model_init_kwargs",
        "train resumes automatically; start over with --fresh": "resume_from_checkpoint",
        "use export.formats: [hub]": "push_to_hub",
        "use export.hub": "hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision",
        "run `hf auth login`, and use export.hub": "hub_token",
        "dpo-cli writes the columns itself": "remove_unused_columns",
        "each command says what it does": "do_train do_eval do_predict",
        "the device is found automatically": "use_cpu",
        "start several processes with accelerate launch": "local_rank",
        "use engine.reference_cache": "precompute_ref_log_probs precompute_ref_batch_size",
    }
)
# Names that older TRL or transformers had.
OLD_TRAIN_ARGUMENTS: dict[str, str] = _by_name(
    {
        "warmup_steps below 1 is a ratio: warmup_steps: 0.1": "warmup_ratio",
        "TRL dropped it; prepare drops long pairs by model.max_length and data.filters.too_long": "max_prompt_length",
        "TRL dropped it; prepare drops long pairs by model.max_length": "max_completion_length max_target_length",
        "it is called eval_strategy now": "evaluation_strategy",
        "the device is found automatically": "no_cuda",
        "pairs can't be grouped by length; engine.shared_prefix pads nothing instead": "group_by_length",
        "train.method: simpo, cpo or orpo need no reference": "reference_free",
        "eval samples from both models": "generate_during_eval",
        "TRL masks with completion_mask now": "label_pad_token_id",
        "only causal language models are supported": "is_encoder_decoder",
        "the reference is found automatically: base, or base + model.adapter": "force_use_ref_model ref_adapter_name",
        "use model.adapter": "model_adapter_name",
        "start over with --fresh": "overwrite_output_dir",
        "safetensors is the only format now": "save_safetensors",
        "logs live in the run's train folder": "logging_dir",
    }
)
# What other programs call a key of ours, or what there is in its place.
NAMES: dict[str, str] = _by_name(
    {
        "model.id": "model_name_or_path base_model",
        "model.revision": "model_revision",
        "model.adapter": "adapter_name_or_path lora_model_dir",
        "model.load_in_4bit": "quantization_bit quantization",
        "model.max_length": "cutoff_len sequence_len max_seq_length max_seq_len seq_len seq_length context_length",
        "model.thinking": "enable_thinking",
        "model.dtype": "torch_dtype",
        "the model's own chat template is taken: remove it": "template chat_template",
        "dpo-cli chooses that itself: remove it": (
            "tokenizer_type model_type attn_implementation flash_attn flash_attention preprocessing_num_workers"
        ),
        "engine.backend": "use_unsloth",
        "code that comes with a model is not run: remove it": "trust_remote_code",
        "lora.r": "lora_rank lora_r",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.bias": "lora_bias",
        "lora.target_modules": "lora_target lora_target_modules lora_targets",
        "lora.target_modules: auto, the default": "lora_target_linear",
        "lora.rslora": "use_rslora peft_use_rslora",
        "a LoRA is all that is trained: remove it": "use_peft finetuning_type adapter unfrozen_parameters",
        "the reference is the model before training: remove it": "ref_model ref_model_adapters",
        "8-bit weights are not trained: set model.load_in_4bit": "load_in_8bit",
        "data.sources": "dataset datasets dataset_name dataset_dir train_file",
        "prepared data live in the run's folder: remove it": "dataset_prepared_path",
        "data.total": "max_samples",
        "split, of a source": "dataset_split dataset_splits dataset_train_split",
        "data_files, of a source": "dataset_config dataset_config_name",
        "data.sources, and a quota of each": "dataset_mixer",
        "data.eval_fraction": "val_size val_set_size",
        "held-out pairs are split off by data.eval_fraction: remove it": (
            "test_datasets eval_dataset dataset_test_split"
        ),
        "prepare --force does it again": "overwrite_cache",
        "engine.shared_prefix pads nothing: remove it": "sample_packing packing",
        "train.method": "stage rl",
        "train.beta": "pref_beta rl_beta dpo_beta",
        "train.loss_type": "pref_loss dpo_loss",
        "train.loss_type: [sigmoid, sft], with train.loss_weights": "pref_ftx rpo_alpha",
        "train.label_smoothing": "dpo_label_smoothing",
        "train.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size",
        "train.per_device_eval_batch_size": "eval_batch_size",
        "train.num_train_epochs": "num_epochs epochs",
        "train.gradient_accumulation_steps": "grad_accum grad_acc accumulation accumulation_steps",
        "train.run_name": "wandb_name wandb_run_id",
        "train.neftune_noise_alpha": "noise_alpha",
        "train.use_liger_kernel": "enable_liger_kernel liger_kernel",
        "train.bf16": "pure_bf16",
        "train.desirable_weight": "kto_chosen_weight kto_desirable_weight",
        "train.undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
        "engine.early_stopping": "early_stopping_patience early_stopping_steps",
        "eval.max_new_tokens": "eval_max_new_tokens",
        "train.learning_rate": "lr",
        "train.lr_scheduler_type": "lr_scheduler",
        "train.warmup_steps, where a number below 1 is a ratio": "warmup_ratio",
        "train.optim": "optimizer",
        "train.eval_strategy and train.eval_steps": "evals_per_epoch",
        "train.save_strategy and train.save_steps": "saves_per_epoch",
        "train.report_to: wandb, and the variable WANDB_PROJECT": "wandb_project",
        "train.report_to: wandb, and the variable WANDB_ENTITY": "wandb_entity",
        "choose the folder with --runs-dir, and the run in it with name:": "output_dir",
        "start over with train --fresh": "overwrite_output_dir",
        "each command says what it does: remove it": "do_train do_eval",
        "the report draws the curves: remove it": "plot_loss",
        "every recipe is read strictly: remove it": "strict",
        "train.tf32": "tf32",
        "export.hub": "hub_model_id export_hub_model_id",
        "export.formats: [hub]": "push_to_hub",
        "choose the folder with --runs-dir": "export_dir",
    }
)
# Names that people give to a key of that very section.
SYNONYMS: dict[str, str] = _by_name(
    {
        "lora.r": "lora.rank",
        "lora.alpha": "lora.lora_alpha",
        "lora.target_modules": "lora.modules lora.target lora.targets",
        "model.id": "model.name model.path model.name_or_path",
        "id": ("sources.path sources.file sources.file_name sources.filename sources.url sources.dataset"),
        "data_files": "sources.files sources.subset sources.config sources.config_name sources.data_dir",
        "layout": "sources.type sources.format",
        "language": "sources.lang",
        "quota": "sources.weight",
    }
)


def program(keys: Collection[str]) -> str | None:
    """The program whose recipe these are the top keys of; None where fewer than two tell."""
    found = {name: sum(one in keys for one in marks) for name, marks in MARKS.items()}
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= 2 else None


def ours(key: tuple[str | int, ...]) -> str | None:
    """What an unknown key is called here, or what to do instead of it; None where nothing is known of it."""
    sections = [str(part) for part in key[:-1] if isinstance(part, str)]
    instead = SYNONYMS.get(f"{sections[-1]}.{key[-1]}") if sections else None
    instead = instead or NAMES.get(str(key[-1]))
    return None if instead == ".".join(map(str, key)) else instead
