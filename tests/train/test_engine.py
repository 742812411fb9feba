"""`engine` through the command: each part on and off gives the same training, and what a run takes is said and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke
from tests.train.runs import SMOKE, cut_short, dpo_cli, log, record
from typer.testing import Result

Train = Callable[..., Result]


# Few of the smoke recipe's pairs, four steps of them at most.
FEW = (
    "train.max_steps=4", "train.logging_steps=1", "train.per_device_train_batch_size=2", "data.total=32",
    "data.eval_size=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("prepared")
    assert dpo_cli("prepare", SMOKE, runs, *FEW).exit_code == 0
    return runs / "smoke"


@pytest.fixture
def train(prepared: Path, tmp_path: Path) -> Train:
    """`dpo-cli train`, each run of another name in one folder of runs."""

    def go(name: str, *settings: str) -> Result:
        if not (tmp_path / name).exists():
            shutil.copytree(prepared, tmp_path / name)
        return dpo_cli("train", SMOKE, tmp_path, f"name={name}", *FEW, *settings)

    return go


def taken(folder: Path) -> dict[str, Any]:
    return dict(record(folder)["engine"])


def logged(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the steps, and the held-out figures, all in one, without what tells the time."""
    rows = log(folder)
    figures = {key: value for row in rows for key, value in row.items() if key.startswith("eval_")}
    timed = ("runtime", "per_second")
    held_out = {key: value for key, value in figures.items() if not any(word in key for word in timed)}
    return [row for row in rows if "loss" in row], held_out


OFF = ("engine.shared_prefix=off", "engine.token_budget=off", "engine.reference_cache=off")


def test_every_part_alone_and_all_together_train_to_the_same_figures(train: Train, tmp_path: Path) -> None:
    runs = {
        "off": OFF,
        "shared": ("engine.shared_prefix=on", *OFF[1:]),
        "budget": (OFF[0], "engine.token_budget=400", OFF[2]),
        "cached": (*OFF[:2], "engine.reference_cache=on"),
        "checkpointed": (*OFF, "train.gradient_checkpointing=true"),
        "all": ("engine.shared_prefix=on", "engine.token_budget=400", "engine.reference_cache=on"),
    }
    for name, settings in runs.items():
        done = train(name, *settings, "train.max_steps=2", "train.eval_strategy=steps", "train.eval_steps=2")
        assert done.exit_code == 0, done.output
    stock, held_out = logged(tmp_path / "off")
    assert held_out.keys() >= {"eval_loss", "eval_zh_rewards/margins"}
    keys = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens", "learning_rate")
    for name in runs:
        rows, same_pairs = logged(tmp_path / name)
        assert same_pairs == pytest.approx(held_out, rel=1e-4, abs=1e-4), name
        for row, same in zip(rows, stock, strict=True):
            assert {key: row[key] for key in keys} == pytest.approx(
                {key: same[key] for key in keys}, rel=1e-4, abs=1e-5
            ), name
            # TRL logs the mean of its two micro-batches' means over tokens; a cut step is one batch, weighed by tokens.
            exact = 1e-2 if "budget" in name or name == "all" else 1e-4
            assert row["logits/rejected"] == pytest.approx(same["logits/rejected"], rel=exact, abs=1e-5), name
    assert [taken(tmp_path / name)["shared_prefix"] for name in runs] == [False, True, False, False, False, True]
    assert [taken(tmp_path / name)["token_budget"] for name in runs] == [None, None, 400, None, None, 400]
    assert [taken(tmp_path / name)["reference_cache"] for name in runs] == [False, False, False, True, False, True]
    assert [taken(tmp_path / name)["gradient_checkpointing"] for name in runs] == [False] * 4 + [True, False]


def test_the_reference_is_cached_where_pairs_are_seen_again_and_then_for_every_run(
    train: Train, tmp_path: Path
) -> None:
    once = train("once", "train.max_steps=1", "lora.dropout=0.1", "train.disable_dropout=false")
    assert once.exit_code == 0
    assert not taken(tmp_path / "once")["reference_cache"], "one epoch: computing it ahead wins nothing"
    assert "no shared prefix: LoRA's dropout would fall on both texts alike" in once.output
    assert not taken(tmp_path / "once")["shared_prefix"] and record(tmp_path / "once")["effective_lora_dropout"] == 0.1
    again = ("data.total=10", "data.languages=null", "train.max_steps=3")  # of 4 pairs
    first = train("first", *again)
    assert "reference of 10 of 10 pairs to compute" in first.output, first.output
    done = train("another", *again, "lora.r=4", "train.beta=0.3", "train.max_steps=2", "lora.dropout=0.1")
    assert "reference of 0 of 10 pairs to compute" in done.output
    assert taken(tmp_path / "another")["reference_cache"], "in one epoch too: it is there"
    assert taken(tmp_path / "another")["shared_prefix"] and record(tmp_path / "another")["effective_lora_dropout"] == 0


@pytest.fixture
def windowed(tmp_path: Path) -> Path:
    """The tiny model with attention through a sliding window, which can't be shared."""
    folder = shutil.copytree(smoke.resolve("builtin:tiny-qwen3"), tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    layers = ["sliding_attention"] * config["num_hidden_layers"]
    config |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_that_cannot_share_takes_the_stock_path_and_says_so_once(
    train: Train, tmp_path: Path, windowed: Path
) -> None:
    done = train("windowed", f"model.id={windowed}", "train.max_steps=1")
    assert done.exit_code == 0
    assert done.output.count("no shared prefix: its layers attend through a sliding window") == 1
    assert not taken(tmp_path / "windowed")["shared_prefix"]
    insisted = train("insisted", f"model.id={windowed}", "engine.shared_prefix=on")
    assert insisted.exit_code == 1
    assert "engine.shared_prefix" in insisted.stderr and "sliding window" in insisted.stderr


def test_losses_over_the_batch_stay_whole(train: Train, tmp_path: Path) -> None:
    done = train("aot", "train.loss_type=aot", "train.warmup_steps=500", "train.max_steps=1")
    assert "the warm-up takes 500 steps and the run 1" in " ".join(done.output.split())
    assert done.exit_code == 0 and "no token budget: the loss aot sorts" in done.output
    assert taken(tmp_path / "aot")["token_budget"] is None
    insisted = train("insisted", "train.loss_type=aot", "engine.token_budget=400")
    assert insisted.exit_code == 1 and "engine.token_budget" in insisted.stderr


def test_layers_are_computed_twice_only_where_the_memory_asks_for_it(train: Train, tmp_path: Path) -> None:
    assert train("roomy", "train.max_steps=2", "train.logging_steps=3").exit_code == 0
    assert not taken(tmp_path / "roomy")["gradient_checkpointing"]
    # Less than a process with torch and TRL takes: nothing fits, so the plan takes its smallest setting.
    settings = ("engine.memory_limit=0.3", "engine.preflight=false", "train.max_steps=2", "train.logging_steps=3")
    assert train("tight", *settings).exit_code == 0
    assert [row["step"] for row in log(tmp_path / "tight")] == [2], "the last step, between two logging steps"
    tight = taken(tmp_path / "tight")
    assert tight["gradient_checkpointing"] and tight["token_budget"] < taken(tmp_path / "roomy")["token_budget"]
    for row, same in zip(log(tmp_path / "tight"), log(tmp_path / "roomy"), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-5)


def test_a_sharing_that_computes_something_else_is_noticed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a backend that drops what keeps the texts apart: the rejected text would see the chosen one."""
    from dpo_cli.train import shared_prefix

    lay_out = shared_prefix._lay_out

    def mixed(*args: Any) -> Any:
        stream = lay_out(*args)
        assert stream
        for index, group in enumerate(stream.groups):
            stream.groups[index] = group._replace(prefix=group.ends[0])
        return stream

    monkeypatch.setattr(shared_prefix, "_lay_out", mixed)
    # Of too little memory the plan takes passes of the longest pair, which differs by whether its prompt is shared.
    settings = ("train.max_steps=1", "engine.memory_limit=0.3", "engine.preflight=false")
    done = train("mixed", *settings)
    assert done.exit_code == 0
    assert done.stderr.count("warning: the shared prefix is off: its log-probabilities differ") == 1
    assert not taken(tmp_path / "mixed")["shared_prefix"]
    monkeypatch.undo()
    assert train("stock", "engine.shared_prefix=off", *settings).exit_code == 0
    assert taken(tmp_path / "mixed") == taken(tmp_path / "stock")
    assert log(tmp_path / "mixed")[0]["logps/rejected"] == log(tmp_path / "stock")[0]["logps/rejected"]


def test_a_resumed_run_keeps_the_choice_it_was_begun_with(train: Train, tmp_path: Path) -> None:
    # Pairs come twice, so the cache pays.
    settings = ("train.save_steps=2", "data.total=10", "data.languages=null")
    assert train("resumed", *settings).exit_code == 0
    folder = tmp_path / "resumed"
    whole, chosen = log(folder), taken(folder)
    assert chosen["reference_cache"] and chosen["token_budget"]
    cut_short(folder, step=2)
    shutil.rmtree(tmp_path / ".reference_cache")
    done = train("resumed", *settings)
    assert "resumed from step 2" in done.output and "reference of 10 of 10 pairs to compute" in done.output
    assert taken(folder) == chosen
    keys = ("loss", "rewards/margins", "logps/chosen")
    assert [[row[key] for key in keys] for row in log(folder)] == [[row[key] for key in keys] for row in whole]
