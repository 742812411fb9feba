"""One line of `verify.json`: what was looked at, what it is, what it may be, and whether it is that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict


class Check(TypedDict):
    name: str
    value: Any
    limit: Any
    ok: bool


def passed(checks: Sequence[Check]) -> bool:
    return all(check["ok"] for check in checks)


def equal(name: str, value: Any, wanted: Any) -> Check:
    return {"name": name, "value": value, "limit": wanted, "ok": value == wanted}


def at_most(name: str, value: float, limit: float) -> Check:
    return {"name": name, "value": _finite(value), "limit": limit, "ok": value <= limit}


def at_least(name: str, value: float, limit: float) -> Check:
    return {"name": name, "value": _finite(value), "limit": limit, "ok": value >= limit}


def between(name: str, value: float, least: float, most: float) -> Check:
    return {"name": name, "value": _finite(value), "limit": [least, most], "ok": least <= value <= most}


def failed(name: str, why: str, wanted: str) -> Check:
    """What could not even be looked at."""
    return {"name": name, "value": why, "limit": wanted, "ok": False}


def reported(name: str, value: float | str) -> Check:
    """A figure that has no limit."""
    return {"name": name, "value": _finite(value) if isinstance(value, float) else value, "limit": None, "ok": True}


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
