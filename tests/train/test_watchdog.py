"""Each remark comes where it is true, once, and not on runs that are sound."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.recipe.errors import fields_at
from dpo_cli.recipe.train import DEFAULT_METHOD, train_model, trl_arguments
from dpo_cli.train import methods
from dpo_cli.train.watchdog import Watchdog, WatchdogCallback
from tests.train.runs import trl_trainer

Row = dict[str, float]
BETA, BATCH, STEPS, EVERY = 0.1, 24, 300, 5
TOKENS, SFT_LOSS, REFERENCE = 250, 1.2, -280.0  # tokens of an answer, its nats per token, nats of the whole


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# Loss of one pair by the rewards of its answers, as in TRL.
PAIR_LOSS: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda c, r: -log_sigmoid(c - r),
    "sigmoid_norm": lambda c, r: -log_sigmoid((c - r) / TOKENS),
    "hinge": lambda c, r: max(0.0, 1 - (c - r)),
    "ipo": lambda c, r: ((c - r) / BETA / TOKENS - 1 / (2 * BETA)) ** 2,
    "bco_pair": lambda c, r: -log_sigmoid(c) - log_sigmoid(-r),
    "apo_zero": lambda c, r: 1 - math.exp(log_sigmoid(c)) + math.exp(log_sigmoid(r)),
    "sft": lambda c, r: SFT_LOSS,
}
LOSSES = [*([name] for name in PAIR_LOSS), ["sigmoid", "sft"], ["sigmoid", "bco_pair", "sft"]]


def series(
    losses: list[str],
    chosen: Callable[[float], float],
    rejected: Callable[[float], float],
    spread: Callable[[float], float],
    *,
    seed: int = 0,
    steps: int = STEPS,
    epochs: float = 1.0,
) -> Iterator[Row]:
    """Log rows of a run whose mean rewards, and their spread from pair to pair, are functions of the progress 0..1."""
    rng = Random(f"{seed}")
    for step in range(EVERY, steps + 1, EVERY):
        at = step / steps
        pairs = [(rng.gauss(chosen(at), spread(at)), rng.gauss(rejected(at), spread(at))) for _ in range(EVERY * BATCH)]
        mean_chosen, mean_rejected = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        yield {
            "loss": sum(sum(PAIR_LOSS[name](*pair) for name in losses) for pair in pairs) / len(pairs),
            "rewards/chosen": mean_chosen,
            "rewards/rejected": mean_rejected,
            "rewards/margins": mean_chosen - mean_rejected,
            "rewards/accuracies": sum(c > r for c, r in pairs) / len(pairs),
            "logps/chosen": REFERENCE + mean_chosen / BETA + rng.gauss(0, 15),
            "epoch": epochs * at,
            "step": step,
        }


def healthy(losses: list[str], seed: int = 0, **options: Any) -> Iterator[Row]:
    """Like the published runs: rewards settle at -1.2 and -2.2, accuracy at three pairs in four.

    Losses that weigh each answer by itself make chosen answers likelier instead.
    """
    by_answer = {"bco_pair", "apo_zero"} & set(losses)

    def risen(at: float) -> float:
        return 1 - math.exp(-3 * at)

    def spread(at: float) -> float:
        return 0.02 + 0.9 * risen(at)

    ends = (0.5, -0.5) if by_answer else (-1.3, -2.3)
    return series(losses, lambda at: ends[0] * risen(at), lambda at: ends[1] * risen(at), spread, seed=seed, **options)


def remarks(rows: Iterator[Row] | list[Row], losses: list[str] | None = None, **options: Any) -> list[str]:
    watchdog = Watchdog(losses or ["sigmoid"], **{"beta": BETA, "batch": BATCH, "steps": STEPS, **options})
    return [remark for row in rows for remark in watchdog.observe(row)]


def flat(losses: list[str], spread: float, drift: float = 0.0, seed: int = 0) -> Iterator[Row]:
    return series(losses, lambda at: drift * at, lambda at: drift * at, lambda at: spread, seed=seed)


def steep(norms: dict[int, float], seed: int = 0) -> Iterator[Row]:
    """A sound run whose gradients have a lognormal norm, but for some rows."""
    rng = Random(seed)
    for index, row in enumerate(healthy(["sigmoid"], seed)):
        yield row | {"grad_norm": norms.get(index, 2 * math.exp(rng.gauss(0, 0.5)))}


SIGMOID = ["sigmoid"]
BAD: dict[str, tuple[Callable[[], Iterator[Row]], str]] = {
    "spike": (lambda: steep({30: 90.0, 35: math.inf, 40: 400.0}), "train.max_grad_norm below 90 cuts such steps"),
    "chosen as far as rejected": (lambda: series(SIGMOID, lambda at: -4 * at, lambda at: -4.05 * at, lambda at: 0.5),
                                  "as much as the rejected"),
    "chosen too far": (lambda: series(SIGMOID, lambda at: -8 * at, lambda at: -9.5 * at, lambda at: 1.0),
                       "further than sound runs"),
    "shortcut": (lambda: series(SIGMOID, lambda at: at, lambda at: -9 * at, lambda at: 0.05), "easier than quality"),
    "too small steps": (lambda: flat(SIGMOID, 0.01), "the steps are too small"),
    "random labels": (lambda: flat(SIGMOID, 0.3, drift=-0.5), "look random"),
    "random labels, no drift": (lambda: flat(SIGMOID, 0.3), "look random"),
    "too large steps": (lambda: flat(SIGMOID, 3.0), "the steps are too large"),
    "rewards run away": (lambda: series(SIGMOID, lambda at: 2 * at, lambda at: -20 * at, lambda at: 2 * at),
                         "only drifts from its reference"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
def test_a_sound_run_gets_no_remark(losses: list[str], seed: int) -> None:
    assert remarks(healthy(losses, seed), losses) == []


@pytest.mark.parametrize("norms", [{}, {5: 90.0}, {30: math.inf, 31: math.nan}], ids=["none", "early", "overflows"])
def test_norms_that_vary_or_overflow_are_no_spike(norms: dict[int, float]) -> None:
    assert remarks(steep(norms)) == []


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_once(name: str) -> None:
    rows, words = BAD[name]
    said = remarks(rows())
    assert sum(words in remark for remark in said) == 1, said


@pytest.mark.parametrize("scale", [1, 1000], ids=["short", "long"])
@pytest.mark.parametrize("losses", [["sigmoid"], ["sigmoid", "bco_pair"], ["sigmoid", "sft"]], ids="+".join)
@pytest.mark.parametrize("name", BAD)
def test_a_remark_names_its_step_and_recipe_lines_that_exist_in_three_lines(
    name: str, losses: list[str], scale: int
) -> None:
    rows = [{**row, "step": scale * int(row["step"])} for row in BAD[name][0]()]
    said = remarks(rows, losses, steps=scale * STEPS)
    assert said or losses != ["sigmoid"]
    for remark in said:
        assert re.match(r"step \d+: ", remark)
        assert len(textwrap.wrap(remark, 80, initial_indent="  ! ", subsequent_indent="    ")) <= 3, remark
        keys = re.findall(r"\b(?:model|lora|data|train|engine|eval|export)(?:\.[a-z_]+)+", remark)
        assert keys, remark
        for key in keys:
            section, name = key.rsplit(".", 1)
            assert name in fields_at(recipe.Recipe, tuple(section.split("."))), key


def test_the_losses_that_a_remark_proposes_are_accepted() -> None:
    rows = BAD["chosen too far"][0]
    proposed = re.search(r"train\.loss_type: \[(.+?)\]", " ".join(remarks(rows())))
    assert proposed
    train: Any = train_model("dpo")
    assert train(loss_type=proposed[1].split(", ")).loss_type == ["sigmoid", "sft"]
    mixed = " ".join(remarks(rows(), ["sigmoid", "sft"]))
    assert "train.loss_weights" in mixed and "train.loss_type" not in mixed


# --------------------------------------------------------------------------------------------------- it knows the loss


def test_a_loss_that_stays_at_069_is_normal_for_sigmoid_norm_and_not_for_sigmoid() -> None:
    rows = list(flat(["sigmoid"], 0.01))
    assert all(abs(row["loss"] - 0.69) < 0.01 for row in rows)
    assert remarks(rows, ["sigmoid_norm"]) == []
    assert len(remarks(rows, ["sigmoid"])) == 1


@pytest.mark.parametrize("losses", [one for one in LOSSES if set(one) - {"sft", "sigmoid_norm"}], ids="+".join)
def test_a_learning_rate_that_is_too_small_is_seen_with_every_paired_loss(losses: list[str]) -> None:
    said = remarks(flat(losses, 0.005), losses)
    assert len(said) == 1 and "train.learning_rate" in said[0]


def test_large_rewards_are_what_per_token_losses_make() -> None:
    for loss, drifts in (("ipo", False), ("sigmoid", True)):
        rows = list(series([loss], lambda at: -1.0 * at, lambda at: -30 * at, lambda at: 1 + 6 * at, epochs=9))
        assert any("drifts" in remark for remark in remarks(rows[30:], [loss])) == drifts


def test_apo_down_is_meant_to_make_chosen_less_likely() -> None:
    rows = list(BAD["chosen too far"][0]())
    assert not any("less likely" in remark for remark in remarks(rows, ["apo_down"]))


def test_ipos_margins_are_looked_at_in_nats() -> None:
    """Its pull does not weaken as rewards grow: two nats are much at any beta."""
    rows = list(series(["ipo"], lambda at: 0.0, lambda at: -0.02 * at, lambda at: 0.005))
    assert remarks(rows, ["ipo"], beta=0.01) == []
    assert any("the steps are too small" in remark for remark in remarks(rows, ["ipo"], beta=1.0))


# ---------------------------------------------------------------------------------------------- published runs' figures

# rewards/chosen, rewards/rejected, accuracy, loss, logps/chosen, beta: the cards that the thresholds quote. Sound are
# alignment-handbook's zephyr-7b and reproductions of it (chosen 70 to 370 nats or 0.25 to 1.4 times the reference's).
SOUND_CARDS = {
    "alignment-handbook/zephyr-7b-dpo-qlora": (-1.2325, -2.0565, 0.7656, 0.5325, -373.4, 0.01),
    "alignment-handbook/zephyr-7b-dpo-full": (-0.9469, -1.8932, 0.7656, 0.5028, -357.2, 0.01),
    "L1nkee/zephyr-7b-dpo-qlora": (-3.6825, -4.9601, 0.7540, 0.4757, -632.9, 0.01),
    "geonmin-kim/zephyr-7b-dpo-qlora": (-2.9667, -4.1000, 0.7445, 0.4873, -561.3, 0.01),
    "Wenboz/llama3-dpo-lora": (0.0154, -0.7979, 0.7280, 0.5193, -292.4, 0.1),
    "lewtun/dpo-model-lora": (-0.7320, -0.8303, 0.6172, 0.6534, -378.5, 0.1),
    "WDong/dpo_0621": (-1.0706, -5.6170, 0.9778, 0.1241, -277.7, 0.1),
}
BROKEN_CARDS = {
    "tsavage68 1e5 rate 03 beta": (-22.4821, -21.9166, 0.4198, 2.0612, -90.2, 0.3),
    "tsavage68 1e5 rate 05 beta": (-27.6674, -27.1162, 0.4330, 4.8688, -71.1, 0.5),
    "just1nseo 5e-6 epoch1": (-4.8886, -5.8224, 0.6470, 0.8935, -773.5, 0.01),
}


def card_rows(figures: tuple[float, ...]) -> list[Row]:
    chosen, rejected, accuracy, loss, logps, _ = figures
    row = {"loss": loss, "grad_norm": 0.5, "rewards/chosen": chosen, "rewards/rejected": rejected,
           "rewards/margins": chosen - rejected, "rewards/accuracies": accuracy, "logps/chosen": logps}  # fmt: skip
    return [{**row, "step": step, "epoch": step / 1000} for step in range(600, 1001, 10)]


@pytest.mark.parametrize("card", SOUND_CARDS)
def test_sound_published_runs_get_no_remark(card: str) -> None:
    assert remarks(card_rows(SOUND_CARDS[card]), beta=SOUND_CARDS[card][-1], steps=1000) == []


@pytest.mark.parametrize("card", BROKEN_CARDS)
def test_broken_published_runs_get_theirs(card: str) -> None:
    said = " ".join(remarks(card_rows(BROKEN_CARDS[card]), beta=BROKEN_CARDS[card][-1], steps=1000))
    assert "less likely" in said and "worse than no training" in said


# --------------------------------------------------------------------------------------------------- no false alarms


def perfect(epoch: float, pairs: int) -> list[Row]:
    row = {"loss": 0.3, "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0}
    return [{**row, "rewards/accuracies": 1.0, "epoch": epoch, "step": step} for step in range(1, pairs + 1)]


def test_accuracy_of_one_needs_73_unseen_pairs_of_the_first_half() -> None:
    assert remarks(perfect(0.4, 72), batch=1) == []
    assert len(remarks(perfect(0.4, 73), batch=1)) == 1
    for epoch in (0.6, 2.0):  # in a second pass they are remembered
        assert remarks(perfect(epoch, 500), batch=1, steps=2000) == []


def test_where_the_margin_stands_is_looked_at_once_halfway() -> None:
    """One that was far from its start by then, and comes back later, did not stay there."""
    rows = series(SIGMOID, lambda at: 0.3 if at < 0.6 else -0.3, lambda at: 0.0, lambda at: 0.5)
    assert not any("too small" in remark or "random" in remark for remark in remarks(rows))


def test_a_loss_that_is_worse_than_none_is_not_called_near_its_end_too() -> None:
    rows = series(SIGMOID, lambda at: -20 * at, lambda at: -6 * at, lambda at: 2 * at)
    said = " ".join(remarks(rows))
    assert "worse than no training" in said and "the loss hardly changes" not in said


def test_rows_of_evaluations_and_the_summary_are_not_looked_at() -> None:
    watchdog = Watchdog(["sigmoid"], BETA, BATCH, STEPS)
    assert watchdog.observe({"eval_en_loss": 9.0, "eval_en_rewards/chosen": -99.0, "step": 5}) == []
    assert watchdog.observe({"train_runtime": 9.0, "train_loss": 9.0, "step": 300}) == []


# ------------------------------------------------------------------------------------------------------------- with TRL


def learning(folder: Any, said: list[str]) -> Any:
    """A trainer of a tiny Qwen3 and pairs that one word tells apart, which it learns within some steps."""
    from dpo_cli.model_files import location
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    where, rng = location("builtin:tiny-qwen3"), Random(0)
    words = ["tea", "rain", "moon", "road", "fish", "lamp"]
    rows = [
        {"prompt": f"Tell me of {topic} and {rng.choice(words)} {number}.", "chosen": f"Surely {topic} is fine.",
         "rejected": f"Never {topic} is fine."}
        for number, topic in zip(range(320), itertools.cycle(words), strict=False)
    ]  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl_trainer(
        folder, get_peft_model(AutoModelForCausalLM.from_pretrained(where), lora), AutoTokenizer.from_pretrained(where),
        rows, per_device_train_batch_size=8, max_steps=18, logging_steps=2, learning_rate=5e-3, seed=0,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer.add_callback(WatchdogCallback(Watchdog(["sigmoid"], 0.1, batch=8, steps=18), said.append))
    return trainer


def test_a_real_run_says_that_its_data_have_a_shortcut_and_a_resumed_one_does_not_say_it_again(tmp_path: Any) -> None:
    from transformers import TrainerControl, TrainerState

    said: list[str] = []
    trainer = learning(tmp_path, said)
    batch = next(iter(trainer.get_train_dataloader()))
    for name in trl_arguments()[DEFAULT_METHOD]["losses"]:
        first = methods.LOSSES[name].first
        if first is None:
            continue
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(first(0.1), rel=1e-4), name
    trainer.loss_types = ["sigmoid"]
    trainer._metrics["train"].clear()

    trainer.train()
    assert len(said) == 1 and "easier than quality" in said[0]

    history = trainer.state.log_history
    again: list[str] = []
    resumed = WatchdogCallback(Watchdog(["sigmoid"], 0.1, batch=8, steps=40), again.append)
    state = TrainerState(max_steps=40, log_history=history[:-1])
    resumed.on_train_begin(trainer.args, state, TrainerControl())
    state.log_history = [*history[:-1], {**history[-2], "step": 20}]
    resumed.on_log(trainer.args, state, TrainerControl())
    assert again == []
