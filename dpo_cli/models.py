"""Base model, tokenizer and adapter, from either backend. The only importer of unsloth.

Every stage gets its model here, so that a recipe means the same weights, dtype and chat template everywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import smoke
from dpo_cli.device import best_dtype
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Lora, Recipe
from dpo_cli.records import Message

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Backend:
    """Who loads and patches the model: `unsloth` or `hf`, and why that one."""

    name: str
    why: str


def choose_backend(recipe: Recipe) -> Backend:
    """The backend that this recipe gets on this machine.

    Raises:
        DpoError: `engine.backend: unsloth` where Unsloth is not installed or finds no GPU.
    """
    import torch

    asked = recipe.engine.backend
    # Unsloth's own switch for machines without a GPU (its CI, and our tests).
    accelerated = torch.cuda.is_available() or os.environ.get("UNSLOTH_ALLOW_CPU") == "1"
    missing = None if find_spec("unsloth") else "Unsloth is not installed"
    missing = missing or (None if accelerated else "Unsloth needs an NVIDIA GPU, and torch sees none")
    if asked == "hf":
        return Backend("hf", "engine.backend: hf")
    if asked == "unsloth" and missing:
        raise DpoError(
            missing,
            where=recipe.where("engine", "backend"),
            hint="set engine.backend: auto, or `pip install 'dpo-cli[unsloth]'` on a machine with a GPU",
        )
    if asked == "unsloth":
        return Backend("unsloth", "engine.backend: unsloth")
    if missing or not torch.cuda.is_available():
        return Backend("hf", missing or "torch sees no GPU")
    return Backend("unsloth", "it is installed and there is a GPU")


def import_backend(backend: Backend) -> None:
    """Import Unsloth, if it is the backend, before anything imports TRL; and make the libraries keep quiet."""
    # bitsandbytes looks for kernels on the Hub at import and says so; transformers and datasets draw bars of their own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    if backend.name == "unsloth":
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(smoke.cache_folder() / "unsloth_compiled"))
        os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")  # else an export may install system packages
        import unsloth  # noqa: F401
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def patched_by_unsloth(trainer_class: type) -> bool:
    """Whether a trainer is, or is made of, the one that Unsloth puts in the place of TRL's."""
    return any(one.__name__.startswith("Unsloth") for one in trainer_class.__mro__)


def location(model_id: str) -> str:
    """What transformers should load: the folder of a `builtin:` id (built on first use), else the id itself."""
    return str(smoke.resolve(model_id)) if model_id.startswith("builtin:") else model_id


def local_files(recipe: Recipe) -> dict[str, Path]:
    """The files of a local model and adapter, by a name without their folder; hub ids have none."""
    return _files_of("model", recipe.model.id) | _files_of("adapter", recipe.model.adapter)


def merge_files(recipe: Recipe) -> dict[str, Path]:
    """The files of a local `model.merge_base`, where that is another model than the trained one."""
    return {} if recipe.model.merge_base == recipe.model.id else _files_of("merge_base", recipe.model.merge_base)


def _files_of(kind: str, model_id: str | None) -> dict[str, Path]:
    folder = Path(location(model_id)) if model_id else None
    if folder is None or not folder.is_dir():
        return {}
    return {f"{kind}/{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()}


def tokenizer_files(recipe: Recipe) -> dict[str, Path]:
    """Those of `local_files` that decide how text becomes tokens."""
    return {
        name: path
        for name, path in local_files(recipe).items()
        if name.startswith(("model/tokenizer", "model/chat_template"))
    }


def chat_template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """The one switch for Qwen3's thinking mode, as `apply_chat_template` takes it."""
    return {"enable_thinking": recipe.model.thinking}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.id`, with its chat template.

    Raises:
        DpoError: it can't be found, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location(recipe.model.id), revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(recipe, "id", "the tokenizer", error) from error
    if not tokenizer.chat_template:
        raise DpoError(
            f"the tokenizer of {recipe.model.id} has no chat template, so there is no telling prompt from answer",
            where=recipe.where("model", "id"),
            hint="take an instruct model, or put chat_template.jinja into its folder",
        )
    return tokenizer


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> list[int]:
    """A chat as token ids, by the tokenizer's own template and its options (`add_generation_prompt`, …)."""
    chat: Any = list(messages)  # transformers doesn't take a TypedDict for a dict
    rendered: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return list(rendered["input_ids"])


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def resolve_dtype(recipe: Recipe) -> torch.dtype:
    """Return `model.dtype`, with auto as this machine's best."""
    import torch

    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    return best_dtype()


def load_base(recipe: Recipe) -> PreTrainedModel:
    """The base model as the recipe wants it (4-bit NF4 or full precision), by transformers and bitsandbytes.

    Raises:
        DpoError: it can't be found, is no causal language model, or its precision is not what the recipe says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    where, revision = location(recipe.model.id), recipe.model.revision
    dtype = resolve_dtype(recipe)
    if recipe.model.id.startswith("builtin:"):
        torch.set_num_threads(1)  # matrices of 64 columns only lose by being shared out
    options: dict[str, Any] = {"revision": revision, "dtype": dtype}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    try:
        config = AutoConfig.from_pretrained(where, revision=revision)
        quantised = getattr(config, "quantization_config", None) is not None
        if quantised and not recipe.model.load_in_4bit:
            raise DpoError(
                f"{recipe.model.id} holds quantised weights, but model.load_in_4bit is false",
                where=recipe.where("model", "load_in_4bit"),
                hint="set model.load_in_4bit: true, or name the 16-bit repository",
            )
        if recipe.model.load_in_4bit and not quantised:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        model = AutoModelForCausalLM.from_pretrained(where, config=config, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(recipe, "id", "the model", error) from error
    if recipe.model.max_length > config.max_position_embeddings:
        raise DpoError(
            f"model.max_length {recipe.model.max_length} is more than the model's {config.max_position_embeddings}",
            where=recipe.where("model", "max_length"),
            hint=f"set model.max_length: {config.max_position_embeddings} or less",
        )
    if recipe.model.load_in_4bit:
        _check_4bit(recipe, model)
    return model


def modules_in_16bit(quantization_config: Any) -> list[str]:
    """List the modules that 4-bit weights leave in 16 bits, as their `quantization_config` names them.

    transformers keeps the config as an object, Unsloth (2026.10) and a `config.json` as a dict.
    """
    config = quantization_config or {}
    names = config.get("llm_int8_skip_modules") if isinstance(config, dict) else config.llm_int8_skip_modules
    return list(names or [])


def is_part_of(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of those named, or lies in one; `mlp` names each module of that name."""
    return any(f".{module}." in f".{name}." for module in modules)


def _check_4bit(recipe: Recipe, model: PreTrainedModel) -> None:
    """Every linear layer is in 4-bit but the head and those that the weights' own config leaves out."""
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
    from torch.nn import Linear

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    skipped = modules_in_16bit(getattr(model.config, "quantization_config", None))
    whole = [
        name
        for name, module in model.named_modules()
        if type(module) is Linear and module is not model.get_output_embeddings() and not is_part_of(name, skipped)
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
    lora = recipe.lora if folder is None else _lora_of(recipe, folder)
    model = _load_unsloth(recipe, lora) if backend.name == "unsloth" else _load_hf(recipe, lora)
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


def adapter_folder(recipe: Recipe) -> Path | None:
    """The folder of `model.adapter`, fetched from the hub where it is a hub id; None where the recipe names none."""
    if recipe.model.adapter is None:
        return None
    folder = Path(recipe.model.adapter)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(recipe.model.adapter, allow_patterns=["adapter_*"]))
        except (OSError, ValueError) as error:
            raise _cannot_load(recipe, "adapter", "the adapter", error) from error
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise DpoError(
                f"{recipe.model.adapter} is no LoRA adapter: it has no {name}",
                where=recipe.where("model", "adapter"),
                hint="name the folder that save_pretrained wrote; a merged model goes into model.id",
            )
    return folder


# Settings of PEFT that make a LoRA something else than (alpha / r) B A on all target_modules; we set none of them.
NOT_PLAIN = (
    "use_dora", "use_rslora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "exclude_modules", "fan_in_fan_out", "layer_replication", "trainable_token_indices", "target_parameters",
)  # fmt: skip


def _lora_of(recipe: Recipe, folder: Path) -> Lora:
    """The LoRA settings of an adapter to go on with; its own, whatever the recipe's `lora` says."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    special = [name for name in NOT_PLAIN if config.get(name)]
    if isinstance(config.get("target_modules"), str):
        special.append("a pattern as target_modules")
    if config.get("peft_type") != "LORA" or special:
        raise DpoError(
            f"{recipe.model.adapter} is no plain LoRA ({', '.join(special) or config.get('peft_type')})",
            where=recipe.where("model", "adapter"),
            hint="merge it into its base and name the merged folder as model.id",
        )
    return Lora(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        bias=config["bias"],
        target_modules=sorted(config["target_modules"]),
    )


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Load the weights in `folder` into the policy adapter, all of them and no others.

    Raises:
        ValueError: the names or shapes are not those of the adapter.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    weights, own = load_peft_weights(str(folder)), get_peft_model_state_dict(model, adapter_name="default")
    strange = sorted(weights.keys() ^ own.keys())
    strange += [name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape]
    if strange:
        raise ValueError(f"{len(strange)} tensors don't match, such as {strange[0]}")
    set_peft_model_state_dict(model, weights, adapter_name="default")


def _load_hf(recipe: Recipe, lora: Lora) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    base = load_base(recipe)
    set_seed(recipe.seed)  # PEFT draws LoRA's A from the global generator
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=list(lora.target_modules),
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

    where = location(recipe.model.id)
    try:
        model, _ = FastLanguageModel.from_pretrained(
            model_name=where,
            revision=recipe.model.revision,
            max_seq_length=recipe.model.max_length,
            dtype=resolve_dtype(recipe),
            load_in_4bit=recipe.model.load_in_4bit,
            use_exact_model_name=True,
            use_gradient_checkpointing="unsloth",
            random_state=recipe.seed,
            local_files_only=Path(where).is_dir(),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(recipe, "id", "the model", error) from error
    if recipe.model.load_in_4bit:
        _check_4bit(recipe, model)  # a dead bitsandbytes makes Unsloth load 16-bit with one printed line
    return FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=list(lora.target_modules),
        use_gradient_checkpointing=False if recipe.train.gradient_checkpointing is False else "unsloth",
        random_state=recipe.seed,
    )


def load_tuned(recipe: Recipe, adapter: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base with a trained adapter, in eval mode on the best device; see `as_reference` for its reference."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(recipe), str(adapter))
    started_from = adapter_folder(recipe)
    if started_from is not None:
        model.load_adapter(str(started_from), adapter_name="reference")
    if torch.cuda.is_available() and not recipe.model.load_in_4bit:
        model = model.to("cuda")
    return model.eval(), load_tokenizer(recipe)


@contextmanager
def as_reference(model: PeftModel) -> Iterator[None]:
    """The model of `load_tuned` as the reference of its training: the adapter it started from, or none."""
    if "reference" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter("reference")
    try:
        yield
    finally:
        model.set_adapter("default")


def merge_base(recipe: Recipe) -> str:
    """The 16-bit weights that a merge starts from, as an id or an absolute folder.

    Raises:
        DpoError: `model.merge_base` is not set and `model.id` names quantised weights.
    """
    from transformers import AutoConfig

    if recipe.model.merge_base:
        return recipe.model.merge_base
    config = AutoConfig.from_pretrained(location(recipe.model.id), revision=recipe.model.revision)
    if getattr(config, "quantization_config", None) is not None:
        raise DpoError(
            f"{recipe.model.id} holds 4-bit weights; merging needs the 16-bit ones",
            where=recipe.where("model", "merge_base"),
            hint="set model.merge_base to the 16-bit repository, such as Qwen/Qwen3-1.7B",
        )
    return recipe.model.id


def _cannot_load(recipe: Recipe, key: str, what: str, error: Exception) -> DpoError:
    return DpoError(
        f"can't load {what} of {getattr(recipe.model, key)}: {str(error).strip().splitlines()[0]}",
        where=recipe.where("model", key),
        hint="check the id or folder; where the Hub is out of reach set HF_ENDPOINT to a mirror",
    )
