"""One thing wrong in what an export writes, everything else right: each is caught by the checks that read it back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import smoke
from dpo_cli.export import gguf, gguf_parity, merge, outputs, parity
from dpo_cli.export.outputs import Placement
from dpo_cli.export.parity import Check
from dpo_cli.inference import token_logps
from transformers import AutoTokenizer

CPU = Placement("cpu", torch.float32)
TINY = smoke.resolve("builtin:tiny-qwen3")
TEXT = "Name two uses of baking soda. 用三句话介绍如何给多肉浇水。"


def failed(checks: list[Check]) -> list[str]:
    return [check["name"] for check in checks if not check["ok"]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(outputs.load(TINY, CPU), lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(folder))
    shutil.copyfile(TINY / merge.TEMPLATE, folder / merge.TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_merged(adapter, tmp_path_factory.mktemp("out") / "merged")


def write_merged(adapter: Path, folder: Path, base: Path = TINY) -> Path:
    merge.write_merged(base, adapter, folder)
    merge.write_files(merge.tokenizer_files(base, adapter), folder)
    return folder


# --------------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def says(merged: Path) -> tuple[list[list[int]], list[torch.Tensor], list[torch.Tensor]]:
    rows = [AutoTokenizer.from_pretrained(TINY)(TEXT)["input_ids"]]
    tuned, base = (token_logps(outputs.load(one, CPU), rows, 16) for one in (merged, TINY))
    return rows, tuned, base


CheckGguf = Callable[..., list[str]]


@pytest.fixture
def check_gguf(merged: Path, says: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckGguf:
    """Write a GGUF, then undo what was patched, and name the checks that it fails."""

    def check(kind: Any, undo: bool = True) -> list[str]:
        path = tmp_path / f"mine-{kind}.gguf"
        gguf.write_gguf(merged, kind, path)
        if undo:
            monkeypatch.undo()
        rows, tuned, base = says
        return failed(gguf_parity.check_gguf(path, kind, merged, rows, tuned, base, 16))

    return check


def put(key: str, value: Any) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        kinds: dict[type, str] = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        writer.kv_data[0].pop(key, None)
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)

    return change


def leave_out(key: str) -> Callable[[Any], None]:
    return lambda writer: writer.kv_data[0].pop(key)


def retype(token: str, kind: int) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        known = writer.kv_data[0]
        known["tokenizer.ggml.token_type"].value[known["tokenizer.ggml.tokens"].value.index(token)] = kind

    return change


def exchange_merges(writer: Any) -> None:
    merges = writer.kv_data[0]["tokenizer.ggml.merges"].value
    merges[5], merges[50] = merges[50], merges[5]


METADATA = [
    ("tokenizer.ggml.add_bos_token", put("tokenizer.ggml.add_bos_token", True)),
    ("tokenizer.ggml.add_eos_token", put("tokenizer.ggml.add_eos_token", True)),
    ("tokenizer.ggml.add_space_prefix", put("tokenizer.ggml.add_space_prefix", False)),
    ("tokenizer.ggml.bos_token_id", put("tokenizer.ggml.bos_token_id", 5)),
    ("tokenizer.ggml.eos_token_id", put("tokenizer.ggml.eos_token_id", 5)),
    ("tokenizer.ggml.padding_token_id", put("tokenizer.ggml.padding_token_id", 5)),
    ("tokenizer.ggml.padding_token_id", leave_out("tokenizer.ggml.padding_token_id")),
    ("tokenizer.ggml.eot_token_id", put("tokenizer.ggml.eot_token_id", 5)),
    ("tokenizer.ggml.token_type", retype("<think>", 3)),
    ("tokenizer.ggml.token_type", retype("a", 6)),
    ("tokenizer.ggml.merges", exchange_merges),
    ("tokenizer.ggml.model", put("tokenizer.ggml.model", "llama")),
    ("tokenizer.ggml.pre", put("tokenizer.ggml.pre", "gpt-2")),
    ("tokenizer.chat_template", put("tokenizer.chat_template", "{{ messages }}")),
    ("general.architecture", put("general.architecture", "qwen2")),
    ("general.file_type", put("general.file_type", 2)),
    ("qwen3.attention.sliding_window", put("qwen3.attention.sliding_window", 128)),
    ("qwen3.rope.scaling.factor", put("qwen3.rope.scaling.factor", 4.0)),
    ("qwen3.rope.scaling.type", put("qwen3.rope.scaling.type", "yarn")),
    ("qwen3.rope.dimension_count", put("qwen3.rope.dimension_count", 8)),
    ("qwen3.rope.freq_base", put("qwen3.rope.freq_base", 5e5)),
    ("qwen3.attention.layer_norm_rms_epsilon", put("qwen3.attention.layer_norm_rms_epsilon", 1e-5)),
    ("qwen3.context_length", put("qwen3.context_length", 64)),
]
# What is compared as another key is, in the same way.
SIBLINGS = {
    "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.model", "general.file_type", "qwen3.rope.scaling.factor",
    "qwen3.rope.scaling.type", "qwen3.rope.dimension_count", "qwen3.attention.layer_norm_rms_epsilon",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "change"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] in SIBLINGS else []) for one in METADATA],
)
def test_metadata(check_gguf: CheckGguf, monkeypatch: pytest.MonkeyPatch, key: str, change: Any) -> None:
    describe = gguf._describe

    def describe_wrongly(writer: Any, *arguments: Any) -> None:
        describe(writer, *arguments)
        change(writer)

    monkeypatch.setattr(gguf, "_describe", describe_wrongly)
    assert "gguf.metadata_differs" in check_gguf("f16"), key


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


CASES: list[tuple[str, list[int], Callable[[torch.Tensor], torch.Tensor]]] = [
    ("f32", [96, 96], torch.t),
    ("q8_0", [96, 96], torch.t),
    ("f32", [2048, 96], lambda weight: weight * 1.001),
    ("f16", [2048, 96], lambda weight: weight * 1.001),
    ("bf16", [2048, 96], lambda weight: weight * 1.01),
    ("q8_0", [96, 96], lambda weight: weight * 1.015),
    ("q8_0", [2048, 96], scale_one_row),
    ("f16", [96, 96], torch.neg),
]


@pytest.mark.parametrize(
    ("where", "kind", "shape", "change"),
    [
        *(("file", *case) for case in CASES),
        *(
            pytest.param("writer", *case, marks=pytest.mark.slow)
            for case in CASES
            if case[2] is not scale_one_row  # which the check of the file uses too
        ),
    ],
)
def test_one_tensor(
    check_gguf: CheckGguf, monkeypatch: pytest.MonkeyPatch, kind: str, shape: list[int], change: Any, where: str
) -> None:
    encode, done = gguf.encode, list[int]()

    def encode_wrongly(tensor: Any, stored: Any) -> Any:
        if tensor.get_shape() == shape and (not done or where == "writer"):
            done.append(1)
            tensor = Changed(change(tensor[:].float()).contiguous())
        return encode(tensor, stored)

    monkeypatch.setattr(gguf, "encode", encode_wrongly)
    if where == "file":
        assert "gguf.weights" in check_gguf(kind) and done
    else:
        assert {"gguf.weight_scale", "gguf.weight_error"} & set(check_gguf(kind, undo=False)) and done


# ------------------------------------------------------------------------------------------------------------- merged


def test_a_sum_in_bfloat16(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: merge.Adapter, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in self.factors:
            return weight
        down, up = (one.bfloat16() for one in self.factors[name])
        return weight.bfloat16() + (up @ down) * self.scale

    assert failed(parity.check_weights(write_merged(adapter, tmp_path / "right"), TINY, adapter)) == []
    monkeypatch.setattr(merge.Adapter, "apply", apply)
    wrong = failed(parity.check_weights(write_merged(adapter, tmp_path / "merged"), TINY, adapter))
    assert wrong == ["merged.rounded_otherwise"]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def exchange_tokens(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    one, other = list(model["vocab"])[-2:]  # the fixtures have neither
    model["vocab"] |= {one: model["vocab"][other], other: model["vocab"][one]}
    edit(folder / "tokenizer.json", model=model)


def exchange_tokenizer_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    model["merges"][-2:] = model["merges"][:-3:-1]
    edit(folder / "tokenizer.json", model=model)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (exchange_tokens, "it.vocabulary_differs"),
        (exchange_tokenizer_merges, "it.merges_equal"),
        (lambda folder: edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>"), "it.end_token"),
        (lambda folder: edit(folder / "generation_config.json", eos_token_id=5), "it.ends_at_text"),
        (lambda folder: edit(folder / "generation_config.json", eos_token_id=[5]), "it.ends_with_answers"),
    ],
)
def test_a_base_that_makes_other_text_of_the_same_tokens(
    adapter: Path, tmp_path: Path, change: Any, check: str
) -> None:
    base = shutil.copytree(TINY, tmp_path / "base")
    if not (base / "generation_config.json").is_file():
        (base / "generation_config.json").write_text("{}")
    trained = AutoTokenizer.from_pretrained(TINY)

    def checks() -> list[str]:
        files = merge.tokenizer_files(base, adapter)
        return failed(
            parity.check_template("it", AutoTokenizer.from_pretrained(base), trained)
            + parity.check_ends("it", files, base, trained)
        )

    assert checks() == []
    change(base)
    assert check in checks()


def test_no_file_names_the_folder_that_a_base_was_in(adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(TINY, tmp_path / "base")
    edit(base / "config.json", _name_or_path="/home/alice/secret/model")
    edit(base / "tokenizer_config.json", name_or_path="C:\\Users\\alice\\secret")
    folder = write_merged(adapter, tmp_path / "merged", base)
    assert failed(parity.check_structure(folder, base)) == []
    assert not [path.name for path in folder.glob("*.json") if "secret" in path.read_text(encoding="utf-8")]
