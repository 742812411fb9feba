"""The pretended card itself: it refuses what a card refuses, counts what a card waits for, and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from tests.pretend_cuda.card_runs import Runs
from tests.pretend_cuda.pretended import Card
from tests.pretend_cuda.pretended_torch import pretending
from transformers import Trainer


@pytest.fixture
def card() -> Iterator[Card]:
    with pretending(Card()) as made:
        yield made


MIXED: dict[str, Callable[[Any, Any], Any]] = {
    "arithmetic": lambda here, there: here + there,
    "in place, a number of the CPU": lambda here, there: there.sum().add_(here.sum()),
    "a mask": lambda here, there: here.masked_fill(there > 1, 0.0),
    "cat": lambda here, there: torch.cat([here, there]),
    "stack with a number of the CPU": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "embedding": lambda here, there: torch.nn.functional.embedding(torch.tensor([1]), here[:, None]),
    "the CPU's indexed by the card's": lambda here, there: there[torch.tensor([1], device="cuda:0")],
    "stored values": lambda here, there: here.index_put_((torch.tensor([1], device="cuda:0"),), there[:1]),
    "a generator": lambda here, there: here.exponential_(generator=torch.Generator()),
    "its generator on the CPU": lambda here, there: there.exponential_(generator=torch.Generator("cuda")),
    "data of a parameter": lambda here, there: setattr(torch.nn.Parameter(here), "data", there),
    "in inference mode": torch.inference_mode()(lambda here, there: torch.nn.functional.linear(here, there[None])),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_mixing_devices_raises_and_names_the_place(operation: Callable[[Any, Any], Any], card: Card) -> None:
    here, there = torch.arange(3.0, device="cuda:0"), torch.arange(3.0)
    with pytest.raises(RuntimeError, match=r"test_pretended.py:\d+ .*lambda here, there"):
        operation(here, there)
    assert len(card.refused) == 1


@pytest.mark.parametrize("convert", [lambda one: one.numpy(), numpy.asarray], ids=["numpy", "asarray"])
def test_numpy_of_a_tensor_on_the_card_raises(convert: Callable[[Any], Any], card: Card) -> None:
    with pytest.raises(TypeError, match=r"cuda:0 .* to numpy, at .*test_pretended.py"):
        convert(torch.arange(3.0, device="cuda:0"))
    assert convert(torch.arange(3.0, device="cuda:0").cpu()) is not None


# Asked of [0, 1, 2] on the card: waits, and blocking copies to it.
COUNTED: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "arithmetic": (lambda one: (one * 2 + torch.tensor(1.0)).softmax(0)[1:], 0, 0),
    "item": (lambda one: one.sum().item(), 1, 0),
    "float, int, if": (lambda one: [float(one[0]), int(one[1]), bool(one[2])], 3, 0),
    "tolist": (lambda one: one.tolist(), 1, 0),
    "indexing by a mask": (lambda one: one[one > 0], 1, 0),
    "storing by a mask": (lambda one: one.__setitem__(one > 0, one[:2] + 1), 1, 0),
    "storing a number by a mask": (lambda one: one.__setitem__(one > 0, 5.0), 0, 0),
    "indexing by a list": (lambda one: one[[0, 1]], 0, 1),
    "to the CPU": (lambda one: one.cpu() + one.to("cpu") + one.to(torch.device("cpu"), torch.float64), 3, 0),
    "copied into a tensor of the CPU": (lambda one: torch.zeros(3).copy_(one), 1, 0),
    "to the card": (lambda one: torch.zeros(3).to("cuda") + torch.zeros(3).cuda() + torch.zeros(3).to(one), 0, 3),
    "made on the card": (lambda one: torch.zeros(3, device=one.device) + one.new_ones(3) + torch.rand_like(one), 0, 0),
    "where it is": (lambda one: one.to("cuda").to(torch.float64).cuda(), 0, 0),
}


@pytest.mark.parametrize(("operation", "waits", "copies"), COUNTED.values(), ids=COUNTED)
def test_waits_and_copies_are_counted(operation: Callable[[Any], Any], waits: int, copies: int, card: Card) -> None:
    one = torch.arange(3.0, device="cuda:0")
    operation(one)
    assert (sum(card.waits.values()), sum(card.copies.values())) == (waits, copies)
    assert {asked.by for asked in (*card.waits, *card.copies)} <= {"ours"}
    assert all("test_pretended.py" in asked.line for asked in (*card.waits, *card.copies))


def test_a_modules_tied_weights_stay_tied_and_learn(card: Card) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    model.to("cuda", torch.float64)
    assert model[1].weight is model[0].weight and model[0].weight.is_cuda and model[0].weight.dtype == torch.float64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    model(torch.tensor([1, 2], device="cuda:0")).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert not card.waits and not torch.equal(model[0].weight, before)


def test_the_card_has_random_numbers_of_its_own(card: Card) -> None:
    torch.manual_seed(3)
    drawn = [torch.rand(2, device="cuda:0").tolist(), torch.rand(2).tolist()]
    torch.manual_seed(3)
    assert [torch.rand(2).tolist(), torch.rand(2, device="cuda:0").tolist()] == drawn[::-1]
    state = torch.cuda.get_rng_state()
    following = torch.rand(2, device="cuda:0").tolist()
    torch.cuda.set_rng_state(state)
    torch.rand(9)
    assert torch.rand(2, device="cuda:0").tolist() == following


# --------------------------------------------------------------------------------------- that the tests here can fail


def test_a_mask_left_on_the_cpu_ends_a_training(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted into a step; on a machine without a card it would pass."""
    step = Trainer.training_step

    def planted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = torch.ones(inputs["attention_mask"].shape, dtype=torch.long)
        return step(self, model, {**inputs, "attention_mask": inputs["attention_mask"] * mask}, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", planted)
    with pytest.raises(
        AssertionError, match=r"same device.* found cuda:0 and cpu .*test_pretended.py:\d+ +return step"
    ):
        runs.go("train", card=Card())
