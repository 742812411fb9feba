"""A raw row as a candidate set, whatever its layout; rows of tools, images, sound or film are refused."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from dpo_cli.prepare.layouts import LayoutOf
from dpo_cli.prepare.messages import Malformed, Unsupported, holds
from dpo_cli.prepare.preferred import Settings
from dpo_cli.records import CandidateSet

MEDIA = re.compile(
    r"(?:(?:chosen|rejected|input|user)_?)?(?:images?|imgs?|pictures?|photos?|screenshots?|videos?|audios?|pixel_values"
    r"|multi_?modal\w*|图片|图像|视频|音频)(?:_?(?:paths?|urls?|files?|names?|ids?|bytes|base64|b64|data|list))?",
    re.IGNORECASE,
)
TOOLS = ("tools", "functions")
_PLACEHOLDER = re.compile("<(?:image|video|audio)>")
_PLACED = re.compile(r"^(?:<(?:image|video|audio)>\s)+|\s<(?:image|video|audio)>\s*$")  # as vision sets write it


@cache
def _is_media(name: str) -> bool:
    return bool(MEDIA.fullmatch(name))


def read_row(row: Any, layout: LayoutOf, settings: Settings) -> CandidateSet:
    """A raw row as a candidate set.

    Raises:
        Malformed: it is not what the layout promises.
        Unsupported: it has images, sound or film, or an answer that calls a tool.
    """
    if not isinstance(row, dict):
        raise Malformed(f"the row is {type(row).__name__}, not a map")
    media = [name for name in row if isinstance(name, str) and _is_media(name)]
    for name in media:
        if holds(row[name]):
            raise Unsupported(f"{name} is not empty, and only text can be trained on")
    try:
        item = layout.read(row, settings)
    except RecursionError as error:
        raise Malformed("lists or maps nested too deep") from error
    asked = item.prompt[-1]["content"]
    if "<" in asked and _PLACED.search(asked):
        raise Unsupported("an <image>, <video> or <audio> in the prompt, and only text can be trained on")
    if media:
        texts = [*(turn["content"] for turn in item.prompt), *(candidate.text for candidate in item.candidates)]
        found = next(filter(None, map(_PLACEHOLDER.search, texts)), None)
        if found:
            raise Unsupported(f"{found[0]} in the text, and only text can be trained on")
    return item


def tools_of(row: Any) -> list[str]:
    """A note on each column of tools, which no layout reads."""
    return [f"the {name} column" for name in TOOLS if holds(row.get(name))] if isinstance(row, dict) else []
