"""Writes `recipe/trl_arguments.json`, from which `check` knows every method, argument and loss without importing TRL.

    python -m tests.tools.trl_arguments

A test compares that file with the TRL that is installed.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from dpo_cli.train.methods import LOSSES, METHODS
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

# Arguments of TRL's experimental trainers for other models than ours, or for tables in W&B.
_OF_OTHERS = {"is_encoder_decoder", "max_completion_length", "generate_during_eval", "padding_value"}


def describe_arguments() -> dict[str, Any]:
    """Every method's arguments and losses as the installed TRL declares them, with what of its row `check` has to know.

    Returns:
        {method: {attributes of its row, "losses": [...], "read_by": {argument: the losses that read it},
        "arguments": {name: {"type", "default", "choices"}}}}, where `type` is written with bool, int, float, str,
        list, dict and None only. `lr_scheduler_type` has "kwargs" too: {schedule: {"takes", "needs"}}.
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
            "row": method.row,
            "reference": method.reference,
            "compares": method.compares,
            "whole_logits": method.whole_logits,
            "engine": list(method.engine),
            "defaults": method.defaults,
            "losses": list(method.losses or losses),
            "neighbours": list(method.neighbours),
            "not_logged": list(method.not_logged),
            "read_by": {} if method.row == "list" else _read_by(trainer, arguments),
            "arguments": arguments,
        }
    return described


def _schedule_kwargs() -> dict[str, dict[str, list[str]]]:
    """What `lr_scheduler_kwargs` may hold, and has to hold, of each learning-rate schedule of transformers."""
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
    branches |= {name: branches[one.computed_as] for name, one in LOSSES.items() if one.computed_as in branches}
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


def _text(value: Any, path: tuple[str, ...] = ()) -> str:
    """JSON with an argument a line, so that a diff of TRLs reads well."""
    if len(path) > 1 and path[1:] != ("arguments",):
        return json.dumps(value)
    lines = [f"{' ' * (len(path) + 1)}{json.dumps(key)}: {_text(one, (*path, key))}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * len(path) + "}"


if __name__ == "__main__":
    target = Path(__file__).parents[2] / "dpo_cli/recipe/trl_arguments.json"
    target.write_text(_text(_shared_once(describe_arguments())) + "\n", encoding="utf-8")
    print(f"wrote {target}")
