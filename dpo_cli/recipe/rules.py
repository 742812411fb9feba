"""Settings that do nothing, or fail late, each with what to write instead, so that `check` says so.

A rule is about keys that are set away from their defaults. Nothing here imports torch or TRL; what only they or the
machine know `train` asks of them before any data are read (`train/config.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from dpo_cli.errors import either
from dpo_cli.recipe.model_rules import lora_targets, on_hub
from dpo_cli.recipe.optimizer_rules import (
    BY_METRIC,
    LOW_RANK,
    WITHOUT_BETAS,
    optim_args,
    optimizer,
    report_to,
    reporters,
    schedule,
    schedule_kwargs,
    warmup,
)
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
    yield from _of_evaluation(recipe.train)
    yield from _of_saving_and_logging(recipe.train)
    yield from _of_steps(recipe.train)
    yield from _of_memory_and_machines(recipe.train)
    yield from _of_other_sections(recipe)
    drops = (
        "does nothing: prepare drops pairs over model.max_length; set data.filters.too_long: false too, or remove it"
    )
    yield "train.truncation_mode", recipe.data.filters.too_long is not False and drops


def notes(recipe: Recipe) -> Rules:
    """Yield what has no effect here, where the run does what it should all the same."""
    train = recipe.train
    evaluates = train.eval_strategy != "no"
    yield "train.per_device_eval_batch_size", not evaluates and "has no effect: nothing is evaluated during training"
    # Not refused: `--set train.save_strategy=no` says what is meant, whatever else the recipe says.
    saves = train.save_strategy == "steps" or recipe.engine.early_stopping
    yield "train.save_steps", not saves and "has no effect without train.save_strategy: steps"
    logs = train.logging_strategy == "steps"
    yield "train.logging_steps", not logs and "has no effect without train.logging_strategy: steps"
    silent = not set(reporters(train)) - {"none"}
    yield "train.run_name", silent and "has no effect: train.report_to names no one to tell it to"
    yield "train.num_train_epochs", train.max_steps >= 1 and "has no effect beside train.max_steps"
    never = f"{train.warmup_steps:g} are no fewer than max_steps {train.max_steps}: the learning rate is never reached"
    yield "train.warmup_steps", 0 < train.max_steps <= train.warmup_steps and never
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
    fits = described["read_by"].get("f_divergence_type", [])
    others = " + ".join(loss for loss in losses if loss not in fits)
    refused = f"can't be with loss_type {others}: set reverse_kl, or {either(fits)}"
    yield "train.f_divergence_type", others and refused
    for name, readers in described["read_by"].items():
        unread = f"is read by loss_type {either(readers)}, not by {' + '.join(losses)}: remove it"
        yield f"train.{name}", not set(readers) & set(losses) and unread
    alpha = "is read with f_divergence_type: alpha_divergence only: set that, or remove it"
    divergence = getattr(train, "f_divergence_type", None)
    yield "train.f_alpha_divergence_coef", divergence != "alpha_divergence" and alpha
    sorts = bool({"aot", "aot_unpaired"} & set(losses))
    yield "train.use_weighting", sorts and "can't be with loss_type aot or aot_unpaired: remove it"
    means = "does nothing: these losses are means over rows, not tokens"
    yield "train.average_tokens_across_devices", described["compares"] and means
    weights = getattr(train, "loss_weights", None) or []
    yield "train.loss_weights", len(weights) != len(losses) and f"has {len(weights)} weights for {len(losses)} losses"
    of_answers = getattr(train, "completion_only_loss", None)
    yield "train.completion_only_loss", not of_answers and NEVER["train.assistant_only_loss"]
    neighbours = " + ".join(name for name in losses if name in described["neighbours"])
    order = f"must be sequential for {neighbours}: its KL term pairs neighbours; dpo-cli shuffles the rows before"
    yield "train.train_sampling_strategy", neighbours and train.train_sampling_strategy != "sequential" and order
    few = f"must be 2 or more for {neighbours}, whose KL term is a mean over these rows; 4 or more is better"
    yield "train.per_device_train_batch_size", neighbours and train.per_device_train_batch_size < 2 and few


def _of_evaluation(train: Any) -> Rules:
    """Arguments of evaluations during training."""
    needed = train.eval_strategy == "no" and NEEDS_EVALUATIONS
    yield "train.eval_steps", train.eval_strategy != "steps" and "needs train.eval_strategy: steps"
    yield "train.eval_steps", _whole(train.eval_steps)
    yield "train.eval_delay train.eval_on_start train.load_best_model_at_end train.metric_for_best_model", needed
    if train.save_strategy not in ("best", train.eval_strategy):
        fix = f"set train.save_strategy: {train.eval_strategy}, or use engine.early_stopping"
        sentence = f"needs each evaluation saved, but saves by {train.save_strategy}: {fix}"
        yield "train.load_best_model_at_end", sentence
    every, saved = train.eval_steps or train.logging_steps, train.save_steps
    if train.save_strategy == "steps" and (
        (every < 1) != (saved < 1) or round(saved * 1e6) % max(round(every * 1e6), 1)
    ):
        multiple = f"to be a multiple of train.eval_steps ({every:g}): make them equal"
        yield "train.load_best_model_at_end", f"needs train.save_steps ({saved:g}) {multiple}"
    if metric := train.metric_for_best_model:
        name = metric if str(metric).startswith("eval_") else f"eval_{metric}"
        yield "train.metric_for_best_model", not_logged(train.method, name) or held_out_metric_problem(name)
    by_metric = train.lr_scheduler_type in BY_METRIC or train.save_strategy == "best"
    alone = not (train.load_best_model_at_end or metric or by_metric)
    yield "train.greater_is_better", alone and "does nothing: set train.metric_for_best_model too, or remove it"
    unknown = train.eval_strategy == "no" or not (metric or train.load_best_model_at_end)
    best = "best needs train.metric_for_best_model: eval_loss, and evaluations"
    yield "train.save_strategy", train.save_strategy == "best" and unknown and best


def _whole(steps: float | None) -> str | bool:
    """Steps above 1 are whole; below 1 they are a share of the run."""
    broken = steps is not None and steps > 1 and steps != int(steps)
    return broken and f"must be a whole number of steps, or below 1 a share of the run, not {steps:g}"


def _of_saving_and_logging(train: Any) -> Rules:
    yield "train.save_steps", train.save_strategy == "steps" and _whole(train.save_steps)
    yield "train.logging_steps", train.logging_strategy == "steps" and _whole(train.logging_steps)
    yield "train.report_to", report_to(train)
    others = not {"trackio", "all"} & set(reporters(train))
    trackio = others and "is read by trackio only: set train.report_to: trackio, or remove it"
    yield "train.project train.trackio_space_id train.trackio_bucket_id train.trackio_static_space_id", trackio
    counted = train.include_num_input_tokens_seen
    if counted not in (True, False, "no", "all", "non_padding"):
        yield "train.include_num_input_tokens_seen", f"must be no, all or non_padding, not {counted}"
    elif counted not in (False, "no") and trl_arguments()[train.method]["whole_logits"]:
        instead = "remove it; metrics.json has tokens_per_second"
        yield "train.include_num_input_tokens_seen", f"does nothing in TRL's trainer of this method: {instead}"
    known = train.debug in ("", [], "underflow_overflow", ["underflow_overflow"])
    yield "train.debug", not known and "must be underflow_overflow, or nothing"


def _of_steps(train: Any) -> Rules:
    """How many steps, of what optimizer, at what learning rate, on rows in what order."""
    steps = train.max_steps
    counted = f"must be 1 or more, or -1 for all of num_train_epochs, not {steps}"
    yield "train.max_steps", steps != -1 and steps < 1 and counted
    yield "train.warmup_steps", warmup(train) or _whole(train.warmup_steps)
    yield "train.lr_scheduler_type", schedule(train)
    yield "train.lr_scheduler_kwargs", schedule_kwargs(train)
    yield "train.optim", optimizer(train)
    yield "train.optim_args", optim_args(train)
    low_rank = train.optim.startswith(LOW_RANK)
    elsewhere = "is of galore and apollo optimizers; lora.target_modules says which layers train"
    yield "train.optim_target_modules", not low_rank and elsewhere
    without = train.optim.startswith(WITHOUT_BETAS) and f"is not read by {train.optim}: remove it"
    yield "train.adam_beta1 train.adam_beta2 train.adam_epsilon", without
    order = train.train_sampling_strategy
    by_length = f"can't be {order}, for which TRL keeps no lengths: leave it random; engine.shared_prefix pads nothing"
    yield "train.train_sampling_strategy", order in ("group_by_length", "batch_rebalance") and by_length


COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def _of_memory_and_machines(train: Any) -> Rules:
    yield "train.fp16", train.bf16 and train.fp16 and "and bf16 can't both be true"
    if not isinstance(train.gradient_checkpointing_kwargs, dict):
        yield "train.gradient_checkpointing_kwargs", "must be a map"
    off = train.gradient_checkpointing is False
    unused = "does nothing while train.gradient_checkpointing is false: remove it"
    yield "train.gradient_checkpointing_kwargs", off and unused
    mode = train.torch_compile_mode
    yield "train.torch_compile_mode", mode not in COMPILE_MODES and f"must be {either(COMPILE_MODES)}, not {mode}"
    installed = find_spec("deepspeed") is not None
    yield "train.deepspeed", not installed and "needs a package that is not installed: pip install deepspeed"
    yield "train.fsdp_config", not train.fsdp and "needs train.fsdp"
    alone = train.dataloader_num_workers <= 0 and "needs train.dataloader_num_workers above 0"
    yield "train.dataloader_persistent_workers train.dataloader_prefetch_factor", alone
    yield "train.dataloader_in_order train.dataloader_multiprocessing_context", alone


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
