"""Answers by the model that `train` starts from: `model.id` with `model.adapter`, by the seeded sampler of `eval`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from dpo_cli import adapters, backends, chat, models
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError
from dpo_cli.hub import loading
from dpo_cli.inference import Answer, Sampling, generate, in_batches, seed_of
from dpo_cli.judging.judgment import key_of
from dpo_cli.model_files import local_files, location
from dpo_cli.prepare.own_answers import Advance, Drawn, Prompts
from dpo_cli.recipe import Recipe, Sample
from dpo_cli.store import Store

DECIDE = (".json", ".jinja", ".safetensors", ".txt")  # suffixes of the files that an answer depends on


class LocalSampler:
    """Draws with the model on this machine, which is loaded for the first answer that is not in the store."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, store: Store) -> None:
        self.recipe, self.tokenizer, self.store = recipe, tokenizer, store
        self._identity = _identity(recipe)
        self._model: Any = None

    def draw(self, prompts: Prompts, sample: Sample, advance: Advance) -> list[list[Drawn]]:
        """Draw `sample.answers` to each prompt, or take them from the store; DpoError where the memory is too small.

        An answer is the same in whatever batch and after whatever kill it is drawn.
        """
        sampling = Sampling(sample.max_new_tokens, sample.temperature, sample.top_p, sample.top_k)
        options = chat.chat_template_kwargs(self.recipe)
        rows: dict[str, tuple[list[int], int]] = {}  # prompt in tokens, and the seed, by the answer's key
        keys: list[list[str]] = []
        for prompt in prompts:
            ids = chat.chat_tokens(self.tokenizer, prompt, add_generation_prompt=True, **options)
            seeds = [seed_of(self.recipe.seed, ids, draw) for draw in range(sample.answers)]
            thinking = self.recipe.model.thinking
            keys.append([key_of("answer", self._identity, thinking, vars(sampling), ids, seed) for seed in seeds])
            rows |= {key: (ids, seed) for key, seed in zip(keys[-1], seeds, strict=True)}
        drawn = {key: Drawn(*kept) for key, kept in self.store.get(rows).items()}
        left = sorted((key for key in rows if key not in drawn), key=lambda key: -len(rows[key][0]))
        advance(len(prompts) * sample.answers - len(left))
        if left and self._model is None:
            self._model = _load(self.recipe)

        too_large = DpoError(
            f"the GPU's memory is too small for one answer of {sample.max_new_tokens} tokens",
            where="data.sources[].sample.max_new_tokens",
            hint="lower it, or set model.load_in_4bit: true; eval.batch_size is halved automatically and is 1 by now",
        )

        def work(batch: Sequence[str]) -> dict[str, Drawn]:
            ids, seeds = zip(*(rows[key] for key in batch), strict=True)
            answers = generate(self._model, self.tokenizer, ids, sampling, seeds)
            return {key: self._drawn(rows[key][0], answer) for key, answer in zip(batch, answers, strict=True)}

        with torch.inference_mode():
            for some in in_batches(left, self.recipe.eval.batch_size, work, lambda _: too_large):
                self.store.put(some)
                drawn |= some
                advance(len(some))
        return [[drawn[key] for key in several] for several in keys]

    def _drawn(self, prompt: list[int], answer: Answer) -> Drawn:
        """The answer's text; with `model.thinking` the thoughts stand in front, as the model wrote them."""
        text = answer.text
        if self.recipe.model.thinking:
            text = str(self.tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()
        return Drawn(text, answer.finished, len(prompt) + len(answer.ids))

    def close(self) -> None:
        """Give the model's memory back: a rater, or the training, may need it."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _identity(recipe: Recipe) -> str:
    """What an answer depends on besides prompt, sampling and seed: model, adapter, and the dtype they run in."""
    where, model = location(recipe.model.id), recipe.model
    files = {name: sha256(path) for name, path in local_files(recipe).items() if path.suffix in DECIDE}
    commit = None
    if not Path(where).is_dir():
        config = AutoConfig.from_pretrained(where, revision=model.revision, trust_remote_code=False)
        commit = [model.id, getattr(config, "_commit_hash", None)]
    adapter = [model.adapter, adapters.adapter_commit(recipe)] if adapters.adapter_commit(recipe) else None
    return key_of(files, commit, adapter, model.load_in_4bit, str(models.resolve_dtype(recipe)))


def _load(recipe: Recipe) -> Any:
    """The base with the adapter that training starts from, where there is one, in eval mode on the best device."""
    backends.import_backend(backends.Backend("hf", "sampling"))
    folder = adapters.adapter_folder(recipe)
    if folder is not None:
        alone = recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": None})})
        return models.load_tuned(alone, folder)[0]
    with loading(recipe.model.id, recipe.model.revision):
        model: Any = models.load_base(recipe)
    if torch.cuda.is_available() and not recipe.model.load_in_4bit:
        model = model.to("cuda")
    return model.eval()
