"""A GGUF file read back by readers that did not write it, and compared with the merged model that it was made of."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_cli import chat
from dpo_cli.disk import read_json
from dpo_cli.export import base as base16
from dpo_cli.export import gguf as gguf_writer
from dpo_cli.export import llamacpp, merge, outputs, parity
from dpo_cli.export.gguf import CONFIG_KEYS
from dpo_cli.export.outputs import Expected
from dpo_cli.export.parity import Check, equal, within
from dpo_cli.inference import token_logps
from dpo_cli.recipe import GgufType


class Limits(NamedTuple):
    """How far a GGUF may be from the adapter on the 16-bit base, and its weights from the merged ones.

    `kl`: most mean KL in nats per token; `top1`: least share of positions with the same likeliest token; `carried`:
    least of the adapter's change; `weights`: most ‖read - merged‖ / ‖merged‖ of any tensor (two exchanged give 1.4);
    `scale`: most |<read, merged> / <merged, merged> - 1|, which rounding hardly moves.
    """

    kl: float
    top1: float
    carried: float
    weights: float
    scale: float


# Up to bf16 they are a bfloat16 merge's. Measured on tuned toys, transformers / llama.cpp: KL q8_0 1e-5 / 2e-5, q6_k
# 7e-5 / 9e-5, q4_k_m 4e-4 / 5e-4, q2_k 3e-3; top-1 from 0.98 / 0.98, 0.98 / 0.98, 0.93 / 0.94, 0.85; carried from 0.99,
# q2_k from 0.66. Real models are known to lose far more to K-quants, so those of behaviour are wide starting limits,
# to be set anew on a real Qwen3. Those of weights are near the worst that the types' blocks can do (q8_0: 0.013, where
# one of 32 weights is all of a block's size); random weights with outliers lose 0.008 in q8_0, 0.025 in q6_k, 0.045 in
# q5_k, 0.09 in q4_k, 0.18 in q3_k_m, 0.34 in q2_k. Scale, on weights of nine kinds: f32 0, f16 of bfloat16 up to 3e-5,
# bf16 of float16 1e-4, q8_0 1e-4 (6e-4 where weights are near float16's smallest); K-quants lose the error's square.
LIMITS: dict[GgufType, Limits] = {
    "f32": Limits(5e-3, 0.95, 0.75, 1e-3, 2e-4),
    "f16": Limits(5e-3, 0.95, 0.75, 1e-3, 2e-4),
    "bf16": Limits(5e-3, 0.95, 0.75, 3e-3, 5e-4),
    "q8_0": Limits(1e-2, 0.93, 0.75, 0.02, 2e-3),
    "q6_k": Limits(3e-2, 0.90, 0.5, 0.05, 5e-3),
    "q5_k_m": Limits(6e-2, 0.85, 0.5, 0.1, 1e-2),
    "q5_k_s": Limits(6e-2, 0.85, 0.5, 0.1, 1e-2),
    "q4_k_m": Limits(0.15, 0.80, 0.5, 0.2, 0.04),
    "q4_k_s": Limits(0.15, 0.80, 0.5, 0.2, 0.04),
    "q3_k_m": Limits(0.5, 0.65, 0.25, 0.35, 0.12),
    "q2_k": Limits(1.5, 0.40, 0.25, 0.6, 0.36),
}
READERS = ("GGUF.", "quantize.imatrix.")  # of the reader, and of llama-quantize with an importance matrix
DROWNED = 0.05  # of a kind's KL limit: what an adapter of less effect carries is reported, but may be all noise


def check_gguf(path: Path, kind: GgufType, merged: Path, expected: Expected) -> list[Check]:
    """Read a GGUF back by transformers and, where llama-cpp-python is installed, by llama.cpp, and compare.

    Args:
        path: the GGUF file.
        kind: what it was to be; what it says of itself is a check.
        merged: the folder that it was made of.
        expected: the adapter on the 16-bit base, and that base alone.
    """
    try:
        fields, tensors = read_gguf(path)
    except Exception as error:  # a broken file breaks the reader anywhere
        return [equal("gguf.readable", f"{type(error).__name__}: {error}", "a whole GGUF")]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    checks = _check_vocabulary(fields, tokenizer)
    own = not gguf_writer.strange(merged)  # else llama.cpp's converter wrote it, whose metadata are its own affair
    if own:
        checks += [_check_metadata(path, fields, kind, merged), _check_tensors(tensors, kind, merged)]
    if own or gguf_writer.readable(merged):
        model = _reload(path, merged, _config(fields, tied="output.weight" not in tensors) if own else None)
        checks += _check_weights(model, kind, merged)
        checks += _check_logps("gguf", kind, token_logps(model, expected.probes.rows, outputs.LAST), expected)
        del model  # llama.cpp loads one of its own
    if llamacpp.installed():
        checks += _check_llama_cpp(path, kind, tokenizer, expected)
    return checks


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Map a GGUF: its metadata by key, and its tensors by name; reads no numbers, but misses none."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _check_metadata(path: Path, fields: dict[str, Any], kind: GgufType, merged: Path) -> Check:
    """Everything that is to be there with its value, and nothing else."""
    wanted = gguf_writer.metadata(merged, kind, gguf_writer.model_name(path, kind))
    there = {key: value for key, value in fields.items() if not key.startswith(READERS)}
    differ = {key for key in there.keys() | wanted.keys() if not _same(there.get(key), wanted.get(key))}
    return equal("gguf.metadata_differs", sorted(differ), [])


def _same(one: Any, other: Any) -> bool:
    """Equal, with true no 1; numbers to within float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return isinstance(one, bool) is isinstance(other, bool) and bool(one == other)


def _check_vocabulary(fields: dict[str, Any], tokenizer: Any) -> list[Check]:
    """Tokens and ends are those of the tokenizer as transformers loads it."""
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
    ends = fields.get("tokenizer.ggml.eos_token_id")
    return [
        equal("gguf.tokens_differ", len(wrong), 0),
        equal("gguf.end_token", ends, tokenizer.eos_token_id),
        equal("gguf.end_of_turn", fields.get("tokenizer.ggml.eot_token_id", ends), chat.turn_end(tokenizer) or ends),
    ]


def _check_tensors(there: dict[str, Any], kind: GgufType, merged: Path) -> Check:
    """All tensors and no others, to the bit where llama.cpp wrote none: norms tell little of one row of a matrix."""
    rest, wrong = dict(there), []
    for name, tensor in gguf_writer.named_tensors(merged):
        read = rest.pop(name, None)
        if read is None or (kind in gguf_writer.DIRECT and not _encoded_alike(read, tensor, kind)):
            wrong.append(name)
    return equal("gguf.tensors", sorted([*wrong, *rest])[:5], [])


def _encoded_alike(read: Any, tensor: Any, kind: GgufType) -> bool:
    shape = tensor.get_shape()
    stored = gguf_writer.tensor_type(kind, shape)
    if read.tensor_type != stored or read.shape.tolist() != shape[::-1]:
        return False
    return np.array_equal(read.data.view(np.uint8).ravel(), gguf_writer.encode(tensor, stored).ravel())


def _check_weights(model: PreTrainedModel, kind: GgufType, merged: Path) -> list[Check]:
    """Every tensor, as another reader than the writer's decodes it, near the merged one."""
    wanted = base16.stored(merged)
    if read_json(merged / "config.json").get("tie_word_embeddings"):
        wanted.pop("lm_head.weight", None)
    read, apart, scales = model.state_dict(), [], []
    for name, tensor in wanted.items():
        there, weight = read[name].float().cpu(), merge.read_tensor(tensor, name).float()
        square = weight.square().sum().clamp(min=1e-30)
        apart.append((there - weight).square().sum().div(square).sqrt())
        scales.append((there * weight).sum().div(square).sub(1).abs())
    return [
        within("gguf.weight_error", float(torch.stack(apart).max()), most=LIMITS[kind].weights),
        within("gguf.weight_scale", float(torch.stack(scales).max()), most=LIMITS[kind].scale),
    ]


def _check_logps(name: str, kind: GgufType, read: Sequence[torch.Tensor], expected: Expected) -> list[Check]:
    """Near the tuned model within the kind's limits, and with the adapter's change in it where that can be measured."""
    most, least, part = LIMITS[kind][:3]
    tuned, base = expected.tuned.logps, expected.base
    drowned = parity.mean_kl(tuned, base) < DROWNED * most
    return [
        *parity.check_gap(name, tuned, read, most, least),
        within(f"{name}.carried", parity.carried(read, tuned, base), least=None if drowned else part),
    ]


def _config(fields: dict[str, Any], tied: bool) -> Any:
    """The shape of a model by its GGUF's own metadata.

    transformers could read those, but it overlooks the head size, and reading the vocabulary takes it a minute.
    """
    known = {ours: fields[f"{gguf_writer.ARCHITECTURE}.{key}"] for key, ours in CONFIG_KEYS.items()}
    return AutoConfig.for_model(
        gguf_writer.ARCHITECTURE,
        **known,
        rope_parameters={"rope_type": "default", "rope_theta": known["rope_theta"]},
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_word_embeddings=tied,
    )


def _reload(path: Path, merged: Path, config: Any) -> PreTrainedModel:
    """The model as transformers reads it; shaped by the merged one's config without one of its own."""
    where, config = outputs.placement(base16.stored(merged)), config or AutoConfig.from_pretrained(merged)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=where.dtype
        )
    return model.to(where.device).eval()


def _check_llama_cpp(path: Path, kind: GgufType, tokenizer: Any, expected: Expected) -> list[Check]:
    """The same by the runtime that will serve the file, and the fixtures' tokens."""
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in outputs.fixtures(tokenizer)
    ]
    try:
        ids, logits = llamacpp.read(path, texts, expected.probes.rows, outputs.LAST)
    except ValueError as error:
        return [equal("gguf.llama_cpp.loads", str(error), "a model")]
    differ = sum(
        theirs != tokenizer(text, add_special_tokens=False)["input_ids"]
        for text, theirs in zip(texts, ids, strict=True)
    )
    read = [torch.from_numpy(one).log_softmax(-1) for one in logits]
    return [
        equal("gguf.llama_cpp.tokens_differ", differ, 0),
        *_check_logps("gguf.llama_cpp", kind, read, expected),
    ]
