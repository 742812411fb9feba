"""The verification can fail: each way an export goes wrong in practice, made on purpose and caught."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli.export import merge, outputs, parity
from dpo_cli.export.outputs import Expected, Outputs, Probes
from dpo_cli.export.parity import LIMITS
from dpo_cli.inference import Answer, token_logps
from safetensors.torch import load_file, save_file
from tests.export.made import CPU, TINY, Exported, copy, edit, failed, rewrite, write_merged
from transformers import AutoTokenizer

DOWN = [f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1)]


def compare(made: Exported, folder: Path, adapter: Path | None = None) -> list[str]:
    """The checks of behaviour that a model in that folder fails."""
    said = outputs.collect(outputs.load(folder, CPU, adapter=adapter), made.expected.probes, made.tokenizer)
    checks = parity.check_parity("it", said.logps, made.expected)
    return failed(checks + parity.check_answers("it", said, made.expected, LIMITS["bfloat16"]))


def structure(made: Exported, folder: Path) -> dict[str, Any]:
    """The checks of a merged model's files that fail, and their values."""
    return {check["name"]: check["value"] for check in parity.check_structure(folder, made.base) if not check["ok"]}


def weights(made: Exported, folder: Path) -> dict[str, Any]:
    checks = parity.check_weights(folder, made.base, made.adapter)
    return {check["name"]: check["value"] for check in checks if not check["ok"]}


# ---------------------------------------------------------------------------------------------------------- behaviour


def test_an_honest_export_passes(made: Exported) -> None:
    assert compare(made, made.merged) == [] == compare(made, made.base, made.adapter)
    assert structure(made, made.merged) == {} == weights(made, made.merged)


def test_an_untouched_base_passed_off_as_merged(made: Exported, spoilt: Path) -> None:
    """ "Are the adapters merged?": the base is caught, and so is the base rounded, which has an effect of its own."""
    assert {"it.effect", "it.carried"} <= set(compare(made, made.base))
    original = load_file(made.base / "model.safetensors")
    rewrite(spoilt, lambda weights: weights.update({name: original[name].bfloat16() for name in weights}))
    assert {"it.effect", "it.carried"} <= set(compare(made, spoilt))


def test_two_layers_tensors_exchanged(made: Exported, spoilt: Path) -> None:
    rewrite(spoilt, lambda weights: weights.update({DOWN[0]: weights[DOWN[1]], DOWN[1]: weights[DOWN[0]]}))
    assert structure(made, spoilt) == {}, "names and shapes are as they should be"
    assert weights(made, spoilt)["merged.weights"] == DOWN, "though a tiny model's outputs hardly change"


@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0], ids=["the wrong sign", "alpha halved", "alpha doubled"])
def test_an_adapter_merged_at_another_scale(made: Exported, tmp_path: Path, scale: float) -> None:
    adapter = copy(made.adapter, tmp_path / "adapter")
    edit(adapter / "adapter_config.json", lora_alpha=scale * 8)
    assert "it.carried" in compare(made, write_merged(adapter, tmp_path / "merged"))


def test_weights_that_are_not_numbers(made: Exported, spoilt: Path) -> None:
    rewrite(spoilt, lambda weights: weights.update({"model.norm.weight": torch.full((96,), torch.nan).half()}))
    said = token_logps(outputs.load(spoilt, CPU), made.expected.probes.rows, outputs.LAST)
    checks = parity.check_parity("it", said, made.expected)
    assert {"it.mean_kl", "it.effect", "it.carried"} <= set(failed(checks))
    assert "NaN" not in json.dumps(checks), "which JSON does not know"


def test_answers_are_compared_with_those_of_the_adapter_on_the_base() -> None:
    """Ends of turn lost, nothing said: one answer may go on where another ended, not two."""
    good = [Answer("Hello you", [1, 2], True), Answer("你好呀", [3, 4], True), Answer("Because.", [5, 6], True)]
    wanted = Expected(Probes([], []), [], Outputs([], good))

    def check(*answers: Answer) -> list[str]:
        return failed(parity.check_answers("it", Outputs([], list(answers)), wanted, LIMITS["bfloat16"]))

    goes_on = [replace(answer, finished=False) for answer in good]
    assert check(*good) == [] == check(goes_on[0], *good[1:])
    assert check(*goes_on[:2], good[2]) == ["it.answers_ended"]
    assert check(Answer("", [1], True), *good[1:]) == ["it.answers_not_empty"]
    assert check(*(Answer(answer.text, [9, *answer.ids], True) for answer in good)) == ["it.greedy_tokens"]


def test_a_faint_adapter_is_not_asked_for_what_16_bits_cannot_hold(made: Exported) -> None:
    """After a step or two of training: of so small a change bfloat16 keeps a part, and nothing is wrong with that."""
    probes, plain, _ = made.expected
    tuned = [(logps + 1e-4 * torch.sin(torch.arange(logps.shape[-1]))).log_softmax(-1) for logps in plain]
    assert 0 < parity.mean_kl(tuned, plain) < parity.FAINT
    checks = parity.check_parity("it", plain, Expected(probes, plain, Outputs(tuned, [])))
    assert failed(checks) == []
    assert next(check for check in checks if check["name"] == "it.carried")["value"] == pytest.approx(0, abs=0.1)


# ------------------------------------------------------------------------------------------------------------ weights


def test_a_bit_that_the_disk_lost(made: Exported, spoilt: Path) -> None:
    shard = sorted(spoilt.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert structure(made, spoilt) == {} and compare(made, spoilt) == []
    assert weights(made, spoilt).keys() == {"merged.weights"}


def test_a_sum_in_bfloat16(made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: merge.Adapter, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in self.factors:
            return weight
        down, up = (one.bfloat16() for one in self.factors[name])
        return weight.bfloat16() + (up @ down) * self.scale

    monkeypatch.setattr(merge.Adapter, "apply", apply)
    assert weights(made, write_merged(made.adapter, tmp_path / "merged")).keys() == {"merged.rounded_otherwise"}


# -------------------------------------------------------------------------------------------------------------- files


def test_a_shard_that_is_cut_short_missing_or_one_too_many(made: Exported, spoilt: Path) -> None:
    """A failed check, not a traceback; also where nothing is left of it."""
    shard = sorted(spoilt.glob("*.safetensors"))[1]
    more = shutil.copyfile(shard, spoilt / "model-00009-of-00009.safetensors")
    assert structure(made, spoilt) == {"merged.shards": [more.name]}
    more.unlink()
    content = shard.read_bytes()
    for size in (len(content) - 1, 4, 0):
        shard.write_bytes(content[:size])
        assert shard.name in structure(made, spoilt)["merged.shards"][0]
    shard.unlink()
    assert shard.name in structure(made, spoilt)["merged.shards"][0]


def test_an_index_that_names_another_place(made: Exported, spoilt: Path) -> None:
    places = json.loads((spoilt / "model.safetensors.index.json").read_text())["weight_map"]
    places["model.norm.weight"] = places["model.embed_tokens.weight"]
    edit(spoilt / "model.safetensors.index.json", weight_map=places)
    assert "model.norm.weight" in structure(made, spoilt)["merged.shards"][0]


@pytest.mark.parametrize("norm", [torch.ones(95).half(), torch.ones(96)], ids=["another shape", "32 bits"])
def test_a_tensor_of_another_kind(made: Exported, spoilt: Path, norm: torch.Tensor) -> None:
    rewrite(spoilt, lambda weights: weights.update({"model.norm.weight": norm}))
    assert structure(made, spoilt) == {"merged.tensors": ["model.norm.weight"]}


def test_a_config_that_short_answers_hardly_show(made: Exported, spoilt: Path) -> None:
    changes = {"rms_norm_eps": 1e-5, "rope_parameters": None, "quantization_config": {"load_in_4bit": True}}
    edit(spoilt / "config.json", **changes, dtype="float32")
    assert structure(made, spoilt) == {"merged.config_differs": sorted(changes), "merged.dtype": "float32"}


def test_a_file_that_would_be_loaded_in_the_models_place(made: Exported, spoilt: Path) -> None:
    """Among them a second adapter, as TRL's `ref` is one."""
    (spoilt / "adapter_config.json").write_text("{}")
    (spoilt / "pytorch_model.bin").write_text("{}")
    (spoilt / "ref").mkdir()
    assert structure(made, spoilt) == {"merged.shards": ["adapter_config.json", "pytorch_model.bin", "ref"]}


def test_a_second_adapter_in_the_adapters_folder_and_among_its_tensors(made: Exported, tmp_path: Path) -> None:
    adapter = copy(made.adapter, tmp_path / "adapter")

    def wrong() -> list[str]:
        return failed(parity.check_adapter_files(adapter, made.adapter, str(TINY)))

    assert wrong() == []
    (adapter / "ref").mkdir()
    assert wrong() == ["adapter.foreign"]
    (adapter / "ref").rmdir()
    tensors = load_file(adapter / merge.WEIGHTS)
    save_file(tensors | {"base_model.model.q_proj.lora_A.ref.weight": torch.ones(1)}, adapter / merge.WEIGHTS)
    assert wrong() == ["adapter.foreign", "adapter.weights_equal"]


def test_an_adapter_that_names_another_base_or_setting_or_is_cut_short(made: Exported, tmp_path: Path) -> None:
    adapter = copy(made.adapter, tmp_path / "adapter")
    changes = {"base_model_name_or_path": "Qwen/Qwen3-bnb-4bit", "lora_alpha": 9, "revision": "main"}
    edit(adapter / "adapter_config.json", **changes)
    checks = parity.check_adapter_files(adapter, made.adapter, str(TINY))
    assert failed(checks) == ["adapter.config_differs"] and checks[-1]["value"] == sorted(changes)
    (adapter / merge.WEIGHTS).write_bytes((adapter / merge.WEIGHTS).read_bytes()[:-1])
    assert failed(parity.check_adapter_files(adapter, made.adapter, str(TINY))) == ["adapter.readable"]


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_a_tokenizer_file_that_is_missing_changed_or_too_many(made: Exported, spoilt: Path) -> None:
    files = merge.tokenizer_files(made.base, made.adapter)
    (spoilt / "tokenizer.json").unlink()
    (spoilt / merge.TEMPLATE).write_bytes(files[merge.TEMPLATE] + b"\n")
    (spoilt / "special_tokens_map.json").write_text("{}")
    [check] = parity.check_tokenizer_files("merged", spoilt, files)
    assert check["value"] == [merge.TEMPLATE, "special_tokens_map.json", "tokenizer.json"]


def exchange_tokens(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    one, other = list(model["vocab"])[-2:]  # the fixtures have neither
    model["vocab"] |= {one: model["vocab"][other], other: model["vocab"][one]}
    edit(folder / "tokenizer.json", model=model)


def exchange_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    model["merges"][-2:] = model["merges"][:-3:-1]
    edit(folder / "tokenizer.json", model=model)


def put_a_space_into_the_template(folder: Path) -> None:
    template = (folder / merge.TEMPLATE).read_text(encoding="utf-8")
    (folder / merge.TEMPLATE).write_text(template.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        (put_a_space_into_the_template, {"it.template", "it.template_tokens_differ"}),
        (exchange_tokens, {"it.vocabulary_differs"}),
        (exchange_merges, {"it.merges_equal"}),
        (lambda folder: edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>"), {"it.end_token"}),
        (lambda folder: edit(folder / "generation_config.json", eos_token_id=5), {"it.ends_at_text"}),
        (lambda folder: edit(folder / "generation_config.json", eos_token_id=[5]), {"it.ends_with_answers"}),
    ],
)
def test_files_that_make_other_text_of_the_same_tokens(
    made: Exported, base: Path, change: Any, checks: set[str]
) -> None:
    trained = AutoTokenizer.from_pretrained(TINY)

    def wrong() -> set[str]:
        files = merge.tokenizer_files(base, made.adapter)
        found = parity.check_template("it", AutoTokenizer.from_pretrained(base), trained)
        return set(failed(found + parity.check_ends("it", files, base, trained)))

    assert wrong() == set()
    change(base)
    assert checks <= wrong()


def test_no_file_names_the_folder_that_a_base_was_in(made: Exported, base: Path, tmp_path: Path) -> None:
    edit(base / "config.json", _name_or_path="/home/alice/secret/model")
    edit(base / "tokenizer_config.json", name_or_path="C:\\Users\\alice\\secret")
    folder = write_merged(made.adapter, tmp_path / "merged", base)
    assert failed(parity.check_structure(folder, base)) == []
    assert not [path.name for path in folder.glob("*.json") if "secret" in path.read_text(encoding="utf-8")]
