"""Qwen3 as one GGUF file: written tensor by tensor, and quantised; other models through llama.cpp's own converter.

Names, types and metadata are those of that converter, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export import gguf_tokenizer, llamacpp
from dpo_cli.families import FAMILIES, family_of
from dpo_cli.recipe import GgufType

ARCHITECTURE = next(family.gguf for family in FAMILIES if family.gguf)  # the one that is written here
DIRECT: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")  # what the gguf package writes
ROWS = 8192  # of a matrix that are converted at a time: as float32 a whole embedding would take four times its file

# Keys of GGUF's metadata and of config.json that mean the same.
CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def strange(folder: Path) -> list[str]:
    """List what keeps a model from being written here; then llama.cpp's converter does it."""
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    known = {**config, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    family = family_of(config)
    found = [] if family and family.gguf else [f"model_type: {config.get('model_type')}"]
    plain = {"attention_bias": False, "use_sliding_window": False, "rope_type": "default"}
    found += [f"{key}: {known[key]}" for key, value in plain.items() if known.get(key, value) != value]
    if not found and gguf_tokenizer.pre_tokenizer(read_json(folder / "tokenizer.json")) is None:
        found.append("a tokenizer that splits words in a way of its own")
    return found


def require(folder: Path, kind: GgufType, llama_cpp: str | None = None) -> None:
    """Find out before anything big is written whether a model can become a GGUF of this kind on this machine.

    Args:
        folder: with `config.json` and `tokenizer.json`; the base's will do, for a merge changes neither.
        llama_cpp: `export.llama_cpp`.

    Raises:
        DpoError: no plain Qwen3 and no converter, nothing that could read the file back, or no quantiser for a K-quant.
    """
    odd = strange(folder)
    if odd and not llamacpp.converter(llama_cpp):
        raise DpoError(
            f"a GGUF is written of plain Qwen3 only, and this model has {', '.join(odd)}",
            where=str(folder),
            hint=f"set export.llama_cpp (or $LLAMA_CPP_DIR) to a llama.cpp with its {llamacpp.CONVERTER}",
        )
    if odd and not readable(folder) and not llamacpp.installed():
        raise DpoError(
            f"nothing here reads such a GGUF ({', '.join(odd)}) back, so it could not be checked",
            where="export.formats",
            hint="pip install llama-cpp-python, or leave gguf and ollama out",
        )
    if kind not in DIRECT:
        llamacpp.quantiser(kind, llama_cpp)


def readable(folder: Path) -> bool:
    """Whether transformers reads GGUF files of this architecture."""
    kind = str(read_json(folder / "config.json").get("model_type"))
    return bool({kind, kind.removesuffix("_text")} & set(GGUF_SUPPORTED_ARCHITECTURES))


def write_gguf(merged: Path, kind: GgufType, target: Path, llama_cpp: str | None = None) -> None:
    """Write a merged model, for which `require` has been asked, as one GGUF file with its tokenizer and chat template.

    Memory stays near one tensor, as it is stored. K-quants go through `llama-quantize` from a file of the stored
    precision, which is removed afterwards.

    Args:
        merged: folder of a merged model (safetensors, any number of shards, any float dtype).
        target: file to write; its folder exists. Its stem, less the kind, becomes the model's name.
        llama_cpp: `export.llama_cpp`.

    Raises:
        DpoError: llama.cpp's program failed.
        OSError: the disk is full, or the file can't be written.
    """
    if kind not in DIRECT:
        program = llamacpp.quantiser(kind, llama_cpp)
        whole: GgufType = "f16" if base16.dtype_16bit(base16.stored(merged)) == "float16" else "bf16"
        with TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            aside = Path(folder, f"{model_name(target, kind)}-{whole}.gguf")
            write_gguf(merged, whole, aside, llama_cpp)
            llamacpp.run([program, str(aside), str(target), kind.upper()], "quantising")
    elif strange(merged):
        script = str(llamacpp.converter(llama_cpp))
        llamacpp.run([sys.executable, script, str(merged), "--outfile", str(target), "--outtype", kind], "converting")
    else:
        _write(merged, kind, target)


def model_name(target: Path, kind: GgufType) -> str:
    return target.stem.removesuffix(f"-{kind}")


def _write(merged: Path, kind: GgufType, target: Path) -> None:
    """Go through the shards twice, for a GGUF opens with the list of its tensors: for shapes, then for numbers."""
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    _describe(writer, merged, kind, model_name(target, kind))
    for name, tensor in named_tensors(merged):
        shape, stored = tensor.get_shape(), tensor_type(kind, tensor.get_shape())
        # The dtype is not looked at, but for uint8, whose shape would be one of bytes.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _size(shape, stored), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in named_tensors(merged):
            writer.write_tensor_data(encode(tensor, tensor_type(kind, tensor.get_shape())))
    except OSError as error:
        if error.errno is None:  # numpy's tofile: "4096 requested and 512 written"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # what a full disk could not take would be flushed once more
            writer.close()


def _describe(writer: Any, merged: Path, kind: GgufType, name: str) -> None:
    """Add all metadata to a GGUFWriter."""
    config = read_json(merged / "config.json")
    rope = config.get("rope_parameters") or {}
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config["rope_theta"] = float(rope.get("rope_theta") or config["rope_theta"])
    writer.add_type("model")
    writer.add_name(name)
    for key, ours in CONFIG_KEYS.items():
        add: Any = writer.add_uint32 if isinstance(config[ours], int) else writer.add_float32
        add(f"{ARCHITECTURE}.{key}", config[ours])
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_tokenizer.add_tokenizer(writer, merged, config["vocab_size"])


def metadata(merged: Path, kind: GgufType, name: str) -> dict[str, Any]:
    """Return all metadata of a merged model's GGUF: key -> value."""
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    _describe(writer, merged, kind, name)
    return {key: one.value for key, one in writer.kv_data[0].items()}


def named_tensors(merged: Path) -> Iterator[tuple[str, Any]]:
    """Yield every tensor by GGUF's name, with a slice that reads rows when asked, always in the same order."""
    config = read_json(merged / "config.json")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURE.upper()], config["num_hidden_layers"])
    for shard in sorted(merged.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in sorted(file.keys()):
                if key == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise DpoError(
                        f"a Qwen3 has no tensor {key}", where=str(merged), hint="export anew from the 16-bit base"
                    )
                yield name, file.get_slice(key)


def tensor_type(kind: GgufType, shape: Sequence[int]) -> Any:
    """Choose as llama.cpp does: norms stay float32, and rows that blocks of 32 don't fill float16."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType["F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()]


def encode(tensor: Any, stored: Any) -> Any:
    """Return a tensor's bytes in GGUF's encoding, as a numpy array."""
    shape = tensor.get_shape()
    encoded = np.empty((shape[0], _size(shape, stored) // shape[0]), np.uint8)
    for start in range(0, shape[0], ROWS):
        part = gguf.quants.quantize(tensor[start : start + ROWS].float().numpy(), stored)
        encoded[start : start + ROWS] = part.view(np.uint8).reshape(len(part), -1)
    return encoded


def _size(shape: Sequence[int], stored: Any) -> int:
    return math.prod(gguf.quants.quant_shape_to_byte_shape(shape, stored))
