"""Qwen3 as one GGUF file: written tensor by tensor, quantised, and read back by readers that did not write it.

Names, types and metadata are those of llama.cpp's own convert_hf_to_gguf.py; whatever is not known to be safe here
(another architecture, another tokenizer) is left to that script, with the command to run.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export import gguf_tokenizer, llamacpp, probe, verify
from dpo_cli.export.base import read_json
from dpo_cli.export.verify import Check
from dpo_cli.recipe import GgufType

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DIRECT: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")  # what the gguf package writes by itself
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

# (most mean KL in nats per token, least top-1 agreement, least of the adapter's change that is carried), against the
# adapter on the 16-bit base. Up to bf16 they are a bfloat16 merge's. Measured on tuned toys, transformers / llama.cpp:
# KL q8_0 1e-5 / 2e-5, q6_k 7e-5 / 9e-5, q4_k_m 4e-4 / 5e-4, q2_k 3e-3; top-1 from 0.98 / 0.98, 0.98 / 0.98,
# 0.93 / 0.94, 0.85; carried from 0.99, q2_k from 0.66. Real models are known to lose far more to K-quants, so those
# are wide starting limits, to be set anew on a real Qwen3.
LIMITS: dict[GgufType, tuple[float, float, float]] = {
    "f32": (5e-3, 0.95, 0.75),
    "f16": (5e-3, 0.95, 0.75),
    "bf16": (5e-3, 0.95, 0.75),
    "q8_0": (1e-2, 0.93, 0.75),
    "q6_k": (3e-2, 0.90, 0.5),
    "q5_k_m": (6e-2, 0.85, 0.5),
    "q5_k_s": (6e-2, 0.85, 0.5),
    "q4_k_m": (0.15, 0.80, 0.5),
    "q4_k_s": (0.15, 0.80, 0.5),
    "q3_k_m": (0.5, 0.65, 0.25),
    "q2_k": (1.5, 0.40, 0.25),
}
DROWNED = 0.05  # of a kind's KL limit: what an adapter of less effect carries is reported, but may be all noise


# ------------------------------------------------------------------------------------------------------- writing


def require(folder: Path, kind: GgufType) -> None:
    """Find out before anything big is written whether a model can become a GGUF of this kind on this machine.

    Args:
        folder: with `config.json` and `tokenizer.json`; the base's will do, for a merge changes neither.

    Raises:
        DpoError: no `gguf` package, not a plain Qwen3, an unknown tokenizer, or no quantiser for a K-quant.
    """
    if not find_spec("gguf"):
        raise DpoError("a GGUF needs the gguf package", where="export.gguf", hint="pip install 'dpo-cli[gguf]'")
    config = read_json(folder / "config.json")
    tokenizer = read_json(folder / "tokenizer.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    known = {**config, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    plain = {"model_type": "qwen3", "attention_bias": False, "use_sliding_window": False, "rope_type": "default"}
    strange = [f"{key}: {known[key]}" for key, value in plain.items() if known.get(key, value) != value]
    if gguf_tokenizer.pre_tokenizer(tokenizer) is None:
        strange.append("a tokenizer that splits words in a way of its own")
    if strange:
        raise DpoError(
            f"a GGUF is written of plain Qwen3 only, and this model has {', '.join(strange)}",
            where=str(folder),
            hint="export merged, then: python llama.cpp/convert_hf_to_gguf.py export/merged --outtype "
            f"{kind if kind in DIRECT else 'bf16'} --outfile model.gguf",
        )
    if kind not in DIRECT:
        llamacpp.quantiser(kind)


def write_gguf(merged: Path, kind: GgufType, target: Path) -> None:
    """Write a merged model as one GGUF file with its tokenizer and chat template.

    Memory stays near one tensor, as it is stored. K-quants go through llama.cpp (`llama-quantize` in $LLAMA_CPP_DIR
    or on PATH, else llama-cpp-python) from a file of the stored precision, which is removed afterwards.

    Args:
        merged: folder of a merged Qwen3 (safetensors, any number of shards, any float dtype).
        target: file to write; its folder exists. Its stem, less the kind, becomes the model's name.

    Raises:
        DpoError: as `require` has it, or the quantiser failed.
        OSError: the disk is full, or the file can't be written.
    """
    require(merged, kind)
    name = target.stem.removesuffix(f"-{kind}")
    if kind in DIRECT:
        _write(merged, kind, target, name)
        return
    quantise = llamacpp.quantiser(kind)
    aside = target.with_name(f".{target.stem}-16bit.gguf")
    try:
        _write(merged, _stored_kind(merged), aside, name)
        quantise(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _write(merged: Path, kind: GgufType, target: Path, name: str) -> None:
    """A GGUF opens with the list of its tensors, so the shards are gone through twice: for shapes, then for numbers."""
    import gguf
    import numpy as np

    config = read_json(merged / "config.json")
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_type("model")
    writer.add_name(name)
    for key, value in _metadata(config).items():
        add: Any = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"qwen3.{key}", value)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_tokenizer.add_tokenizer(writer, merged, config["vocab_size"])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for key, tensor in _tensors(merged, config):
        ggml_name = names.get_name(key, try_suffixes=(".weight",))
        if ggml_name is None:
            raise DpoError(f"a Qwen3 has no tensor {key}", where=str(merged), hint="export anew from the 16-bit base")
        shape = tensor.get_shape()
        stored = _tensor_type(kind, shape)
        # The dtype is not looked at, but for uint8, whose shape would be one of bytes.
        writer.add_tensor_info(ggml_name, shape, np.dtype(np.float32), _size(shape, stored), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(merged, config):
            writer.write_tensor_data(_encode(tensor, _tensor_type(kind, tensor.get_shape())))
    except OSError as error:
        if error.errno is None:  # numpy's tofile: "4096 requested and 512 written"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # what a full disk could not take would be flushed once more
            writer.close()


def _metadata(config: dict[str, Any]) -> dict[str, int | float]:
    """config.json in GGUF's words."""
    rope = config.get("rope_parameters") or {}
    known = {
        **config,
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "rope_theta": float(rope.get("rope_theta") or config["rope_theta"]),
    }
    return {key: known[ours] for key, ours in CONFIG_KEYS.items()}


def _tensors(merged: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every tensor of every shard as (name, slice that reads rows when asked), always in the same order."""
    from safetensors import safe_open

    for shard in sorted(merged.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in sorted(file.keys()):
                if not (key == "lm_head.weight" and config.get("tie_word_embeddings")):
                    yield key, file.get_slice(key)


def _tensor_type(kind: GgufType, shape: Sequence[int]) -> Any:
    """Norms stay float32, and rows that blocks of 32 don't fill float16, as in llama.cpp."""
    import gguf

    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType["F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()]


def _encode(tensor: Any, stored: Any) -> Any:
    """A tensor's bytes in GGUF's encoding, as a numpy array."""
    import gguf
    import numpy as np

    shape = tensor.get_shape()
    encoded = np.empty((shape[0], _size(shape, stored) // shape[0]), np.uint8)
    for start in range(0, shape[0], ROWS):
        part = gguf.quants.quantize(tensor[start : start + ROWS].float().numpy(), stored)
        encoded[start : start + ROWS] = part.view(np.uint8).reshape(len(part), -1)
    return encoded


def _size(shape: Sequence[int], stored: Any) -> int:
    """Bytes of a tensor in GGUF's encoding."""
    import gguf

    return math.prod(gguf.quants.quant_shape_to_byte_shape(shape, stored))


def _stored_kind(merged: Path) -> GgufType:
    """The kind that keeps every bit of a merged model, which is stored in 16 bits."""
    return "f16" if base16.dtype_16bit(base16.stored(merged)) == "float16" else "bf16"


def _file_type(kind: GgufType) -> Any:
    import gguf

    return gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]


# ------------------------------------------------------------------------------------------------------ checking


def check_gguf(
    path: Path,
    merged: Path,
    rows: Sequence[list[int]],
    tuned: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    last: int,
) -> list[Check]:
    """Read a GGUF back by transformers and, where llama-cpp-python is installed, by llama.cpp, and compare.

    Args:
        path: the GGUF file.
        merged: the folder that it was made of, for config, tokenizer and template.
        rows: token ids of held-out chats.
        tuned, base: `verify.token_logps` of the adapter on the 16-bit base, and of that base alone, at the `last`
            positions of each row.
    """
    import gguf
    from transformers import AutoTokenizer

    try:
        fields = metadata(path)
    except Exception as error:  # a broken file breaks the reader anywhere
        said = f"{type(error).__name__}: {error}"
        return [{"name": "gguf.readable", "value": said, "limit": "a whole GGUF", "ok": False}]
    kind = gguf.LlamaFileType(fields["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    checks = _check_metadata(fields, read_json(merged / "config.json"), tokenizer)
    read = verify.token_logps(_reload(path, fields, probe.place(base16.stored(merged))), rows, last)
    checks += _check_numbers("gguf", kind, read, tuned, base)
    if llamacpp.installed():
        checks += _check_llama_cpp(path, kind, tokenizer, rows, tuned, base, last)
    return checks


def metadata(path: Path) -> dict[str, Any]:
    """What a GGUF says of itself by key, and under "tensors" their names; reads no numbers, but misses none."""
    import gguf

    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    return {"tensors": names} | {key: field.contents() for key, field in reader.fields.items()}


def _check_metadata(fields: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> list[Check]:
    """Shape of the model, vocabulary and template, against config.json and the tokenizer as transformers loads it."""
    import gguf

    wanted = _metadata(config)
    differ = [key for key, value in wanted.items() if abs(fields.get(f"qwen3.{key}", -1) - value) > 1e-6 * abs(value)]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = tokenizer.added_tokens_decoder
    types = fields["tokenizer.ggml.token_type"]
    plain, whole = (gguf.TokenType.NORMAL,), (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    wrong = [
        number
        for number, (ours, theirs) in enumerate(zip(tokens, fields["tokenizer.ggml.tokens"], strict=False))
        if ours != theirs
        or types[number] not in (whole if number in added else plain)
        or (number in added and added[number].special and types[number] != gguf.TokenType.CONTROL)
    ]
    merges = [" ".join(merge) for merge in state["model"]["merges"]] != fields["tokenizer.ggml.merges"]
    sizes = [len(fields["tokenizer.ggml.tokens"]), len(types)]
    same_template = fields.get("tokenizer.chat_template") == tokenizer.chat_template
    ends = fields.get("tokenizer.ggml.eos_token_id")
    pre = gguf_tokenizer.pre_tokenizer(state)
    return [
        {"name": "gguf.config_differs", "value": differ, "limit": [], "ok": not differ},
        {"name": "gguf.tokens_differ", "value": len(wrong), "limit": 0, "ok": not wrong},
        {"name": "gguf.merges_differ", "value": merges, "limit": False, "ok": not merges},
        _equal("gguf.vocabulary_sizes", sizes, [config["vocab_size"]] * 2),
        _equal("gguf.pre_tokenizer", fields.get("tokenizer.ggml.pre"), pre),
        _equal("gguf.end_token", ends, tokenizer.eos_token_id),
        _equal("gguf.template_equal", same_template, True),
    ]


def _check_numbers(
    name: str, kind: Any, read: Sequence[torch.Tensor], tuned: Sequence[torch.Tensor], base: Sequence[torch.Tensor]
) -> list[Check]:
    """Near the tuned model within the kind's limits, and with the adapter's change in it where that can be told."""
    most, least, part = LIMITS[kind]
    kl, top1, share = verify.mean_kl(tuned, read), verify.top1_agreement(tuned, read), verify.carried(read, tuned, base)
    limit = part if verify.mean_kl(tuned, base) >= DROWNED * most else None
    return [
        {"name": f"{name}.mean_kl", "value": _finite(kl), "limit": most, "ok": kl <= most},
        {"name": f"{name}.top1_agreement", "value": top1, "limit": least, "ok": top1 >= least},
        {
            "name": f"{name}.carried",
            "value": _finite(share),
            "limit": limit,
            "ok": limit is None or share >= limit,
        },
    ]


def _reload(path: Path, fields: dict[str, Any], where: probe.Place) -> PreTrainedModel:
    """The model as transformers reads it, shaped by the file's own metadata.

    transformers could read those too, but it overlooks the head size, and reading the vocabulary takes it a minute.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {ours: fields[f"qwen3.{key}"] for key, ours in CONFIG_KEYS.items()}
    config = AutoConfig.for_model(
        "qwen3",
        **known,
        rope_parameters={"rope_type": "default", "rope_theta": known["rope_theta"]},
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_word_embeddings="output.weight" not in fields["tensors"],
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=where.dtype
        )
    return model.to(where.device).eval()


def _check_llama_cpp(
    path: Path,
    kind: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    tuned: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    last: int,
) -> list[Check]:
    """The same by the runtime that will serve the file, and the fixtures' tokens."""
    import torch

    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in verify.FIXTURES
    ]
    try:
        ids, logits = llamacpp.read(path, texts, rows, last)
    except RuntimeError as error:
        return [{"name": "gguf.llama_cpp.loads", "value": str(error), "limit": "a model", "ok": False}]
    differ = sum(
        theirs != tokenizer(text, add_special_tokens=False)["input_ids"]
        for text, theirs in zip(texts, ids, strict=True)
    )
    read = [torch.from_numpy(one).log_softmax(-1) for one in logits]
    return [
        {"name": "gguf.llama_cpp.tokens_differ", "value": differ, "limit": 0, "ok": differ == 0},
        *_check_numbers("gguf.llama_cpp", kind, read, tuned, base),
    ]


def _equal(name: str, value: Any, wanted: Any) -> Check:
    return {"name": name, "value": value, "limit": wanted, "ok": value == wanted}


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
