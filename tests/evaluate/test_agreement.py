"""`eval` against TRL: the rewards of a trained adapter are those that TRL's own trainer logs on the same rows."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import backends, models
from dpo_cli.evaluate.pairs import Scored, pair_metrics, score_pairs
from dpo_cli.recipe import Recipe
from dpo_cli.records import Pair
from tests.random_model import write_random_qwen3

BETA = 0.3
LONGEST = 64  # tokens of prompt + answer
WORDS = "amber basket candle dragon engine falcon garden harbour island jungle kettle ladder marble".split()  # noqa: SIM905


def pair(name: str, prompt: str, chosen: str, rejected: str, language: str = "en") -> Pair:
    return Pair(
        id=name,
        prompt=[{"role": "user", "content": prompt}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        language=language,
        source="test",
        chat_template_kwargs={"enable_thinking": False},
    )


def training_pairs() -> list[Pair]:
    rng = random.Random(1)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))

    return [pair(f"train-{number}", text(), text().upper(), text()) for number in range(12)]


def held_out() -> list[Pair]:
    return [
        pair("english", "Name two things.", "A BASKET and a candle.", "engine engine"),
        pair("lost", "Name two things.", "engine engine", "A BASKET AND A CANDLE."),
        pair("chinese", "请用一句话介绍长城。", "长城是中国古代的防御工程，绵延万里。", "我不知道。", "zh"),
        pair("mixed", "Translate: harbour", "港口 harbour, 海港。", "A HARBOUR.", "zh"),
        pair("truncated", "Say much.", "DRAGON " * 60, "kettle " * 60),
        Pair(
            **asdict(pair("turns", "unused", "AMBER LADDER", "amber"))
            | {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Name one."},
                    {"role": "assistant", "content": "Marble."},
                    {"role": "user", "content": "Another."},
                ]
            }
        ),
        pair("tie", "Name a thing.", "A ladder.", "A ladder."),
    ]


@dataclass(frozen=True)
class Agreed:
    """One training: what TRL logged of each held-out pair, in their order, and what `eval` finds of them."""

    theirs: list[dict[str, float]]
    ours: list[Scored]
    loss_type: str


def train(folder: Path, loss_type: str, adapter: Path | None = None) -> tuple[Path, Agreed]:
    """A few steps of TRL's DPOTrainer from the base or from `adapter`; (the trained adapter, what both say)."""
    import datasets
    import torch
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    recipe = Recipe.model_validate(
        {
            "name": "agreement",
            "seed": 1,
            "model": {
                "id": str(write_random_qwen3(folder / "model")),
                "load_in_4bit": False,
                "dtype": "float32",
                "max_length": LONGEST,
                "adapter": None if adapter is None else str(adapter),
            },
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
            "data": {"sources": [{"id": "x"}]},
        }
    )
    model, tokenizer = models.load_for_training(recipe, backends.Backend("hf", "a test"))
    rows = {one.id: datasets.Dataset.from_list([one.to_json()]) for one in held_out()}
    trainer: Any = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, seed=1,
            beta=BETA, loss_type=[loss_type], learning_rate=3e-3, max_steps=6, per_device_train_batch_size=2,
            max_length=LONGEST, save_strategy="no", logging_strategy="no", gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list([one.to_json() for one in training_pairs()]),
        eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    if adapter is None:
        trainer.model.delete_adapter("ref")  # a copy of the start, which is the base
    trainer.train()
    trainer.evaluate()
    theirs = [row for row in trainer.state.log_history if "eval_rewards/chosen" in row]
    trained = folder / "adapter"
    trainer.model.save_pretrained(trained, selected_adapters=["default"])
    tuned, tokenizer = models.load_tuned(recipe, trained)
    [ours] = score_pairs(tuned, tokenizer, [held_out()], LONGEST, batch_size=3)
    return trained, Agreed(theirs, ours, loss_type)


@pytest.fixture(scope="module", params=["sigmoid", "sigmoid_norm", "from an adapter"])
def agreed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Agreed:
    folder = tmp_path_factory.mktemp("agreement")
    if request.param != "from an adapter":
        return train(folder, request.param)[1]
    first, _ = train(folder / "first", "sigmoid")
    return train(folder / "second", "sigmoid", adapter=first)[1]


def test_rewards_and_log_probabilities_of_each_pair_are_those_that_trl_logs(agreed: Agreed) -> None:
    assert len(agreed.theirs) == len(agreed.ours) == len(held_out())
    for theirs, ours in zip(agreed.theirs, agreed.ours, strict=True):
        chosen, rejected = BETA * ours.chosen_drift, BETA * ours.rejected_drift
        found = {
            "eval_logps/chosen": ours.policy_chosen,
            "eval_logps/rejected": ours.policy_rejected,
            "eval_rewards/chosen": chosen,
            "eval_rewards/rejected": rejected,
            "eval_rewards/margins": chosen - rejected,
        }
        logged = {name: theirs[name] for name in found}
        assert found == pytest.approx(logged, rel=1e-5, abs=1e-4), ours.id
    cut = agreed.ours[4]
    assert cut.id == "truncated" and cut.chosen_tokens == cut.rejected_tokens < LONGEST
    moved = [abs(BETA * ours.chosen_drift) for ours in agreed.ours]
    assert min(moved) > 1e-3 and max(moved) > 0.1  # so that more than the reference was compared


def test_lengths_are_those_that_the_loss_divides_by(agreed: Agreed) -> None:
    """sigmoid_norm: -log sigmoid(β (drift per token of chosen - of rejected)); sigmoid has the sums."""
    for theirs, ours in zip(agreed.theirs, agreed.ours, strict=True):
        norm = agreed.loss_type == "sigmoid_norm"
        lengths = (ours.chosen_tokens, ours.rejected_tokens) if norm else (1, 1)
        margin = BETA * (ours.chosen_drift / lengths[0] - ours.rejected_drift / lengths[1])
        name = next(key for key in theirs if key.endswith("_loss"))
        assert math.log1p(math.exp(-margin)) == pytest.approx(theirs[name], abs=1e-4), ours.id


def test_accuracy_is_trls_but_for_ties_which_count_half(agreed: Agreed) -> None:
    figures = pair_metrics(agreed.ours, BETA, seed=1)
    right = [row["eval_rewards/accuracies"] for row in agreed.theirs]
    assert 0 < sum(right[:-1]) < len(right) - 1  # some right, some wrong
    assert right[-1] == 0  # the tie

    def by_prompt(values: list[float]) -> float:
        """A prompt counts once, with the mean of its pairs."""
        groups: dict[str, list[float]] = {}
        for scored, value in zip(agreed.ours, values, strict=True):
            groups.setdefault(scored.prompt, []).append(value)
        return sum(sum(group) / len(group) for group in groups.values()) / len(groups)

    accuracy = by_prompt([*right[:-1], 0.5])
    assert figures["reward_accuracy"]["value"] == pytest.approx(accuracy, abs=1e-6)
    margin = by_prompt([row["eval_rewards/margins"] for row in agreed.theirs])
    assert figures["margin"]["value"] == pytest.approx(margin, abs=1e-4)
