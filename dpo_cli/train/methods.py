"""The training methods and their losses, a row each: all that sets one apart from the others stands here.

What `check` has to know of it without torch, `tests/tools/trl_arguments.py` writes into `recipe/trl_arguments.json`.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from dpo_cli.recipe.train import HELD_OUT
from dpo_cli.train import lipo, listwise, single_answers
from dpo_cli.train.reference_free import ReferenceFree

Row = Literal["pair", "answer", "list"]


def _as_it_is(dataset: Dataset, seed: int) -> Dataset:
    return dataset.select_columns(["id", "prompt", "chosen", "rejected", "chat_template_kwargs"])


@dataclass(frozen=True)
class Method:
    """What sets a method apart from the others."""

    config: str  # the names of its classes in `module`
    trainer: str
    module: str = "trl"
    data: tuple[str, ...] = ("pairs",)  # each `data.format` that it learns from, the usual one first
    row: Row = "pair"  # what a training row is; of a list, a prompt with all its answers
    rows: Callable[[Dataset, int], Dataset] = _as_it_is  # the prepared rows for its trainer, given the recipe's seed
    mixins: tuple[type, ...] = ()  # classes that stand before its trainer, to do what DPO's does already
    reference: bool = True  # whether it compares with the model as it was
    compares: bool = True  # whether it learns from bad answers as well
    losses: tuple[str, ...] | None = None  # of `train.loss_type`; None: all that the trainer has
    neighbours: tuple[str, ...] = ()  # those with a KL term over a micro-batch's rows, which have to be two at least
    without: tuple[str, ...] = ()  # arguments of its config that its losses don't look at
    defaults: dict[str, Any] = field(default_factory=dict)  # of `train`, neither TRL's nor ours for all methods
    engine: tuple[str, ...] = ()  # parts of the `engine` section that fit its trainer
    whole_logits: bool = False  # its trainer holds the logits of all tokens, where others make them tile by tile
    not_logged: tuple[str, ...] = ()  # held-out figures (`HELD_OUT`) that its trainer does not log
    label_weights: Callable[[Any], tuple[float, float]] | None = None  # of good and bad answers, by `train`
    keeps_chosen: str = ""  # what keeps chosen answers from becoming less likely; empty: sft among the losses

    def classes(self) -> tuple[Any, Any]:
        """The config and the trainer, TRL imported."""
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it says that it may change; our pin does not
        module = importlib.import_module(self.module)
        return getattr(module, self.config), getattr(module, self.trainer)

    @property
    def rows_are(self) -> str:
        """What its training rows are called."""
        return {"pair": "pairs", "answer": "rows", "list": "prompts"}[self.row]


CPO, ORPO = "trl.experimental.cpo", "trl.experimental.orpo"
NO_REFERENCE: dict[str, Any] = {"reference": False, "whole_logits": True, "mixins": (ReferenceFree,)}

METHODS = {
    "dpo": Method("DPOConfig", "DPOTrainer", engine=("shared_prefix", "token_budget", "reference_cache")),
    # Beta and gamma of its authors' run from Llama-3-8B base (princeton-nlp/SimPO); TRL's 0.1 and 0.5 suit no SimPO.
    "simpo": Method(
        "CPOConfig", "CPOTrainer", CPO, losses=("simpo", "alphapo"),
        defaults={"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}, **NO_REFERENCE,
    ),
    "cpo": Method("CPOConfig", "CPOTrainer", CPO, **NO_REFERENCE),
    "orpo": Method("ORPOConfig", "ORPOTrainer", ORPO, **NO_REFERENCE),
    # 48 rows a step are 24 pairs; its KL term is the better the more rows it is a mean over.
    "kto": Method(
        "KTOConfig", "KTOTrainer", data=("unpaired", "pairs"), row="answer", rows=single_answers.labelled_rows,
        neighbours=("kto",), defaults={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 12},
        not_logged=("rewards/accuracies",), keeps_chosen="raise train.desirable_weight",
        label_weights=lambda train: (train.desirable_weight, train.undesirable_weight),
    ),
    "lipo": Method(
        "DPOConfig", "DPOTrainer", data=("ranked",), row="list", rows=lipo.rows, mixins=(lipo.Listwise,),
        losses=listwise.LOSS_TYPES, without=lipo.OVER_PAIRS, defaults={"loss_type": ["lambda"]},
        engine=("shared_prefix",), keeps_chosen="raise train.beta",
    ),
    # A LoRA wants some ten times the rate of whole weights, for which TRL's default is 2e-5 (TRL's guide to PEFT).
    "sft": Method(
        "SFTConfig", "SFTTrainer", data=("unpaired", "pairs", "ranked"), row="answer", rows=single_answers.best_rows,
        mixins=(single_answers.AnswersOnly,), reference=False, compares=False, losses=("nll", "dft"),
        defaults={"learning_rate": 2e-4}, not_logged=HELD_OUT[1:],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """What has to be known of a loss, of whichever method."""

    # Its value, by beta, where the policy equals its reference (TRL's `_compute_loss` with all log-ratios 0).
    first: Callable[[float], float] | None = None
    whole: str = ""  # why a step can't be cut into passes of any pairs, to follow its name; empty: a mean over pairs
    per_token: bool = False  # its rewards are divided by tokens, so a large sum is nothing special
    in_nats: bool = False  # its pull does not weaken as rewards grow, so the margin is looked at in nats
    lowers_chosen: bool = False  # it is meant for chosen answers that are worse than the model's own
    compares: bool = True  # chosen answers with rejected ones; False: it learns from chosen ones alone
    least_beta: float = 0.0  # below it, `train.beta` is likely one of another loss
    computed_as: str = ""  # the loss that TRL makes of it, with other arguments


def _always(value: float) -> Callable[[float], float]:
    return lambda beta: value


SORTS, IN_LISTS = "sorts the log-ratios over the batch", "is a mean over lists"
OVER_TOKENS = "averages over the tokens of the batch"
LOG_2 = math.log(2)

# That the first ones are a mean over pairs is so in TRL 1.15 and 1.16; WPO weights, `ld_alpha` and f-divergences are a
# pair's own too. (BCO's running mean of rewards is not in these versions.)
LOSSES = {
    "sigmoid": Loss(_always(LOG_2)),
    "hinge": Loss(_always(1.0)),
    "ipo": Loss(lambda beta: 1 / (2 * beta) ** 2, per_token=True, in_nats=True),
    "exo_pair": Loss(),  # its first value hangs on label_smoothing
    "nca_pair": Loss(_always(2 * LOG_2)),
    "robust": Loss(_always(LOG_2)),
    "bco_pair": Loss(_always(2 * LOG_2)),
    "sppo_hard": Loss(lambda beta: 2 / (2 * beta) ** 2),
    "aot": Loss(_always(LOG_2), whole=SORTS),
    "aot_unpaired": Loss(_always(LOG_2), whole=SORTS),
    "apo_zero": Loss(_always(1.0)),
    "apo_down": Loss(_always(1.0), lowers_chosen=True),
    "discopop": Loss(_always((LOG_2 + 1) / 2)),
    "sft": Loss(whole=OVER_TOKENS, compares=False),
    "sigmoid_norm": Loss(_always(LOG_2), per_token=True),
    "kto": Loss(_always(0.5), whole="has a KL term over the batch"),
    "apo_zero_unpaired": Loss(_always(0.5), whole="is a mean over labelled rows"),
    # Its authors' beta is 2 to 10 (princeton-nlp/SimPO); 0.1 comes with a recipe made for DPO.
    "simpo": Loss(per_token=True, least_beta=0.5),
    "alphapo": Loss(per_token=True, least_beta=0.5, computed_as="simpo"),
    "nll": Loss(whole=OVER_TOKENS, compares=False),
    "dft": Loss(whole=OVER_TOKENS, compares=False),
    **{name: Loss(whole=IN_LISTS, per_token=name in listwise.PER_TOKEN) for name in listwise.LOSS_TYPES},
}


def cannot_be_cut(losses: Sequence[str]) -> str | None:
    """Why a step with these losses can't be cut into passes of any pairs, or None; one not known here can't."""
    for name in losses:
        reason = LOSSES[name].whole if name in LOSSES else "is not known to be a mean over pairs"
        if reason:
            return f"the loss {name} {reason}"
    return None
