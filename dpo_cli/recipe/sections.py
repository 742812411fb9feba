"""The sections of a recipe but `train`: what every key is called, what it may hold, and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, create_model, field_validator, model_validator

from dpo_cli.recipe.paths import hub_id_problem
from dpo_cli.recipe.raters import Judge, Rater, Sample
from dpo_cli.recipe.slips import language_problem, layers, one_as_list, words
from dpo_cli.recipe.train import Section, held_out_metric_problem, language_of

_ONE_OR_SEVERAL = BeforeValidator(one_as_list, json_schema_input_type=str | list[str])


def _one_source_as_list(value: Any) -> Any:
    """So that one source may be written as a map or as its id."""
    if isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
        raise ValueError(f"must be a list of sources: [{{name: {next(iter(value))}, id: …}}]")
    return [value] if isinstance(value, str | dict) else value


def _id_alone(value: Any) -> Any:
    """So that a source without other settings may be written as its id."""
    return {"id": value} if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


# A size of memory: GB where no unit is written.
MEMORY_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([gm])(?:i?b)?)?\s*", re.IGNORECASE)

METRICS = ("correctness", "helpfulness", "coherence", "complexity", "verbosity")

Layout = Literal[
    "auto", "ultrafeedback", "ultrafeedback_zh", "ultrafeedback_binarized", "helpsteer2", "helpsteer2_preference",
    "helpsteer3", "hh_rlhf", "nectar", "arena", "sharegpt", "swift", "alpaca", "orca", "pairs", "kto", "prompts",
    "chat",
]  # fmt: skip


class Model(Section):
    id: str = Field(min_length=1, description="hub id, local folder, or builtin:tiny-qwen3")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    adapter: str | None = Field(None, description="a LoRA to start from (your SFT); the reference is base + adapter")
    adapter_revision: str | None = Field(None, description="branch, tag or commit of an adapter on the hub")
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
    rslora: bool = Field(False, description="multiply by alpha / sqrt(r) instead, so that a high rank learns as fast")
    dropout: float = Field(0.01, ge=0, lt=1, description="see train.disable_dropout: 0 in effect unless that is false")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases train")
    target_modules: Annotated[
        Literal["auto"] | Annotated[list[str], Field(min_length=1)],
        BeforeValidator(layers, json_schema_input_type=str | list[str]),
    ] = Field("auto", description="linear layers that get an adapter; auto: all of the model's but its head")


class DataFiles(Section):
    """Files or a Hub data set, and how to read them."""

    name: str | None = Field(None, min_length=1, description="its name in the report; default: the id's stem")
    id: str = Field(min_length=1, description="hub id, local file or folder, or builtin:…")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    data_files: str | list[str] | None = Field(None, description="files inside the hub repository or folder")
    split: str = Field("train", description="split of a hub data set")
    layout: Layout = Field("auto", description="how its rows are laid out; auto looks at the columns")
    language: str | None = Field(None, description="en, zh, …; default: detected row by row")
    columns: dict[str, str] | None = Field(
        None, description="for pairs, kto, chat and prompts: our column name -> theirs"
    )

    @field_validator("language")
    @classmethod
    def _language_is_a_code(cls, language: str | None) -> str | None:
        if problem := language_problem(language):
            raise ValueError(problem)
        return language

    @property
    def label(self) -> str:
        """The name in reports: `name`, or the last part of the id without its suffixes."""
        return self.name or Path(self.id.removeprefix("builtin:")).name.split(".")[0]


def _labels_differ(sources: list[Any]) -> list[Any]:
    labels = [source.label for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two sources are called '{label}'; give one of them a name:")
    return sources


class Source(DataFiles):
    quota: int | None = Field(None, ge=1, description="at most this many training pairs from here")
    keep_refusals: bool = Field(False, description="safety data: don't drop templated refusals")
    sample: Sample | None = Field(None, description="{answers: 4}: the model answers the prompts itself")
    rate: bool = Field(False, description="rate its answers again by data.rater, whatever its own scores")


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
    subsets: Annotated[list[str], _ONE_OR_SEVERAL] = Field(
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


class Disagreement(FilterOptions):
    max_spread: float = Field(2.0, ge=0, description="raters of one answer may be so far apart, on their own scale")


class Switch(FilterOptions):
    """A filter that can only be on or off."""


def _options(value: Any, info: Any) -> Any:
    """`true` -> the defaults, a bare number -> the first field; false and maps as they are."""
    if value is True:
        return {}
    if isinstance(value, int | float) and not isinstance(value, bool):
        first = next(iter(FILTERS[info.field_name][0].model_fields), None)
        return {first: value} if first else value
    return value


def _written(options: type[FilterOptions]) -> Any:
    """What may stand in a recipe for a filter, for the JSON schema."""
    first = next(iter(options.model_fields.values()), None)
    return bool | options | float if first and first.annotation in (int, float) else bool | options


# By drop reason: what tunes the filter, and what it drops.
FILTERS: dict[str, tuple[type[FilterOptions], str]] = {
    "garbled": (Garbled, "control or replacement characters, mojibake; an answer that repeats itself"),
    "contaminated": (Contaminated, "the prompt is in data.contamination, or is a benchmark's inside a source"),
    "language": (Switch, "its language is none of data.languages"),
    "duplicate": (Switch, "the same prompt again, but for case, space and punctuation; over all sources"),
    "near_duplicate": (NearDuplicate, "nearly the same prompt"),
    "disagreement": (
        Disagreement,
        "its raters are too far apart, where a source has several, as HelpSteer2's disagreements",
    ),
    "think": (
        Switch,
        "a tag of thinking, however spelled, but for closed blocks at the start: they are cut off and counted "
        "as an edit, or kept with model.thinking",
    ),
    "markers": (
        Switch,
        "special tokens or another chat's role markers inside an answer; end tokens at its end are cut off and counted",
    ),
    "echo": (
        Echo,
        "the answer is the prompt; a leading echo is cut off and counted, of shorter prompts only where 9 of "
        "10 answers of a source begin so",
    ),
    "template": (Switch, "a templated refusal or self-introduction; Confidence: 80% is cut off and counted"),
    "short": (Short, "an answer too short to prefer"),
    "contradicts_scores": (Switch, "chosen scores below rejected; an error where most rows of a source do"),
    "identical": (Identical, "the two answers are, or nearly are, the same"),
    "tie": (Switch, "the two answers score the same"),
    "margin": (Switch, "scores nearer than data.pairs.min_margin"),
    "low_chosen": (Switch, "chosen scores below data.pairs.min_chosen_score"),
    "too_long": (TooLong, "over model.max_length tokens, or too much of it taken by the prompt"),
    "length_ratio": (LengthRatio, "one answer so many times longer than the other"),
}
OFF_BY_DEFAULT = ("disagreement", "length_ratio")

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
                    Literal[False] | options,
                    BeforeValidator(_options, json_schema_input_type=_written(options)),
                    Field(description=drops),
                ],
                False if reason in OFF_BY_DEFAULT else options(),
            )
            for reason, (options, drops) in FILTERS.items()
        },
    )


class Data(Section):
    format: Literal["pairs", "ranked", "unpaired"] = Field(
        "pairs", description="what prepare writes; by default what train.method learns from"
    )
    sources: Annotated[
        list[Annotated[Source, BeforeValidator(_id_alone, json_schema_input_type=str | Source)]],
        BeforeValidator(
            _one_source_as_list,
            json_schema_input_type=str | Source | Annotated[list[str | Source], Field(min_length=1)],
        ),
        AfterValidator(_labels_differ),
    ] = Field(min_length=1, description="where the preference data come from")
    rater: Rater | None = Field(
        None, description="{kind: reward_model, id} or {kind: openai, base_url, model}: rates what sample and rate name"
    )
    score_weights: ScoreWeights = ScoreWeights()
    pairs: PairPolicy = PairPolicy()
    filters: Filters = Field(default_factory=lambda: Filters(), description="by drop reason: false, or what tunes it")
    contamination: Annotated[list[str], _ONE_OR_SEVERAL] = Field(
        [], description="files of prompts that must not be trained on"
    )
    total: int | None = Field(None, ge=1, description="training pairs; null = all")
    languages: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="shares of the languages, such as {en: 0.7, zh: 0.3}; null = as they come"
    )
    eval_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the prompts held out, by hash; more where that is under 50"
    )
    eval_size: int = Field(500, ge=1, description="at most this many held-out pairs are used")
    keep_dropped: bool = Field(False, description="write data/dropped.jsonl")

    @property
    def samples_here(self) -> bool:
        """Whether the model itself, and no server, answers the prompts of a source."""
        return any(source.sample and not source.sample.server for source in self.sources)

    @field_validator("languages")
    @classmethod
    def _shares_sum_to_one(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if problem := next(filter(None, map(language_problem, shares or ())), None):
            raise ValueError(problem)
        if shares is not None and abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(
                f"must be shares that sum to 1, such as {{en: 0.7, zh: 0.3}}, not to {sum(shares.values()):g}"
            )
        return shares


class EarlyStopping(Section):
    """Stop when a held-out figure gets no better, and keep the adapter of its best evaluation."""

    metric: str = Field("eval_loss", description="eval_loss, eval_rewards/accuracies, …; eval_zh_loss for one language")
    patience: int = Field(3, ge=1, description="evaluations without a better figure before it stops")

    @field_validator("metric")
    @classmethod
    def _metric_is_logged(cls, metric: str) -> str:
        if problem := held_out_metric_problem(metric):
            raise ValueError(problem)
        return metric

    @property
    def language(self) -> str | None:
        """The one language whose held-out pairs decide; None: all."""
        return language_of(self.metric)


class Engine(Section):
    backend: Literal["auto", "unsloth", "hf"] = Field("auto", description="auto: Unsloth where it can run")
    shared_prefix: Literal["auto", "on", "off"] = Field(
        "auto", description="compute a pair's prompt once, and no padding"
    )
    token_budget: Literal["auto", "off"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="tokens computed at once; a step's pairs are cut by it"
    )
    reference_cache: Literal["auto", "on", "off"] = Field(
        "auto", description="keep reference log-probabilities; auto: where each pair is seen again"
    )
    allow_cpu: bool = Field(False, description="train on a CPU though the model is large or there is a GPU")
    preflight: bool = Field(True, description="try the longest pairs before training")
    memory_limit: str | float | None = Field(None, description="GB this run may use, e.g. 16; default: all")
    early_stopping: EarlyStopping | None = Field(None, description="{metric, patience}; keeps the best adapter")

    @field_validator("memory_limit")
    @classmethod
    def _limit_is_a_size(cls, limit: str | float | None) -> str | float | None:
        match = MEMORY_SIZE.fullmatch(str(limit))
        if limit is not None and not (match and 0 < float(match[1]) < 1e6):
            raise ValueError(f"must be a size above 0, in GB: 16, 7.5 or 500MB, not {str(limit)[:60]}")
        return limit


class Eval(Section):
    prompts: int = Field(200, ge=0, description="held-out prompts that base and tuned model answer")
    max_new_tokens: int = Field(512, ge=1, description="tokens per sampled answer")
    temperature: float = Field(0.7, ge=0, description="of sampling; 0 takes the likeliest token")
    top_p: float = Field(0.8, gt=0, le=1, description="nucleus that is sampled from")
    top_k: int = Field(20, ge=0, description="likeliest tokens that are sampled from; 0: all")
    batch_size: int = Field(16, ge=1, description="answers sampled at once; halved where memory runs out")
    against: Literal["reference", "base"] = Field(
        "reference", description="what the tuned model is compared with; base: without the adapter it started from"
    )
    judge: Judge | None = Field(None, description="{kind: openai, …} or {kind: reward_model, id}, for win rates")
    sets: Annotated[
        list[Annotated[DataFiles, BeforeValidator(_id_alone, json_schema_input_type=str | DataFiles)]],
        BeforeValidator(_one_source_as_list, json_schema_input_type=str | DataFiles | list[str | DataFiles]),
        AfterValidator(_labels_differ),
    ] = Field([], description="test sets: other preference pairs, RewardBench's say, that are scored too")
    report_language: Literal["en", "zh"] | None = Field(
        None, description="what report.html is written in: en or zh; null: the language of most held-out prompts"
    )


GgufType = Literal["f32", "f16", "bf16", "q8_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]


class Export(Section):
    formats: Annotated[
        list[Literal["adapter", "merged", "gguf", "ollama", "hub"]],
        BeforeValidator(words, json_schema_input_type=Any),
    ] = Field(["adapter", "merged"], min_length=1, description="what export writes")
    gguf: Annotated[GgufType, BeforeValidator(_lower)] = Field(
        "q8_0", description="GGUF weight type; q2_k to q6_k need llama.cpp's llama-quantize"
    )
    llama_cpp: str | None = Field(None, description="folder of llama.cpp: its converter and llama-quantize")
    hub: str | None = Field(None, description="repository to push to, as user/name; formats names hub too")
    hub_private: bool = Field(True, description="whether a repository that is made by the push is private")

    @field_validator("hub")
    @classmethod
    def _hub_is_a_repository(cls, hub: str | None) -> str | None:
        if hub is not None and (problem := hub_id_problem(hub)):
            raise ValueError(f"{problem}; write user/name")
        return hub
