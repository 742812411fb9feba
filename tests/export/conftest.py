from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from dpo_cli.export import merge, outputs
from dpo_cli.export.outputs import Expected
from dpo_cli.inference import token_logps
from tests.export.made import CPU, TINY, Exported, asked, copy, store, with_random_lora, write_merged
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The built-in model (tied embeddings, heads of 16) with a LoRA of random weights, merged into several shards."""
    folder = tmp_path_factory.mktemp("made")
    targets = ["q_proj", "v_proj", "down_proj"]
    with_random_lora(outputs.load(TINY, CPU), folder / "adapter", std=0.02, lora_alpha=8, target_modules=targets)
    shutil.copyfile(TINY / merge.TEMPLATE, folder / "adapter" / merge.TEMPLATE)
    merged = write_merged(folder / "adapter", folder / "merged", shard_bytes=150_000)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    probes = asked(tokenizer)
    plain = token_logps(outputs.load(TINY, CPU), probes.rows, outputs.LAST)
    tuned = outputs.collect(outputs.load(TINY, CPU, adapter=folder / "adapter"), probes, tokenizer)
    return Exported(TINY, merged, Expected(probes, plain, tuned), folder / "adapter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the built-in model, to be made odd."""
    return copy(TINY, tmp_path / "base")


@pytest.fixture
def spoilt(made: Exported, tmp_path: Path) -> Path:
    """A copy of the merged model, to be spoilt."""
    return copy(made.merged, tmp_path / "merged")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An output matrix of its own, heads of 128 as in every real Qwen3, rows that K-quants' blocks of 256 fill."""
    config = Qwen3Config(
        vocab_size=2100,  # more rows than the tokenizer has tokens
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=2039, pad_token_id=2040,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("untied")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).float().eval()
    probes = asked(AutoTokenizer.from_pretrained(TINY))
    plain = token_logps(model, probes.rows, outputs.LAST)
    store(model, folder / "untouched")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                left, right = (torch.randn(size, 2, generator=draw) for size in weight.shape)
                weight.add_(left @ right.T, alpha=0.02)
    tuned = token_logps(model, probes.rows, outputs.LAST)
    store(model, folder / "merged")
    wanted = outputs.Expected(probes, plain, outputs.Outputs(tuned, []))
    return Exported(folder / "untouched", folder / "merged", wanted)


@pytest.fixture(params=[pytest.param("made", marks=pytest.mark.slow), "untied"])  # the smoke run exports a tied one
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.gguf"
