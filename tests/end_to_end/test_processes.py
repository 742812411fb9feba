"""Several processes by `accelerate launch`: one writes, all train, and the figures are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.job import open_run
from tests import program

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


# A desktop or another training on the card of one process. Each says at its end whether it is still in their group.
ONE_HAS_LESS = """
import atexit, os
import torch.distributed
from dpo_cli.cli import main
from dpo_cli.train import engine
if os.environ["RANK"] == "1":
    engine.available_memory = lambda recipe: 545 * 2**20
atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))
main()
"""


def options(*settings: str) -> list[str]:
    return [part for one in settings for part in ("--set", one)]


def launch(runs: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --num_processes 2 -m dpo_cli train` on two CPU processes, which talk through gloo."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.run(
        [*launcher, "-m", "dpo_cli", "train", str(SMOKE), "--runs-dir", str(runs), *options(*settings)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def logged(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "smoke" / "train" / "log.jsonl").read_text().splitlines()]


def adapter(runs: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(runs / "smoke" / "train" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("by", ["environment", pytest.param("launcher", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_and_the_adapter_of_one(by: str, tmp_path: Path, command: Any) -> None:
    together = (
        "train.max_steps=4",
        "train.logging_steps=1",
        "train.eval_strategy=steps",
        "train.eval_steps=4",
        "train.per_device_train_batch_size=2",
        "train.per_device_eval_batch_size=1",  # transformers' means are over batches
        "engine.token_budget=150",  # one or two pairs: each process alone would take other passes
        "data.total=48",
        "data.eval_size=24",
    )
    shared = (*together, "train.gradient_accumulation_steps=2")
    one, two = tmp_path / "one", tmp_path / "two"
    command("train", SMOKE, "--runs-dir", one, *options(*together, "train.gradient_accumulation_steps=4"))
    if by == "launcher":
        both = [launch(two, *shared)]
    else:
        both = ranks("-m", "dpo_cli", "train", SMOKE, "--runs-dir", two, *options(*shared))
    assert all(one.returncode == 0 for one in both), both
    assert sum(one.stdout.count("8 a step, on cpu") for one in both) == 1, "one process talks"

    for row, same in zip(logged(two), logged(one), strict=True):
        assert row["step"] == same["step"]
        for name in ("loss", "rewards/margins", "eval_loss", "eval_zh_rewards/margins"):
            assert row.get(name) == pytest.approx(same.get(name), abs=1e-5)
    weights, same_weights = adapter(two), adapter(one)
    assert weights.keys() == same_weights.keys()
    # In norm: of a gradient near zero, Adam's first steps make as much as of any other, whatever its last digit is.
    apart = sum((weights[name] - same_weights[name]).square().sum().item() for name in weights)
    assert apart**0.5 < 1e-4 * sum(one.square().sum().item() for one in same_weights.values()) ** 0.5
    record = json.loads((two / "smoke" / "manifest.json").read_text())["stages"]["train"]
    assert (record["status"], record["processes"]) == ("complete", 2)
    loaded, run = open_run(SMOKE, list(shared), two)
    assert run.fresh("train", loaded), "every other command takes it"


def ranks(*arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Two processes as `accelerate launch` starts them, without the launcher, which ends one with the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in ("0", "1"):
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(program.python(*arguments, env=env, **pipes))
    try:
        said = [one.communicate() for one in started]
    finally:
        for one in started:
            one.kill()
    return [subprocess.CompletedProcess(one.args, one.returncode, *out) for one, out in zip(started, said, strict=True)]


def test_an_error_in_one_process_ends_the_others(tmp_path: Path) -> None:
    settings = options("data.filters.short.min_chars=100000", "data.filters.short.min_han=100000")
    both = ranks("-m", "dpo_cli", "train", SMOKE, "--runs-dir", tmp_path, *settings)
    assert all(one.returncode != 0 for one in both)
    assert sum(one.stderr.count("error: nothing is left of 600 prompts") for one in both) == 1


def test_where_one_process_has_less_memory_all_take_what_fits_it(tmp_path: Path) -> None:
    """With passes of different sizes each would wait for the other's."""
    settings = ("train.max_steps=1", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1")
    few = options(*settings, "data.total=40", "data.eval_size=8")
    both = ranks("-c", ONE_HAS_LESS, "train", SMOKE, "--runs-dir", tmp_path, *few)
    assert all(one.returncode == 0 for one in both), both
    assert ["in a group: False" in one.stdout for one in both] == [True, True], "else one may abort at its exit"
    taken = json.loads((tmp_path / "smoke" / "manifest.json").read_text())["stages"]["train"]["engine"]
    assert 0 < taken["token_budget"] < 1024
