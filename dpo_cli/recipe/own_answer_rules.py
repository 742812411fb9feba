"""What makes no sense of `sample`, `rate` and `data.rater`, each with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_cli.recipe.yaml import Key

Recipe = Any  # dpo_cli.recipe's, which imports this module
A_RATER = "data.rater: {kind: reward_model, id: Skywork/Skywork-Reward-V2-Qwen3-0.6B}"


def own_answers(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Yield what is refused of sampling and rating, by its key."""
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
