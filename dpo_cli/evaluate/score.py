"""Log-probabilities of the held-out answers under the tuned model and its reference, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_cli import models
from dpo_cli.records import Pair
from dpo_cli.stats import Figure, bootstrap_mean, wilson

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scored:
    """One held-out pair: log-probabilities in nats, summed over the answer's tokens with its end token.

    `policy` is the tuned model, `reference` what it started from: the base alone, or with `model.adapter`.
    """

    id: str
    language: str
    source: str
    chosen_tokens: int
    rejected_tokens: int
    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float

    @property
    def chosen_drift(self) -> float:
        """log π(chosen) - log π_ref(chosen): how much likelier the chosen answer became, in nats."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_drift(self) -> float:
        return self.policy_rejected - self.reference_rejected


@dataclass(frozen=True)
class Tokens:
    """A prompt and one answer as token ids; the loss counts from `start` on."""

    ids: list[int]
    start: int


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair, max_length: int) -> tuple[Tokens, Tokens]:
    """(chosen, rejected) of a pair in tokens, split into prompt and answer as TRL's DPOTrainer does.

    TRL renders prompt and prompt + answer apart and lets the answer begin where the two part, at the same place for
    both answers; what is over `max_length` is cut from the end.
    """
    prompt = _render(tokenizer, pair.prompt, pair, add_generation_prompt=True)
    whole = [_render(tokenizer, pair.prompt + answer, pair) for answer in (pair.chosen, pair.rejected)]
    start = min(_common_prefix(prompt, ids) for ids in whole)
    chosen, rejected = (Tokens(ids[:max_length], start) for ids in whole)
    return chosen, rejected


def _render(tokenizer: PreTrainedTokenizerBase, messages: Any, pair: Pair, **options: Any) -> list[int]:
    rendered: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, **pair.chat_template_kwargs, **options
    )
    return list(rendered["input_ids"])


def _common_prefix(one: list[int], other: list[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def answer_logps(model: PreTrainedModel | PeftModel, rows: Sequence[Tokens], batch_size: int) -> list[list[float]]:
    """Each row's per-token log-probabilities of its answer, in nats.

    Rows are sorted by length and padded on the right; the head only runs where answers stand, so that a vocabulary of
    150,000 words does not fill the memory.
    """
    import torch

    device = next(model.parameters()).device
    results: list[list[float]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        longest = max(len(rows[index].ids) for index in batch)
        keep = longest - min(rows[index].start for index in batch) + 1  # positions that predict an answer token
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(batch):
            ids[line, : len(rows[index].ids)] = torch.tensor(rows[index].ids)
            mask[line, : len(rows[index].ids)] = 1
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep, use_cache=False
            ).logits
        offset = longest - logits.shape[1]
        for line, index in enumerate(batch):
            row = rows[index]
            # The logits at position t score token t + 1.
            scores = logits[line, row.start - 1 - offset : len(row.ids) - 1 - offset].float()
            tokens = ids[line, row.start : len(row.ids)].to(device)
            logps = torch.gather(scores.log_softmax(-1), 1, tokens.unsqueeze(1)).squeeze(1)
            results[index] = logps.tolist()
    return results


def score_pairs(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int, batch_size: int
) -> list[Scored]:
    """Every pair under the tuned model and under its reference, one base in memory."""
    rows = [row for pair in pairs for row in encode(tokenizer, pair, max_length)]
    policy = answer_logps(model, rows, batch_size)
    with models.as_reference(model):
        reference = answer_logps(model, rows, batch_size)
    scored = []
    for index, pair in enumerate(pairs):
        chosen, rejected = 2 * index, 2 * index + 1
        scored.append(
            Scored(
                id=pair.id,
                language=pair.language,
                source=pair.source,
                chosen_tokens=len(policy[chosen]),
                rejected_tokens=len(policy[rejected]),
                policy_chosen=sum(policy[chosen]),
                policy_rejected=sum(policy[rejected]),
                reference_chosen=sum(reference[chosen]),
                reference_rejected=sum(reference[rejected]),
            )
        )
    return scored


def pair_metrics(scored: Sequence[Scored], beta: float, seed: int) -> dict[str, Figure]:
    """The `pairs` figures of `eval/metrics.json`.

    reward_accuracy: share of pairs whose implicit reward β (log π - log π_ref) is higher for chosen; ties count ½, so
        an untrained adapter stands at 0.5. reward_accuracy_per_token: the same with rewards divided by length.
    margin: β (chosen drift - rejected drift), in nats.
    chosen_drift, rejected_drift: log π - log π_ref, in nats.
    ranking_accuracy_base, ranking_accuracy_tuned: share of pairs whose chosen answer has the higher mean
        log-probability per token.
    longer_wins: share of pairs whose chosen answer has more tokens: what a model gets that only learned length.
    """

    def share(one: list[float], other: list[float]) -> Figure:
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(one, other, strict=True))
        return wilson(wins, len(one))

    chosen_length = [float(max(pair.chosen_tokens, 1)) for pair in scored]
    rejected_length = [float(max(pair.rejected_tokens, 1)) for pair in scored]
    chosen = [pair.chosen_drift for pair in scored]
    rejected = [pair.rejected_drift for pair in scored]

    def per_token(values: list[float], lengths: list[float]) -> list[float]:
        return [value / length for value, length in zip(values, lengths, strict=True)]

    return {
        "reward_accuracy": share(chosen, rejected),
        "reward_accuracy_per_token": share(per_token(chosen, chosen_length), per_token(rejected, rejected_length)),
        "margin": bootstrap_mean([beta * (a - b) for a, b in zip(chosen, rejected, strict=True)], seed),
        "chosen_drift": bootstrap_mean(chosen, seed),
        "rejected_drift": bootstrap_mean(rejected, seed),
        "ranking_accuracy_base": share(
            per_token([pair.reference_chosen for pair in scored], chosen_length),
            per_token([pair.reference_rejected for pair in scored], rejected_length),
        ),
        "ranking_accuracy_tuned": share(
            per_token([pair.policy_chosen for pair in scored], chosen_length),
            per_token([pair.policy_rejected for pair in scored], rejected_length),
        ),
        "longer_wins": share(chosen_length, rejected_length),
    }
