"""Writing the adapter and the merged model: tokenizer files as the base has them, template as training had it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dpo_cli import chat
from dpo_cli.adapters import not_plain
from dpo_cli.disk import read_json, write_json
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export.base import INDEX, Stored

TEMPLATE = "chat_template.jinja"
WEIGHTS = "adapter_model.safetensors"
SHARD_BYTES = 5 * 10**9  # transformers' old default, which every loader and the Hub's viewer are used to


@dataclass(frozen=True)
class Adapter:
    """What a LoRA does to a base, by the names of the base's tensors.

    `factors`: A [r, in] and B [out, r], float32. `whole`: tensors in the place of the base's: trained biases, and the
    head where it has a LoRA, for PEFT then keeps a copy.
    """

    scale: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    whole: dict[str, torch.Tensor]

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return W + scale B A in float32, or the tensor itself where none trained.

        The scale is alpha / r (Hu et al., 2021, section 4.1), or alpha / sqrt(r) of rsLoRA (Kalajdzievski, 2023).
        """
        weight = self.whole.get(name, weight)
        if name not in self.factors:
            return weight
        down, up = self.factors[name]
        return weight.float() + (up @ down) * self.scale


def read_adapter(folder: Path, base: Path, tensors: Mapping[str, Stored]) -> Adapter:
    """Read an adapter, checked against the tensors of the base that it changes.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        base: for the error's words.
        tensors: the base's, as `base.stored` has them.

    Raises:
        DpoError: it is no plain LoRA, or one of another model.
    """
    config = read_json(folder / "adapter_config.json")
    if special := not_plain(config):
        raise DpoError(
            f"only a plain LoRA can be merged, and this adapter has {', '.join(special)}",
            where=str(folder),
            hint="train it with dpo-cli, or merge it by peft's merge_and_unload",
        )
    weights = {_in_base(key, tensors): weight for key, weight in load_file(folder / WEIGHTS).items()}
    factors, whole, strange = {}, {}, []
    for key, weight in weights.items():
        name, part, _ = key.partition(".lora_A.weight")
        if part:
            factors[f"{name}.weight"] = (weight.float(), weights[f"{name}.lora_B.weight"].float())
        elif key.endswith((".bias", ".base_layer.weight")):
            whole[key.replace(".base_layer.", ".")] = weight
        elif not key.endswith(".lora_B.weight"):
            strange.append(f"{key}, which is no part of a LoRA on linear layers")
    shapes: dict[str, tuple[int, ...]] = {name: (up.shape[0], down.shape[1]) for name, (down, up) in factors.items()}
    shapes |= {name: tuple(weight.shape) for name, weight in whole.items()}
    for name, shape in shapes.items():
        if name not in tensors:
            strange.append(f"{name}, which the base does not have")
        elif tensors[name].shape != shape:
            strange.append(f"{name} as {list(shape)}, which is {list(tensors[name].shape)} in the base")
    if strange:
        raise DpoError(
            f"the adapter is one of another model than the 16-bit base: {len(strange)} tensors don't match, "
            f"such as {strange[0]}",
            where=str(base),
            hint="set model.merge_base to the 16-bit weights of the model that was trained",
        )
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return Adapter(config["lora_alpha"] / rank, factors, whole)


def _in_base(key: str, tensors: Mapping[str, Stored]) -> str:
    """Name an adapter's tensor as the base does; vision-language models keep the text model one level deeper."""
    name = key.removeprefix("base_model.model.")
    inside = name.replace("model.", "model.language_model.", 1)
    nested = name.startswith("model.layers.") and "model.language_model.embed_tokens.weight" in tensors
    return inside if nested else name


def write_adapter(adapter: Path, base_name: str, revision: str | None, folder: Path) -> None:
    """Write the policy adapter alone, naming the 16-bit base that people will load it on.

    Args:
        adapter: `train/adapter`.
        base_name: a hub id or absolute folder; training's own may be a 4-bit repository.
        folder: to write into; made.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
    config = read_json(adapter / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": base_name, "revision": revision})


def write_merged(base: Path, adapter: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Merge into the 16-bit base, shard by shard: W + (alpha / r) B A in float32, stored as float16 or bfloat16.

    In memory are one shard to write and one tensor in float32; what no adapter changes is read when it is written. No
    model is built, so what architecture it is matters little. No GPU either: with r of 32 a weight takes 64 products,
    which a CPU does about as fast as a disk takes the result.

    Args:
        base: a folder that `base.find` found.
        adapter: `train/adapter`.
        folder: to write into; made.
        shard_bytes: of a file at most; a larger tensor has a file to itself.

    Raises:
        DpoError: the adapter does not fit the base.
    """
    tensors = base16.stored(base)
    change = read_adapter(adapter, base, tensors)
    dtype: torch.dtype = getattr(torch, base16.dtype_16bit(tensors))
    folder.mkdir(parents=True)
    config = read_json(base / "config.json")
    config.pop("_name_or_path", None)  # old ones hold where the weights came from, mostly somebody's own folder
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")  # the latter for transformers 4
    write_json(folder / "config.json", config)

    split = shards({name: tensor.shape for name, tensor in tensors.items()}, shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            weight = change.apply(name, read_tensor(tensors[name], name))
            shard[name] = weight.to(dtype) if weight.is_floating_point() else weight
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors writes for the user alone
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def shards(shapes: Mapping[str, tuple[int, ...]], most: int = SHARD_BYTES) -> StateDictSplit:
    """Split tensors of 16 bits into files of at most so many bytes, in their order; by shape, for a dry run too."""
    return split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: 2 * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )


def read_tensor(tensor: Stored, name: str) -> torch.Tensor:
    """Map a tensor: its pages are read when used, and the system may drop them again."""
    with safe_open(tensor.file, framework="pt") as opened:
        return opened.get_tensor(name)


def tokenizer_files(base: Path, adapter: Path) -> dict[str, bytes]:
    """Collect what an export has beside weights: the base's files byte for byte, and training's chat template.

    Saved anew by transformers 5 they name a tokenizer class that transformers 4, and with it many a server, can't
    read. Old readers take the template from `tokenizer_config.json`: where the base's holds another one than
    training's (Unsloth's repositories have templates of their own), it is replaced there too.
    """
    files = {name: (base / name).read_bytes() for name in base16.TOKENIZER_FILES if (base / name).is_file()}
    files[TEMPLATE] = (adapter / TEMPLATE).read_bytes()
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    wanted = {key: value for key, value in settings.items() if key != "name_or_path"}  # somebody's folder, too
    wanted |= {"chat_template": files[TEMPLATE].decode("utf-8")} if "chat_template" in settings else {}
    if settings != wanted:
        files["tokenizer_config.json"] = (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def named_ends(files: Mapping[str, bytes], base: Path) -> int | list[int] | None:
    """Find the tokens that end generation: those of `generation_config.json`, or of the base's config without it."""
    own = json.loads(files.get("generation_config.json", b"{}"))
    named: int | list[int] | None = own.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    return named


def name_turn_end(files: dict[str, bytes], base: Path, tokenizer: Any) -> None:
    """Make what the chat template writes behind an answer an end in `generation_config.json`, where it is none.

    A base model that was made for text names another end; a server that reads this alone would let it talk on.

    Args:
        files: of `tokenizer_files`, changed in place.
        tokenizer: of training.
    """
    named = named_ends(files, base)
    if chat.unnamed_end(GenerationConfig(eos_token_id=named), tokenizer):
        own = json.loads(files.get("generation_config.json", b"{}"))
        own["eos_token_id"] = chat.end_tokens(named, tokenizer)
        files["generation_config.json"] = (json.dumps(own, indent=2) + "\n").encode()


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
