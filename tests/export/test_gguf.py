"""GGUF files of real, tiny Qwen3 models: what is written is read back whole, and what is wrong is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from dpo_cli import recipe, smoke
from dpo_cli.errors import DpoError
from dpo_cli.export import gguf, gguf_parity, outputs
from dpo_cli.export.export import export as export_stage
from dpo_cli.export.parity import Check
from dpo_cli.inference import token_logps
from dpo_cli.recipe import GgufType
from dpo_cli.run import Run
from safetensors.torch import load_file, save_file
from tests import families
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

LAST = 24
K_QUANTS = [kind for kind in get_args(GgufType) if kind not in gguf.DIRECT]
SENTENCES = (
    "Name two uses of baking soda.",
    "用三句话介绍如何给多肉浇水，谢谢！",
    "Mixed 中文 and emoji 🙂, 12345\n\n\ttoo",
)


@dataclass(frozen=True)
class Exported:
    """A merged bfloat16 model, and what the models it comes from say in float32."""

    merged: Path
    rows: list[list[int]]
    tuned: list[torch.Tensor]
    base: list[torch.Tensor]
    untouched: Path  # the base, stored like the merged model

    def checks(self, path: Path, kind: GgufType) -> list[Check]:
        return gguf_parity.check_gguf(path, kind, self.merged, self.rows, self.tuned, self.base, LAST)

    def failed(self, path: Path, kind: GgufType) -> list[str]:
        return [check["name"] for check in self.checks(path, kind) if not check["ok"]]


def export(base: PreTrainedModel, tiny: Path, folder: Path, shard: str) -> Exported:
    """Base -> base with a change of low rank in every matrix -> 16 bits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [tokenizer(text * 3)["input_ids"] for text in SENTENCES]
    plain = token_logps(base, rows, LAST)
    untouched, merged = folder / "untouched", folder / "merged"
    store(base, tiny, untouched, shard)
    base = base.float()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "proj" in name:
                left, right = (torch.randn(size, 2, generator=draw) for size in weight.shape)
                weight.add_(left @ right.T, alpha=0.02)
    tuned = token_logps(base, rows, LAST)
    store(base, tiny, merged, shard)
    return Exported(merged, rows, tuned, plain, untouched)


def store(model: PreTrainedModel, tiny: Path, folder: Path, shard: str) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)  # type: ignore[arg-type]
    model.float().load_state_dict(state)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny / name, folder / name)


@pytest.fixture(scope="module")
def tiny() -> Path:
    return smoke.resolve("builtin:tiny-qwen3")


@pytest.fixture(scope="module")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The built-in model: tied embeddings, heads of 16, one shard."""
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    return export(base, tiny, tmp_path_factory.mktemp("tied"), "5GB")


@pytest.fixture(scope="module")
def untied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An output matrix of its own, heads of 128 as in every real Qwen3, rows that K-quants' blocks of 256 fill."""
    config = Qwen3Config(
        vocab_size=2100,  # more rows than the tokenizer has tokens
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=2039,
        pad_token_id=2040,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Qwen3ForCausalLM(config).float().eval()
    return export(base, tiny, tmp_path_factory.mktemp("untied"), "1MB")


@pytest.fixture(params=[pytest.param("tied", marks=pytest.mark.slow), "untied"])  # the smoke run exports a tied one
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")


def other_tokenizer(exported: Exported, folder: Path, **changes: Any) -> Path:
    """A copy of the merged model with something else in its tokenizer.json."""
    copy = shutil.copytree(exported.merged, folder / "changed")
    state = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    (copy / "tokenizer.json").write_text(json.dumps({**state, **changes}), encoding="utf-8")
    return copy


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", gguf.DIRECT)
def test_every_type_passes_its_checks(exported: Exported, kind: GgufType, tmp_path: Path) -> None:
    path = tmp_path / f"mine-{kind}.gguf"
    gguf.write_gguf(exported.merged, kind, path)
    assert exported.failed(path, kind) == []
    assert gguf_parity.metadata(path)["general.name"] == "mine"


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_types_that_hold_bfloat16_hold_every_bit(untied: Exported, kind: GgufType, tmp_path: Path) -> None:
    assert len(list(untied.merged.glob("*.safetensors"))) > 2
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(untied.merged, kind, path)
    merged = AutoModelForCausalLM.from_pretrained(untied.merged, dtype=torch.float32).state_dict()
    read = gguf_parity._reload(
        path, gguf_parity.metadata(path), untied.merged, outputs.Placement("cpu", torch.float32)
    ).state_dict()
    assert merged.keys() == read.keys()
    assert all(torch.equal(merged[name], read[name]) for name in merged)


def test_prompts_become_the_same_tokens_from_the_file_alone(tied: Exported, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(tied.merged, "q8_0", path)
    ours = AutoTokenizer.from_pretrained(tied.merged)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert theirs.chat_template == ours.chat_template
    chats: Any = outputs.FIXTURES
    for messages in chats:
        text: Any = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_metadata_that_servers_go_by(tied: Exported, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(tied.merged, "q8_0", path)
    fields, tokenizer = gguf_parity.metadata(path), AutoTokenizer.from_pretrained(tied.merged)
    assert fields["general.architecture"] == "qwen3"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_end|>"], kinds["<think>"], kinds["a"]) == (3, 4, 1)  # control, user-defined, normal


def test_the_trained_template_wins_over_the_one_in_the_bases_tokenizer_config(tied: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(tied.merged, tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    gguf.write_gguf(copy, "f16", tmp_path / "mine.gguf")
    fields = gguf_parity.metadata(tmp_path / "mine.gguf")
    assert fields["tokenizer.chat_template"] == (copy / "chat_template.jinja").read_text()


def test_a_config_as_transformers_4_wrote_it(untied: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(untied.merged, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    (copy / "config.json").write_text(json.dumps(config))
    for folder in (untied.merged, copy):
        gguf.write_gguf(folder, "q8_0", tmp_path / f"{folder.name}.gguf")
    ours, theirs = (gguf_parity.metadata(tmp_path / f"{name}.gguf") for name in ("merged", "copy"))
    assert ours | {"general.name": "copy"} == theirs


def test_memory_stays_near_one_tensor(untied: Exported, tmp_path: Path) -> None:
    gguf.write_gguf(untied.merged, "f32", tmp_path / "warm.gguf")  # imports and vocabulary are not what is measured
    tracemalloc.start()
    try:
        gguf.write_gguf(untied.merged, "f32", tmp_path / "mine.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    biggest, whole = 2100 * 256 * 4, (tmp_path / "mine.gguf").stat().st_size
    assert peak < 1.2 * biggest + 2e6 < 0.6 * whole


def test_a_full_disk_is_an_error_that_says_so(tied: Exported, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        gguf.write_gguf(tied.merged, "f16", tmp_path / "mine.gguf")
    assert raised.value.errno == errno.ENOSPC


# ---------------------------------------------------------------------------------------------------- what is noticed


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_an_untouched_base_passed_off_as_the_tuned_model(exported: Exported, kind: GgufType, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(exported.untouched, kind, path)
    assert "gguf.carried" in exported.failed(path, kind)


def test_a_truncated_file(tied: Exported, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(tied.merged, "q8_0", path)
    size = path.stat().st_size
    for kept in (size - 1000, size // 2, 100, 0):
        os.truncate(path, kept)
        assert tied.failed(path, "q8_0") == ["gguf.readable"]


def test_two_layers_exchanged(exported: Exported, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tmp_path / "mine.gguf"
    gguf.write_gguf(exported.merged, "f16", path)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path, "r+").tensors}
    one, other = tensors["blk.0.ffn_down.weight"], tensors["blk.1.ffn_down.weight"]
    kept = one.copy()
    one[:], other[:] = other, kept
    assert {"gguf.mean_kl", "gguf.weight_error"} <= set(exported.failed(path, "f16"))


def test_a_tensor_that_the_reader_makes_up(untied: Exported, tmp_path: Path) -> None:
    """transformers takes ones for a norm that is not there, which is what an untrained one has."""
    copy = shutil.copytree(untied.merged, tmp_path / "copy")
    for shard in copy.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(shard).items() if "layers.1.self_attn.q_norm" not in name}
        save_file(kept, shard, metadata={"format": "pt"})
    gguf.write_gguf(copy, "q8_0", tmp_path / "mine.gguf")
    checks = untied.checks(tmp_path / "mine.gguf", "q8_0")
    assert [check["value"] for check in checks if not check["ok"]] == [["blk.1.attn_q_norm.weight"]] * 2


def test_coarser_weights_than_were_asked_for(untied: Exported, tmp_path: Path) -> None:
    gguf.write_gguf(untied.merged, "q8_0", tmp_path / "mine.gguf")
    wrong = untied.failed(tmp_path / "mine.gguf", "f16")
    assert {"gguf.metadata_differs", "gguf.weights", "gguf.weight_error"} <= set(wrong)


def test_metadata_of_another_model(tied: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(tied.merged, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    gguf.write_gguf(copy, "f16", tmp_path / "mine.gguf")
    checks = {check["name"]: check for check in tied.checks(tmp_path / "mine.gguf", "f16")}
    assert checks["gguf.metadata_differs"]["value"] == ["qwen3.rope.freq_base", "tokenizer.chat_template"]


def test_a_vocabulary_with_two_tokens_exchanged(tied: Exported, tmp_path: Path) -> None:
    model = json.loads((tied.merged / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = model["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    gguf.write_gguf(other_tokenizer(tied, tmp_path, model=model), "f16", tmp_path / "mine.gguf")
    checks = {check["name"]: check for check in tied.checks(tmp_path / "mine.gguf", "f16")}
    assert checks["gguf.tokens_differ"]["value"] == 2


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "llama"}, "model_type: llama"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type: yarn"),
    ],
)
def test_another_architecture_is_left_to_llama_cpp(
    tied: Exported, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    copy = shutil.copytree(tied.merged, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(DpoError, match="plain Qwen3") as raised:
        gguf.write_gguf(copy, "q8_0", tmp_path / "mine.gguf")
    assert word in str(raised.value) and "convert_hf_to_gguf.py" in str(raised.value)
    assert not (tmp_path / "mine.gguf").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\s+"}, "behavior": "Isolated", "invert": False,
            }
        },
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_take_for_another(
    tied: Exported, tmp_path: Path, change: dict[str, Any]
) -> None:
    copy = other_tokenizer(tied, tmp_path, **change)
    with pytest.raises(DpoError, match="splits words in a way of its own"):
        gguf.write_gguf(copy, "q8_0", tmp_path / "mine.gguf")


def test_gpt2s_word_splitting_has_a_name_too(tied: Exported, tmp_path: Path) -> None:
    copy = other_tokenizer(tied, tmp_path, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False})
    gguf.write_gguf(copy, "f16", tmp_path / "mine.gguf")
    assert gguf_parity.metadata(tmp_path / "mine.gguf")["tokenizer.ggml.pre"] == "gpt-2"


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = recipe.load(Path(__file__).parents[2] / "recipes" / "smoke.yaml", ["export.formats=[gguf]"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DpoError, match=r"pip install -e '.*\[gguf\]'"):
        export_stage(loaded, Run(tmp_path))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- K-quants


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_k_quant_without_llama_cpp_gives_the_command(tied: Exported, tmp_path: Path) -> None:
    with pytest.raises(DpoError, match="llama-quantize") as raised:
        gguf.require(tied.merged, "q4_k_m")
    assert "llama-quantize NAME-bf16.gguf NAME-q4_k_m.gguf Q4_K_M" in str(raised.value)
    with pytest.raises(DpoError, match="llama-quantize"):
        gguf.write_gguf(tied.merged, "q4_k_m", tmp_path / "mine-q4_k_m.gguf")
    assert not list(tmp_path.iterdir())


def program(folder: Path, script: str) -> None:
    """A llama-quantize that does what the script says."""
    folder.mkdir(parents=True)
    (folder / "llama-quantize").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "llama-quantize").chmod(0o755)


@pytest.mark.usefixtures("no_llama_cpp")
def test_llama_quantize_in_llama_cpp_dir_gets_all_the_bits(
    tied: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "llama.cpp" / "build" / "bin", '/bin/cp "$1" "$2"; echo "$3" >"$2.kind"')
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama.cpp"))
    (tmp_path / "out").mkdir()
    gguf.write_gguf(tied.merged, "q4_k_m", tmp_path / "out" / "mine-q4_k_m.gguf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine-q4_k_m.gguf", "mine-q4_k_m.gguf.kind"}
    assert (tmp_path / "out" / "mine-q4_k_m.gguf.kind").read_text() == "Q4_K_M\n"
    # What the program was given: bfloat16, as merged.
    fields = gguf_parity.metadata(tmp_path / "out" / "mine-q4_k_m.gguf")
    assert (fields["general.file_type"], fields["general.name"]) == (32, "mine")


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_failing_llama_quantize_has_the_last_word(
    tied: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "echo loading; echo 'failed: no such type' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "out").mkdir()
    with pytest.raises(DpoError, match="failed: no such type"):
        gguf.write_gguf(tied.merged, "q4_k_m", tmp_path / "out" / "mine-q4_k_m.gguf")
    assert not list((tmp_path / "out").iterdir())


QUANTISE = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), options))
"""


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants(untied: Exported, kind: GgufType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("llama-quantize"):
        pytest.importorskip("llama_cpp")
        program(tmp_path / "bin", f"{sys.executable} -c '{QUANTISE}' \"$@\"")
        monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "bin"))
    path = tmp_path / f"mine-{kind}.gguf"
    gguf.write_gguf(untied.merged, kind, path)
    # The likeliest tokens of a model that never was trained are near-ties, which any rounding decides.
    assert [name for name in untied.failed(path, kind) if not name.endswith("top1_agreement")] == []
    assert gguf_parity.metadata(path)["general.name"] == "mine"
    gguf.write_gguf(untied.untouched, kind, path)
    assert {"gguf.carried", "gguf.llama_cpp.carried"} <= set(untied.failed(path, kind))


def test_every_kind_has_limits_and_coarser_ones_have_wider() -> None:
    assert set(gguf_parity.LIMITS) == set(get_args(GgufType))
    order: list[GgufType] = ["bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]
    kls, top1s, shares, weights, scales = zip(*(gguf_parity.LIMITS[kind] for kind in order), strict=True)
    assert list(kls) == sorted(kls) and list(weights) == sorted(weights)
    assert list(scales) == sorted(scales)
    assert list(top1s) == sorted(top1s, reverse=True) and list(shares) == sorted(shares, reverse=True)


# ---------------------------------------------------------------------------------------------------- other models

# What llama.cpp's script does with a Llama: the halves of each head's rotary dimensions become neighbours.
CONVERTER = """
import json, sys, types
from pathlib import Path
import gguf
import numpy as np
from safetensors.numpy import load_file
light = types.SimpleNamespace(read_json=lambda path: json.loads(path.read_text()))
sys.modules["dpo_cli.export.base"] = light  # which imports transformers and PEFT
from dpo_cli.export import gguf_tokenizer

merged, target = Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "f16"
config = json.loads((merged / "config.json").read_text())
heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
writer = gguf.GGUFWriter(target, "llama")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads["q_proj"])
writer.add_head_count_kv(heads["k_proj"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
gguf_tokenizer.add_tokenizer(writer, merged, config["vocab_size"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
for name, weight in load_file(merged / "model.safetensors").items():
    count = heads.get(name.split(".")[-2], 0)
    if count and "WRONG" not in __file__:
        weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    weight = np.ascontiguousarray(weight, np.float16 if weight.ndim > 1 else np.float32)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Llama, whose adapter is the difference to one of another seed."""
    folder = tmp_path_factory.mktemp("llama")
    merged, base = families.build("llama", folder / "merged"), families.build("llama", folder / "base", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = [tokenizer(text * 3)["input_ids"] for text in SENTENCES]
    tuned, plain = (
        token_logps(AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32), rows, LAST)
        for one in (merged, base)
    )
    return Exported(merged, rows, tuned, plain, base)


@pytest.mark.usefixtures("no_llama_cpp")
def test_another_model_needs_llama_cpps_converter(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(DpoError, match="model_type: llama") as raised:
        gguf.require(llama.merged, "f16")
    assert "export.llama_cpp" in str(raised.value) and "convert_hf_to_gguf.py" in str(raised.value)
    with pytest.raises(DpoError, match="model_type: llama"):
        gguf.write_gguf(llama.merged, "f16", tmp_path / "mine.gguf", str(tmp_path))


@pytest.mark.parametrize("folder", ["llama.cpp", "WRONG"])
def test_what_the_converter_wrote_is_read_back_and_compared(llama: Exported, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(llama.merged, "f16", path, str(tmp_path / folder))
    failed = llama.failed(path, "f16")
    assert failed == [] if folder == "llama.cpp" else "gguf.weight_error" in failed


# ------------------------------------------------------------------------------------------------------- the runtime


def test_the_runtime_tokenises_and_computes_alike(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = tmp_path / "mine.gguf"
    gguf.write_gguf(exported.merged, "f16", path)
    checks = {check["name"]: check for check in exported.checks(path, "f16")}
    assert checks["gguf.llama_cpp.tokens_differ"]["ok"]
    assert checks["gguf.llama_cpp.mean_kl"]["value"] < 1e-3
