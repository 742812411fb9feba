"""A GGUF with one thing wrong, everything else right: each is caught by the checks that read it back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli.export import gguf, gguf_parity
from tests.export.made import Exported, checks, copy, edit, rewrite

# ------------------------------------------------------------------------------------------------- a file gone wrong


def test_a_truncated_file(made: Exported, path: Path) -> None:
    gguf.write_gguf(made.merged, "q8_0", path)
    size = path.stat().st_size
    for kept in (size - 1000, size // 2, 100, 0):
        os.truncate(path, kept)
        assert checks(made, path, "q8_0").keys() == {"gguf.readable"}


def test_two_layers_exchanged(exported: Exported, path: Path) -> None:
    from gguf import GGUFReader

    gguf.write_gguf(exported.merged, "f16", path)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path, "r+").tensors}
    one, other = tensors["blk.0.ffn_down.weight"], tensors["blk.1.ffn_down.weight"]
    kept = one.copy()
    one[:], other[:] = other, kept
    assert {"gguf.mean_kl", "gguf.weight_error", "gguf.tensors"} <= checks(exported, path, "f16").keys()


def test_a_tensor_that_the_reader_makes_up(untied: Exported, tmp_path: Path, path: Path) -> None:
    """transformers takes ones for a norm that is not there, which is what an untrained one has."""
    without = copy(untied.merged, tmp_path / "copy")
    rewrite(without, lambda weights: weights.pop("model.layers.1.self_attn.q_norm.weight"))
    gguf.write_gguf(without, "q8_0", path)
    assert checks(untied, path, "q8_0") == {"gguf.tensors": ["blk.1.attn_q_norm.weight"]}


def test_coarser_weights_than_were_asked_for(untied: Exported, path: Path) -> None:
    gguf.write_gguf(untied.merged, "q8_0", path)
    assert {"gguf.metadata_differs", "gguf.tensors", "gguf.weight_error"} <= checks(untied, path, "f16").keys()


def test_a_vocabulary_with_two_tokens_exchanged(made: Exported, spoilt: Path, path: Path) -> None:
    model = json.loads((spoilt / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    model["vocab"] |= {"a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    edit(spoilt / "tokenizer.json", model=model)
    gguf.write_gguf(spoilt, "f16", path)
    assert checks(made, path, "f16")["gguf.tokens_differ"] == 2


# ------------------------------------------------------------------------------------------------ a writer gone wrong


def put(key: str, value: Any) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        kinds: dict[type, str] = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        writer.kv_data[0].pop(key, None)
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)

    return change


def retype(token: str, kind: int) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        known = writer.kv_data[0]
        known["tokenizer.ggml.token_type"].value[known["tokenizer.ggml.tokens"].value.index(token)] = kind

    return change


def exchange_merges(writer: Any) -> None:
    merges = writer.kv_data[0]["tokenizer.ggml.merges"].value
    merges[5], merges[50] = merges[50], merges[5]


def pop_padding(writer: Any) -> None:
    writer.kv_data[0].pop("tokenizer.ggml.padding_token_id")


WRONG = {
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.bos_token_id": 5,
    "tokenizer.ggml.eos_token_id": 5,
    "tokenizer.ggml.padding_token_id": 5,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.chat_template": "{{ messages }}",
    "general.architecture": "qwen2",
    "general.file_type": 2,
    "qwen3.attention.sliding_window": 128,
    "qwen3.rope.scaling.factor": 4.0,
    "qwen3.rope.scaling.type": "yarn",
    "qwen3.rope.dimension_count": 8,
    "qwen3.rope.freq_base": 5e5,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-5,
    "qwen3.context_length": 64,
}
# Each key for itself, but several in one file.
BROKEN: list[dict[str, Callable[[Any], None]]] = [
    {key: put(key, value) for key, value in WRONG.items()}
    | {"tokenizer.ggml.token_type": retype("<think>", 3), "tokenizer.ggml.merges": exchange_merges},
    {"tokenizer.ggml.token_type": retype("a", 6), "tokenizer.ggml.padding_token_id": pop_padding},
]


@pytest.mark.parametrize("changes", BROKEN, ids=["other values", "another type and a missing key"])
def test_metadata(
    made: Exported, path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Callable[[Any], None]]
) -> None:
    describe = gguf._describe

    def describe_wrongly(writer: Any, *arguments: Any) -> None:
        describe(writer, *arguments)
        for change in changes.values():
            change(writer)

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_describe", describe_wrongly)
        gguf.write_gguf(made.merged, "f16", path)
    fields, _ = gguf_parity.read_gguf(path)
    assert gguf_parity._check_metadata(path, fields, "f16", made.merged)["value"] == sorted(changes)


class Changed:
    """A slice of a safetensors file with other numbers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.tensor[rows]


def scale_one_row(weight: torch.Tensor) -> torch.Tensor:
    weight[3] *= 1.1
    return weight


Case = tuple[str, list[int], Callable[[torch.Tensor], torch.Tensor]]
ONLY_ITS_SCALE: Case = ("q8_0", [96, 96], lambda weight: weight * 1.015)  # shows it: rounding may do as much
CASES: list[Case] = [
    ("f32", [96, 96], torch.t),
    ("q8_0", [96, 96], torch.t),
    ("f32", [2048, 96], lambda weight: weight * 1.001),
    ("f16", [2048, 96], lambda weight: weight * 1.001),
    ("bf16", [2048, 96], lambda weight: weight * 1.01),
    ONLY_ITS_SCALE,
    ("q8_0", [2048, 96], scale_one_row),
    ("f16", [96, 96], torch.neg),
]


@pytest.mark.parametrize(
    ("where", "kind", "shape", "change"),
    [
        *(("file", *case) for case in CASES),
        *(
            pytest.param("writer", *case, marks=() if case is ONLY_ITS_SCALE else pytest.mark.slow)
            for case in CASES
            if case[2] is not scale_one_row  # which the check of the file uses too
        ),
    ],
)
def test_one_tensor(
    made: Exported, path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, shape: list[int], change: Any, where: str
) -> None:
    encode, done = gguf.encode, list[int]()

    def encode_wrongly(tensor: Any, stored: Any) -> Any:
        if tensor.get_shape() == shape and (not done or where == "writer"):
            done.append(1)
            tensor = Changed(change(tensor[:].float()).contiguous())
        return encode(tensor, stored)

    monkeypatch.setattr(gguf, "encode", encode_wrongly)
    gguf.write_gguf(made.merged, kind, path)
    if where == "file":
        monkeypatch.undo()
        _, tensors = gguf_parity.read_gguf(path)
        assert not gguf_parity._check_tensors(tensors, kind, made.merged)["ok"]
    else:
        assert {"gguf.weight_scale", "gguf.weight_error"} & checks(made, path, kind).keys()
    assert done
