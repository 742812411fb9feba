"""Says in plain words, once a run each, what people ask when they watch a DPO run, and which recipe line to change.

`Watchdog` is given TRL's log rows and knows nothing of trainers; `WatchdogCallback` feeds it from one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from transformers import TrainerCallback

from dpo_cli.recipe.train import DEFAULT_METHOD
from dpo_cli.stats import wilson
from dpo_cli.train.methods import LOSSES, METHODS, Loss, Method

# Every threshold. A reward is beta x nats: TRL logs beta x (log-prob of the policy - of the reference), summed over an
# answer's tokens. "Cards" are runs published on the Hub, sound and broken; tests/train/test_watchdog.py has figures.

# Pairs under a mean. The per-pair loss of a sound run has a spread of about 0.4, so 200 pairs know it to 0.03.
WINDOW_PAIRS = 200
# Chosen answers less likely is normal with DPO (eric-mitchell/direct-preference-optimization#8 and #32, and arXiv
# 2402.13228, 2410.08847 on when it harms). Not normal, on a window's means: nearly as far as rejected (sound cards
# 0.55 to 0.88 of it), once it is far enough not to be noise, in nats;
RACE_SHARE, RACE_NATS = 0.95, 20.0
# or further than any sound card, as a reward or as a multiple of the reference's nats, whichever comes first.
FAR_REWARD, FAR_MULTIPLE = -5.0, 1.5
# Unseen pairs nearly all right. UltraFeedback's cards end at 0.69 to 0.78, and raters agree on 73 % (InstructGPT, arXiv
# 2203.02155), so 0.95 before half of the data was seen is a shortcut; later, pairs seen before are remembered.
EARLY_EPOCH, EARLY_ACCURACY = 0.5, 0.95
# Half of the run is over, and since its first quarter the margin is below this: sigmoid's loss has moved by 1.5 %.
# The slowest sound card (lewtun) is at 0.03 to 0.06 there. ipo's pull does not weaken with the reward: counted in nats.
# Where answers moved by more and still no more than half are right (by Wilson's bound), labels look random.
FLAT_FROM, FLAT_AFTER = 0.25, 0.5
FLAT_REWARD, FLAT_NATS = 0.02, 0.2
# Mean loss above where it started, for a window. Sound cards never are; just1nseo's ends at 1.29 times that.
WORSE_LOSS = 1.1
# A reward or margin at which sigmoid's gradient is 1 - sigmoid(10) = 0.005 % of its first: what still moves, drifts.
RUNAWAY_REWARD = 10.0
# Gradient norm against the median and the largest of at least so many rows before. Our choice, far above where ZClip
# (arXiv 2504.02507) scales steps down: a lognormal norm with sigma 0.5 gets there twice in a million rows.
SPIKE_MEDIANS, SPIKE_RECORD, SPIKE_ROWS = 10.0, 2.0, 10


@dataclass
class Watchdog:
    """Reads a run's log rows; losses, beta and weights are those of `train`."""

    losses: Sequence[str]
    beta: float
    batch: int  # pairs a step, over all devices and accumulation
    steps: int  # of the whole run
    weights: Sequence[float] | None = None
    method: Method = METHODS[DEFAULT_METHOD]
    _rows: list[Mapping[str, float]] = field(default_factory=list, init=False)
    _pairs: list[float] = field(default_factory=list, init=False)  # how many each row is a mean over
    _halfway_seen: bool = field(default=False, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    def observe(self, row: Mapping[str, Any]) -> list[str]:
        """The remarks that a row of TRL's log gives rise to and that were not made before.

        Its loss is in the loss's own unit, rewards/* in beta x nats, logps/* in nats an answer.
        """
        if "loss" not in row:  # an evaluation's row, or the summary at the end
            return []
        last_step = self._rows[-1]["step"] if self._rows else 0
        self._rows.append(row)
        self._pairs.append(max(row["step"] - last_step, 0) * self.batch)
        found = {check.__name__: check(row) for check in self._checks(row)}
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said.update(new)
        return [f"step {row['step']}: {text}" for text in new.values()]

    def _checks(self, row: Mapping[str, float]) -> Sequence[Callable[[Mapping[str, float]], str | None]]:
        if not self._compares:  # nothing here is about preference
            return [self._spike, self._worse]
        if "rewards/margins" not in row:
            return [self._spike]
        if not self.method.reference:
            return [self._spike, self._shortcut]
        return [self._spike, self._chosen, self._shortcut, self._flat, self._worse, self._runaway]

    # ------------------------------------------------------------------------------------------------ what is looked at

    def _spike(self, row: Mapping[str, float]) -> str | None:
        norms = [past.get("grad_norm", math.inf) for past in self._rows]
        *before, norm = [one for one in norms if math.isfinite(one)] or [0.0]
        usual = median(before) if len(before) >= SPIKE_ROWS else 0.0
        if not usual or norm < max(SPIKE_MEDIANS * usual, SPIKE_RECORD * max(before)):
            return None
        return (
            f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the usual: an odd batch or too "
            f"large steps. A train.max_grad_norm below {norm:.2g} cuts such steps; if the loss stays up after it, "
            "lower train.learning_rate."
        )

    def _chosen(self, row: Mapping[str, float]) -> str | None:
        chosen, rejected = self._recent("rewards/chosen"), self._recent("rewards/rejected")
        if chosen is None or rejected is None or chosen >= 0:
            return None
        nats = -chosen / self.beta
        logps = self._recent("logps/chosen")
        reference = abs(logps + nats) if logps is not None else math.inf
        race = nats >= RACE_NATS and chosen <= RACE_SHARE * rejected
        far = not any(loss.lowers_chosen for loss in self._known) and (
            (chosen <= FAR_REWARD and not self._per_token) or nats >= FAR_MULTIPLE * reference
        )
        if not race and not far:
            return None
        why = "as much as the rejected ones or more" if race else "further than sound runs go"
        alone = next((name for name in self.losses if not LOSSES[name].compares), None)
        sft = f"try train.loss_type: [{', '.join([*self.losses, 'sft'])}]"
        fix = self.method.keeps_chosen or (f"raise the weight of {alone} in train.loss_weights" if alone else sft)
        return (
            f"the chosen answers have become {nats:.0f} nats less likely, {why}. Some of that is "
            f"normal with DPO, this is not: lower train.learning_rate, or {fix}."
        )

    def _shortcut(self, row: Mapping[str, float]) -> str | None:
        if row.get("epoch", math.inf) > EARLY_EPOCH or "rewards/accuracies" not in row:
            return None
        right = pairs = 0.0
        for past, count in zip(reversed(self._rows), reversed(self._pairs), strict=True):
            right, pairs = right + past["rewards/accuracies"] * count, pairs + count
            low = wilson(right, round(pairs))["low"]
            if low is not None and low > EARLY_ACCURACY:
                return (
                    f"{100 * right / pairs:.0f}% of the last {pairs:.0f} pairs right, none seen "
                    "before: something easier than quality tells chosen from rejected. See Shortcuts in "
                    "data/report.md; data.sources and data.filters decide what stays in."
                )
            if pairs >= WINDOW_PAIRS:
                break
        return None

    def _flat(self, row: Mapping[str, float]) -> str | None:
        if self._halfway_seen or row["step"] < FLAT_AFTER * self.steps:
            return None
        since = [index for index, past in enumerate(self._rows) if past["step"] > FLAT_FROM * self.steps]
        margin, accuracy = self._mean("rewards/margins", since), self._mean("rewards/accuracies", since)
        if margin is None or (accuracy is None and "rewards/accuracies" not in self.method.not_logged):
            return None
        self._halfway_seen = True
        limit = FLAT_NATS * self.beta if any(loss.in_nats for loss in self._known) else FLAT_REWARD
        if margin >= limit:
            return None
        rows, pairs = [self._rows[index] for index in since], round(sum(self._pairs[index] for index in since))
        moved = sum(max(abs(one["rewards/chosen"]), abs(one["rewards/rejected"])) for one in rows) / len(rows)
        if accuracy is not None and moved >= limit and (wilson(accuracy * pairs, pairs)["low"] or 0.0) <= 0.5:
            return (
                f"the model has moved, and still {100 * accuracy:.0f}% of {pairs} pairs are "
                "right: these preferences look random to it. Raise data.pairs.min_margin, or check the scores."
            )
        if any(loss.per_token and not loss.in_nats for loss in self._known):
            return None  # it sees the margin per token, thousandths: 0.69 all along is what it looks like
        return (
            f"well into the run the margin is {margin:+.3f}, about where it began: the steps are "
            "too small. Raise train.learning_rate, or train.num_train_epochs."
        )

    def _worse(self, row: Mapping[str, float]) -> str | None:
        loss, first = self._recent("loss"), self._first_loss()
        if loss is None or first is None or loss <= WORSE_LOSS * first:
            return None
        rows_are = self.method.rows_are
        return (
            f"the loss was {loss:.2f} over the last {WINDOW_PAIRS} {rows_are} or more, worse than "
            f"no training ({first:.2f}): the steps are too large. Lower train.learning_rate"
            f"{' or raise train.beta' if self._compares else ''}."
        )

    def _runaway(self, row: Mapping[str, float]) -> str | None:
        if self._per_token or self._worse(row):
            return None
        rewards = {name: self._recent(f"rewards/{name}") for name in ("margins", "rejected", "chosen")}
        name, far = max(rewards.items(), key=lambda item: abs(item[1] or 0.0))
        if far is None or abs(far) <= RUNAWAY_REWARD:
            return None
        what = "the margin" if name == "margins" else f"the reward of {name}"
        return (
            f"{what} is {far:+.1f}. Beyond {RUNAWAY_REWARD:g} the loss hardly changes, and the "
            "model only drifts from its reference: lower train.learning_rate or train.num_train_epochs."
        )

    # ---------------------------------------------------------------------------------------------------------- figures

    def _recent(self, name: str) -> float | None:
        """The mean over the last rows that cover `WINDOW_PAIRS`; None before there are so many."""
        pairs, start = 0.0, len(self._rows)
        while start and pairs < WINDOW_PAIRS:
            start -= 1
            pairs += self._pairs[start]
        return self._mean(name, range(start, len(self._rows)))

    def _mean(self, name: str, indices: Sequence[int]) -> float | None:
        pairs = sum(self._pairs[index] for index in indices)
        if pairs < WINDOW_PAIRS or any(name not in self._rows[index] for index in indices):
            return None
        return sum(self._rows[index][name] * self._pairs[index] for index in indices) / pairs

    def _first_loss(self) -> float | None:
        """The loss of no training, by beta; where nothing is compared, the model's own: of the first rows logged."""
        if not self._compares:
            last = next((index for index in range(len(self._rows)) if sum(self._pairs[: index + 1]) >= WINDOW_PAIRS), 0)
            return self._mean("loss", range(last + 1))
        firsts = [loss.first(self.beta) for loss in self._known if loss.first]
        if len(firsts) < len(self.losses):
            return None
        weights = self.weights or [1.0] * len(self.losses)
        return sum(weight * first for first, weight in zip(firsts, weights, strict=True))

    @property
    def _known(self) -> list[Loss]:
        return [LOSSES[name] for name in self.losses]

    @property
    def _compares(self) -> bool:
        return any(loss.compares for loss in self._known)

    @property
    def _per_token(self) -> bool:
        return any(loss.per_token for loss in self._known)


class WatchdogCallback(TrainerCallback):
    """Shows every log row to a watchdog and says its remarks, on the main process."""

    def __init__(self, watchdog: Watchdog, say: Callable[[str], None]) -> None:
        self.watchdog, self.say = watchdog, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for row in state.log_history:  # those of a resumed run have had their remarks
            self.watchdog.observe(row)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for remark in self.watchdog.observe(state.log_history[-1]):
            if state.is_world_process_zero:
                self.say(remark)
