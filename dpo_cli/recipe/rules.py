"""Settings that do nothing, or fail late, each with what to write instead, so that `check` says so.

A rule is about keys that are set away from their defaults. Nothing here imports torch or TRL: what TRL, transformers or
the machine refuse by themselves `train` asks of them before any data are read (`train/config.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_cli.errors import either
from dpo_cli.recipe.model_rules import lora_targets, on_hub
from dpo_cli.recipe.paths import json_in
from dpo_cli.recipe.train import held_out_metric_problem, not_logged, trl_arguments
from dpo_cli.recipe.yaml import Key

Recipe = Any  # dpo_cli.recipe's, which imports this module
# Dotted keys with spaces between them, and the sentence behind each; false or None where nothing is wrong.
Rules = Iterator[tuple[str, str | bool | None]]

UNREAD = "does nothing in preference training: remove it"
NEEDS_EVALUATIONS = "needs evaluations: set train.eval_strategy: steps, or epoch"
NO_RESUME = "can't be: a run that was cut short could not go on as an unbroken one; remove it"
# What no preference trainer of TRL reads, what dpo-cli sets, and what would break a resume.
NEVER = {
    "train.padding_free train.label_smoothing_factor train.ref_model_mixup_alpha train.ref_model_sync_steps": UNREAD,
    "train.trust_remote_code train.bf16_full_eval train.fp16_full_eval train.use_cache train.disable_tqdm": UNREAD,
    "train.prediction_loss_only train.eval_do_concat_batches train.eval_use_gather_object train.label_names": UNREAD,
    "train.eval_accumulation_steps train.include_for_metrics train.batch_eval_metrics": UNREAD,
    "train.dataset_text_field train.dataset_kwargs train.shuffle_dataset train.length_column_name": UNREAD,
    "train.save_only_model train.ignore_data_skip train.enable_jit_checkpoint": NO_RESUME,
    "train.use_liger_kernel train.liger_kernel_config": (
        "can't be: TRL's trainer and engine.shared_prefix patch the same layers; Unsloth brings kernels of its own"
    ),
    "train.packing train.eval_packing train.packing_strategy": (
        "can't be: a row stays one prompt with its answer, as eval scores it; remove it"
    ),
    "train.assistant_only_loss": "can't be: the tokens of the last answer count, and no others; remove it",
    "train.chat_template_path train.eos_token": "can't be: the model's own chat template is taken; remove it",
    "train.sync_ref_model": "can't be: with a LoRA, TRL keeps no reference that could be moved",
}


def problems(recipe: Recipe) -> list[tuple[Key, str]]:
    """Return the settings that are refused, each with its sentence."""
    return _of_set_keys(recipe, rules(recipe))


def remarks(recipe: Recipe) -> list[tuple[Key, str]]:
    """Return the settings that have no effect here and harm nothing, of which `check` prints a note."""
    return _of_set_keys(recipe, notes(recipe))


def _of_set_keys(recipe: Recipe, found: Rules) -> list[tuple[Key, str]]:
    """The first sentence of each key that the method has and that is set away from its default."""
    sentences: dict[Key, str] = {}
    for keys, sentence in found:
        for dotted in keys.split() if sentence else ():
            section, name = dotted.split(".")
            part = getattr(recipe, section)
            field = type(part).model_fields.get(name)
            if field and getattr(part, name) != field.get_default(call_default_factory=True):
                sentences.setdefault((section, name), str(sentence))
    return list(sentences.items())


def rules(recipe: Recipe) -> Rules:
    """Yield what is refused."""
    yield from NEVER.items()
    yield from _of_early_stopping(recipe)
    yield from _of_the_method(recipe)
    yield from _of_losses(recipe.train)
    yield from _of_steps(recipe.train)
    yield from _of_other_sections(recipe)


def notes(recipe: Recipe) -> Rules:
    """Yield what has no effect here, where the run does what it should all the same."""
    train = recipe.train
    yield "train.num_train_epochs", train.max_steps >= 1 and "has no effect beside train.max_steps"
    disabled = recipe.lora.dropout and getattr(train, "disable_dropout", False)
    yield "lora.dropout", disabled and "has no effect while train.disable_dropout is true, as it is by default"
    no_adapter = recipe.model.adapter is None
    yield "eval.against", no_adapter and "has no effect: model.adapter is not set, so that the base is the reference"


def _of_early_stopping(recipe: Recipe) -> Rules:
    train, stops = recipe.train, recipe.engine.early_stopping is not None
    yield "engine.early_stopping", train.eval_strategy == "no" and NEEDS_EVALUATIONS
    is_set = stops and "is set by engine.early_stopping, which saves each evaluation; remove it"
    yield "train.load_best_model_at_end train.metric_for_best_model train.greater_is_better", is_set
    yield "train.save_strategy", train.save_strategy != train.eval_strategy and is_set
    yield "train.save_steps", train.save_steps != train.eval_steps and is_set


def _of_the_method(recipe: Recipe) -> Rules:
    """Settings of `lora` and `engine` that `train.method` can't do with."""
    method, engine, described = recipe.train.method, recipe.engine, trl_arguments()[recipe.train.method]
    biases = "can't be trained: TRL keeps a second adapter for the reference, and PEFT lets one alone have biases"
    yield "lora.bias", described["reference"] and f"{biases}; set lora.bias: none"
    wanted = {"shared_prefix": engine.shared_prefix == "on", "reference_cache": engine.reference_cache == "on"}
    for part, on in (wanted | {"token_budget": isinstance(engine.token_budget, int)}).items():
        why = f"it is made for train.method dpo, not for {method}"
        if part == "reference_cache" and not described["reference"]:
            why = f"{method} has no reference"
        yield f"engine.{part}", on and part not in described["engine"] and f"{why}: set engine.{part}: auto"


def _of_losses(train: Any) -> Rules:
    """Arguments that only some losses of the method read, and what some of them need."""
    described, losses = trl_arguments()[train.method], train.losses
    for name, readers in described["read_by"].items():
        unread = f"is read by loss_type {either(readers)}, not by {' + '.join(losses)}: remove it"
        yield f"train.{name}", not set(readers) & set(losses) and unread
    weights = getattr(train, "loss_weights", None) or []
    yield "train.loss_weights", len(weights) != len(losses) and f"has {len(weights)} weights for {len(losses)} losses"
    of_answers = getattr(train, "completion_only_loss", None)
    yield "train.completion_only_loss", not of_answers and NEVER["train.assistant_only_loss"]
    neighbours = " + ".join(name for name in losses if name in described["neighbours"])
    order = f"must be sequential for {neighbours}: its KL term pairs neighbours; dpo-cli shuffles the rows before"
    yield "train.train_sampling_strategy", neighbours and train.train_sampling_strategy != "sequential" and order
    few = f"must be 2 or more for {neighbours}, whose KL term is a mean over these rows; 4 or more is better"
    yield "train.per_device_train_batch_size", neighbours and train.per_device_train_batch_size < 2 and few


def _of_steps(train: Any) -> Rules:
    """Evaluations during training, the schedule, and the order of the rows."""
    yield "train.eval_steps", train.eval_strategy != "steps" and "needs train.eval_strategy: steps"
    unasked = train.eval_strategy == "no" and NEEDS_EVALUATIONS
    yield "train.eval_delay train.eval_on_start train.load_best_model_at_end train.metric_for_best_model", unasked
    if metric := train.metric_for_best_model:
        name = metric if str(metric).startswith("eval_") else f"eval_{metric}"
        yield "train.metric_for_best_model", not_logged(train.method, name) or held_out_metric_problem(name)
    without = "is not read by lr_scheduler_type constant: constant_with_warmup has a warm-up"
    yield "train.warmup_steps", train.lr_scheduler_type == "constant" and without
    order = train.train_sampling_strategy
    by_length = f"can't be {order}, for which TRL keeps no lengths: leave it random; engine.shared_prefix pads nothing"
    yield "train.train_sampling_strategy", order in ("group_by_length", "batch_rebalance") and by_length


# Keys of `lora`, and what they are called in an adapter's config.
OF_ADAPTERS = {
    "r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias", "target_modules": "target_modules",
    "rslora": "use_rslora",
}  # fmt: skip


def _of_other_sections(recipe: Recipe) -> Rules:
    if recipe.model.adapter is None:
        yield "lora.target_modules", lora_targets(recipe)
    else:  # its own settings count; those of a local one may be repeated
        config = json_in(recipe.model.adapter, "adapter_config.json")
        for name, theirs in OF_ADAPTERS.items():
            value, own = getattr(recipe.lora, name), config.get(theirs)
            if isinstance(value, list) and isinstance(own, list):
                value, own = sorted(value), sorted(own)
            shown = f", which has {theirs} {own}" if own is not None else ""
            unread = f"does nothing beside model.adapter{shown}: its own settings count; remove it"
            yield f"lora.{name}", value != own and unread
    yield "model.revision", not on_hub(recipe.model.id) and "does nothing: model.id is no Hub id"
    formats = set(recipe.export.formats)
    gguf = not {"gguf", "ollama"} & formats and "does nothing unless export.formats names gguf or ollama"
    yield "export.gguf export.llama_cpp", gguf
    yield "export.hub export.hub_private", "hub" not in formats and "does nothing unless export.formats names hub"
    nowhere = "hub" in formats and not recipe.export.hub
    yield "export.formats", nowhere and "names hub: set export.hub: user/name to say where to"
    yield "export.formats", formats == {"hub"} and "has nothing to push; add adapter, merged, gguf or ollama"
