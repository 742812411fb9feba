"""What only TRL, transformers and this machine know of the settings is said before any data are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dpo_cli.errors import FAILED, USAGE, DpoError
from dpo_cli.recipe import Recipe, load
from dpo_cli.run import Run
from dpo_cli.train.config import rehearse, trl_config
from dpo_cli.train.rows import check_fills_a_step

Loaded = Callable[..., Recipe]
MINIMAL = "model: {id: 'builtin:tiny-qwen3', load_in_4bit: false}\ndata: {sources: [{id: c/d}]}\n"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(MINIMAL, encoding="utf-8")
    return lambda *settings: load(tmp_path / "r.yaml", list(settings))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lora.target_modules=[q_proj, lm_head]", "tie_word_embeddings"),
        ("model.max_length=100000", "model.max_length"),
        ("train.tf32=true", "train.tf32"),
        ("train.accelerator_config={split: 1}", "split"),
        ("train.accelerator_config=./nowhere.json", "nowhere.json"),
        ("train.fsdp=full_shards", "full_shards"),
        ("train.optim_args=momentum=fast", "fast"),
        ("train.lr_scheduler_kwargs={num_decay_steps: 3, decay_type: steep}", "steep"),
    ],
)
def test_a_setting_that_can_not_be_used_here(loaded: Loaded, tmp_path: Path, setting: str, says: str) -> None:
    more = ["train.optim=sgd"] if "optim_args" in setting else []
    more += ["train.method=orpo"] if "lm_head" in setting else []
    more += ["train.lr_scheduler_type=warmup_stable_decay"] if "decay" in setting else []
    with pytest.raises(DpoError) as caught:
        rehearse(loaded(setting, *more), Run(tmp_path / "runs" / "r", {}))
    assert caught.value.exit_code == (USAGE if setting.startswith("train.") else FAILED)
    assert says in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        *((f"train.method={method}",) for method in ("dpo", "simpo", "cpo", "orpo", "kto")),
        ("train.optim=adamw_8bit", "train.lr_scheduler_type=cosine", "train.warmup_steps=0.1"),
        ("train.eval_strategy=steps", "train.lr_scheduler_type=reduce_lr_on_plateau", "train.max_steps=3"),
        ("train.optim=sgd", "train.optim_args=momentum=0.9", "train.lr_scheduler_type=inverse_sqrt"),
    ],
)
def test_settings_that_can_be_used(loaded: Loaded, tmp_path: Path, settings: tuple[str, ...]) -> None:
    rehearse(loaded(*settings), Run(tmp_path / "runs" / "r", {}))


def test_rows_that_fill_no_step_are_not_all_dropped(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = loaded("train.dataloader_drop_last=true", "train.gradient_accumulation_steps=4")
    check_fills_a_step(recipe, 4)
    check_fills_a_step(loaded("train.gradient_accumulation_steps=4"), 3)
    with pytest.raises(DpoError, match="a step takes 4 rows, there are 3") as caught:
        check_fills_a_step(recipe, 3)
    assert "train.dataloader_drop_last" in str(caught.value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DpoError, match="a step takes 8 rows, there are 7"):
        check_fills_a_step(recipe, 7)


def test_trls_config_has_the_recipes_own_keys(loaded: Loaded, tmp_path: Path) -> None:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

    run = Run(tmp_path / "runs" / "r", {})
    args = trl_config(loaded("seed=7", "name=mine", "model.max_length=96"), run, DPOConfig, 0)
    assert (args.seed, args.data_seed, args.run_name, args.max_length) == (7, 7, "mine", 96)
    assert trl_config(loaded("name=mine", "train.run_name=of-a-sweep"), run, DPOConfig, 0).run_name == "of-a-sweep"
    for metric, greater in (("eval_rewards/accuracies", True), ("eval_zh_loss", False)):
        stopping = (f"engine.early_stopping={{metric: {metric}}}", "train.eval_strategy=steps", "train.eval_steps=3")
        args = trl_config(loaded(*stopping), run, DPOConfig, 0)
        assert (args.greater_is_better, args.save_strategy, args.save_steps) == (greater, "steps", 3)
        assert args.restore_callback_states_from_checkpoint, "else a resumed run forgets how long it has waited"
    with pytest.raises(DpoError, match="the installed TRL has no argument beta") as caught:
        trl_config(loaded("train.beta=0.3"), run, SFTConfig, 0)  # as a TRL of another version
    assert "train.beta" in str(caught.value)
