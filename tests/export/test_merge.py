"""Merging by streaming: what PEFT's own merge gives, for any base, within one shard of memory; or a clear refusal."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli.errors import DpoError
from dpo_cli.export import base as base16
from dpo_cli.export import merge
from safetensors.torch import load_file, save_file
from tests.export.made import with_random_lora
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_base(folder: Path, dtype: str = "bfloat16", shard: str = "5GB", **config: Any) -> Path:
    """A Qwen3 of 2 layers with random weights, as `save_pretrained` leaves it."""
    small: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(Qwen3Config(**small | config)).to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def random_adapter(folder: Path, base: Path, **config: Any) -> Any:
    """A LoRA on it that changes something, saved; as PEFT's model in float32."""
    return with_random_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder, **config)


def by_peft(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.merge_and_unload(safe_merge=True).state_dict())


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged(base: Path, adapter: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    merge.write_merged(base, adapter, folder, **options)
    return all_tensors(folder)


@pytest.mark.parametrize(
    ("dtype", "config", "lora"),
    [
        ("bfloat16", {}, {}),
        ("float16", {}, {}),
        ("float32", {}, {"target_modules": ["q_proj", "down_proj"]}),
        ("bfloat16", {}, {"use_rslora": True, "r": 9}),
        ("bfloat16", {"tie_word_embeddings": False}, {"target_modules": [*LINEAR, "lm_head"]}),
        ("bfloat16", {"attention_bias": True}, {"bias": "all"}),
        ("bfloat16", {"attention_bias": True}, {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]}),
    ],
    ids=["bfloat16", "float16", "float32", "rsLoRA", "untied head", "all biases", "biases of LoRA layers"],
)
def test_the_merge_is_pefts(tmp_path: Path, dtype: str, config: dict[str, Any], lora: dict[str, Any]) -> None:
    """To 1e-6 in float32, and the same bits once rounded to what is stored."""
    base = random_base(tmp_path / "base", dtype, **config)
    expected = by_peft(random_adapter(tmp_path / "adapter", base, **lora))
    tensors = base16.stored(base)
    change = merge.read_adapter(tmp_path / "adapter", base, tensors)
    before = all_tensors(base)
    assert expected.keys() - {"lm_head.weight"} == before.keys() - {"lm_head.weight"}
    for name, weight in before.items():
        torch.testing.assert_close(change.apply(name, weight).float(), expected[name], rtol=0, atol=1e-6)

    written = merged(base, tmp_path / "adapter", tmp_path / "merged")
    stored = torch.float16 if dtype == "float16" else torch.bfloat16
    assert written.keys() == before.keys()
    for name, weight in written.items():
        assert torch.equal(weight, expected[name].to(stored)), name
    changed = {name for name in before if not torch.equal(before[name].to(stored), written[name])}
    assert len(changed) >= 4 and not any("norm" in name for name in changed)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(stored).split(".")[1]


def test_shards_are_as_small_as_asked_and_the_index_lists_them(tmp_path: Path) -> None:
    """From a base in shards of its own, which are cut otherwise."""
    base = random_base(tmp_path / "base", shard="9KB")
    model = random_adapter(tmp_path / "adapter", base)
    before = os.umask(0o022)
    try:
        merged(base, tmp_path / "adapter", tmp_path / "merged", shard_bytes=7000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o644}, "others may read them"
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 4 and len(list(base.glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"] == merge.shards(base16.shapes(base), 7000).metadata, "as a dry run says"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(tmp_path / "merged").values())
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 7000
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0, atol=2e-2)


def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    """A base of 12 shards of 16 MB: at its peak the process holds one of them more, and a tensor in float32."""
    shards, each, rows, columns = 12, 16, 512, 1024
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(shards * each)]
    places = {f"{name}.weight": f"part-{number // each:02}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(places.values())):
        inside = [name for name, place in places.items() if place == file]
        save_file({name: torch.full((rows, columns), 0.5, dtype=torch.bfloat16) for name in inside}, base / file)
    (base / base16.INDEX).write_text(json.dumps({"weight_map": places}))
    (base / "config.json").write_text("{}")
    factors = {}
    for name in names[::2]:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, columns)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, 4)
    save_file(factors, adapter / merge.WEIGHTS)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 1}))

    def resident(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    merge.write_merged(base, adapter, tmp_path / "before", shard_bytes=shards * each * rows * columns)  # imports
    shutil.rmtree(tmp_path / "before")
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    except OSError:
        pytest.skip("this system does not let a process reset its peak")
    before, shard = resident("VmRSS"), each * rows * columns * 2
    merge.write_merged(base, adapter, tmp_path / "merged", shard_bytes=shard)
    grown = resident("VmHWM") - before
    assert grown < 1.5 * shard + 30e6 < shards * shard / 3, f"{grown / shard:.1f} shards"
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == shards
    weights = all_tensors(tmp_path / "merged")
    assert {float(weights[f"{name}.weight"].mean()) for name in names[:2]} == {0.5, 1.5}


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("other", "lora", "words"),
    [
        (
            {"intermediate_size": 64},
            {},
            ["6 tensors", "mlp.down_proj.weight as [32, 64], which is [32, 48] in the base"],
        ),
        ({"num_hidden_layers": 3}, {}, ["7 tensors", "model.layers.2.", "the base does not have"]),
        # Merged into the embedding, which the head is tied to, it would change the input as well.
        (
            {"tie_word_embeddings": False},
            {"target_modules": ["q_proj", "lm_head"]},
            ["lm_head.weight, which the base does not have"],
        ),
        ({}, {"target_modules": ["embed_tokens"]}, ["no part of a LoRA on linear layers"]),
        ({}, {"use_dora": True}, ["only a plain LoRA can be merged, and this adapter has use_dora"]),
        ({}, {"modules_to_save": ["norm"]}, ["only a plain LoRA can be merged, and this adapter has modules_to_save"]),
    ],
    ids=["other sizes", "more layers", "a head", "the embedding", "DoRA", "whole modules"],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, other: dict[str, Any], lora: dict[str, Any], words: list[str]
) -> None:
    base = random_base(tmp_path / "base")
    random_adapter(tmp_path / "adapter", random_base(tmp_path / "other", **other), **lora)
    with pytest.raises(DpoError) as raised:
        merge.write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert raised.value.hint and raised.value.where
    assert all(word in raised.value.message for word in words), raised.value.message
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------------- small files


def test_the_template_in_tokenizer_config_is_trainings_too(tmp_path: Path) -> None:
    """Where it is training's already, or there is none, the file stays as it is, byte for byte."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (adapter / merge.TEMPLATE).write_text("training's {{ 你好 }}", encoding="utf-8")
    (base / "tokenizer.json").write_bytes(b'{"version":  "1.0"}')
    for settings in ({"a": 1}, {"a": 1, "chat_template": "training's {{ 你好 }}"}):
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        files = merge.tokenizer_files(base, adapter)
        assert files["tokenizer_config.json"] == (base / "tokenizer_config.json").read_bytes()
    (base / "tokenizer_config.json").write_text(json.dumps({"a": 1, "chat_template": "the base's"}))
    (base / merge.TEMPLATE).write_text("the base's")
    files = merge.tokenizer_files(base, adapter)
    assert json.loads(files["tokenizer_config.json"]) == {"a": 1, "chat_template": "training's {{ 你好 }}"}
    assert files[merge.TEMPLATE] == (adapter / merge.TEMPLATE).read_bytes()
    assert files["tokenizer.json"] == b'{"version":  "1.0"}'
