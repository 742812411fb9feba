"""GGUF files of real, tiny models: what is written is read back whole, and what is wrong is noticed."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from dpo_cli import recipe
from dpo_cli.errors import DpoError
from dpo_cli.export import gguf, gguf_parity, llamacpp, outputs
from dpo_cli.export.export import export as export_stage
from dpo_cli.recipe import GgufType
from dpo_cli.run import Run
from tests import families
from tests.export.made import SMOKE, TINY, Exported, asked, checks, copy, edit, expected, failed, store
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

K_QUANTS = [kind for kind in get_args(GgufType) if kind not in gguf.DIRECT]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", gguf.DIRECT)
def test_every_type_passes_its_checks(exported: Exported, kind: GgufType, tmp_path: Path) -> None:
    path = tmp_path / f"mine-{kind}.gguf"
    gguf.write_gguf(exported.merged, kind, path)
    found = gguf_parity.check_gguf(path, kind, exported.merged, exported.expected)
    assert failed(found) == []
    stored = json.loads((exported.merged / "config.json").read_text())["dtype"]
    if (kind, stored) in (("f32", "float32"), ("f32", "bfloat16"), ("bf16", "bfloat16")):  # every bit has its place
        assert next(check["value"] for check in found if check["name"] == "gguf.weight_error") == 0
    fields, _ = gguf_parity.read_gguf(path)
    assert (fields["general.name"], fields["general.architecture"], fields["tokenizer.ggml.pre"]) == (
        "mine", "qwen3", "qwen2",
    )  # fmt: skip


def test_rows_that_blocks_do_not_fill_stay_16_bit(tmp_path: Path, path: Path) -> None:
    """As llama.cpp's converter has it."""
    folder = tmp_path / "narrow"
    model: Any = Qwen3ForCausalLM(Qwen3Config.from_pretrained(TINY, intermediate_size=80))
    store(model, folder)
    gguf.write_gguf(folder, "q8_0", path)
    kinds = {name: tensor.tensor_type.name for name, tensor in gguf_parity.read_gguf(path)[1].items()}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    down = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).model.layers[0].mlp.down_proj.weight
    assert torch.allclose(down, model.model.layers[0].mlp.down_proj.weight, atol=1e-3)


def test_the_untouched_base_does_not(untied: Exported, path: Path) -> None:
    assert len(list(untied.merged.glob("*.safetensors"))) > 2
    gguf.write_gguf(untied.base, "q8_0", path)
    assert {"gguf.carried", "gguf.mean_kl"} <= checks(untied, path, "q8_0").keys()


def test_prompts_become_the_same_tokens_from_the_file_alone(made: Exported, path: Path) -> None:
    gguf.write_gguf(made.merged, "q8_0", path)
    ours, theirs = made.tokenizer, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs.chat_template == ours.chat_template
    for messages in outputs.FIXTURES:
        text: Any = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    fields, _ = gguf_parity.read_gguf(path)
    assert fields["tokenizer.ggml.padding_token_id"] == ours.pad_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_end|>"], kinds["<think>"], kinds["a"]) == (3, 4, 1)  # control, user-defined, normal


def test_a_config_as_transformers_4_wrote_it(untied: Exported, tmp_path: Path) -> None:
    old = copy(untied.merged, tmp_path / "copy")
    config = json.loads((old / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    assert gguf.metadata(old, "q8_0", "mine") == gguf.metadata(untied.merged, "q8_0", "mine")


def test_memory_stays_near_one_tensor(untied: Exported, path: Path) -> None:
    gguf.write_gguf(untied.merged, "f32", path)  # imports and vocabulary are not what is measured
    tracemalloc.start()
    try:
        gguf.write_gguf(untied.merged, "f32", path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * (2100 * 256 * 4) + 2e6 < 0.6 * path.stat().st_size


def test_a_full_disk_is_an_error_that_says_so(made: Exported, path: Path) -> None:
    path.symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        gguf.write_gguf(made.merged, "f16", path)
    assert raised.value.errno == errno.ENOSPC

    path.unlink()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most[1]))  # in the middle of the tensors
    try:
        with pytest.raises(OSError) as raised:
            gguf.write_gguf(made.merged, "f16", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)


# ---------------------------------------------------------------------------------------------------- what is refused


def tokenizer_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", **changes)


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\s+"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (config_with(model_type="llama"), "model_type: llama"),
        (config_with(attention_bias=True), "attention_bias"),
        (config_with(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}), "rope_type: yarn"),
        (tokenizer_with(normalizer={"type": "Lowercase"}), "splits words in a way of its own"),
        (tokenizer_with(pre_tokenizer=BYTES), "splits words in a way of its own"),
        (tokenizer_with(pre_tokenizer={"pretokenizers": [SPLIT, BYTES]}), "splits words in a way of its own"),
    ],
)
def test_what_is_no_plain_qwen3_is_left_to_llama_cpp(base: Path, change: Any, word: str) -> None:
    change(base)
    with pytest.raises(DpoError, match="plain Qwen3") as raised:
        gguf.require(base, "q8_0")
    assert word in str(raised.value) and "convert_hf_to_gguf.py" in str(raised.value)


def test_what_nothing_here_could_read_back_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "installed", lambda: False)
    edit(base / "config.json", model_type="nobodys")
    (base / llamacpp.CONVERTER).touch()
    with pytest.raises(DpoError, match="nothing here reads such a GGUF"):
        gguf.require(base, "q8_0", str(base))


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DpoError, match=r"pip install -e '.*\[gguf\]'"):
        export_stage(recipe.load(SMOKE, ["export.formats=[gguf]"]), Run(tmp_path))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- K-quants


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_k_quant_without_llama_cpp_gives_the_command(base: Path) -> None:
    with pytest.raises(DpoError, match=r"llama-quantize NAME-bf16\.gguf NAME-q4_k_m\.gguf Q4_K_M"):
        gguf.require(base, "q4_k_m")


def program(folder: Path, script: str) -> str:
    """A llama-quantize that does what the script says."""
    folder.mkdir(parents=True)
    (folder / "llama-quantize").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "llama-quantize").chmod(0o755)
    return str(folder)


@pytest.mark.usefixtures("no_llama_cpp")
def test_llama_quantize_in_llama_cpp_dir_gets_all_the_bits(
    untied: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "llama.cpp" / "build" / "bin", '/bin/cp "$1" "$2"; echo "$3" >"$2.kind"')
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama.cpp"))
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "mine-q4_k_m.gguf"
    gguf.write_gguf(untied.merged, "q4_k_m", path)
    assert {one.name for one in path.parent.iterdir()} == {path.name, f"{path.name}.kind"}
    assert path.with_name(f"{path.name}.kind").read_text() == "Q4_K_M\n"
    other = program(tmp_path / "other", "exit 0")
    assert llamacpp.quantiser("q4_k_m", other) == f"{other}/llama-quantize", "export.llama_cpp goes first"
    fields, _ = gguf_parity.read_gguf(path)  # what the program was given: bfloat16, as merged
    assert (fields["general.file_type"], fields["general.name"]) == (32, "mine")
    assert checks(untied, path, "q4_k_m") == {"gguf.metadata_differs": ["general.file_type"]}


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_failing_llama_quantize_has_the_last_word(
    made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo loading; echo 'failed: no such type' >&2; exit 1"
    monkeypatch.setenv("PATH", program(tmp_path / "bin", script))
    (tmp_path / "out").mkdir()
    with pytest.raises(DpoError, match="failed: no such type"):
        gguf.write_gguf(made.merged, "q4_k_m", tmp_path / "out" / "mine-q4_k_m.gguf")
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
        monkeypatch.setenv("LLAMA_CPP_DIR", program(tmp_path / "bin", f"{sys.executable} -c '{QUANTISE}' \"$@\""))
    path = tmp_path / f"mine-{kind}.gguf"
    gguf.write_gguf(untied.merged, kind, path)
    # The likeliest tokens of a model that never was trained are near-ties, which any rounding decides.
    assert [name for name in checks(untied, path, kind) if not name.endswith("top1_agreement")] == []
    assert gguf_parity.read_gguf(path)[0]["general.name"] == "mine"
    gguf.write_gguf(untied.base, kind, path)
    assert {"gguf.carried", "gguf.llama_cpp.carried"} <= checks(untied, path, kind).keys()


def test_every_kind_has_limits_and_coarser_ones_have_wider() -> None:
    assert set(gguf_parity.LIMITS) == set(get_args(GgufType))
    order: list[GgufType] = ["bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]
    kls, top1s, shares, weights, scales = zip(*(gguf_parity.LIMITS[kind] for kind in order), strict=True)
    for wider in (kls, weights, scales, [-top1 for top1 in top1s], [-share for share in shares]):
        assert list(wider) == sorted(wider)


# ---------------------------------------------------------------------------------------------------- other models

# What llama.cpp's script does with a Llama: the halves of each head's rotary dimensions become neighbours.
CONVERTER = """
import json, sys
from pathlib import Path
import gguf
import numpy as np
from safetensors.numpy import load_file
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
    return Exported(base, merged, expected(asked(AutoTokenizer.from_pretrained(merged)), loaded(base), loaded(merged)))


@pytest.mark.parametrize("folder", ["llama.cpp", "WRONG"])
def test_what_the_converter_wrote_is_read_back_and_compared(
    llama: Exported, tmp_path: Path, path: Path, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    gguf.write_gguf(llama.merged, "f16", path, str(tmp_path / folder))
    found = checks(llama, path, "f16")
    assert found == {} if folder == "llama.cpp" else "gguf.weight_error" in found


# ------------------------------------------------------------------------------------------------------- the runtime


def test_the_runtime_tokenises_and_computes_alike(exported: Exported, path: Path) -> None:
    pytest.importorskip("llama_cpp")
    gguf.write_gguf(exported.merged, "f16", path)
    found = gguf_parity.check_gguf(path, "f16", exported.merged, exported.expected)
    values = {check["name"]: check["value"] for check in found}
    assert failed(found) == [] and values["gguf.llama_cpp.mean_kl"] < 1e-3
