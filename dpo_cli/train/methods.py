"""The training methods: which TRL classes each one uses, and what their arguments are called.

`python -m dpo_cli.train.methods` writes `dpo_cli/trl_arguments.json`, from which `check` knows every argument and
loss without importing TRL; a test holds that file against the TRL that is installed.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """The names of a method's classes in `trl`."""

    config: str
    trainer: str


METHODS = {
    "dpo": Method("DPOConfig", "DPOTrainer"),
}


def describe_arguments() -> dict[str, Any]:
    """Every method's arguments and losses as the installed TRL declares them.

    Returns:
        {method: {"config": class name, "losses": [...], "arguments": {name: {"type", "default", "choices"}}}}, where
        `type` is written with bool, int, float, str, list, dict and None only.
    """
    import trl

    described: dict[str, Any] = {}
    for name, method in METHODS.items():
        config, trainer = getattr(trl, method.config), getattr(trl, method.trainer)
        hints = typing.get_type_hints(config)
        arguments = {}
        for field in dataclasses.fields(config):
            kind, choices = _plain_type(hints[field.name])
            if not kind:
                continue  # an object that no YAML can hold
            default = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory() if callable(field.default_factory) else None
            choices = choices or [str(choice) for choice in field.metadata.get("choices") or []]
            arguments[field.name] = {"type": kind, "default": default, "choices": choices}
        # TRL keeps no list of its losses: they are the branches of `_compute_loss`, each once, in order.
        source = inspect.getsource(trainer._compute_loss)
        losses = list(dict.fromkeys(re.findall(r'loss_type == "(\w+)"', source)))
        described[name] = {"config": method.config, "losses": losses, "arguments": arguments}
    return described


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
    target = Path(__file__).parents[1] / "trl_arguments.json"
    text = json.dumps(describe_arguments(), indent=1)
    text = re.sub(r"\n {4,}|\n {3}(?=[}\]])", " ", text)  # one argument a line, so that a diff of TRLs reads well
    target.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {target}")
