"""Settings that do nothing or fail late: `load` refuses them with what to write instead, or `check` tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import Recipe, check, dump, load
from dpo_cli.recipe.foreign import OWNED_TRAIN_ARGUMENTS
from dpo_cli.recipe.model_rules import against_model
from dpo_cli.recipe.optimizer_rules import OPTIMIZER_PACKAGES, REPORTERS
from dpo_cli.recipe.rules import notes, rules
from dpo_cli.recipe.train import trl_arguments

MINIMAL = "model: {id: a/b}\ndata: {sources: [{id: c/d}]}\n"
Load = Callable[..., Recipe]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`loaded("train.beta=1", …)`: the minimal recipe with settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(MINIMAL, encoding="utf-8")
    return lambda *settings: load(tmp_path / "r.yaml", [setting for line in settings for setting in line.split("; ")])


EVALUATES = "train.eval_strategy=steps"
SERVER = "kind: openai, model: m, base_url: http://x/v1"
MIN_LR, UNCHECKPOINTED = "lr_scheduler_type=cosine_with_min_lr", "gradient_checkpointing=false"
BEST = f"load_best_model_at_end=true; {EVALUATES}"
REFUSED_IN_TRAIN = [
    # settings, the key that is named, what is said
    ("average_tokens_across_devices=false", "average_tokens_across_devices", "means over rows"),
    ("use_cache=true", "use_cache", "does nothing in preference training"),
    ("use_liger_kernel=true", "use_liger_kernel", "Unsloth"),
    ("save_only_model=true", "save_only_model", "could not go on"),
    ("train_sampling_strategy=group_by_length", "train_sampling_strategy", "leave it random"),
    # losses
    ("label_smoothing=0.1", "label_smoothing", "aot, aot_unpaired, exo_pair or robust, not by sigmoid"),
    ("method=cpo; simpo_gamma=1", "simpo_gamma", "alphapo or simpo, not by sigmoid"),
    ("discopop_tau=0.1", "discopop_tau", "is read by loss_type discopop"),
    ("f_alpha_divergence_coef=0.3", "f_alpha_divergence_coef", "alpha_divergence"),
    ("f_divergence_type=forward_kll", "f_divergence_type", "did you mean forward_kl?"),
    ("f_divergence_type=forward_kl; loss_type=nca_pair", "f_divergence_type", "with loss_type nca_pair"),
    ("use_weighting=true; loss_type=aot", "use_weighting", "aot or aot_unpaired"),
    ("truncation_mode=keep_end", "truncation_mode", "data.filters.too_long: false"),
    ("method=sft; completion_only_loss=false", "completion_only_loss", "the tokens of the last answer count"),
    ("f_divergence_type=forward_kl; loss_type=[sigmoid, nca_pair]", "f_divergence_type", "with loss_type nca_pair"),
    # evaluation, saving, logging
    ("eval_steps=5", "eval_steps", "needs train.eval_strategy: steps"),
    ("eval_steps=5; eval_strategy=epoch", "eval_steps", "needs train.eval_strategy: steps"),
    ("eval_delay=3", "eval_delay", "needs evaluations"),
    (f"eval_steps=2.5; {EVALUATES}", "eval_steps", "whole number of steps"),
    ("save_steps=2.5", "save_steps", "whole number of steps"),
    ("load_best_model_at_end=true", "load_best_model_at_end", "needs evaluations"),
    (f"{BEST}; save_strategy=epoch", "load_best_model_at_end", "set train.save_strategy: steps"),
    (f"{BEST}; eval_steps=4; save_steps=6", "load_best_model_at_end", "multiple of train.eval_steps"),
    (f"{BEST}; eval_steps=0.1; save_steps=6", "load_best_model_at_end", "multiple of train.eval_steps"),
    ("metric_for_best_model=eval_loss", "metric_for_best_model", "needs evaluations"),
    (f"metric_for_best_model=accuracy; {EVALUATES}", "metric_for_best_model", "eval_rewards/accuracies"),
    (f"method=kto; metric_for_best_model=rewards/accuracies; {EVALUATES}", "metric_for_best_model", "by kto:"),
    (f"greater_is_better=true; {EVALUATES}", "greater_is_better", "metric_for_best_model"),
    (f"save_strategy=best; {EVALUATES}", "save_strategy", "train.metric_for_best_model: eval_loss"),
    ("report_to=wandbb", "report_to", "did you mean wandb?"),
    ("project=mine", "project", "train.report_to: trackio"),
    ("include_num_input_tokens_seen=some", "include_num_input_tokens_seen", "all or non_padding"),
    ("method=orpo; include_num_input_tokens_seen=all", "include_num_input_tokens_seen", "tokens_per_second"),
    ("debug=tpu_metrics_debug", "debug", "underflow_overflow"),
    # optimizer, schedule, steps
    ("max_steps=0", "max_steps", "1 or more, or -1"),
    ("warmup_steps=10; lr_scheduler_type=constant", "warmup_steps", "constant_with_warmup"),
    ("warmup_steps=2.5", "warmup_steps", "whole number"),
    ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_type", "{min_lr_rate: 0.1}"),
    ("lr_scheduler_type=cosine_warmup_with_min_lr", "lr_scheduler_type", "one of min_lr and min_lr_rate"),
    (f"{MIN_LR}; lr_scheduler_kwargs={{min_lr: 0, min_lr_rate: 0}}", "lr_scheduler_type", "one of min_lr and"),
    ("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_type", "num_decay_steps"),
    ("lr_scheduler_kwargs={num_cycles: 2}", "lr_scheduler_kwargs", "linear takes no num_cycles: remove it"),
    ("lr_scheduler_type=cosine; lr_scheduler_kwargs={num_cycle: 2}", "lr_scheduler_kwargs", "did you mean num_cycles?"),
    ("lr_scheduler_kwargs=fast", "lr_scheduler_kwargs", "must be a map"),
    ("optim_args=rank=8", "optim_args", "is not read by adamw_torch_fused"),
    ("optim=sgd; optim_args=rank=8", "optim_args", "it takes momentum"),
    ("optim_target_modules=[q_proj]", "optim_target_modules", "lora.target_modules"),
    ("optim=adafactor; adam_beta1=0.8", "adam_beta1", "is not read by adafactor"),
    # memory and machines
    (f"{UNCHECKPOINTED}; gradient_checkpointing_kwargs={{a: 1}}", "gradient_checkpointing_kwargs", "is false"),
    ("torch_compile_mode=fast", "torch_compile_mode", "reduce-overhead"),
    ("fsdp_config={a: 1}", "fsdp_config", "needs train.fsdp"),
    ("dataloader_persistent_workers=true", "dataloader_persistent_workers", "dataloader_num_workers above 0"),
]  # fmt: skip


def in_train(settings: str) -> str:
    """`beta=1; lora.r=2` -> `train.beta=1; lora.r=2`."""
    return "; ".join(one if "." in one.split("=")[0] else f"train.{one}" for one in settings.split("; "))


RATER = "data.rater={kind: reward_model, id: c/rm}"
PROMPTS = f"data.sources=[{{id: c/d, sample: {{}}}}]; {RATER}"
OF_OWN_ANSWERS = [
    ("data.sources.0.sample={}", "data.sources[0].sample", "add data.rater: {kind: reward_model, id: Skywork/"),
    ("data.sources.0.rate=true", "data.sources[0].rate", "needs a rater"),
    (RATER, "data.rater", "give a source sample: {answers: 4} or rate: true"),
    (f"{PROMPTS}; data.sources.0.rate=true", "data.sources[0].rate", "are rated anyway: remove it"),
    (f"{PROMPTS}; data.sources.0.sample.answers=1", "data.sources[0].sample.answers", "equal to 2, not 1"),
    (f"{PROMPTS}; data.sources.0.sample.top_k=1", "data.sources[0].sample.top_k", "all answers to a prompt alike"),
    (f"{PROMPTS}; data.sources.0.sample.slice=[3, 3]", "data.sources[0].sample.slice", "such as [0, 3]"),
    (f"{PROMPTS}; data.sources.0.sample.slice=[1]", "data.sources[0].sample.slice", "such as [0, 3]"),
    (
        f"{PROMPTS}; data.sources.0.layout=prompts; data.sources.0.sample.keep=true",
        "data.sources[0].sample.keep",
        "no answers to keep",
    ),
    ("data.sources.0.layout=prompts", "data.sources[0].layout", "add sample: {answers: 4}"),
    (
        f"{PROMPTS}; data.sources.0.sample.max_new_tokens=2000",
        "data.sources[0].sample.max_new_tokens",
        "write max_new_tokens: 512",
    ),
    (f"{PROMPTS}; data.rater.id=a/b", "data.rater.id", "is the model itself"),
    (f"{PROMPTS}; data.rater.calibration=5", "data.rater.calibration", "unknown key"),
]
STOPPING = f"engine.early_stopping={{}}; {EVALUATES}"
BY_ACCURACY = "engine.early_stopping={metric: eval_rewards/accuracies}"
OF_SECTIONS = [
    ("data={sources: []}", "data.sources", "at least 1"),
    ("data={sources: [3]}", "data.sources[0]", "must be a map"),
    ("data={sources: [{layout: pairs}]}", "data.sources[0].id", "is missing"),
    ("data={sources: [{id: a/b, layout: ultrafedback}]}", "data.sources[0].layout", "did you mean ultrafeedback?"),
    ("data={sources: [{id: a/c}, {id: b/c}]}", "data.sources", "two sources are called 'c'"),
    ("data={sources: [{id: a/b, columns: {prompt: 1}}]}", "data.sources[0].columns.prompt", "must be text"),
    ("data={sources: a/b, languages: {en: 70, zh: 30}}", "data.languages", "such as {en: 0.7, zh: 0.3}, not to 100"),
    ("data={sources: a/b, languages: [en, zh]}", "data.languages", "such as {en: 0.7, zh: 0.3}; null = as they come"),
    ("data={sources: a/b, languages: {English: 1}}", "data.languages", "such as en or zh, not English"),
    ("data={sources: [{id: a/b, language: Chinese}]}", "data.sources[0].language", "such as en or zh, not Chinese"),
    ("data={sources: [{path: a/b}]}", "data.sources[0].path", "it is called id here"),
    ("data={sources: [{id: a/b}], filters: {near_duplicates: 1}}", "data.filters.near_duplicates", "near_duplicate?"),
    ("data={sources: [{id: a/b}], filters: {tie: 3}}", "data.filters.tie", "not 3"),
    ("data={sources: [{id: a/b}], filters: {echo: {min_char: 3}}}", "data.filters.echo.min_char", "mean min_chars?"),
    ("data={sources: [{id: a/b}], score_weights: {correctness: 0, helpfulness: 0}}", "data.score_weights", "weigh 0"),
    ("train={method: simpo, loss_type: sigmoid_norm}", "train.loss_type", "set train.loss_type: null for simpo's own"),
    ("train={method: orpo, loss_type: sigmoid}", "train.loss_type", "not to orpo: remove it, or set it to null"),
    ("train={method: cpo, loss_type: sigmod}", "train.loss_type", "did you mean sigmoid?"),
    ("train={simpo_gamma: 0.5}", "train.simpo_gamma", "belongs to train.method simpo or cpo, not to dpo"),
    ("train={method: kto, desirable_wieght: 1}", "train.desirable_wieght", "did you mean desirable_weight?"),
    ("train={method: smipo}", "train.method", "did you mean simpo?"),
    ("train={method: [dpo]}", "train.method", "must be dpo"),
    ("train={method: ipo}", "train.method", "ipo is a loss: write method: dpo and loss_type: ipo"),
    (
        "train={method: orpo, sync_ref_model: true}",
        "train.sync_ref_model",
        "belongs to train.method dpo, kto or lipo, not to",
    ),
    ("train={method: kto, per_device_train_batch_size: 1}", "train.per_device_train_batch_size", "must be 2 or more"),
    ("train={method: kto, train_sampling_strategy: random}", "train.train_sampling_strategy", "must be sequential"),
    ("train={method: simpo, simpo_gamma: -1}", "train.simpo_gamma", "must be greater than or equal to 0"),
    ("train={method: simpo, loss_type: alphapo}", "train.alpha", "must not be 0 for alphapo"),
    ("train.loss_type=exo_pair", "train.label_smoothing", "must be above 0"),
    ("train={bf16: true, fp16: true}", "train.fp16", "can't both be true"),
    ("train.method=kto; data.format=ranked", "data.format", "set data.format: unpaired"),
    ("data.format=unpaired", "data.format", "or train.method: kto"),
    ("train.method=simpo; engine.reference_cache=on", "engine.reference_cache", "simpo has no reference"),
    ("train.method=kto; engine.token_budget=500", "engine.token_budget", "engine.token_budget: auto"),
    (f"train.method=kto; {EVALUATES}; {BY_ACCURACY}", "engine.early_stopping.metric", "eval_rewards/margins"),
    ("engine.early_stopping={}", "engine.early_stopping", "set train.eval_strategy: steps"),
    ("engine.early_stopping={metric: eval_los}", "engine.early_stopping.metric", "did you mean eval_loss?"),
    (f"{STOPPING}; train.save_steps=7", "train.save_steps", "which saves each evaluation"),
    (f"{STOPPING}; train.greater_is_better=true", "train.greater_is_better", "is set by engine.early_stopping"),
]
REFUSED = [
    *OF_OWN_ANSWERS,
    *OF_SECTIONS,
    *((in_train(settings), f"train.{key}", says) for settings, key, says in REFUSED_IN_TRAIN),
    # LoRA
    *(
        (
            f"lora.target_modules={given}",
            "lora.target_modules",
            "names of linear layers, such as q_proj, and no patterns",
        )
        for given in ("[q_proj, all]", "[embed_tokens]", "[q_norm]", ".*_proj")
    ),
    ("lora.target_modules=[q_proj, lm_head]", "lora.target_modules", "lm_head would not train"),
    ("lora.bias=all", "lora.bias", "set lora.bias: none"),
    ("model.adapter=me/sft; lora.r=8", "lora.r", "does nothing beside model.adapter"),
    # other sections
    ("model.id=builtin:tiny-qwen3; model.revision=main", "model.revision", "no Hub id"),
    ("data.sources.0.id=builtin:style-helpsteer2; data.sources.0.revision=x", "data.sources[0].revision", "no Hub id"),
    ("eval.sets=[{id: builtin:style-helpsteer2, split: test}]", "eval.sets[0].split", "one file"),
    ("eval.sets=[{id: a/b, quota: 3}]", "eval.sets[0].quota", "unknown key"),
    ("export.gguf=q4_k_m", "export.gguf", "names gguf or ollama"),
    ("export={hub: me/mine}", "export.hub", "does nothing unless export.formats names hub"),
    ("export={formats: [merged, hub]}", "export.formats", "set export.hub: user/name"),
    ("export={formats: [hub], hub: me/mine}", "export.formats", "nothing to push"),
    ("export.hub=a/b/c; export.formats=[merged, hub]", "export.hub", "user/name"),
    ("export.hub=a--b; export.formats=[merged, hub]", "export.hub", "no --"),
    ("export.gguf=q4_0", "export.gguf", "did you mean q4_k_s?"),
    ("engine.memory_limit=lots", "engine.memory_limit", "16, 7.5 or 500MB"),
    ("engine.memory_limit=-3", "engine.memory_limit", "not -3"),
    ("name=a,b", "name", "without ,"),
    (f"name={'x' * 300}", "name", "not too long"),
    ('name="a\\tb"', "name", "without"),
    ("eval.judge={kind: openai, model: m, base_url: 'http://x/v1?key=abc'}", "eval.judge.base_url", "without keys"),
    (f"eval.judge={{{SERVER}, api_key_env: HOME}}", "eval.judge.api_key_env", "_KEY or _TOKEN"),
]


@pytest.mark.parametrize(("settings", "key", "says"), REFUSED, ids=[settings[:60] for settings, _, _ in REFUSED])
def test_what_does_nothing_or_fails_late_is_refused(loaded: Load, settings: str, key: str, says: str) -> None:
    with pytest.raises(DpoError) as caught:
        loaded(settings)
    assert caught.value.exit_code == USAGE
    assert f"  {key}\n" in str(caught.value)
    assert says in str(caught.value)
    assert "abc" not in str(caught.value)
    assert str(caught.value).startswith("the recipe has an error\n"), "one setting, one error"


FINE = [
    "train.loss_type=robust; train.label_smoothing=0.1",
    "train.method=simpo; train.label_smoothing=0.1; train.simpo_gamma=2",
    "train.loss_type=[sigmoid, discopop]; train.discopop_tau=0.1",
    "train.f_divergence_type=alpha_divergence; train.f_alpha_divergence_coef=0.3",
    "train.truncation_mode=keep_end; data.filters.too_long=false",
    "train.f_divergence_type=js_divergence; train.loss_type=[sigmoid, sft]",
    f"{EVALUATES}; train.eval_steps=5; train.eval_on_start=true; train.eval_delay=2",
    f"{EVALUATES}; train.eval_steps=5; train.save_steps=10; train.load_best_model_at_end=true",
    f"{EVALUATES}; train.eval_steps=0.1; train.save_steps=0.2; train.load_best_model_at_end=true",
    "train.eval_strategy=epoch; train.save_strategy=epoch; train.load_best_model_at_end=true",
    f"{EVALUATES}; train.lr_scheduler_type=reduce_lr_on_plateau; train.lr_scheduler_kwargs={{patience: 2}}",
    "train.lr_scheduler_type=cosine_with_min_lr; train.lr_scheduler_kwargs={min_lr_rate: 0.1}",
    "train.lr_scheduler_type=warmup_stable_decay; train.lr_scheduler_kwargs={num_decay_steps: 3}",
    "train.save_steps=0.25; train.logging_steps=1; train.max_steps=1; train.warmup_steps=0.1",
    "train.optim=sgd; train.optim_args=momentum=0.9,nesterov=true",
    "train.dataloader_num_workers=1; train.dataloader_prefetch_factor=2; train.dataloader_persistent_workers=true",
    f"{EVALUATES}; train.save_strategy=best; train.metric_for_best_model=zh_loss; train.greater_is_better=false",
    f"engine.early_stopping={{}}; {EVALUATES}; train.eval_steps=10",
    "train.lr_scheduler_type=constant_with_warmup; train.warmup_steps=10",
    "train.method=orpo; lora.target_modules=[q_proj, lm_head]",
    "lora.target_modules=[model.layers.0.self_attn.q_proj]",
    "export.formats=gguf; export.gguf=Q4_K_M",
    "export.formats=[merged, hub]; export.hub=me/my.model-2; export.hub_private=false",
    "engine.memory_limit=15GB",
    "engine.memory_limit=7.5",
    "eval.judge={kind: openai, model: m, base_url: https://x/v1, api_key_env: HF_TOKEN}",
    f"{PROMPTS}; data.sources.0.sample={{answers: 8, slice: [2, 3], server: {{base_url: http://x/v1, model: m}}}}",
    f"{PROMPTS}; model.max_length=512",  # as long as an answer may become
    f"data.sources.0.rate=true; data.rater={{{SERVER}}}",
    "model.adapter=me/sft; eval.against=base",
]


@pytest.mark.parametrize("settings", FINE)
def test_what_does_something_loads_and_so_does_its_dump(loaded: Load, tmp_path: Path, settings: str) -> None:
    recipe = loaded(settings)
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe), encoding="utf-8")
    assert load(again).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    ("settings", "key", "says"),
    [
        ("train.max_steps=5; train.warmup_steps=500", "train.warmup_steps", "the learning rate is never reached"),
        ("train.per_device_eval_batch_size=2", "train.per_device_eval_batch_size", "nothing is evaluated"),
        ("train.run_name=x", "train.run_name", "no effect"),
        ("train.save_steps=5; train.save_strategy=epoch", "train.save_steps", "without train.save_strategy: steps"),
        ("train.logging_steps=2; train.logging_strategy=no", "train.logging_steps", "without train.logging_strategy"),
        ("train.max_steps=5; train.num_train_epochs=2", "train.num_train_epochs", "no effect beside train.max_steps"),
        ("lora.dropout=0.1", "lora.dropout", "while train.disable_dropout is true"),
        ("eval.against=base", "eval.against", "the base is the reference"),
    ],
)
def test_what_has_no_effect_and_harms_nothing_is_told(loaded: Load, settings: str, key: str, says: str) -> None:
    recipe = loaded(settings)
    (remark,) = check(recipe, Path("r.yaml"))
    assert f"  {key} " in remark
    assert says in remark
    assert check(loaded("train.beta=0.2"), Path("r.yaml")) == []


@pytest.mark.parametrize("optim", trl_arguments()["dpo"]["arguments"]["optim"]["choices"])
def test_an_optimizer_loads_where_its_package_is_installed(loaded: Load, optim: str) -> None:
    module, package = next((found for part, found in OPTIMIZER_PACKAGES.items() if part in optim), (None, ""))
    more = ["train.optim_target_modules=[q_proj]"] if optim.startswith(("galore_", "apollo_")) else []
    if module is None or find_spec(module):
        assert loaded(f"train.optim={optim}", *more).train.optim == optim
        return
    with pytest.raises(DpoError, match=f"pip install {package}"):
        loaded(f"train.optim={optim}", *more)


@pytest.mark.parametrize("name", REPORTERS)
def test_a_tracker_loads_where_its_package_is_installed(loaded: Load, name: str) -> None:
    modules, package = REPORTERS[name]
    if any(find_spec(module) for module in modules):
        assert loaded(f"train.report_to={name}").train.report_to == name
        return
    with pytest.raises(DpoError, match=f"pip install {package}"):
        loaded(f"train.report_to=[{name}]")


def test_every_rule_is_of_a_key_that_exists(loaded: Load) -> None:
    """A rule on a name that TRL has dropped would never speak."""
    train = {name for one in trl_arguments().values() for name in one["arguments"]} - set(OWNED_TRAIN_ARGUMENTS)
    sections: list[Any] = [
        Recipe.model_fields[name].annotation for name in ("lora", "model", "eval", "export", "engine")
    ]
    fields = {section.__name__.lower(): set(section.model_fields) for section in sections}
    fields["lora"].add("rslora")  # of a LoRA's own config
    recipes = [loaded(f"train.method={method}") for method in trl_arguments()]
    recipes.append(loaded("model.adapter=me/sft"))
    for key in {key for recipe in recipes for keys, _ in (*rules(recipe), *notes(recipe)) for key in keys.split()}:
        section, name = key.split(".")
        assert name in (train if section == "train" else fields[section]), key


# ------------------------------------------------------------------------------------------- what only a model shows


@pytest.mark.parametrize(
    ("settings", "config", "key", "says"),
    [
        (
            "train.method=orpo; lora.target_modules=[lm_head]",
            {"tie_word_embeddings": True},
            "target_modules",
            "tie_word",
        ),
        (
            "model.max_length=4096",
            {"max_position_embeddings": 2048},
            "max_length",
            "max_length: 2048 or less",
        ),
        (
            "model.load_in_4bit=false",
            {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
            "load_in_4bit",
            "quantised",
        ),
        ("model.load_in_4bit=false", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "id", "GPTQ"),
        (
            "model.load_in_4bit=true",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}},
            "id",
            "8-bit",
        ),
        ("train.router_aux_loss_coef=0.1", {"hidden_size": 8}, "router_aux_loss_coef", "experts"),
    ],
)
def test_what_a_model_can_not_do(loaded: Load, settings: str, config: dict[str, Any], key: str, says: str) -> None:
    ((found, sentence),) = against_model(loaded(settings), config)
    assert found[-1] == key
    assert says in sentence
    in_4bit = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    fine = {"tie_word_embeddings": True, "num_experts": 8, "quantization_config": in_4bit}
    assert against_model(loaded("model.max_length=2048"), fine | {"max_position_embeddings": 2048}) == []


def test_check_reads_a_local_models_config(loaded: Load, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}), encoding="utf-8")
    (tmp_path / "m" / "tokenizer.json").write_text("{}", encoding="utf-8")
    recipe = loaded("model.id=./m; train.method=simpo; lora.target_modules=[q_proj, lm_head]")
    with pytest.raises(DpoError, match="tie_word_embeddings") as caught:
        check(recipe, tmp_path / "r.yaml")
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("unsloth/Qwen3-1.7B-unsloth-bnb-4bit", "set model.merge_base: unsloth/Qwen3-1.7B\n"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "set model.merge_base: unsloth/Llama-3.2-1B-Instruct\n"),
        ("./m", "set model.merge_base: the 16-bit repository"),
    ],
)
def test_check_wants_16_bit_weights_to_merge_into(loaded: Load, tmp_path: Path, name: str, fix: str) -> None:
    (tmp_path / "m").mkdir()
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps({"quantization_config": quantised}), encoding="utf-8")
    (tmp_path / "m" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DpoError) as caught:
        check(loaded(f"model.id={name}; model.load_in_4bit=true"), tmp_path / "r.yaml")
    assert fix in f"{caught.value}\n" and "model.merge_base" in str(caught.value)
    assert caught.value.exit_code == USAGE
    check(loaded(f"model.id={name}; model.load_in_4bit=true; model.merge_base=Qwen/Qwen3-1.7B"), tmp_path / "r.yaml")


def test_an_adapters_own_settings_may_be_repeated(loaded: Load, tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    own = {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(own), encoding="utf-8")
    loaded("model.adapter=./sft; lora.r=8; lora.alpha=16; lora.target_modules=[q_proj, v_proj]")
    with pytest.raises(DpoError, match="which has r 8"):
        loaded("model.adapter=./sft; lora.r=64")
