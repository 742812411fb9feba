"""Bases and adapters with something wrong in them are refused by name when they are loaded, not trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_cli import adapters, backends, chat, models, smoke
from dpo_cli.errors import DpoError
from dpo_cli.models import load_config
from dpo_cli.recipe import Lora, Recipe
from dpo_cli.train import config
from dpo_cli.train.config import refuse_cpu
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

Tensors = dict[str, torch.Tensor]


def recipe(model: Path | str, **engine: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"id": str(model), "load_in_4bit": False, "max_length": 128},
            "data": {"sources": [{"id": "nobody/none"}]},
            "engine": engine,
        }
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny model in a folder of its own, to be damaged."""
    return Path(shutil.copytree(smoke.resolve("builtin:tiny-qwen3"), tmp_path / "base"))


def edit(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def rewrite(base: Path, change: Callable[[Tensors], Tensors]) -> None:
    weights = load_file(base / "model.safetensors")
    save_file(change(weights), base / "model.safetensors", metadata={"format": "pt"})


def renamed(base: Path) -> None:
    rewrite(base, lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()})


def without_norms(base: Path) -> None:
    rewrite(base, lambda weights: {name: one for name, one in weights.items() if "q_norm" not in name})


def with_a_layer_more(base: Path) -> None:
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"] + 1
    edit(base / "config.json", num_hidden_layers=layers, layer_types=["full_attention"] * layers)


def without_a_head(base: Path) -> None:
    edit(base / "config.json", tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            renamed,
            "such as lm_head|such as model.embed_tokens.weight; they hold others that it has not, such as module.",
        ),
        (without_norms, "lack 3 tensors of the model, such as model.layers.0.self_attn.q_norm.weight"),
        (with_a_layer_more, "such as model.layers.3.input_layernorm.weight"),
        (without_a_head, "lack 1 tensors of the model, such as lm_head.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_would_be_random_are_refused_by_name(
    base: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(base)
    with pytest.raises(DpoError, match=named):
        models.load_base(recipe(base))


def test_tied_weights_may_be_stored_once_or_twice(base: Path) -> None:
    models.load_base(recipe(base))
    rewrite(base, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    models.load_base(recipe(base))


def test_stored_names_are_those_of_one_file_or_of_an_index(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    assert models.stored_names(str(base), None) == set(weights)
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models.stored_names(str(base), None) == set(weights)


def test_a_pickle_is_not_loaded(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(DpoError, match="safetensors"):
        models.load_base(recipe(base))


def test_a_models_own_code_is_not_run_whatever_one_answers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    trace = tmp_path / "it ran"
    (base / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(base / "config.json", model_type="own", auto_map=auto, architectures=["Model"])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(DpoError):
        models.load_base(recipe(base))
    assert not trace.exists()


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused_with_both_sizes(base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [token | {"id": rows + n, "content": f"<extra_{n}>"} for n in range(20)]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(DpoError, match=f"has {rows + 20:,} tokens, its model only {rows:,} rows"):
        models.load_for_training(recipe(base), backends.Backend("hf", ""))


def test_of_named_templates_the_default_is_taken(base: Path) -> None:
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    (base / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": template + "{# tools #}"}]
    edit(base / "tokenizer_config.json", chat_template=named)
    assert chat.load_tokenizer(recipe(base)).chat_template == template
    edit(base / "tokenizer_config.json", chat_template=named[1:])
    with pytest.raises(DpoError, match="no chat template"):
        chat.load_tokenizer(recipe(base))


def test_what_the_template_writes_behind_an_answer_ends_it_though_the_model_names_another(base: Path) -> None:
    """A base model: its generation config and tokenizer say <|endoftext|>, its template <|im_end|>."""
    edit(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = chat.load_tokenizer(recipe(base))
    text, turn = (int(str(tokenizer.convert_tokens_to_ids(token))) for token in ("<|endoftext|>", "<|im_end|>"))
    assert chat.turn_end(tokenizer) == turn
    assert chat.end_tokens(text, tokenizer) == chat.end_tokens([text], tokenizer) == sorted([text, turn])
    assert chat.unnamed_end(GenerationConfig(eos_token_id=text), tokenizer) == "<|im_end|>"
    assert chat.unnamed_end(GenerationConfig(eos_token_id=[text, turn]), tokenizer) is None
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    assert chat.turn_end(tokenizer) == turn, "not the token right before the answer, as Mistral's template has one"
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert chat.turn_end(tokenizer) is None
    assert chat.end_tokens(text, tokenizer) == [text]


PLAIN = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj"],
    "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}, "init_lora_weights": True,
}  # fmt: skip


def test_a_plain_lora_is_plain_however_it_was_drawn() -> None:
    for init in (None, True, False, "gaussian"):
        assert adapters.not_plain(PLAIN | {"init_lora_weights": init}) == []


@pytest.mark.parametrize(
    "special",
    [
        {"init_lora_weights": "pissa"}, {"loftq_config": {"loftq_bits": 4}}, {"use_dora": True},
        {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 4}}, {"target_modules": ".*q_proj"},
        {"peft_type": "IA3"}, {"a_switch_of_a_later_peft": True},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_is_another_thing_on_the_plain_base_is_named(special: dict[str, Any]) -> None:
    [name] = special
    assert any(name in words for words in adapters.not_plain(PLAIN | special))


def test_a_pissa_adapter_is_refused_as_a_start(tmp_path: Path) -> None:
    """Its base was changed when it was made: on the plain one it is another model, seen as 0.4 of a logit."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smoke.resolve("builtin:tiny-qwen3"))
    made = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    made.save_pretrained(str(tmp_path / "pissa"))
    asked = recipe("builtin:tiny-qwen3")
    with pytest.raises(DpoError, match="init_lora_weights: pissa"):
        adapters.lora_of(asked, tmp_path / "pissa")


def test_a_lora_is_the_recipes_and_is_read_back_as_it_is(tmp_path: Path) -> None:
    lora = Lora(r=4, alpha=12, rslora=True, dropout=0.25, bias="lora_only", target_modules=["down_proj", "q_proj"])
    asked = recipe("builtin:tiny-qwen3").model_copy(update={"lora": lora})
    model, _ = models.load_for_training(asked, backends.Backend("hf", ""))
    adapted = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert adapted.scaling["default"] == 12 / 4**0.5  # type: ignore[index]
    model.save_pretrained(str(tmp_path))
    assert adapters.lora_of(asked, tmp_path) == lora


def test_an_adapter_that_does_not_fit_or_is_not_whole_is_named(tmp_path: Path) -> None:
    asked, hf = recipe("builtin:tiny-qwen3"), backends.Backend("hf", "")
    model, _ = models.load_for_training(asked, hf)
    model.save_pretrained(str(tmp_path / "sft"))
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"adapter": str(tmp_path / "sft")})})
    file = tmp_path / "sft" / "adapter_model.safetensors"
    save_file({name: one[..., :-1].contiguous() for name, one in load_file(file).items()}, file)
    with pytest.raises(DpoError, match="an adapter of another model"):
        models.load_for_training(asked, hf)
    file.unlink()
    with pytest.raises(DpoError, match=r"is no LoRA adapter: it has no adapter_model\.safetensors"):
        models.load_for_training(asked, hf)


def test_the_reference_of_a_training_that_went_on_is_the_adapter_it_began_with(tmp_path: Path) -> None:
    asked, hf = recipe("builtin:tiny-qwen3"), backends.Backend("hf", "")
    model, _ = models.load_for_training(asked, hf)
    for name, strength in (("sft", 0.1), ("dpo", 0.2)):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(strength)
        model.save_pretrained(str(tmp_path / name))
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"adapter": str(tmp_path / "sft")})})
    tuned, _ = models.load_tuned(asked, tmp_path / "dpo")

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[5, 6, 7]])).logits

    before = logits(tuned)
    with models.as_reference(tuned):
        reference = logits(tuned)
    assert torch.equal(reference, logits(models.load_tuned(recipe("builtin:tiny-qwen3"), tmp_path / "sft")[0]))
    assert torch.equal(logits(tuned), before) and not torch.allclose(before, reference)


def test_later_stages_load_the_commits_that_train_recorded() -> None:
    asked = recipe("someone/base")
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"adapter": "someone/sft"})})
    pinned = models.as_trained(asked, {"revisions": {"someone/base": "a" * 40, "someone/sft": "b" * 40}})
    assert (pinned.model.revision, pinned.model.adapter_revision) == ("a" * 40, "b" * 40)
    assert models.as_trained(asked, {}) == asked


def test_a_large_model_on_a_cpu_stops_with_the_time_it_would_take(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_cpu(recipe(base), load_config(recipe(base)))  # the tiny model may
    edit(
        base / "config.json", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, layer_types=["full_attention"] * 28,
    )  # fmt: skip
    with pytest.raises(DpoError, match=r"0\.6B weights: on this CPU 1,000 pairs would take about \d+ (hours|days)"):
        refuse_cpu(recipe(base), load_config(recipe(base)))
    # 8 operations of 0.6B weights and 600,000 tokens, where ten products of 2 x 1024**3 take a tenth of a second.
    monkeypatch.setattr(config, "time", SimpleNamespace(perf_counter=iter([5.0, 5.1]).__next__))
    with pytest.raises(DpoError, match="about 4 hours"):
        refuse_cpu(recipe(base), load_config(recipe(base)))
    refuse_cpu(recipe(base, allow_cpu=True), load_config(recipe(base, allow_cpu=True)))


def test_a_model_that_does_not_fit_the_card_is_no_matter_of_its_id(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(DpoError, match="does not fit the memory that is free") as caught:
        models.load_base(recipe(base))
    assert "nvidia-smi" in str(caught.value.hint)
