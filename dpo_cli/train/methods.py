"""The training methods, a row each: TRL's classes, what data they learn from, and which of our parts fit them.

`python -m dpo_cli.train.methods` writes `dpo_cli/recipe/trl_arguments.json`, from which `check` knows every method,
argument and loss without importing TRL; a test compares that file with the TRL that is installed.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.train import lipo, listwise, reference_free, unpaired

if TYPE_CHECKING:
    from datasets import Dataset


def _as_it_is(dataset: Dataset, seed: int) -> Dataset:
    return dataset.select_columns(["id", "prompt", "chosen", "rejected", "chat_template_kwargs"])


@dataclass(frozen=True)
class Method:
    """What sets a method apart from the others.

    Attributes:
        config, trainer: the names of its classes in `module`.
        data: each `data.format` that it learns from, the usual one first.
        reference: whether it compares with the model as it was.
        losses: of `train.loss_type`; None: all that the trainer has.
        without: arguments of its config that its losses don't look at.
        defaults: `train` arguments whose default is neither TRL's nor ours for all methods.
        engine: parts of the `engine` section that fit its trainer.
        whole_logits: its trainer holds the logits of all tokens at once, where others make them tile by tile.
        rows: the prepared rows as its trainer takes them, given the recipe's seed.
        patch: a subclass of its trainer that does what DPO's does already.
    """

    config: str
    trainer: str
    module: str = "trl"
    data: tuple[str, ...] = ("pairs",)
    reference: bool = True
    losses: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    engine: tuple[str, ...] = ()
    whole_logits: bool = False
    rows: Callable[[Dataset, int], Dataset] = _as_it_is
    patch: Callable[[Any], Any] = lambda trainer_class: trainer_class

    def classes(self) -> tuple[Any, Any]:
        """The config and the trainer, TRL imported."""
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that it may change: our pin and our tests know
        module = importlib.import_module(self.module)
        return getattr(module, self.config), getattr(module, self.trainer)


CPO, ORPO = "trl.experimental.cpo", "trl.experimental.orpo"
NO_REFERENCE: dict[str, Any] = {"reference": False, "whole_logits": True, "patch": reference_free.tokenised_as_dpo}

METHODS = {
    "dpo": Method("DPOConfig", "DPOTrainer", engine=("shared_prefix", "token_budget", "reference_cache")),
    # Beta and gamma of its authors' run from Llama-3-8B base (princeton-nlp/SimPO); TRL's 0.1 and 0.5 suit no SimPO.
    "simpo": Method(
        "CPOConfig", "CPOTrainer", CPO, losses=("simpo", "alphapo"),
        defaults={"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}, **NO_REFERENCE,
    ),
    "cpo": Method("CPOConfig", "CPOTrainer", CPO, **NO_REFERENCE),
    "orpo": Method("ORPOConfig", "ORPOTrainer", ORPO, **NO_REFERENCE),
    # Its KL term is a mean over the rows at once, which TRL wants to be more than one; and 48 rows a step are 24 pairs.
    "kto": Method(
        "KTOConfig", "KTOTrainer", data=("unpaired", "pairs"),
        defaults={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 12}, rows=unpaired.rows,
    ),
    "lipo": Method(
        "DPOConfig", "DPOTrainer", data=("ranked",), losses=listwise.LOSS_TYPES, without=lipo.OVER_PAIRS,
        defaults={"loss_type": ["lambda"]}, engine=("shared_prefix",), rows=lipo.rows, patch=lipo.listwise_trainer,
    ),
}  # fmt: skip

# Arguments of TRL's experimental trainers for other models than ours, or for tables in W&B.
_OF_OTHERS = {"is_encoder_decoder", "max_completion_length", "generate_during_eval", "padding_value"}


def describe_arguments() -> dict[str, Any]:
    """Every method's arguments and losses as the installed TRL declares them, with what of its row `check` has to know.

    Returns:
        {method: {"config": class name, "data", "reference", "whole_logits", "engine", "defaults", "losses": [...],
        "read_by": {argument: the losses that read it}, "arguments": {name: {"type", "default", "choices"}}}}, where
        `type` is written with bool, int, float, str, list, dict and None only. `lr_scheduler_type` has "kwargs" too:
        {schedule: {"takes", "needs"}}.
    """
    described: dict[str, Any] = {}
    for name, method in METHODS.items():
        config, trainer = method.classes()
        hints = typing.get_type_hints(config)
        arguments = {}
        for one in dataclasses.fields(config):
            kind, choices = _plain_type(hints[one.name])
            if not kind or one.name in _OF_OTHERS or one.name in method.without:
                continue  # an object that no YAML can hold
            default = one.default
            if default is dataclasses.MISSING:
                default = one.default_factory() if callable(one.default_factory) else None
            choices = choices or [str(choice) for choice in one.metadata.get("choices") or []]
            arguments[one.name] = {"type": kind, "default": default, "choices": choices}
        if "f_divergence_type" in arguments:  # branches, like the losses below
            branches = re.findall(r'f_divergence_type == "(\w+)"', inspect.getsource(trainer._compute_loss))
            arguments["f_divergence_type"]["choices"] = list(dict.fromkeys(branches))
        arguments["lr_scheduler_type"]["kwargs"] = _schedule_kwargs()
        losses: Any = arguments.get("loss_type", {}).pop("choices", [])
        if "loss_type" in arguments and not losses:
            # DPO's config keeps no list of them: they are the branches of `_compute_loss`, each once, in order.
            losses = list(dict.fromkeys(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trainer._compute_loss))))
        described[name] = {
            "config": method.config,
            "data": list(method.data),
            "reference": method.reference,
            "whole_logits": method.whole_logits,
            "engine": list(method.engine),
            "defaults": method.defaults,
            "losses": list(method.losses or losses),
            "read_by": {} if method.losses == listwise.LOSS_TYPES else _read_by(trainer, arguments),
            "arguments": arguments,
        }
    return described


def _schedule_kwargs() -> dict[str, dict[str, list[str]]]:
    """What `lr_scheduler_kwargs` may hold, and has to hold, of each learning-rate schedule of transformers."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    ours = ("self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    passed_on: dict[str, Any] = {"reduce_lr_on_plateau": ReduceLROnPlateau.__init__, "greedy": GreedyLR.__init__}
    found = {}
    for schedule, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        parameters = inspect.signature(passed_on.get(schedule.value, function)).parameters.values()
        named = [one for one in parameters if one.name not in ours]
        needs = [one.name for one in named if one.default is inspect.Parameter.empty]
        found[schedule.value] = {"takes": [one.name for one in named], "needs": needs}
    return found


def _read_by(trainer: Any, arguments: dict[str, Any]) -> dict[str, list[str]]:
    """The arguments that only some losses read, and which: TRL compares `loss_type` with each loss's name."""
    function = getattr(trainer, "_compute_loss", None) or getattr(trainer, "cpo_loss", None)
    if function is None:
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    def read(nodes: list[Any]) -> set[str]:
        every = [part for node in nodes for part in ast.walk(node)]
        return {part.attr for part in every if isinstance(part, ast.Attribute) and part.attr in arguments}

    branches: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        match = isinstance(node, ast.If) and re.fullmatch(r"(self\.)?loss_type == '(\w+)'", ast.unparse(node.test))
        if isinstance(node, ast.If) and match:
            branches[match.group(2)] = read(node.body)
            node.body = []
    if "simpo" in branches:
        branches["alphapo"] = branches["simpo"]  # CPOConfig makes it simpo, with `alpha`
    elsewhere = read([tree])
    names = sorted(set().union(*branches.values()) - elsewhere)
    found = {name: sorted(loss for loss, reads in branches.items() if name in reads) for name in names}
    divergence = re.search(r"f_divergence_loss_types = (\{.*?\})", inspect.getsource(trainer.__init__))
    return found | ({"f_divergence_type": sorted(ast.literal_eval(divergence.group(1)))} if divergence else {})


def _shared_once(described: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are the same in every method under "shared", and out of each."""
    first, *others = (one["arguments"] for one in described.values())
    shared = {name: entry for name, entry in first.items() if all(one.get(name) == entry for one in others)}
    own = {
        method: {**one, "arguments": {name: one["arguments"][name] for name in one["arguments"] if name not in shared}}
        for method, one in described.items()
    }
    return {"shared": shared, **own}


def _plain_type(hint: Any) -> tuple[str, list[str]]:
    """A type hint as text, and the choices where it is an enum; ("", []) where YAML can't write such a value."""
    if hint is type(None):
        return "None", []
    if hint in (bool, int, float, str):
        return str(hint.__name__), []
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "str", [str(member.value) for member in hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        plain = [_plain_type(part) for part in parts]
        if not all(kind for kind, _ in plain):
            return "", []
        kinds = list(dict.fromkeys(kind for kind, _ in plain))
        choices = [choice for _, some in plain for choice in some]
        return " | ".join(kinds), choices if kinds == ["str"] else []
    if origin is typing.Literal:
        return " | ".join(dict.fromkeys(type(part).__name__ for part in parts)), []
    if origin is list:
        return f"list[{_plain_type(parts[0])[0]}]", []
    if hint is dict or origin is dict:
        return "dict", []
    return "", []


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "recipe/trl_arguments.json"
    text = json.dumps(_shared_once(describe_arguments()), indent=1)
    # One argument a line, so that a diff of TRLs reads well; "shared" holds them one level higher than a method does.
    shared, own = text.split('\n "dpo":', 1)
    shared = re.sub(r"\n {3,}|\n {2}(?=[}\]])", " ", shared)
    own = re.sub(r"\n {4,}|\n {3}(?=[}\]])", " ", own)
    text = f'{shared}\n "dpo":{own}'
    target.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {target}")
