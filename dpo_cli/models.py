"""Base model, tokenizer and adapter, from either backend.

Every stage gets its model here, so that a recipe means the same weights, dtype and chat template everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.hub import cached_file

from dpo_cli.adapters import adapter_commit, adapter_folder, load_adapter_weights, lora_of
from dpo_cli.backends import Backend
from dpo_cli.chat import load_tokenizer
from dpo_cli.errors import DpoError
from dpo_cli.families import family_of
from dpo_cli.gpu import best_dtype
from dpo_cli.hub import loading
from dpo_cli.model_files import cannot_load, location
from dpo_cli.recipe import Lora, Recipe
from dpo_cli.recipe.model_rules import against_model
from dpo_cli.recipe.yaml import show_key


def load_config(recipe: Recipe) -> Any:
    """Read the config of `model.id`, as transformers keeps it."""
    where = location(recipe.model.id)
    return AutoConfig.from_pretrained(where, revision=recipe.model.revision, trust_remote_code=False)


def check_config(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise the first thing that the recipe asks of its model and that the model can't do, by its `config.json`."""
    for key, sentence in against_model(recipe, config):
        problem, _, fix = sentence.partition(": ")
        raise DpoError(f"{show_key(key)} {problem}", where=recipe.where(*key), hint=fix)


def resolve_dtype(recipe: Recipe) -> torch.dtype:
    """Return `model.dtype`, with auto as `train.fp16` asks for, else this machine's best."""
    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    return torch.float16 if recipe.train.fp16 and torch.cuda.is_available() else best_dtype()


# Safetensors only: a pickle can run code when it is loaded. Nor does a model bring code of its own, about which
# transformers would ask on the terminal.
SAFE = {"use_safetensors": True, "trust_remote_code": False}


def load_base(recipe: Recipe) -> PreTrainedModel:
    """Load the base model as the recipe wants it (4-bit NF4 or full precision), by transformers and bitsandbytes.

    Raises:
        DpoError: it can't be found, is no causal language model, lacks weights, or its precision is not what the
            recipe says.
    """
    where, revision = location(recipe.model.id), recipe.model.revision
    dtype = resolve_dtype(recipe)
    if recipe.model.id.startswith("builtin:"):
        torch.set_num_threads(1)  # matrices of 64 columns only lose by being shared out
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, **SAFE}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    try:
        config = load_config(recipe)
        check_config(recipe, config.to_dict())
        if recipe.model.load_in_4bit and getattr(config, "quantization_config", None) is None:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, config=config, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise cannot_load(recipe, "id", "the model", error) from error
    model, found = loaded
    _refuse_random_weights(recipe, found["missing_keys"], found["unexpected_keys"])
    if recipe.model.load_in_4bit:
        _check_4bit(recipe, model)
    return model


def _refuse_random_weights(recipe: Recipe, missing: Iterable[str], others: Collection[str]) -> None:
    """Raise where the stored weights lack some of the model's, which transformers draws at random, with a log line."""
    if lacking := sorted(missing):
        instead = f"; they hold others that it has not, such as {min(others)}" if others else ""
        raise DpoError(
            f"the weights of {recipe.model.id} lack {len(lacking)} tensors of the model, such as {lacking[0]}{instead}",
            where=recipe.where("model", "id"),
            hint="they would be random: save the whole model by save_pretrained, under the names it has there",
        )


def stored_names(where: str, revision: str | None) -> set[str]:
    """Read the names of the tensors in a model's safetensors, of a local folder or a hub id.

    Raises:
        OSError: it has no safetensors.
    """
    try:
        index = cached_file(where, "model.safetensors.index.json", revision=revision)
    except OSError:
        with safe_open(cached_file(where, "model.safetensors", revision=revision), "pt") as file:
            return set(file.keys())
    return set(json.loads(Path(str(index)).read_text(encoding="utf-8"))["weight_map"])


def modules_in_16bit(quantization_config: Any) -> list[str]:
    """List the modules that 4-bit weights leave in 16 bits, as their `quantization_config` names them.

    transformers keeps the config as an object, Unsloth (2026.10) and a `config.json` as a dict.
    """
    config = quantization_config or {}
    known = config if isinstance(config, dict) else vars(config)
    names = known.get("llm_int8_skip_modules")  # GPTQ's and AWQ's configs have none
    return list(names or [])


def stays_in_16bit(name: str, modules: Sequence[str]) -> bool:
    """Whether transformers leaves a module in 16 bits where the `quantization_config` names these.

    Its rule: the full name begins with one of them, which are patterns, or ends with one. So `model.layers.1` stands
    for the layers 10 to 19 too, and `mlp` not for the linear layers in it.
    """
    return not should_convert_module(name, list(modules))


def _check_4bit(recipe: Recipe, model: PreTrainedModel) -> None:
    """Every linear layer is in 4-bit but the head and those that the weights' own config leaves out."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    skipped = modules_in_16bit(getattr(model.config, "quantization_config", None))
    whole = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and module is not model.get_output_embeddings()
        and not stays_in_16bit(name, skipped)
    ]
    if not layers or whole:
        raise DpoError(
            f"the model was to be in 4-bit, but {len(whole)} layers came out in full precision, such as {whole[:1]}",
            where=recipe.where("model", "load_in_4bit"),
            hint="check that bitsandbytes works here: python -m bitsandbytes",
        )
    for layer in layers:
        # bitsandbytes 0.50.2 repacks CPU weights at the first eval forward where the CPU has AVX512-BF16; training
        # then runs through a kernel without a backward, and its gradients are wrong.
        if layer.weight.device.type == "cpu":
            layer.support_avx512bf16_for_cpu = False


def load_for_training(recipe: Recipe, backend: Backend) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base with a LoRA to train, and the tokenizer.

    A fresh LoRA has B = 0, so the policy starts equal to the base, its reference. With `model.adapter` it starts as
    that adapter, and base + adapter is the reference.

    Raises:
        DpoError: a part can't be loaded, or does not fit another.
    """
    tokenizer = load_tokenizer(recipe)
    folder = adapter_folder(recipe)
    lora = recipe.lora if folder is None else lora_of(recipe, folder)
    with loading(recipe.model.id, recipe.model.revision):
        model = _load_unsloth(recipe, lora) if backend.name == "unsloth" else _load_hf(recipe, lora)
    _check_vocabulary(recipe, model, tokenizer)
    if folder is not None:
        try:
            load_adapter_weights(model, folder)
        except ValueError as error:
            raise DpoError(
                f"{recipe.model.adapter} is an adapter of another model: {error}",
                where=recipe.where("model", "adapter"),
                hint="set model.id to the base that the adapter was trained on",
            ) from error
    return model, tokenizer


def _check_vocabulary(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Raise where the tokenizer has tokens that the model has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise DpoError(
            f"the tokenizer of {recipe.model.id} has {len(tokenizer):,} tokens, its model only {rows:,} rows for them",
            where=recipe.where("model", "id"),
            hint="enlarge the model by resize_token_embeddings and save it, or save the tokenizer it was made with",
        )


def _targets(lora: Lora, model: Any) -> list[str] | str:
    """The modules that get an adapter, as PEFT takes them: of a family that is not known all linear ones."""
    if lora.target_modules != "auto":
        return list(lora.target_modules)
    family = family_of(model.config.to_dict())
    return list(family.linear) if family else "all-linear"


def _load_hf(recipe: Recipe, lora: Lora) -> PeftModel:
    base = load_base(recipe)
    set_seed(recipe.seed)  # PEFT draws LoRA's A from the global generator
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_rslora=lora.rslora,
        target_modules=_targets(lora, base),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise DpoError(
            f"LoRA does not fit this model: {error}",
            where=recipe.where("lora", "target_modules"),
            hint="name linear layers that the model has, such as q_proj",
        ) from error


def _load_unsloth(recipe: Recipe, lora: Lora) -> PeftModel:
    """The same through Unsloth, with its names for things.

    `use_exact_model_name`: Unsloth would else swap a 16-bit id for its own 4-bit repository, without the revision.
    """
    from unsloth import FastLanguageModel

    where, revision = location(recipe.model.id), recipe.model.revision
    try:
        stored = stored_names(where, revision)  # first, for Unsloth would take a pickle too
        model, _ = FastLanguageModel.from_pretrained(
            model_name=where,
            revision=revision,
            max_seq_length=recipe.model.max_length,
            dtype=resolve_dtype(recipe),
            load_in_4bit=recipe.model.load_in_4bit,
            use_exact_model_name=True,
            use_gradient_checkpointing="unsloth",
            random_state=recipe.seed,
            local_files_only=Path(where).is_dir(),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_load(recipe, "id", "the model", error) from error
    names = {name for name, _ in model.named_parameters()}
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:  # else stored under other names
        _refuse_random_weights(recipe, names - stored, stored - names)
    if recipe.model.load_in_4bit:
        _check_4bit(recipe, model)  # a dead bitsandbytes makes Unsloth load 16-bit with one printed line
    return FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_rslora=lora.rslora,
        target_modules=_targets(lora, model),
        use_gradient_checkpointing=False if recipe.train.gradient_checkpointing is False else "unsloth",
        random_state=recipe.seed,
    )


def load_tuned(recipe: Recipe, adapter: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base with a trained adapter, in eval mode on the best device; see `as_reference` for its reference."""
    tokenizer = load_tokenizer(recipe)
    with loading(recipe.model.id, recipe.model.revision):
        model = PeftModel.from_pretrained(load_base(recipe), str(adapter))
    _check_vocabulary(recipe, model, tokenizer)
    started_from = adapter_folder(recipe)
    if started_from is not None:
        model.load_adapter(str(started_from), adapter_name="reference")
    return model.eval(), tokenizer


def revisions(recipe: Recipe, model: PeftModel) -> dict[str, str]:
    """Return the commits that a base and an adapter from the hub were loaded at, by id."""
    found = {recipe.model.id: getattr(model.config, "_commit_hash", None)}
    if recipe.model.adapter:
        found[recipe.model.adapter] = adapter_commit(recipe)
    return {name: commit for name, commit in found.items() if commit}


def as_trained(recipe: Recipe, record: Mapping[str, Any]) -> Recipe:
    """Pin base and adapter to the commits that `train` recorded, so that later stages load what was trained."""
    commits = record.get("revisions") or {}
    pinned = {
        "revision": commits.get(recipe.model.id, recipe.model.revision),
        "adapter_revision": commits.get(recipe.model.adapter, recipe.model.adapter_revision),
    }
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=pinned)})


@contextmanager
def as_reference(model: PeftModel) -> Iterator[None]:
    """The model of `load_tuned` as the reference of its training: the adapter it started from, or none."""
    if "reference" in model.peft_config:
        model.set_adapter("reference")
        try:
            yield
        finally:
            model.set_adapter("default")
        return
    layers: Any = model.base_model
    layers.disable_adapter_layers()  # PEFT's disable_adapter looks through all of them first, each time
    try:
        yield
    finally:
        layers.enable_adapter_layers()


def merge_base(recipe: Recipe) -> str:
    """The 16-bit weights that a merge starts from, as an id or an absolute folder."""
    return recipe.model.merge_base or recipe.model.id
