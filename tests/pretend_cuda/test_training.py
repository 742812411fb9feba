"""Training on a pretended card: tensors of the two devices never meet, and the figures are those of the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.train.memory import CUDA_CONTEXT
from dpo_cli.train.methods import METHODS
from tests.pretend_cuda.card_runs import OUT_OF_MEMORY, Runs, small_card
from tests.pretend_cuda.pretended import Card
from tests.train.runs import cut_short, log, untimed, weights
from transformers import Trainer

EVALUATED = ("train.eval_strategy=steps", "train.eval_steps=2")
OFF = ("engine.shared_prefix=off", "engine.token_budget=off")
NewRuns = Callable[[], Runs]


def assert_same_on_cpu(on_card: Runs, on_cpu: Runs, *settings: str) -> None:
    """Train on both, with evaluation, and compare the logs."""
    on_card.go("train", *EVALUATED, *settings, card=Card())
    on_cpu.go("train", *EVALUATED, *settings)
    rows, wanted = on_card.figures(), on_cpu.figures()
    assert len(rows) == len(wanted) >= 5
    for one, other in zip(rows, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ((), {"shared_prefix": True, "token_budget": 400, "gradient_checkpointing": False}),
        pytest.param(
            ("engine.shared_prefix=off",), {"shared_prefix": False, "token_budget": 400}, marks=pytest.mark.slow
        ),
        (OFF, {"shared_prefix": False, "token_budget": None}),
        pytest.param(
            ("train.gradient_checkpointing=true",),
            {"gradient_checkpointing": True, "shared_prefix": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("train.optim=adamw_torch_fused", "train.loss_type=sigmoid_norm"),
            {"shared_prefix": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shared prefix", "padded passes", "stock", "checkpointing", "fused optimizer"],
)
def test_training_on_a_card_gives_the_figures_of_the_cpu(
    settings: tuple[str, ...], chosen: dict[str, Any], new_runs: NewRuns
) -> None:
    on_card = new_runs()
    assert_same_on_cpu(on_card, new_runs(), *settings)
    assert chosen.items() <= on_card.engine.items()


METHODS_BESIDE_DPO = [
    pytest.param(name, marks=[] if name == "kto" else [pytest.mark.slow]) for name in METHODS if name != "dpo"
]


@pytest.mark.parametrize("method", METHODS_BESIDE_DPO)
def test_every_method_trains_on_a_card_as_on_the_cpu(method: str, new_runs: NewRuns) -> None:
    data = METHODS[method].data
    form = "pairs" if "pairs" in data else data[0]
    assert_same_on_cpu(
        new_runs(), new_runs(), f"train.method={method}", f"data.format={form}", "engine.token_budget=auto"
    )


@pytest.mark.slow
def test_a_training_that_was_cut_short_goes_on_from_its_checkpoint(runs: Runs) -> None:
    """With early stopping, so that the best adapter is loaded at the end."""
    stopping = "engine.early_stopping={metric: eval_loss, patience: 5}"
    settings = (*EVALUATED, "train.save_strategy=steps", "train.save_steps=2", "train.max_steps=4", stopping)
    runs.go("train", *settings, card=Card())
    trained, figures = weights(runs.run), runs.figures()
    cut_short(runs.run, step=2)
    assert "resumed from step 2" in runs.go("train", *settings, card=Card())
    assert runs.figures() == figures
    assert weights(runs.run) == trained


@pytest.mark.slow
def test_an_adapter_is_trained_on_with_a_cached_reference(new_runs: NewRuns, trained: Runs) -> None:
    on_card = new_runs()
    settings = (f"model.adapter={trained.run / 'train' / 'adapter'}", "engine.reference_cache=on")
    assert_same_on_cpu(on_card, new_runs(), *settings)
    assert on_card.engine["reference_cache"]
    again = on_card.go("train", *EVALUATED, *settings, "train.learning_rate=1e-4", "name=again", card=Card())
    assert "reference of 0 of 24 pairs to compute" in again


# ---------------------------------------------------------------------------------------------------------- preflight


def test_the_preflight_leaves_a_training_as_it_was(new_runs: NewRuns) -> None:
    """With dropout, whose random numbers are the card's."""
    settings = ("lora.dropout=0.3", "train.disable_dropout=false")
    tried, untried = new_runs(), new_runs()
    card = Card()
    tried.go("train", *settings, card=card)
    untried.go("train", *settings, "engine.preflight=false", card=Card())
    assert card.emptied >= 2
    assert untimed(log(tried.run)) == untimed(log(untried.run))
    assert weights(tried.run) == weights(untried.run)


@pytest.mark.parametrize(
    "error",
    [pytest.param(one, marks=pytest.mark.slow if one in OUT_OF_MEMORY[:3] else []) for one in OUT_OF_MEMORY],
    ids=lambda error: str(error)[:30],
)
def test_every_name_of_running_out_of_memory_halves_the_batch(
    error: Exception, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts a pair; the card holds four."""
    small_card(monkeypatch, error, lambda ids: len(ids) > 4)
    said = runs.go("train", *OFF, "train.per_device_train_batch_size=8", "train.max_steps=1", card=Card())
    assert "8 pairs at once don't fit the memory: 2 pairs at once" in said
    assert runs.engine["micro_batch"] == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            (*OFF, "train.gradient_checkpointing=false"),
            r"(?s)one row at a time does not fit.*set train\.gradient_checkpointing: true",
        ),
        (  # its KL term is a mean over the rows at once, so these are not halved
            ("train.method=kto", "data.format=pairs", "engine.token_budget=auto"),
            r"(?s)4 rows at once do not fit.*train\.per_device_train_batch_size \(2 or more\), lower model\.max_length",
        ),
    ],
    ids=["dpo", "kto"],
)
def test_what_fits_in_no_way_is_an_error_with_a_fix(
    settings: tuple[str, ...], says: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_card(monkeypatch, OUT_OF_MEMORY[1], lambda ids: True)
    with pytest.raises(AssertionError, match=says):
        runs.go("train", *settings, card=Card())


def test_another_error_of_a_step_is_not_taken_for_a_full_memory(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    small_card(monkeypatch, RuntimeError("shapes differ"), lambda ids: len(ids) > 4)
    with pytest.raises(AssertionError, match="shapes differ"):
        runs.go("train", *OFF, "train.per_device_train_batch_size=8", card=Card())


def test_a_row_that_does_not_fit_turns_checkpointing_on_where_the_recipe_leaves_it_open(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.training_step

    def on_a_small_card(self: Any, *inputs: Any, **options: Any) -> Any:
        if not any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise OUT_OF_MEMORY[1]
        return step(self, *inputs, **options)

    monkeypatch.setattr(Trainer, "training_step", on_a_small_card)
    said = runs.go("train", "train.max_steps=1", card=Card())
    assert "400 tokens at once, with gradient checkpointing" in said
    assert runs.engine["gradient_checkpointing"]


def test_running_out_of_memory_lowers_the_tokens(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    small_card(monkeypatch, OUT_OF_MEMORY[0], lambda ids: ids.numel() > 900)
    said = runs.go("train", "engine.token_budget=1600", "train.per_device_train_batch_size=12", card=Card())
    found = re.search(r"1600 tokens at once don't fit the memory: (\d+) tokens at once", said)
    assert found and 300 < int(found[1]) <= 900


def test_a_memory_limit_holds_for_the_card_and_halves_the_batch(new_runs: NewRuns) -> None:
    """The largest tensor, which stands for the peak here, grows with the pairs at once."""
    settings = (*OFF, "train.per_device_train_batch_size=8", "train.max_steps=1")
    card, other = Card(), Card()
    new_runs().go("train", *settings, card=card)
    limit = CUDA_CONTEXT + card.largest * 2 // 3
    limited = new_runs()
    limited.go("train", *settings, f"engine.memory_limit={limit / 2**20:.3f} MB", card=other)
    assert limited.engine["micro_batch"] == 4
    assert other.share == pytest.approx((limit - CUDA_CONTEXT) / other.total, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "capability", "says"),
    [
        (("model.dtype=bfloat16",), (7, 5), "this GPU does not compute in bfloat16"),
        (("model.dtype=auto", "train.bf16=true"), (7, 0), "this GPU does not compute in bfloat16"),
        (("model.dtype=bfloat16", "train.fp16=true"), (8, 9), "train.fp16 does not go with model.dtype: bfloat16"),
        (("model.dtype=float16", "train.bf16=true"), (8, 9), "train.bf16 does not go with model.dtype: float16"),
    ],
)
def test_a_precision_that_the_card_or_the_model_lacks_is_refused_before_the_data(
    settings: tuple[str, ...], capability: tuple[int, int], says: str, tmp_path: Path
) -> None:
    runs = Runs(tmp_path / "runs")
    with pytest.raises(AssertionError, match=says):
        runs.go("train", *settings, card=Card(capability))
    assert not (runs.run / "data").exists()


def test_memory_that_runs_out_in_training_is_said_with_the_step(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []

    def in_the_second_step(ids: Any) -> bool:
        forwards.append(len(ids))  # of policy and reference
        return len(forwards) > 2

    small_card(monkeypatch, OUT_OF_MEMORY[1], in_the_second_step)
    with pytest.raises(AssertionError, match=r"(?s)memory ran out in step 2 of 4.*engine.preflight: true"):
        runs.go("train", *OFF, "engine.preflight=false", "train.max_steps=4", card=Card())


def test_one_process_takes_one_of_two_cards_and_says_so(runs: Runs) -> None:
    """TRL refuses DataParallel, which transformers would take."""
    said = runs.go("train", *OFF, "train.max_steps=1", card=Card(count=2))
    assert re.search(r"24 pairs, 4 a step, on", said)
    assert "one of 2 GPUs: accelerate launch" in " ".join(said.split())
