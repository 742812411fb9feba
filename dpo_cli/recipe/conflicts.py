"""What `rules.py` has no keys for: data that a method can't learn from, and settings of one source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.errors import either
from dpo_cli.recipe.train import methods_with, not_logged, trl_arguments
from dpo_cli.recipe.yaml import Key

Recipe = Any  # dpo_cli.recipe's, which imports this module
Conflicts = Iterator[tuple[Key, str]]


def conflicts(recipe: Recipe) -> Conflicts:
    """Yield the keys that can't be as they are, each with its sentence."""
    yield from _of_the_data(recipe)
    yield from _of_sources(recipe)
    yield from _of_own_answers(recipe)


def _of_the_data(recipe: Recipe) -> Conflicts:
    """What `train.method` can't learn from, or does not log."""
    method, given = recipe.train.method, recipe.data.format
    wanted = trl_arguments()[method]["data"]
    if given not in wanted:
        others = methods_with("data", given)
        instead = f", or train.method: {either(others)}" if others else ""
        sentence = f"{method} learns from {either(wanted)}, not from {given}: set data.format: {wanted[0]}{instead}"
        yield ("data", "format") if ("data", "format") in recipe._places else ("train", "method"), sentence
    losses, train = recipe.train.losses, recipe.train
    if {"exo_pair", "robust"} & set(losses) and not train.label_smoothing:
        yield ("train", "label_smoothing"), f"must be above 0 for {' + '.join(losses)}, for instance 0.1"
    if "alphapo" in losses and not train.alpha:
        yield ("train", "alpha"), "must not be 0 for alphapo, which is simpo then; for instance 0.25"
    stopping = recipe.engine.early_stopping
    if stopping and (unlogged := not_logged(method, stopping.metric)):
        yield ("engine", "early_stopping", "metric"), unlogged


def _of_sources(recipe: Recipe) -> Conflicts:
    """Settings of sources that only a Hub data set, or a folder, has a use for."""
    sources = [(("data", "sources", index), one) for index, one in enumerate(recipe.data.sources)]
    sources += [(("eval", "sets", index), one) for index, one in enumerate(recipe.eval.sets)]
    for key, source in sources:
        builtin, path = source.id.startswith("builtin:"), Path(source.id)
        local = builtin or path.is_absolute()
        if source.revision and local:
            yield (*key, "revision"), "does nothing: the source is no Hub id; remove it"
        if builtin or (local and path.is_file()):
            for name in ("data_files", "split"):
                if getattr(source, name) != type(source).model_fields[name].default:
                    yield (*key, name), "does nothing: the source is one file; remove it"


A_RATER = "data.rater: {kind: reward_model, id: Skywork/Skywork-Reward-V2-Qwen3-0.6B}"


def _of_own_answers(recipe: Recipe) -> Conflicts:
    """What makes no sense of `sample`, `rate` and `data.rater`."""
    data, rater = recipe.data, recipe.data.rater
    for index, source in enumerate(data.sources):
        key = ("data", "sources", index)
        if rater is None and (source.sample or source.rate):
            asked = "sample" if source.sample else "rate"
            yield (*key, asked), f"needs a rater, for nothing says which answer is better: add {A_RATER}"
        if source.rate and source.sample:
            yield (*key, "rate"), "does nothing beside sample, whose answers are rated anyway: remove it"
        if source.layout == "prompts" and not source.sample:
            yield (*key, "layout"), "prompts has no answers: add sample: {answers: 4}, so that the model answers them"
        if source.layout == "prompts" and source.sample and source.sample.keep:
            yield (*key, "sample", "keep"), "does nothing: layout prompts has no answers to keep; remove it"
        longest = recipe.model.max_length
        if source.sample and source.sample.max_new_tokens > longest:
            sentence = f"is over model.max_length, and longer pairs are dropped: write max_new_tokens: {longest // 2}"
            yield (*key, "sample", "max_new_tokens"), sentence
    if rater is None:
        return
    if not any(source.sample or source.rate for source in data.sources):
        sentence = "has nothing to rate: give a source sample: {answers: 4} or rate: true, or remove it"
        yield ("data", "rater"), sentence
    if rater.kind == "reward_model" and rater.id == recipe.model.id:
        sentence = "is the model itself, which writes answers and scores none: name a reward model, such as "
        yield ("data", "rater", "id"), sentence + A_RATER.partition("id: ")[2].rstrip("}")
