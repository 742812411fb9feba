"""The verification can fail: each way an export goes wrong in practice, made on purpose and caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cli import smoke
from dpo_cli.export import merge, outputs, parity
from dpo_cli.export.outputs import Outputs, Placement, Probes
from dpo_cli.export.parity import LIMITS, Check
from dpo_cli.inference import Answer, token_logps
from safetensors.torch import load_file, save_file

QUESTIONS = ["How do I water succulents?", "请介绍多肉浇水。", "Name two uses of baking soda."]


def failed(checks: list[Check]) -> list[str]:
    return [check["name"] for check in checks if not check["ok"]]


@dataclass(frozen=True)
class Exported:
    """A tiny Qwen3, a LoRA of random weights on it, the merge of the two, and what the three say."""

    base: Path
    adapter: Path
    merged: Path
    tokenizer: Any
    asked: Probes
    plain: list[torch.Tensor]
    tuned: Outputs

    def compare(self, folder: Path, adapter: Path | None = None) -> list[str]:
        """The checks of behaviour that a model in that folder fails."""
        said = outputs.collect(outputs.load(folder, CPU, adapter=adapter), self.asked, self.tokenizer)
        checks = parity.check_parity("it", said.logps, self.tuned.logps, self.plain)
        return failed(checks + parity.check_answers("it", said, self.tuned, QUESTIONS, LIMITS["bfloat16"]))


CPU = Placement("cpu", torch.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("made")
    base, adapter, merged = smoke.resolve("builtin:tiny-qwen3"), folder / "adapter", folder / "merged"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(outputs.load(base, CPU), lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(adapter))
    shutil.copyfile(base / merge.TEMPLATE, adapter / merge.TEMPLATE)
    merge.write_merged(base, adapter, merged, shard_bytes=150_000)
    merge.write_files(merge.tokenizer_files(base, adapter), merged)

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts: Any = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        for text in QUESTIONS
    ]
    asked = Probes([[*prompt, *prompt[4:-4]] for prompt in prompts], prompts, QUESTIONS)
    plain = token_logps(outputs.load(base, CPU), asked.rows, outputs.LAST)
    tuned = outputs.collect(outputs.load(base, CPU, adapter=adapter), asked, tokenizer)
    return Exported(base, adapter, merged, tokenizer, asked, plain, tuned)


@pytest.fixture
def spoilt(made: Exported, tmp_path: Path) -> Path:
    """A copy of the merged model, to be spoilt."""
    return shutil.copytree(made.merged, tmp_path / "merged")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of every shard at once, each of which stays in its file."""
    files = {file: load_file(file) for file in folder.glob("*.safetensors")}
    weights = {name: tensor for inside in files.values() for name, tensor in inside.items()}
    change(weights)
    for file, inside in files.items():
        save_file({name: weights[name].contiguous().clone() for name in inside}, file, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------- behaviour


def test_an_honest_export_passes(made: Exported) -> None:
    assert made.compare(made.merged) == []
    assert made.compare(made.base, made.adapter) == []
    assert failed(parity.check_structure(made.merged, made.base)) == []
    assert failed(parity.check_weights(made.merged, made.base, made.adapter)) == []


def test_an_untouched_base_passed_off_as_merged(made: Exported) -> None:
    """ "Are the adapters merged?": the base itself, though 16-bit, whole and with the right template, is caught."""
    assert {"it.effect", "it.carried"} <= set(made.compare(made.base))


def test_the_base_rounded_to_16_bits_is_no_merge_either(made: Exported, spoilt: Path) -> None:
    """Rounding gives it an effect of its own, which goes nowhere the adapter goes."""
    original = load_file(made.base / "model.safetensors")
    rewrite(spoilt, lambda weights: weights.update({name: original[name].bfloat16() for name in weights}))
    assert {"it.effect", "it.carried"} <= set(made.compare(spoilt))


def test_two_layers_tensors_exchanged(made: Exported, spoilt: Path) -> None:
    def exchange(weights: dict[str, torch.Tensor]) -> None:
        one, other = (f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1))
        weights[one], weights[other] = weights[other], weights[one]

    rewrite(spoilt, exchange)
    assert failed(parity.check_structure(spoilt, made.base)) == [], "names and shapes are as they should be"
    assert parity.check_weights(spoilt, made.base, made.adapter)[0]["value"] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ], "though a tiny model says hardly anything else"


@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0], ids=["the wrong sign", "alpha halved", "alpha doubled"])
def test_an_adapter_merged_at_another_scale(made: Exported, tmp_path: Path, scale: float) -> None:
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": scale * config["lora_alpha"]}))
    merge.write_merged(made.base, adapter, tmp_path / "merged")
    assert "it.carried" in made.compare(tmp_path / "merged")


def test_weights_that_are_not_numbers(made: Exported, spoilt: Path) -> None:
    rewrite(spoilt, lambda weights: weights.update({"model.norm.weight": torch.full((96,), torch.nan).half()}))
    said = token_logps(outputs.load(spoilt, CPU), made.asked.rows, outputs.LAST)
    checks = parity.check_parity("it", said, made.tuned.logps, made.plain)
    assert {"it.mean_kl", "it.effect", "it.carried"} <= set(failed(checks))
    assert "NaN" not in json.dumps(checks), "which JSON does not know"


def test_the_answers_are_held_against_those_of_the_adapter_on_the_base() -> None:
    """Ends of turn lost, another language, nothing said: one answer may come out otherwise, not two."""
    prompts = ["Hello there", "你好", "Why?"]
    good = [Answer("Hello you", [1, 2], True), Answer("你好呀", [3, 4], True), Answer("Because.", [5, 6], True)]

    def check(answers: list[Answer]) -> list[str]:
        return failed(parity.check_answers("it", Outputs([], answers), Outputs([], good), prompts, LIMITS["bfloat16"]))

    assert check(good) == []
    one_otherwise = Answer("你好", [1, 2], False)
    assert check([one_otherwise, *good[1:]]) == []
    assert check([one_otherwise, Answer("hello", [3, 4], False), good[2]]) == [
        "it.answers_ended",
        "it.answers_in_language",
    ]
    assert check([Answer("", [1], True), *good[1:]]) == ["it.answers_not_empty"]
    assert check([Answer(answer.text, [9, *answer.ids], True) for answer in good]) == ["it.greedy_tokens"]


def test_a_faint_adapter_is_not_asked_for_what_16_bits_cannot_hold(made: Exported) -> None:
    """After a step or two of training: of so small a change bfloat16 keeps a part, and that is nobody's mistake."""
    tuned = [plain + 1e-4 * torch.sin(torch.arange(plain.shape[-1])) for plain in made.plain]
    tuned = [logps.log_softmax(-1) for logps in tuned]
    assert 0 < parity.mean_kl(tuned, made.plain) < parity.FAINT
    checks = parity.check_parity("it", made.plain, tuned, made.plain)
    assert failed(checks) == []
    assert next(check for check in checks if check["name"] == "it.carried")["value"] == pytest.approx(0, abs=0.1)


# -------------------------------------------------------------------------------------------------------------- files


def test_a_bit_that_the_disk_lost(made: Exported, spoilt: Path) -> None:
    shard = sorted(spoilt.glob("*.safetensors"))[0]
    with open(shard, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert failed(parity.check_structure(spoilt, made.base)) == [] and made.compare(spoilt) == []
    assert failed(parity.check_weights(spoilt, made.base, made.adapter)) == ["merged.weights"]


def test_a_shard_that_is_cut_short(made: Exported, spoilt: Path) -> None:
    """A failed check, not a traceback; also where nothing is left of it."""
    shard = sorted(spoilt.glob("*.safetensors"))[1]
    for size in (shard.stat().st_size - 1, 4, 0):
        with open(shard, "r+b") as file:
            file.truncate(size)
        checks = parity.check_structure(spoilt, made.base)
        assert failed(checks) == ["merged.shards"]
        assert shard.name in checks[0]["value"][0]


def test_a_shard_that_is_missing_and_one_too_many(made: Exported, spoilt: Path) -> None:
    first = sorted(spoilt.glob("*.safetensors"))[0]
    shutil.copyfile(first, spoilt / "model-00009-of-00009.safetensors")
    checks = parity.check_structure(spoilt, made.base)
    assert failed(checks) == ["merged.shards"] and checks[0]["value"] == ["model-00009-of-00009.safetensors"]
    (spoilt / "model-00009-of-00009.safetensors").unlink()
    first.unlink()
    assert failed(parity.check_structure(spoilt, made.base)) == ["merged.shards"]


def test_an_index_that_names_another_place(made: Exported, spoilt: Path) -> None:
    index = spoilt / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    checks = parity.check_structure(spoilt, made.base)
    assert failed(checks) == ["merged.shards"] and "model.norm.weight" in checks[0]["value"][0]


def test_a_tensor_of_another_shape(made: Exported, spoilt: Path) -> None:
    rewrite(spoilt, lambda weights: weights.update({"model.norm.weight": torch.ones(95).half()}))
    checks = parity.check_structure(spoilt, made.base)
    assert failed(checks) == ["merged.tensors"] and checks[1]["value"] == ["model.norm.weight"]


def test_a_second_adapter_in_the_folder(made: Exported, spoilt: Path, tmp_path: Path) -> None:
    """TRL's `ref`: beside the merged model, as a folder of the adapter, and among its tensors."""
    (spoilt / "ref").mkdir()
    assert failed(parity.check_structure(spoilt, made.base)) == ["merged.shards"]
    name = json.loads((made.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")

    def wrong() -> list[str]:
        return failed(parity.check_adapter_files(adapter, made.adapter, name))

    assert wrong() == []
    (adapter / "ref").mkdir()
    assert wrong() == ["adapter.foreign_tensors"]
    (adapter / "ref").rmdir()
    weights = load_file(adapter / merge.WEIGHTS)
    save_file(weights | {"base_model.model.q_proj.lora_A.ref.weight": torch.ones(1)}, adapter / merge.WEIGHTS)
    assert wrong() == ["adapter.foreign_tensors", "adapter.weights_equal"]


def test_an_adapter_that_names_the_4bit_base_or_is_cut_short(made: Exported, tmp_path: Path) -> None:
    assert failed(parity.check_adapter_files(made.adapter, made.adapter, "Qwen/Qwen3-1.7B")) == ["adapter.base"]
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9, "base_model_name_or_path": "x"}))
    checks = parity.check_adapter_files(adapter, made.adapter, "x")
    assert failed(checks) == ["adapter.config_differs"] and checks[-1]["value"] == ["lora_alpha"]
    assert failed(parity.check_adapter_files(adapter, made.adapter, "x", "main"))[0] == "adapter.revision"
    (adapter / merge.WEIGHTS).write_bytes((adapter / merge.WEIGHTS).read_bytes()[:-1])
    assert failed(parity.check_adapter_files(adapter, made.adapter, "x")) == ["adapter.readable"]


def test_quantised_or_32_bit_weights_in_a_merged_model(made: Exported, spoilt: Path) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    wrong = {"quantization_config": {"load_in_4bit": True}, "dtype": "float32", "tie_word_embeddings": False}
    (spoilt / "config.json").write_text(json.dumps(config | wrong))
    checks = parity.check_structure(spoilt, made.base)
    assert failed(checks) == ["merged.dtype", "merged.tied", "merged.quantised", "merged.config_differs"]
    (spoilt / "config.json").write_text(json.dumps(config))
    rewrite(spoilt, lambda weights: weights.update({"model.norm.weight": torch.ones(96)}))
    assert failed(parity.check_structure(spoilt, made.base)) == ["merged.dtype"], "which the config does not say"


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-5}, {"max_position_embeddings": 64}, {"eos_token_id": 5}, {"rope_parameters": None}]
)
def test_a_config_that_short_answers_hardly_show(made: Exported, spoilt: Path, change: dict[str, Any]) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | change))
    checks = parity.check_structure(spoilt, made.base)
    assert failed(checks) == ["merged.config_differs"] and checks[-2]["value"] == list(change)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "chat_template.json"])
def test_a_file_that_would_be_loaded_in_the_models_place(made: Exported, spoilt: Path, name: str) -> None:
    (spoilt / name).write_text("{}")
    checks = parity.check_structure(spoilt, made.base)
    assert failed(checks) == ["merged.shards"] and checks[0]["value"] == [name]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", merge.TEMPLATE])
def test_a_tokenizer_file_that_is_missing_or_changed(made: Exported, spoilt: Path, name: str) -> None:
    files = merge.tokenizer_files(made.base, made.adapter)
    assert failed(parity.check_tokenizer_files("merged", spoilt, files)) == []
    (spoilt / name).write_bytes((spoilt / name).read_bytes() + b"\n")
    assert parity.check_tokenizer_files("merged", spoilt, files)[0]["value"] == [name]
    (spoilt / name).unlink()
    assert parity.check_tokenizer_files("merged", spoilt, files)[0]["value"] == [name]
    (spoilt / name).write_bytes(files[name])
    (spoilt / "special_tokens_map.json").write_text("{}")
    assert parity.check_tokenizer_files("merged", spoilt, files)[0]["value"] == ["special_tokens_map.json"]


def test_another_chat_template(made: Exported, spoilt: Path) -> None:
    from transformers import AutoTokenizer

    template = (spoilt / merge.TEMPLATE).read_text(encoding="utf-8")
    (spoilt / merge.TEMPLATE).write_text(template.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")
    checks = parity.check_template("merged", AutoTokenizer.from_pretrained(spoilt), made.tokenizer)
    assert failed(checks) == ["merged.template", "merged.template_tokens_differ"]
