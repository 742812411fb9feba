"""The judge on this machine: a reward model, which is a sequence classifier with one output.

It scores an answer by itself, so there is no order of the two to cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli import models
from dpo_cli.disk import sha256
from dpo_cli.errors import DpoError
from dpo_cli.inference import bar, in_batches
from dpo_cli.judging.judgments import Cache, Judgment, Match, key_of
from dpo_cli.machine import best_dtype
from dpo_cli.recipe import RewardModelJudge


def by_reward_model(settings: RewardModelJudge, matches: Sequence[Match], path: Path, progress: bool) -> list[Judgment]:
    """A judgment for every match: the answer with the higher score wins; equal scores are a tie. See `judges.judge`."""
    where, dtype = models.location(settings.id), str(best_dtype()).removeprefix("torch.")
    config, tokenizer = open_reward_model(settings)
    identity = _identity(where, config)
    tokens: dict[str, list[int]] = {}
    keys: list[tuple[str, str] | None] = []  # of both answers, a match
    for match in matches:
        rendered = [_render(tokenizer, match, answer) for answer in (match.first, match.second)]
        if None in rendered:
            keys.append(None)
            continue
        both = [key_of(settings.kind, settings.id, identity, dtype, settings.max_length, ids) for ids in rendered]
        tokens |= {key: ids for key, ids in zip(both, rendered, strict=True) if ids is not None}
        keys.append((both[0], both[1]))
    cache = Cache(path, set(tokens))
    missing = {key: ids[: settings.max_length] for key, ids in tokens.items() if key not in cache.known}
    if missing:
        _score_all(settings, where, dtype, config, missing, cache, progress)
    judgments = []
    for match, pair in zip(matches, keys, strict=True):
        one, other = (cache.known[key] for key in pair) if pair else (math.nan, math.nan)
        cut = any(len(tokens[key]) > settings.max_length for key in pair or ())
        if math.isfinite(one - other):
            score = 0.5 if one == other else float(one > other)
            judgments.append(Judgment(match.id, score, difference=one - other, cut=cut))
        else:
            judgments.append(Judgment(match.id, None, cut=cut))
    return judgments


def _render(tokenizer: Any, match: Match, answer: str) -> list[int] | None:
    """The conversation with one answer in tokens; None where the model's template refuses it, a system turn say."""
    from jinja2 import TemplateError

    try:
        return models.chat_tokens(tokenizer, [*match.prompt, {"role": "assistant", "content": answer}])
    except TemplateError:
        return None


def _score_all(
    settings: RewardModelJudge,
    where: str,
    dtype: str,
    config: Any,
    rows: dict[str, list[int]],
    cache: Cache,
    progress: bool,
) -> None:
    """Score the rows that are not in the cache, the longest first, so that memory runs out at once or not at all.

    Raises:
        DpoError: the weights can't be loaded, are no reward model's, or don't fit.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
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
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # The head reads the last token that is not the padding, so where the model names none we need one that no row ends
    # with. The pads themselves are masked.
    pad = config.get_text_config().pad_token_id
    if pad is None:
        ends = {ids[-1] for ids in rows.values()}
        pad = next(token for token in range(len(ends) + 1) if token not in ends)
        model.config.get_text_config().pad_token_id = pad
    order = sorted(rows, key=lambda key: -len(rows[key]))

    def score(keys: Sequence[str]) -> list[float]:
        longest = len(rows[keys[0]])
        ids = torch.tensor([rows[key] + [pad] * (longest - len(rows[key])) for key in keys], device=model.device)
        mask = torch.tensor([[1] * len(rows[key]) + [0] * (longest - len(rows[key])) for key in keys]).to(model.device)
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def too_large(key: str) -> DpoError:
        return DpoError(
            f"one answer of {len(rows[key])} tokens is too much for the memory with {settings.id}",
            where="eval.judge",
            hint="lower eval.judge.max_length, or take a smaller reward model",
        )

    done = 0
    with bar("scoring", len(order), progress) as advance, torch.inference_mode():
        for scores in in_batches(order, settings.batch_size, score, too_large):
            for key, value in zip(order[done:], scores, strict=False):
                cache.add(key, value)
            done += len(scores)
            advance(len(scores))


def open_reward_model(settings: RewardModelJudge) -> tuple[Any, Any]:
    """Its configuration and tokenizer.

    Raises:
        DpoError: they can't be found, it gives more than one number, or it has no chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = models.location(settings.id)
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
            where="eval.judge.id",
            hint="take a reward model of chats, or put chat_template.jinja into its folder",
        )
    return config, tokenizer


def _identity(where: str, config: Any) -> str | None:
    """What its scores hang on: the commit of a hub id, the content of a local folder."""
    if not Path(where).is_dir():
        return getattr(config, "_commit_hash", None)
    files = [path for path in sorted(Path(where).iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
    return key_of(*[(path.name, sha256(path)) for path in files])


def _cannot_load(settings: RewardModelJudge, error: Exception) -> DpoError:
    return DpoError(
        f"can't load the reward model {settings.id}: {str(error).strip().splitlines()[0]}",
        where="eval.judge.id",
        hint="check the id or folder; where the Hub is out of reach set HF_ENDPOINT to a mirror",
    )


def _no_reward_model(settings: RewardModelJudge, why: str) -> DpoError:
    return DpoError(
        f"{settings.id} is no reward model: it {why}",
        where="eval.judge.id",
        hint="name a sequence classifier with one output, such as Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    )
