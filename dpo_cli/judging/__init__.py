"""Judges: which of two answers to a prompt is the better one. A kind of judge is a file of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from dpo_cli.judging import server
from dpo_cli.judging.judgment import Judgment, Match
from dpo_cli.recipe import OpenAIJudge, RewardModelJudge

__all__ = ["Judgment", "Match", "judge", "ready"]

Settings = OpenAIJudge | RewardModelJudge


def judge(settings: Settings, matches: Sequence[Match], store: Path, *, progress: bool) -> list[Judgment]:
    """Judge every match; the judgments come in their order.

    Args:
        settings: `eval.judge`.
        matches: what to judge; ids may repeat.
        store: the file of all that judges have replied, see `Store`; nothing in it is asked again.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        DpoError: the judge can't be reached or used at all. One match that it can't do is a failure, not an error.
    """
    if isinstance(settings, OpenAIJudge):
        return server.judge(settings, matches, store, progress)
    return _reward_model().judge(settings, matches, store, progress)


def ready(settings: Settings) -> str | None:
    """Find out before an hour of sampling what `judge` would fail on after it: no client, no key, no model.

    Returns:
        A remark where a server is not there yet. That is no error: on one card it may have to wait for the sampling.

    Raises:
        DpoError: as `judge`, but for what only a request or the weights can show.
    """
    if isinstance(settings, OpenAIJudge):
        return server.ready(settings)
    _reward_model().open_reward_model(settings)
    return None


def _reward_model() -> ModuleType:
    from dpo_cli.judging import reward_model  # here, for it imports torch

    return reward_model
