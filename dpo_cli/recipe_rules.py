"""Settings that do nothing, or fail late: one table, a row a rule, so that `check` says so and what to write instead.

A rule is about keys that are set away from their defaults. It has a sentence for them, and may say where they are fine.
Nothing here imports torch or TRL; what only the machine or the data show is checked by `train` before it works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_cli.errors import did_you_mean, either
from dpo_cli.recipe_paths import json_in
from dpo_cli.recipe_train import held_out_metric_problem, trl_arguments
from dpo_cli.recipe_yaml import Key

Recipe = Any  # dpo_cli.recipe's, which imports this module


@dataclass(frozen=True)
class Rule:
    """What is wrong with keys that are set.

    Attributes:
        keys: dotted, separated by spaces.
        problem: the sentence behind the key, or what makes it of the recipe and the value (None: nothing wrong).
        unless: where the keys are fine.
        told: said by `check` as a remark, and no error: the run does what it should.
    """

    keys: str
    problem: str | Callable[[Recipe, Any], str | None]
    unless: Callable[[Recipe], bool] = lambda recipe: False
    told: bool = False


def problems(recipe: Recipe) -> list[tuple[Key, str]]:
    """The settings that are refused, each with its sentence."""
    return [(key, sentence) for key, sentence, told in _broken(recipe) if not told] + list(_of_sources(recipe))


def remarks(recipe: Recipe) -> list[tuple[Key, str]]:
    """The settings that have no effect here and harm nothing."""
    return [(key, sentence) for key, sentence, told in _broken(recipe) if told]


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
                yield (section, name), sentence, rule.told


def _of_sources(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Settings of sources that only a Hub data set, or a folder, has a use for."""
    for index, source in enumerate(recipe.data.sources):
        builtin, path = source.id.startswith("builtin:"), Path(source.id)
        local = builtin or path.is_absolute()
        if source.revision and local:
            yield ("data", "sources", index, "revision"), "does nothing: the source is no Hub id; remove it"
        if builtin or (local and path.is_file()):
            for name in ("data_files", "split"):
                if getattr(source, name) != type(source).model_fields[name].default:
                    yield ("data", "sources", index, name), "does nothing: the source is one file; remove it"


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
    if recipe.train.method == "kto" and name.endswith("rewards/accuracies"):
        return "is not logged by kto, which looks at no pairs: set eval_loss or eval_rewards/margins"
    return held_out_metric_problem(name)


BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow a held-out figure


def _schedule(recipe: Recipe, value: Any) -> str | None:
    """A schedule without what it needs."""
    kwargs = recipe.train.lr_scheduler_kwargs
    given = kwargs if isinstance(kwargs, dict) else {}
    if value in BY_METRIC and not _evaluates(recipe):
        return f"{value} follows the held-out loss: set train.eval_strategy: steps, or epoch"
    takes, needs = (trl_arguments()["dpo"]["arguments"]["lr_scheduler_type"]["kwargs"][value][one] for one in KWARGS)
    missing = [name for name in needs if name not in given]
    if missing:
        return f"{value} needs train.lr_scheduler_kwargs: {{{', '.join(f'{name}: …' for name in missing)}}}"
    if (
        "min_lr" in takes
        and value != "greedy"
        and value not in BY_METRIC
        and ("min_lr" in given) == ("min_lr_rate" in given)
    ):
        return f"{value} needs train.lr_scheduler_kwargs with one of min_lr and min_lr_rate, as {{min_lr_rate: 0.1}}"
    return None


KWARGS = ("takes", "needs")


def _schedule_kwargs(recipe: Recipe, value: Any) -> str | None:
    """Arguments that the schedule does not take."""
    name = recipe.train.lr_scheduler_type
    takes = trl_arguments()["dpo"]["arguments"]["lr_scheduler_type"]["kwargs"][name]["takes"]
    if not isinstance(value, dict):
        return "must be a map"
    strange = [str(one) for one in value if one not in takes]
    if not strange:
        return None
    near = did_you_mean(strange[0], takes)
    said = f"did you mean {near}?" if near else f"it takes {', '.join(takes)}" if takes else "remove it"
    return f"{name} takes no {strange[0]}: {said}"


# By what an optimizer's name holds: the module it needs, and what to install.
OPTIMIZER_PACKAGES = {
    "galore_": ("galore_torch", "galore-torch"), "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"), "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"), "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"), "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"), "adamw_torch_npu": ("torch_npu", "torch-npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"), "bnb": ("bitsandbytes", "bitsandbytes"),
    "8bit": ("bitsandbytes", "bitsandbytes"), "32bit": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
}  # fmt: skip


def _optimizer(recipe: Recipe, value: Any) -> str | None:
    module, package = next((found for part, found in OPTIMIZER_PACKAGES.items() if part in value), (None, None))
    if module and find_spec(module) is None:
        return f"{value} needs the package {package}, which is not installed: pip install {package}"
    if value.startswith(LOW_RANK) and not recipe.train.optim_target_modules:
        return f"{value} needs train.optim_target_modules, such as [q_proj, v_proj]"
    if value.endswith("_layerwise") and recipe.train.gradient_accumulation_steps > 1:
        return f"{value} can't accumulate gradients: set train.gradient_accumulation_steps: 1"
    return None


LOW_RANK = ("galore_", "apollo_")
WITHOUT_BETAS = (
    "adafactor", "sgd", "adagrad", "rmsprop", "galore_", "lomo", "adalomo", "grokadamw", "schedule_free_sgd",
)  # fmt: skip
# Of optimizers that torch has, what `optim_args` may hold; of the packages' own that is theirs to say.
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}  # fmt: skip
WITHOUT_ARGS = re.compile(
    r"adamw_torch(_fused|_xla|_npu_fused)?|adafactor|(paged_)?(adamw|lion)_(bnb_)?\d+bit|a?d?a?lomo"
)


def _optim_args(recipe: Recipe, value: Any) -> str | None:
    optim = recipe.train.optim
    if WITHOUT_ARGS.fullmatch(optim):
        return f"is not read by {optim}: remove it"
    pairs = [part.split("=") for part in value.replace(" ", "").split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        return "must be name=value pairs with commas between them, such as momentum=0.9,nesterov=true"
    strange = [name for name, _ in pairs if name not in OPTIM_ARGS.get(optim, (name,))]
    return f"{optim} takes no {strange[0]}: it takes {', '.join(OPTIM_ARGS[optim])}" if strange else None


# By name in `report_to`: the modules of which one is needed, and what to install.
REPORTERS = {
    "azure_ml": (("azureml",), "azureml-core"), "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"), "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"), "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"), "kubeflow": (("kubeflow",), "kubeflow"), "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"), "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"), "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}  # fmt: skip


def _reporters(recipe: Recipe) -> list[str]:
    said = recipe.train.report_to
    return [said] if isinstance(said, str) else said or []


def _report_to(recipe: Recipe, value: Any) -> str | None:
    for name in _reporters(recipe):
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            near = did_you_mean(name, list(REPORTERS))
            return f"must be none, all, or of {', '.join(REPORTERS)}, not {name}" + (
                f"; did you mean {near}?" if near else ""
            )
        modules, package = REPORTERS[name]
        if not any(find_spec(module) for module in modules):
            return f"{name} needs a package that is not installed: pip install {package}"
    return None


def _lora_targets(recipe: Recipe, value: Any) -> str | None:
    """Layers that a LoRA can't have here, as far as their names say it."""
    for name in value if isinstance(value, list) else [value]:
        if "-" in name or name == "all":
            return f"{name} is not a layer: name the layers, or leave the key out for all linear ones"
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            return f"takes the names of layers, such as q_proj, and no patterns such as {name}"
        if re.search(r"emb|wte|wpe|norm", name):
            return f"{name} is not a linear layer, and only those get an adapter that can be merged: remove it"
        if name.endswith("lm_head") and not trl_arguments()[recipe.train.method]["whole_logits"]:
            return f"{name} would not train: TRL's trainer of {recipe.train.method} reads the head's weights: remove it"
    return None


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
    if value and recipe.train.disable_dropout:
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
NO_WORKERS = "needs train.dataloader_num_workers above 0"

RULES = (
    # Read by nothing in TRL's preference trainers, or set by dpo-cli.
    Rule("train.padding_free", "is switched off in TRL: remove it; engine.shared_prefix pads nothing"),
    Rule("train.label_smoothing_factor", "is not read by preference losses; TRL's own is label_smoothing"),
    Rule("train.ref_model_mixup_alpha train.ref_model_sync_steps", "is of sync_ref_model, which a LoRA can't have"),
    Rule("train.trust_remote_code", "is never given: code that comes with a model is not run; remove it"),
    Rule("train.average_tokens_across_devices", "does nothing: these losses are means over rows, not tokens"),
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
        "train.per_device_eval_batch_size", "has no effect: nothing is evaluated during training", _evaluates, told=True
    ),
    Rule("train.eval_steps", _whole("eval_strategy")),
    Rule("train.load_best_model_at_end", _best_model),
    Rule("train.metric_for_best_model", _metric),
    Rule("train.greater_is_better", "does nothing: set train.metric_for_best_model too, or remove it", _picks_best),
    # Saving and logging.
    Rule("train.save_steps", _whole("save_strategy")),
    Rule("train.logging_steps", _whole("logging_strategy")),
    # Told, not refused: `--set train.save_strategy=no` says what is meant, whatever else the recipe says.
    Rule(
        "train.save_steps",
        "has no effect without train.save_strategy: steps",
        unless=lambda recipe: recipe.train.save_strategy == "steps" or bool(recipe.engine.early_stopping),
        told=True,
    ),
    Rule(
        "train.logging_steps",
        "has no effect without train.logging_strategy: steps",
        unless=lambda recipe: recipe.train.logging_strategy == "steps",
        told=True,
    ),
    Rule(
        "train.save_strategy",
        "best needs train.metric_for_best_model: eval_loss, and evaluations",
        unless=lambda recipe: recipe.train.save_strategy != "best" or (_evaluates(recipe) and _has_metric(recipe)),
    ),
    Rule("train.report_to", _report_to),
    Rule(
        "train.project train.trackio_space_id train.trackio_bucket_id train.trackio_static_space_id",
        "is read by trackio only: set train.report_to: trackio, or remove it",
        unless=lambda recipe: bool({"trackio", "all"} & set(_reporters(recipe))),
    ),
    Rule(
        "train.run_name",
        "has no effect: train.report_to names no one to tell it to",
        unless=lambda recipe: bool(set(_reporters(recipe)) - {"none"}),
        told=True,
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
        told=True,
    ),
    Rule("train.warmup_steps", _warmup),
    Rule("train.warmup_steps", _long_warmup, told=True),
    Rule("train.lr_scheduler_type", _schedule),
    Rule("train.lr_scheduler_kwargs", _schedule_kwargs),
    Rule("train.optim", _optimizer),
    Rule("train.optim_args", _optim_args),
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
    Rule("lora.target_modules", _lora_targets, unless=lambda recipe: recipe.model.adapter is not None),
    *(_adapters_own(name, theirs) for name, theirs in OF_ADAPTERS.items()),
    Rule("lora.dropout", _dropout, told=True),
    Rule("model.revision", "does nothing: model.id is no Hub id", unless=lambda recipe: _on_hub(recipe.model.id)),
    Rule(
        "export.gguf",
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


def _on_hub(name: str) -> bool:
    return not (name.startswith("builtin:") or Path(name).is_absolute())


def quantised_base(recipe: Recipe, config: Mapping[str, Any]) -> list[tuple[Key, str]]:
    """What export would refuse after training: quantised weights to merge into. Told by config.json, or by the id."""
    name = recipe.model.id
    if recipe.model.merge_base or not (config.get("quantization_config") or name.endswith("-bnb-4bit")):
        return []
    fix = f"set model.merge_base: {unquantised(name) or 'the 16-bit repository, such as Qwen/Qwen3-1.7B'}"
    return [
        (("model", "merge_base"), f"is missing, and model.id holds quantised weights, which nothing merges into: {fix}")
    ]


def unquantised(name: str) -> str | None:
    """The repository that Unsloth's 4-bit ones are made of: unsloth/X-unsloth-bnb-4bit -> unsloth/X; None of others."""
    base = re.sub(r"(-unsloth)?-bnb-4bit$", "", name)
    return base if _on_hub(name) and base != name else None


def _in_4bit(quantised: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of bitsandbytes' 4-bit weights."""
    return bool(quantised.get("load_in_4bit")) and quantised.get("quant_method", "bitsandbytes") == "bitsandbytes"


def against_model(recipe: Recipe, config: Mapping[str, Any]) -> list[tuple[Key, str]]:
    """What the recipe asks of a model that it can't do, each as `problem: fix`.

    Args:
        config: the model's `config.json`, or a transformers config's `to_dict()`.
    """
    found: list[tuple[Key, str]] = []
    targets = recipe.lora.target_modules if recipe.model.adapter is None else []
    if config.get("tie_word_embeddings") is True and any(str(one).endswith("lm_head") for one in targets):
        sentence = "names lm_head, but this model's head is its embedding (tie_word_embeddings)"
        found.append((("lora", "target_modules"), f"{sentence}, so it could not be merged: remove it"))
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and recipe.model.max_length > longest:
        found.append(
            (("model", "max_length"), f"is more than the model's {longest}: set model.max_length: {longest} or less")
        )
    quantised = config.get("quantization_config") or {}
    if quantised and not _in_4bit(quantised):
        method = "8-bit" if quantised.get("load_in_8bit") else str(quantised.get("quant_method", "other")).upper()
        sentence = f"names {method} weights, and only bitsandbytes' 4-bit ones are trained: name the 16-bit repository"
        found.append((("model", "id"), sentence))
    elif quantised and not recipe.model.load_in_4bit:
        sentence = "is false, but the weights are quantised: set model.load_in_4bit: true, or name 16-bit ones"
        found.append((("model", "load_in_4bit"), sentence))
    experts = any(str(name).startswith("num_") and "expert" in str(name) for name in config)
    if getattr(recipe.train, "router_aux_loss_coef", None) and not experts:
        found.append((("train", "router_aux_loss_coef"), "is of models with experts, which this is not: remove it"))
    return found
