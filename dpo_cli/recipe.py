"""The recipe: what every key is called, what it may hold, and what it is where nobody says.

One class a section. A recipe is read by `load`, checked whole, and frozen; stages get the result. Nothing here
imports torch or TRL: TRL's argument names come from the generated `trl_arguments.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dpo_cli.errors import USAGE, DpoError, did_you_mean
from dpo_cli.recipe_yaml import Dumper, Key, read_recipe, show_key

METRICS = ("correctness", "helpfulness", "coherence", "complexity", "verbosity")

Layout = Literal[
    "auto", "ultrafeedback", "ultrafeedback_zh", "ultrafeedback_binarized", "helpsteer2", "helpsteer2_preference",
    "helpsteer3", "hh_rlhf", "nectar", "sharegpt", "pairs", "kto",
]  # fmt: skip


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, types are exact, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    id: str = Field(min_length=1, description="hub id, local folder, or builtin:tiny-qwen3")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    adapter: str | None = Field(None, description="a LoRA to start from (your SFT); the reference is base + adapter")
    load_in_4bit: bool = Field(True, description="NF4 with double quantisation")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bfloat16 on a GPU that has it, else float16; float32 on a CPU"
    )
    max_length: int = Field(1024, ge=16, description="tokens of prompt + answer; longer pairs are dropped")
    thinking: bool = Field(False, description="Qwen3's thinking mode, alike in all four stages")
    merge_base: str | None = Field(None, description="16-bit weights to merge into; default: model.id if not quantised")


class Lora(Section):
    r: int = Field(32, ge=1, description="rank")
    alpha: float = Field(64, gt=0, description="scale; the update is multiplied by alpha / r")
    dropout: float = Field(0.01, ge=0, lt=1, description="see train.disable_dropout: 0 in effect unless that is false")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases train")
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers that get an adapter",
    )


class Source(Section):
    name: str | None = Field(None, min_length=1, description="its name in the report; default: the id's stem")
    id: str = Field(min_length=1, description="hub id, local file or folder, or builtin:…")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    data_files: str | list[str] | None = Field(None, description="files inside the hub repository or folder")
    split: str = Field("train", description="split of a hub data set")
    layout: Layout = Field("auto", description="how its rows are laid out; auto looks at the columns")
    language: str | None = Field(None, description="en, zh, …; default: detected row by row")
    columns: dict[str, str] | None = Field(None, description="for pairs and kto: our column name -> theirs")
    quota: int | None = Field(None, ge=1, description="at most this many training pairs from here")
    keep_refusals: bool = Field(False, description="safety data: don't drop templated refusals")

    @property
    def label(self) -> str:
        """The name in `report.json`: `name`, or the last part of the id without its suffixes."""
        return self.name or Path(self.id.removeprefix("builtin:")).name.split(".")[0]


class PairPolicy(Section):
    pick: Literal["best_worst", "best_random", "all"] = Field("best_worst", description="which candidates meet")
    min_margin: float = Field(0.1, ge=0, le=1, description="least score difference, on 0..1")
    min_chosen_score: float | None = Field(None, ge=0, le=1, description="least score of the chosen answer, on 0..1")


class ScoreWeights(Section):
    """Weights of the metrics; renormalised over the ones that an answer has."""

    correctness: float = Field(0.4, ge=0, description="mean of honesty and truthfulness where a source has those")
    helpfulness: float = Field(0.3, ge=0, description="is it of use")
    coherence: float = Field(0.2, ge=0, description="instruction following where a source has that")
    complexity: float = Field(0.05, ge=0, description="expertise it takes to write")
    verbosity: float = Field(0.05, ge=0, description="detail; a positive weight favours long answers")

    @model_validator(mode="after")
    def _something_counts(self) -> ScoreWeights:
        if not self.correctness + self.helpfulness:
            raise ValueError("correctness and helpfulness can't both weigh 0: they decide which answer is better")
        return self


# ------------------------------------------------------------------------------------- data.filters, by drop reason


class FilterOptions(Section):
    """What tunes one filter. In a recipe a bare value sets the first field, `true` keeps the defaults."""


class Garbled(FilterOptions):
    max_repetition: float = Field(
        0.5, gt=0, le=1, description="share of an answer's runs of 4 words (8 characters in Chinese) that repeat"
    )


class Contaminated(FilterOptions):
    subsets: list[str] = Field(
        ["truthful_qa", "TrufulQA_zh"], description="rows of a benchmark inside a source, by its `source` column"
    )
    ngram_words: int = Field(8, ge=1, description="shared words in a row that count as the same prompt")
    ngram_han: int = Field(13, ge=1, description="shared Han characters in a row that count as the same prompt")


class NearDuplicate(FilterOptions):
    similarity: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of character shingles")


class Short(FilterOptions):
    min_chars: int = Field(16, ge=1, description="least characters of an answer")
    min_han: int = Field(6, ge=1, description="least characters of a Chinese answer")


class Echo(FilterOptions):
    min_chars: int = Field(30, ge=1, description="shorter prompts may be repeated by the answer")


class Identical(FilterOptions):
    similarity: float = Field(0.95, gt=0, le=1, description="answers nearer than this count as the same")


class TooLong(FilterOptions):
    max_prompt: float = Field(0.5, gt=0, le=1, description="share of model.max_length that the prompt may take")


class LengthRatio(FilterOptions):
    max: float = Field(3.0, gt=1, description="longer over shorter answer, in tokens")


class Switch(FilterOptions):
    """A filter that can only be on or off."""


def _options(value: Any, info: Any) -> Any:
    """`true` -> the defaults, a bare number -> the first field; false and maps as they are."""
    if value is True:
        return {}
    if isinstance(value, int | float) and not isinstance(value, bool):
        first = next(iter(FILTER_OPTIONS[info.field_name].model_fields), None)
        return {first: value} if first else value
    return value


def _written(options: type[FilterOptions]) -> Any:
    """What may stand in a recipe for a filter, for the JSON schema."""
    first = next(iter(options.model_fields.values()), None)
    return bool | options | float if first and first.annotation in (int, float) else bool | options


FILTER_OPTIONS: dict[str, type[FilterOptions]] = {
    "garbled": Garbled, "contaminated": Contaminated, "language": Switch, "duplicate": Switch,
    "near_duplicate": NearDuplicate, "think": Switch, "markers": Switch, "echo": Echo, "template": Switch,
    "short": Short, "identical": Identical, "tie": Switch, "margin": Switch, "low_chosen": Switch,
    "too_long": TooLong, "length_ratio": LengthRatio,
}  # fmt: skip
OFF_BY_DEFAULT = ("length_ratio",)

if TYPE_CHECKING:
    Filters = Any
else:
    Filters = create_model(
        "Filters",
        __base__=Section,
        __module__=__name__,
        __doc__="One key a drop reason: false, true, a value, or a map.",
        **{
            reason: (
                Annotated[
                    Literal[False] | options, BeforeValidator(_options, json_schema_input_type=_written(options))
                ],
                False if reason in OFF_BY_DEFAULT else options(),
            )
            for reason, options in FILTER_OPTIONS.items()
        },
    )


class Data(Section):
    format: Literal["pairs", "ranked", "unpaired"] = Field("pairs", description="what prepare writes")
    sources: list[Source] = Field(min_length=1, description="where the preference data come from")
    score_weights: ScoreWeights = ScoreWeights()
    pairs: PairPolicy = PairPolicy()
    filters: Filters = Field(default_factory=lambda: Filters(), description="by drop reason: false, or what tunes it")
    contamination: list[str] = Field([], description="files of prompts that must not be trained on")
    total: int | None = Field(7500, ge=1, description="training pairs; null = all")
    languages: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        {"en": 0.7, "zh": 0.3}, description="shares of the languages; null = no quota"
    )
    eval_fraction: float = Field(0.05, gt=0, lt=1, description="prompts held out for ever, by hash")
    eval_size: int = Field(500, ge=1, description="at most this many held-out pairs are used")
    keep_dropped: bool = Field(False, description="write data/dropped.jsonl")

    @field_validator("languages")
    @classmethod
    def _shares_sum_to_one(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if shares is not None and abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares sum to {sum(shares.values()):g}, not 1")
        return shares

    @field_validator("sources")
    @classmethod
    def _labels_differ(cls, sources: list[Source]) -> list[Source]:
        labels = [source.label for source in sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sources are called '{label}'; give one of them a name:")
        return sources


class Engine(Section):
    backend: Literal["auto", "unsloth", "hf"] = Field("auto", description="auto: Unsloth where it can run")
    shared_prefix: Literal["auto", "on", "off"] = Field("auto", description="compute the shared prompt once")
    token_budget: Literal["auto", "off"] | int = Field("auto", description="tokens per micro-batch")
    reference_cache: Literal["auto", "on", "off"] = Field("auto", description="keep reference log-probabilities")
    preflight: bool = Field(True, description="try the longest pairs before training")
    memory_limit: str | float | None = Field(None, description="GB this run may use, e.g. 16; default: all")
    early_stopping: dict[str, Any] | None = Field(None, description="{metric, patience}")


class Eval(Section):
    prompts: int = Field(200, ge=0, description="held-out prompts that base and tuned model answer")
    max_new_tokens: int = Field(512, ge=1, description="tokens per sampled answer")
    judge: dict[str, Any] | None = Field(None, description="a judge model for win rates")


class Export(Section):
    formats: list[Literal["adapter", "merged", "gguf", "ollama", "hub"]] = Field(
        ["adapter", "merged"], min_length=1, description="what export writes"
    )
    gguf: str = Field("q8_0", description="GGUF weight type")
    hub: str | None = Field(None, description="repository to push to")


# ---------------------------------------------------------------------------------------------- train: TRL's own names

# What dpo-cli sets otherwise than TRL: the contract's learning rate and batch, and checkpoints often enough that a
# crash costs minutes (TRL's every 500 steps would leave a 313-step run without any).
OUR_TRAIN_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 24,
    "num_train_epochs": 1.0,
    "per_device_eval_batch_size": 4,
    "logging_steps": 5,
    "save_steps": 25,
    "save_total_limit": 2,
}

# Arguments that belong to another part of the recipe or to dpo-cli itself, and where to say it instead.
OWNED_TRAIN_ARGUMENTS: dict[str, str] = {
    "seed": "set the recipe's own seed:",
    "data_seed": "set the recipe's own seed:",
    "output_dir": "choose the folder with --runs-dir",
    "max_length": "set model.max_length",
    "model_init_kwargs": "use model.id, model.revision, model.dtype and model.load_in_4bit",
    "resume_from_checkpoint": "train resumes by itself; start over with --fresh",
    "push_to_hub": "use export.formats: [hub]",
    "hub_model_id": "use export.hub",
    "hub_token": "run `hf auth login`, and use export.hub",
    "hub_private_repo": "use export.hub",
    "hub_strategy": "use export.hub",
    "hub_always_push": "use export.hub",
    "hub_revision": "use export.hub",
    "remove_unused_columns": "dpo-cli writes the columns itself",
    "do_train": "each command says what it does",
    "do_eval": "each command says what it does",
    "do_predict": "each command says what it does",
    "use_cpu": "the device is found by itself",
    "local_rank": "start several processes with accelerate launch",
    "precompute_ref_log_probs": "use engine.reference_cache",
    "precompute_ref_batch_size": "use engine.reference_cache",
}

# Names that older TRL or transformers had, and what to write today.
OLD_TRAIN_ARGUMENTS: dict[str, str] = {
    "warmup_ratio": "warmup_steps below 1 is a ratio: warmup_steps: 0.1",
    "max_prompt_length": "TRL dropped it; prepare drops long pairs by model.max_length and data.filters.too_long",
    "max_completion_length": "TRL dropped it; prepare drops long pairs by model.max_length",
    "max_target_length": "TRL dropped it; prepare drops long pairs by model.max_length",
    "evaluation_strategy": "it is called eval_strategy now",
    "no_cuda": "the device is found by itself",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha]",
    "reference_free": "train.method: simpo, cpo or orpo need no reference",
    "generate_during_eval": "eval samples from both models",
    "label_pad_token_id": "TRL masks with completion_mask now",
    "is_encoder_decoder": "only causal language models are supported",
    "force_use_ref_model": "the reference is found by itself: base, or base + model.adapter",
    "ref_adapter_name": "the reference is found by itself: base, or base + model.adapter",
    "model_adapter_name": "use model.adapter",
    "overwrite_output_dir": "start over with --fresh",
    "save_safetensors": "safetensors is the only format now",
    "logging_dir": "logs live in the run's train folder",
    "torch_dtype": "set model.dtype",
    "batch_size": "it is called per_device_train_batch_size",
    "epochs": "it is called num_train_epochs",
    "lr": "it is called learning_rate",
}

_POSITIVE: dict[str, Any] = {"gt": 0}
_NOT_NEGATIVE: dict[str, Any] = {"ge": 0}
_AT_LEAST_ONE: dict[str, Any] = {"ge": 1}
TRAIN_RANGES: dict[str, dict[str, Any]] = {
    "learning_rate": _POSITIVE,
    "beta": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": _POSITIVE,
    "label_smoothing": {"ge": 0, "lt": 0.5},
    "ld_alpha": {"ge": 0, "le": 1},
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_total_limit": _AT_LEAST_ONE,
    "dataset_num_proc": _AT_LEAST_ONE,
    "dataloader_num_workers": _NOT_NEGATIVE,
}


@cache
def trl_arguments() -> dict[str, Any]:
    """What `train/methods.py` read off TRL's config classes: {method: {config, losses, arguments}}."""
    text = (Path(__file__).parent / "trl_arguments.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


class _TrainBase(Section):
    """Checks between TRL's arguments, which `_train_model` adds below."""

    model_config = ConfigDict(protected_namespaces=())

    @model_validator(mode="after")
    def _settings_that_exclude_each_other(self) -> _TrainBase:
        train: Any = self
        losses = train.loss_type
        if train.loss_weights is not None and len(train.loss_weights) != len(losses):
            problem = f"has {len(train.loss_weights)} weights for {len(losses)} losses"
            raise PydanticCustomError("key", "{problem}", {"key": "loss_weights", "problem": problem})
        if {"exo_pair", "robust"} & set(losses) and not train.label_smoothing:
            problem = f"must be above 0 for {' + '.join(losses)}, for instance 0.1"
            raise PydanticCustomError("key", "{problem}", {"key": "label_smoothing", "problem": problem})
        if train.bf16 and train.fp16:
            raise PydanticCustomError("key", "{problem}", {"key": "fp16", "problem": "and bf16 can't both be true"})
        return self


@cache
def _train_model(method: str) -> type[_TrainBase]:
    """The `train` section of one method: TRL's arguments with their types, our defaults, ranges and choices."""
    described = trl_arguments()[method]

    def as_list(value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    fields: dict[str, Any] = {"method": (Literal[method], method)}
    for name, argument in described["arguments"].items():
        if name in OWNED_TRAIN_ARGUMENTS:
            continue
        kind: Any = argument["type"]
        if argument["choices"]:
            none = [None] if "None" in kind.split(" | ") else []
            kind = Literal[tuple(argument["choices"] + none)]
        if name == "loss_type":
            losses: Any = Literal[tuple(described["losses"])]
            word_or_list = BeforeValidator(as_list, json_schema_input_type=losses | list[losses])
            kind = Annotated[list[losses], word_or_list, Field(min_length=1)]
        default = OUR_TRAIN_DEFAULTS.get(name, argument["default"])
        fields[name] = (kind, Field(default, **TRAIN_RANGES.get(name, {})))
    return create_model(
        "Train",
        __base__=_TrainBase,
        __module__=__name__,
        __doc__=f"Arguments of TRL's {described['config']}.",
        **fields,
    )


if TYPE_CHECKING:
    Train = Any
else:
    Train = _train_model("dpo")


# ---------------------------------------------------------------------------------------------------------- the recipe


class Recipe(Section):
    """A whole recipe, checked; see `recipes/` for written ones."""

    name: str = Field("", description="the run lives in runs/<name>/; default: the file's stem")
    extends: str | None = Field(None, description="path of a recipe to start from")
    seed: int = Field(42, ge=0, lt=2**32, description="of sampling, LoRA's init, data order and generation")
    model: Model
    lora: Lora = Lora()
    data: Data
    train: Train = Field(default_factory=lambda: _train_model("dpo")())
    engine: Engine = Engine()
    eval: Eval = Eval()
    export: Export = Export()
    _places: dict[Key, str] = PrivateAttr(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not name.strip() or name.startswith(".") or set(name) & set('/\\:*?"<>|\0\n'):
            raise ValueError("must be usable as the name of a folder")
        return name

    def where(self, *key: str | int) -> str:
        """`recipes/x.yaml:12  data.sources[0].id`, or the key alone where nobody set it."""
        place = self._places.get(key)
        return f"{place}  {show_key(key)}" if place else show_key(key)


# Keys that the contract names and a later version builds. Said at once, because a setting that does nothing is the
# worst kind of typo.
_NOT_BUILT: tuple[tuple[str, str], ...] = (
    ("engine.shared_prefix", "auto off"),
    ("engine.token_budget", "auto off"),
    ("engine.reference_cache", "auto off"),
    ("engine.early_stopping", "None"),
    ("eval.judge", "None"),
    ("export.hub", "None"),
)


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: the recipe file.
        overrides: `KEY=VALUE` settings that win over the file (`--set`).

    Raises:
        DpoError: (exit code 2) with every mistake found, each with its line and what to write instead.
    """
    document = read_recipe(path, overrides or [])
    if document.values.get("name") is None:
        document.values["name"] = path.stem
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        raise _recipe_error(path, document.places, _problems(error, document.values)) from None
    recipe._places.update(document.places)
    unbuilt = [(key, "is not built yet in this version") for key in _unbuilt_keys(recipe)]
    if unbuilt:
        raise _recipe_error(path, document.places, unbuilt)
    return recipe


def _unbuilt_keys(recipe: Recipe) -> list[Key]:
    found: list[Key] = []
    for dotted, built in _NOT_BUILT:
        section, name = dotted.split(".")
        if str(getattr(getattr(recipe, section), name)) not in built.split():
            found.append((section, name))
    for index, kind in enumerate(recipe.export.formats):
        if kind not in ("adapter", "merged"):
            found.append(("export", "formats", index))
    return found


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default explicit; loads again to an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


@cache
def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's completion and checks."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dpo-cli recipe"}


# ------------------------------------------------------------------------------------------------ mistakes, in words

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "none_required": "null",
}


def _recipe_error(path: Path, places: dict[Key, str], problems: list[tuple[Key, str]]) -> DpoError:
    order = {key: index for index, key in enumerate(places)}

    def position(key: Key) -> int:  # of what is missing, that of the section it is missing in
        return next((order[key[:end]] for end in range(len(key), -1, -1) if key[:end] in order), -1)

    blocks = []
    for key, problem in sorted(problems, key=lambda found: position(found[0])):
        known = next((places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in places), str(path))
        blocks.append(f"{known}  {show_key(key)}\n    {problem}")
    count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return DpoError(f"the recipe has {count}\n  " + "\n  ".join(blocks), exit_code=USAGE)


def _problems(error: ValidationError, values: dict[str, Any]) -> list[tuple[Key, str]]:
    """Pydantic's errors as (key, sentence); the branches of one union become one sentence."""
    by_key: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        key = _real_key(item["loc"], item["type"], values)
        if item["type"] == "key":
            key = (*key, item["ctx"]["key"])
        by_key.setdefault(key, []).append(item)
    deepest = [key for key in by_key if not any(key == other[: len(key)] != other for other in by_key)]
    return [(key, _sentence(key, by_key[key])) for key in deepest]


def _real_key(loc: tuple[str | int, ...], kind: str, values: Any) -> Key:
    """`loc` without the parts that pydantic adds for the branches of a union and that stand in no file."""
    key: list[str | int] = []
    for index, part in enumerate(loc):
        inside = isinstance(values, dict) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            key.append(part)
            values = values[part]
        elif index == len(loc) - 1 and kind in ("missing", "extra_forbidden"):
            key.append(part)
    return tuple(key)


def _sentence(key: Key, items: list[Any]) -> str:
    first = items[0]
    kinds = list(dict.fromkeys(_KINDS[item["type"]] for item in items if item["type"] in _KINDS))
    values = [item["ctx"]["expected"] for item in items if item["type"] == "literal_error"]
    if first["type"] == "extra_forbidden":
        return _unknown_key(key)
    if first["type"] == "missing":
        return f"is missing: {_field_description(key)}"
    others = [item for item in items if item["type"] not in _KINDS and item["type"] != "literal_error"]
    if (kinds or values) and not others:
        options = [*kinds, *(text.replace("'", "").replace("False", "false") for text in values)]
        sentence = f"must be {' or '.join(options)}, not {_shown(first['input'])}"
        words = [word for text in values for word in text.replace("'", "").replace(" or ", ", ").split(", ")]
        near = did_you_mean(first["input"], words) if isinstance(first["input"], str) else None
        return f"{sentence}; did you mean {near}?" if near else sentence
    first = others[0] if others else first
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return message if first["type"] in ("value_error", "key") else f"{message}, not {_shown(first['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(key: Key) -> str:
    name = str(key[-1])
    if key[0] == "train" and name in OWNED_TRAIN_ARGUMENTS:
        return f"is not set here: {OWNED_TRAIN_ARGUMENTS[name]}"
    if key[0] == "train" and name in OLD_TRAIN_ARGUMENTS:
        return f"is not one of TRL's arguments: {OLD_TRAIN_ARGUMENTS[name]}"
    siblings = _fields_at(key[:-1])
    near = did_you_mean(name, siblings)
    if near:
        return f"unknown key; did you mean {near}?"
    elsewhere = [f"{part}.{name}" for part in Recipe.model_fields if name in _fields_at((part,))]
    if elsewhere:
        return f"unknown key here; did you mean {elsewhere[0]}?"
    if len(siblings) <= 20:
        return f"unknown key; known here: {', '.join(siblings)}"
    return "unknown key; `dpo-cli schema` lists them all"


def _fields_at(key: Key) -> list[str]:
    """The names that may stand below `key`, read off the JSON schema."""
    schema = json_schema()
    node = _node_at(schema, key)
    return list(node.get("properties", {}))


def _field_description(key: Key) -> str:
    node = _node_at(json_schema(), key)
    return str(node.get("description", "a recipe needs it")).splitlines()[0]


def _node_at(schema: dict[str, Any], key: Key) -> dict[str, Any]:
    """The part of a JSON schema that describes `key`, its references followed."""

    def followed(node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in node:
            return {**schema["$defs"][node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
        maps = [followed(option) for option in node.get("anyOf", []) if "$ref" in option]
        return {**maps[0], **node} if maps else node

    node = followed(schema)
    for part in key:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if not inner:
            return {}
        node = followed(inner)
    return node
