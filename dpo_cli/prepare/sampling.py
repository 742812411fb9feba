"""Answers to prompts, each drawn once and kept: by the model that `train` starts from, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpo_cli.judging.client import Client
from dpo_cli.judging.judgment import key_of
from dpo_cli.prepare.text import hash64
from dpo_cli.recipe import Recipe, Sample, Server
from dpo_cli.records import Message
from dpo_cli.store import Store


class Drawn(NamedTuple):
    """An answer; `ended`: not at `max_new_tokens`; `tokens`: of prompt and answer, 0 where a server counts none."""

    text: str
    ended: bool
    tokens: int


Prompts = Sequence[list[Message]]
Advance = Callable[[int], None]  # called with the number of answers that are done, the known ones at once


class ServerSampler:
    """Answers of any OpenAI-compatible server, each requested alone and with a seed of its own."""

    def __init__(self, recipe: Recipe, settings: Server, store: Store) -> None:
        self.recipe, self.settings = recipe, settings
        self._client = Client(settings, store)

    def draw(self, prompts: Prompts, sample: Sample, advance: Advance) -> list[list[Drawn]]:
        """Draw `sample.answers` to each prompt, or take them from the store; DpoError where the server is of no use.

        What it refuses to answer counts as an answer without an end.
        """
        server = self.settings.base_url.rstrip("/")
        options = {
            "temperature": sample.temperature, "top_p": sample.top_p, "max_tokens": sample.max_new_tokens,
            "extra_body": {
                "chat_template_kwargs": {"enable_thinking": self.recipe.model.thinking},
                **({"top_k": sample.top_k} if sample.top_k else {}),
            },
        }  # fmt: skip
        requests, keys = {}, []
        for prompt in prompts:
            seeds = [hash64(self.recipe.seed, key_of(prompt), draw) % 2**31 for draw in range(sample.answers)]
            keys.append([key_of("answer", server, self.settings.model, options, prompt, seed) for seed in seeds])
            for key, seed in zip(keys[-1], seeds, strict=True):
                requests[key] = {"messages": prompt, "seed": seed, **options}
        advance(len(prompts) * sample.answers - len(requests))
        good, _ = self._client.ask(requests, lambda reply: True, advance)
        nothing = Drawn("", False, 0)
        drawn = {key: Drawn(reply.text, not reply.cut, reply.tokens) for key, reply in good.items()}
        return [[drawn.get(key, nothing) for key in several] for several in keys]
