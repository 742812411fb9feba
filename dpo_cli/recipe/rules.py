"""Settings that do nothing, or fail late: one table, a row a rule, so that `check` says so and what to write instead.

A rule is about keys that are set away from their defaults. It has a sentence for them, and may say where they are fine.
Nothing here imports torch or TRL; what only the machine or the data show is checked by `train` before it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
)
from dpo_cli.recipe.paths import json_in
from dpo_cli.recipe.train import held_out_metric_problem, not_logged, trl_arguments
from dpo_cli.recipe.yaml import Key

Recipe = Any  # dpo_cli.recipe's, which imports this module


@dataclass(frozen=True)
class Rule:
    """What is wrong with keys that are set.

    Attributes:
        keys: dotted, separated by spaces.
        problem: the sentence behind the key, or what makes it of the recipe and the value (None: nothing wrong).
        unless: where the keys are fine.
        remark: `check` prints it as a note, and it is no error: the run does what it should.
    """

    keys: str
    problem: str | Callable[[Recipe, Any], str | None]
    unless: Callable[[Recipe], bool] = lambda recipe: False
    remark: bool = False


def problems(recipe: Recipe) -> list[tuple[Key, str]]:
    """The settings that are refused, each with its sentence."""
    return [(key, sentence) for key, sentence, remark in _broken(recipe) if not remark]


def remarks(recipe: Recipe) -> list[tuple[Key, str]]:
    """The settings that have no effect here and harm nothing."""
    return [(key, sentence) for key, sentence, remark in _broken(recipe) if remark]


def _broken(recipe: Recipe) -> Iterator[tuple[Key, str, bool]]:
    seen = set()
    for rule in RULES:
        for dotted in rule.keys.split():
            section, name = dotted.split(".")
            part = getattr(recipe, section)
            field = type(part).model_fields.get(name)
            if field is None or dotted in seen:  # another method's; or something is wrong with it already
                continue
            value = getattr(part, name)
            if value == field.get_default(call_default_factory=True) or rule.unless(recipe):
                continue
            sentence = rule.problem if isinstance(rule.problem, str) else rule.problem(recipe, value)
            if sentence:
                seen.add(dotted)
                yield (section, name), sentence, rule.remark


# ------------------------------------------------------------------------------------------------- what rules ask


def _evaluates(recipe: Recipe) -> bool:
    return bool(recipe.train.eval_strategy != "no")


def _needs_evaluation(recipe: Recipe, value: Any) -> str | None:
    return None if _evaluates(recipe) else "needs evaluations: set train.eval_strategy: steps, or epoch"


def _picks_best(recipe: Recipe) -> bool:
    """Whether anything asks which evaluation was the best."""
    train = recipe.train
    by_metric = train.lr_scheduler_type in BY_METRIC or train.save_strategy == "best"
    return bool(train.load_best_model_at_end or train.metric_for_best_model or by_metric)


def _unread_by_losses(name: str) -> Rule:
    """An argument that only some of the method's losses read."""

    def problem(recipe: Recipe, value: Any) -> str | None:
        losses = trl_arguments()[recipe.train.method]["read_by"].get(name)
        if losses is None or set(losses) & set(recipe.train.losses):
            return None
        return f"is read by loss_type {either(losses)}, not by {' + '.join(recipe.train.losses)}: remove it"

    return Rule(f"train.{name}", problem)


def _divergence(recipe: Recipe, value: Any) -> str | None:
    fits = trl_arguments()[recipe.train.method]["read_by"].get("f_divergence_type", [])
    others = [loss for loss in recipe.train.losses if loss not in fits]
    return f"can't be with loss_type {' + '.join(others)}: set reverse_kl, or {either(fits)}" if others else None


def _whole(strategy: str) -> Callable[[Recipe, Any], str | None]:
    """Steps above 1 are whole; below 1 they are a share of the run."""

    def problem(recipe: Recipe, value: Any) -> str | None:
        if getattr(recipe.train, strategy) == "steps" and value is not None and value > 1 and value != int(value):
            return f"must be a whole number of steps, or below 1 a share of the run, not {value:g}"
        return None

    return problem


def _best_model(recipe: Recipe, value: Any) -> str | None:
    train = recipe.train
    if not _evaluates(recipe):
        return _needs_evaluation(recipe, value)
    if train.save_strategy not in ("best", train.eval_strategy):
        instead = f"set train.save_strategy: {train.eval_strategy}"
        return (
            f"needs each evaluation saved, but saves by {train.save_strategy}: {instead}, or use engine.early_stopping"
        )
    every, saved = train.eval_steps or train.logging_steps, train.save_steps
    if train.save_strategy == "steps" and ((every < 1) != (saved < 1) or round(saved * 1e6) % round(every * 1e6)):
        return f"needs train.save_steps ({saved:g}) to be a multiple of train.eval_steps ({every:g}): make them equal"
    return None


def _metric(recipe: Recipe, value: Any) -> str | None:
    if not _evaluates(recipe):
        return _needs_evaluation(recipe, value)
    name = value if str(value).startswith("eval_") else f"eval_{value}"
    unlogged = not_logged(recipe.train.method, name)
    if unlogged:
        return unlogged
    return held_out_metric_problem(name)


def _adapters_own(name: str, theirs: str) -> Rule:
    """Beside `model.adapter` its own settings count; a local one's may be repeated."""

    def problem(recipe: Recipe, value: Any) -> str | None:
        own = json_in(recipe.model.adapter or "", "adapter_config.json").get(theirs)
        if value == own or (isinstance(own, list) and isinstance(value, list) and sorted(value) == sorted(own)):
            return None
        shown = f", which has {theirs} {own}" if own is not None else ""
        return f"does nothing beside model.adapter{shown}: its own settings count; remove it"

    return Rule(f"lora.{name}", problem, unless=lambda recipe: recipe.model.adapter is None)


# Keys of `lora`, and what they are called in an adapter's config.
OF_ADAPTERS = {
    "r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias", "target_modules": "target_modules",
    "rslora": "use_rslora",
}  # fmt: skip


def _dropout(recipe: Recipe, value: Any) -> str | None:
    if value and getattr(recipe.train, "disable_dropout", False):
        return "has no effect while train.disable_dropout is true, as it is by default"
    return None


def _steps(recipe: Recipe, value: Any) -> str | None:
    return None if value == -1 or value >= 1 else f"must be 1 or more, or -1 for all of num_train_epochs, not {value}"


def _warmup(recipe: Recipe, value: Any) -> str | None:
    train = recipe.train
    if train.lr_scheduler_type in ("constant", *BY_METRIC):
        other = " constant_with_warmup has a warm-up" if train.lr_scheduler_type == "constant" else " remove it"
        return f"is not read by lr_scheduler_type {train.lr_scheduler_type}:{other}"
    if value > 1 and value != int(value):
        return f"must be a whole number of steps, or below 1 a share of the run, not {value:g}"
    return None


def _long_warmup(recipe: Recipe, value: Any) -> str | None:
    if 0 < recipe.train.max_steps <= value:
        return f"{value:g} are no fewer than max_steps {recipe.train.max_steps}: the learning rate is never reached"
    return None


# ------------------------------------------------------------------------------------------------------- the rules

COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
NO_METRICS = "is of metrics over predictions, which preference training does not make: remove it"
ONLY_ANSWERS = "can't be: the tokens of the last answer count, and no others; remove it"
NO_WORKERS = "needs train.dataloader_num_workers above 0"

RULES = (
    # Read by nothing in TRL's preference trainers, or set by dpo-cli.
    Rule("train.padding_free", "is switched off in TRL: remove it; engine.shared_prefix pads nothing"),
    Rule("train.label_smoothing_factor", "is not read by preference losses; TRL's own is label_smoothing"),
    Rule("train.ref_model_mixup_alpha train.ref_model_sync_steps", "is of sync_ref_model, which a LoRA can't have"),
    Rule("train.trust_remote_code", "is never given: code that comes with a model is not run; remove it"),
    Rule(
        "train.average_tokens_across_devices",
        "does nothing: these losses are means over rows, not tokens",
        unless=lambda recipe: not trl_arguments()[recipe.train.method]["compares"],
    ),
    Rule("train.bf16_full_eval train.fp16_full_eval", "does nothing during training; eval takes model.dtype"),
    Rule("train.use_cache", "does nothing: training never uses the cache; remove it"),
    Rule(
        "train.prediction_loss_only train.eval_do_concat_batches train.eval_use_gather_object train.label_names "
        "train.eval_accumulation_steps train.include_for_metrics train.batch_eval_metrics",
        NO_METRICS,
    ),
    Rule("train.disable_tqdm", "does nothing: dpo-cli draws its own progress; use --quiet"),
    Rule(
        "train.use_liger_kernel train.liger_kernel_config",
        "can't be: TRL's trainer and engine.shared_prefix patch the same layers; Unsloth brings kernels of its own",
    ),
    # Of SFT, whose rows are prompts with one answer.
    Rule(
        "train.packing train.eval_packing train.packing_strategy",
        "can't be: a row stays one prompt with its answer, as eval scores it; remove it",
    ),
    Rule("train.completion_only_loss", lambda recipe, value: None if value else ONLY_ANSWERS),
    Rule("train.assistant_only_loss", ONLY_ANSWERS),
    Rule(
        "train.dataset_text_field train.dataset_kwargs train.shuffle_dataset",
        "does nothing: prepare writes the rows, and the trainer shuffles them; remove it",
    ),
    Rule("train.chat_template_path train.eos_token", "can't be: the model's own chat template is taken; remove it"),
    # What would break a resume.
    Rule("train.save_only_model", "can't be: a resume needs the optimizer's state; save_total_limit saves disk space"),
    Rule("train.ignore_data_skip", "can't be: a resumed run would see other rows than an unbroken one; remove it"),
    Rule("train.enable_jit_checkpoint", "can't be: train itself saves at Ctrl-C and SIGTERM; remove it"),
    # The order of the rows.
    Rule(
        "train.train_sampling_strategy",
        lambda recipe, value: (
            f"can't be {value}, for which TRL keeps no lengths: leave it random; engine.shared_prefix pads nothing"
            if value in ("group_by_length", "batch_rebalance")
            else None
        ),
    ),
    Rule("train.length_column_name", "is of group_by_length, which can't be; remove it"),
    # Losses.
    *(_unread_by_losses(name) for name in ("label_smoothing", "discopop_tau", "simpo_gamma")),
    Rule("train.f_divergence_type", _divergence),
    Rule(
        "train.f_alpha_divergence_coef",
        "is read with f_divergence_type: alpha_divergence only: set that, or remove it",
        unless=lambda recipe: recipe.train.f_divergence_type == "alpha_divergence",
    ),
    Rule(
        "train.use_weighting",
        "can't be with loss_type aot or aot_unpaired, which sort the rows: remove it",
        unless=lambda recipe: not {"aot", "aot_unpaired"} & set(recipe.train.losses),
    ),
    Rule(
        "train.truncation_mode",
        "does nothing: prepare drops pairs over model.max_length; set data.filters.too_long: false too, or remove it",
        unless=lambda recipe: recipe.data.filters.too_long is False,
    ),
    # Evaluation during training.
    Rule(
        "train.eval_steps",
        "needs train.eval_strategy: steps",
        unless=lambda recipe: recipe.train.eval_strategy == "steps",
    ),
    Rule("train.eval_delay train.eval_on_start", _needs_evaluation),
    Rule(
        "train.per_device_eval_batch_size",
        "has no effect: nothing is evaluated during training",
        _evaluates,
        remark=True,
    ),
    Rule("train.eval_steps", _whole("eval_strategy")),
    Rule("train.load_best_model_at_end", _best_model),
    Rule("train.metric_for_best_model", _metric),
    Rule("train.greater_is_better", "does nothing: set train.metric_for_best_model too, or remove it", _picks_best),
    # Saving and logging.
    Rule("train.save_steps", _whole("save_strategy")),
    Rule("train.logging_steps", _whole("logging_strategy")),
    # A remark, not refused: `--set train.save_strategy=no` says what is meant, whatever else the recipe says.
    Rule(
        "train.save_steps",
        "has no effect without train.save_strategy: steps",
        unless=lambda recipe: recipe.train.save_strategy == "steps" or bool(recipe.engine.early_stopping),
        remark=True,
    ),
    Rule(
        "train.logging_steps",
        "has no effect without train.logging_strategy: steps",
        unless=lambda recipe: recipe.train.logging_strategy == "steps",
        remark=True,
    ),
    Rule(
        "train.save_strategy",
        "best needs train.metric_for_best_model: eval_loss, and evaluations",
        unless=lambda recipe: recipe.train.save_strategy != "best" or (_evaluates(recipe) and _has_metric(recipe)),
    ),
    Rule("train.report_to", report_to),
    Rule(
        "train.project train.trackio_space_id train.trackio_bucket_id train.trackio_static_space_id",
        "is read by trackio only: set train.report_to: trackio, or remove it",
        unless=lambda recipe: bool({"trackio", "all"} & set(reporters(recipe))),
    ),
    Rule(
        "train.run_name",
        "has no effect: train.report_to names no one to tell it to",
        unless=lambda recipe: bool(set(reporters(recipe)) - {"none"}),
        remark=True,
    ),
    Rule(
        "train.include_num_input_tokens_seen",
        lambda recipe, value: (
            f"must be no, all or non_padding, not {value}"
            if value not in (True, False, "no", "all", "non_padding")
            else "does nothing in TRL's trainer of this method: remove it; metrics.json has tokens_per_second"
            if value not in (False, "no") and trl_arguments()[recipe.train.method]["whole_logits"]
            else None
        ),
    ),
    Rule(
        "train.debug",
        lambda recipe, value: (
            None
            if value in ("", [], "underflow_overflow", ["underflow_overflow"])
            else "must be underflow_overflow, or nothing"
        ),
    ),
    # Optimizer, schedule, steps.
    Rule("train.max_steps", _steps),
    Rule(
        "train.num_train_epochs",
        "has no effect beside train.max_steps",
        unless=lambda recipe: recipe.train.max_steps < 1,
        remark=True,
    ),
    Rule("train.warmup_steps", _warmup),
    Rule("train.warmup_steps", _long_warmup, remark=True),
    Rule("train.lr_scheduler_type", schedule),
    Rule("train.lr_scheduler_kwargs", schedule_kwargs),
    Rule("train.optim", optimizer),
    Rule("train.optim_args", optim_args),
    Rule(
        "train.optim_target_modules",
        "is of galore and apollo optimizers; lora.target_modules says which layers train",
        unless=lambda recipe: recipe.train.optim.startswith(LOW_RANK),
    ),
    Rule(
        "train.adam_beta1 train.adam_beta2 train.adam_epsilon",
        lambda recipe, value: f"is not read by {recipe.train.optim}: remove it",
        unless=lambda recipe: not recipe.train.optim.startswith(WITHOUT_BETAS),
    ),
    # Memory and machines.
    Rule(
        "train.gradient_checkpointing_kwargs",
        lambda recipe, value: (
            "must be a map"
            if not isinstance(value, dict)
            else "does nothing while train.gradient_checkpointing is false: remove it"
            if recipe.train.gradient_checkpointing is False
            else None
        ),
    ),
    Rule(
        "train.torch_compile_mode",
        lambda recipe, value: None if value in COMPILE_MODES else f"must be {either(COMPILE_MODES)}, not {value}",
    ),
    Rule(
        "train.deepspeed",
        lambda recipe, value: (
            None if find_spec("deepspeed") else "needs a package that is not installed: pip install deepspeed"
        ),
    ),
    Rule("train.fsdp_config", "needs train.fsdp", unless=lambda recipe: bool(recipe.train.fsdp)),
    Rule(
        "train.dataloader_persistent_workers train.dataloader_prefetch_factor train.dataloader_in_order "
        "train.dataloader_multiprocessing_context",
        NO_WORKERS,
        unless=lambda recipe: recipe.train.dataloader_num_workers > 0,
    ),
    # Other sections.
    Rule("lora.target_modules", lora_targets, unless=lambda recipe: recipe.model.adapter is not None),
    *(_adapters_own(name, theirs) for name, theirs in OF_ADAPTERS.items()),
    Rule("lora.dropout", _dropout, remark=True),
    Rule(
        "eval.against",
        "has no effect: model.adapter is not set, so that the base is the reference",
        unless=lambda recipe: recipe.model.adapter is not None,
        remark=True,
    ),
    Rule("model.revision", "does nothing: model.id is no Hub id", unless=lambda recipe: on_hub(recipe.model.id)),
    Rule(
        "export.gguf export.llama_cpp",
        "does nothing unless export.formats names gguf or ollama",
        unless=lambda recipe: bool({"gguf", "ollama"} & set(recipe.export.formats)),
    ),
    Rule(
        "export.hub_private",
        "does nothing unless export.formats names hub",
        unless=lambda recipe: "hub" in recipe.export.formats,
    ),
)


def _has_metric(recipe: Recipe) -> bool:
    return bool(recipe.train.metric_for_best_model or recipe.train.load_best_model_at_end)
