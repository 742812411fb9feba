"""The judge on this machine: a reward model, which is a sequence classifier with one output.

It scores each answer alone, so there is no order of the two to cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dpo_cli import chat, model_files
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError, first_line
from dpo_cli.gpu import best_dtype
from dpo_cli.hub import loading
from dpo_cli.inference import in_batches, padded
from dpo_cli.judging.judgment import Judgment, Match, key_of
from dpo_cli.progress import Step
from dpo_cli.recipe import RewardModelJudge, RewardModelRater
from dpo_cli.records import Message
from dpo_cli.stats import win
from dpo_cli.store import Store


class Score(NamedTuple):
    """What an answer scored, in the model's own unit; `cut`: it was shortened to `max_length` to be read."""

    value: float
    cut: bool


def judge(settings: RewardModelJudge, matches: Sequence[Match], store: Path, progress: bool) -> list[Judgment]:
    """Judge every match: the answer with the higher score wins; equal scores are a tie. See `judging.judge`."""
    conversations = [(match.prompt, answer) for match in matches for answer in (match.first, match.second)]
    step = Step("scoring the answers", quiet=not progress, total=len(conversations))
    with Store(store) as kept, step:
        found = RewardModel(settings, kept).scores(conversations, step.advance)
    judgments = []
    for match, one, other in zip(matches, found[::2], found[1::2], strict=True):
        difference = one.value - other.value if one and other else math.nan
        known = math.isfinite(difference)
        cut = bool(one and other and (one.cut or other.cut))
        score, gap = (win(difference, 0.0), difference) if known else (None, None)
        judgments.append(Judgment(match.id, score, difference=gap, cut=cut))
    return judgments


class RewardModel:
    """A reward model, whose weights are loaded for the first answer that is not in the store.

    Raises:
        DpoError: it can't be found, or is no reward model.
    """

    def __init__(self, settings: RewardModelRater, store: Store) -> None:
        self.settings, self.store = settings, store
        self._where, self._dtype = model_files.location(settings.id), str(best_dtype()).removeprefix("torch.")
        self._config, self._tokenizer = open_reward_model(settings)
        self._identity = _identity(self._where, self._config)
        self._model: Any = None

    def scores(
        self, conversations: Sequence[tuple[list[Message], str]], advance: Callable[[int], None]
    ) -> list[Score | None]:
        """Score each answer to its prompt; what is in the store is not scored again.

        Args:
            advance: is told of every answer that is done, the known ones at once.

        Returns:
            None where the model's template refuses the conversation, one with a system turn say.

        Raises:
            DpoError: the weights can't be loaded, are no reward model's, or don't fit.
        """
        settings = self.settings
        rows = [_render(self._tokenizer, *conversation) for conversation in conversations]
        identity = (settings.kind, settings.id, self._identity, self._dtype, settings.max_length)
        keys = [key_of(*identity, ids) if ids else None for ids in rows]
        tokens = {key: ids for key, ids in zip(keys, rows, strict=True) if key and ids}
        known: dict[str, float] = self.store.get(tokens)
        missing = {key: ids[: settings.max_length] for key, ids in tokens.items() if key not in known}
        advance(len(conversations) - len(missing))
        if missing:
            if self._model is None:
                self._model = _load(settings, self._where, self._dtype, self._config)
            known |= _score_all(settings, self._model, missing, self.store, advance)
        cut = {key for key, ids in tokens.items() if len(ids) > settings.max_length}
        return [Score(known[key], key in cut) if key else None for key in keys]


def _render(tokenizer: Any, prompt: list[Message], answer: str) -> list[int] | None:
    try:
        return chat.chat_tokens(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    except TemplateError:
        return None


def _load(settings: RewardModelRater, where: str, dtype: str, config: Any) -> Any:
    try:
        with loading(settings.id, settings.revision):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                where,
                revision=settings.revision,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise _cannot_load(settings, error) from error
    if loaded["missing_keys"]:
        raise _no_reward_model(settings, f"has no weights for {sorted(loaded['missing_keys'])[0]}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _score_all(
    settings: RewardModelRater, model: Any, rows: dict[str, list[int]], store: Store, advance: Callable[[int], None]
) -> dict[str, float]:
    """Score the rows and keep it, the longest first, so that memory runs out at once or not at all."""
    config = model.config.get_text_config()
    # The head reads the last token that is not the padding, so where the model names none we need one that no row ends
    # with. The pads themselves are masked.
    if config.pad_token_id is None:
        ends = {ids[-1] for ids in rows.values()}
        config.pad_token_id = next(token for token in range(len(ends) + 1) if token not in ends)
    order = sorted(rows, key=lambda key: -len(rows[key]))

    def score(keys: Sequence[str]) -> dict[str, float]:
        ids, mask = padded([rows[key] for key in keys], model.device, value=config.pad_token_id)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return dict(zip(keys, logits.float().tolist(), strict=True))

    def too_large(key: str) -> DpoError:
        what = f"one answer of {len(rows[key])} tokens is too much for the memory with {settings.id}"
        hint = f"lower {settings.at}.max_length, or take a smaller reward model"
        return DpoError(what, where=settings.at, hint=hint)

    found: dict[str, float] = {}
    with torch.inference_mode():
        for some in in_batches(order, settings.batch_size, score, too_large):
            store.put(some)
            found |= some
            advance(len(some))
    return found


def open_reward_model(settings: RewardModelRater) -> tuple[Any, Any]:
    """Its configuration and tokenizer.

    Raises:
        DpoError: they can't be found, it gives more than one number, or it has no chat template.
    """
    where = model_files.location(settings.id)
    try:
        config = AutoConfig.from_pretrained(where, revision=settings.revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(where, revision=settings.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(settings, error) from error
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise _no_reward_model(settings, f"is a {' or '.join(config.architectures or ['model of no named kind'])}")
    if config.num_labels != 1:
        raise _no_reward_model(settings, f"gives {config.num_labels} numbers for a text")
    if not tokenizer.chat_template:
        raise DpoError(
            f"the tokenizer of {settings.id} has no chat template, so there is no showing it a conversation",
            where=f"{settings.at}.id",
            hint="take a reward model of chats, or put chat_template.jinja into its folder",
        )
    return config, tokenizer


def _identity(where: str, config: Any) -> str | None:
    """What its scores hang on: the commit of a hub id, the content of a local folder."""
    if not Path(where).is_dir():
        return getattr(config, "_commit_hash", None)
    files = [path for path in sorted(Path(where).iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
    return key_of(*[(path.name, sha256(path)) for path in files])


def _cannot_load(settings: RewardModelRater, error: Exception) -> DpoError:
    what = f"can't load the reward model {settings.id}: {first_line(error)}"
    hint = "check the id or folder; where the Hub is out of reach set HF_ENDPOINT to a mirror"
    return DpoError(what, where=f"{settings.at}.id", hint=hint)


def _no_reward_model(settings: RewardModelRater, why: str) -> DpoError:
    hint = "name a sequence classifier with one output, such as Skywork/Skywork-Reward-V2-Qwen3-0.6B"
    return DpoError(f"{settings.id} is no reward model: it {why}", where=f"{settings.at}.id", hint=hint)
