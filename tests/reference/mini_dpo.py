"""Direct Preference Optimization in plain PyTorch, the whole of it, from the paper and without a trainer library.

Rafailov et al. 2023, arXiv 2305.18290. A pair is a prompt x with a chosen answer y_w and a rejected one y_l. With the
policy pi, the frozen reference pi_ref and beta > 0, equation 7 is

    loss = -log sigmoid(beta * [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)])

It is the oracle that dpo-cli's training is compared with, and to be read: `python -m tests.reference.mini_dpo` works
the loss of one pair out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Literal["sigmoid", "sigmoid_norm"]


class Pair(NamedTuple):
    """Token ids. An answer ends with the token that ends a turn, if the model is to learn to stop."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Batch(NamedTuple):
    """B pairs as 2B rows, the chosen first, padded on the right to L tokens. All three are [2B, L].

    `attend` is 1 on tokens and 0 on padding; `answer` is 1 on the answer's tokens alone.
    """

    ids: Tensor
    attend: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Settings:
    """Of a training; the optimizer's are AdamW's usual ones (betas 0.9 and 0.999, eps 1e-8, no weight decay)."""

    beta: float = 0.1
    loss: Loss = "sigmoid"
    learning_rate: float = 1e-6  # of step 1; it falls linearly, to 0 after the last step
    micro_batch: int = 1  # pairs of one forward
    accumulation: int = 1  # forwards of one step
    max_grad_norm: float = 1.0
    max_length: int = 1024  # tokens of prompt + answer; what is longer is cut at the end


def collate(pairs: Sequence[Pair], max_length: int) -> Batch:
    """Pad B pairs to one batch. The padding's id doesn't matter (0): nothing attends to it and nothing scores it."""
    texts = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
    starts = [len(p.prompt) for p in pairs] * 2
    length = min(max(map(len, texts)), max_length)
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    attend, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        end = min(len(text), length)
        ids[row, :end] = torch.tensor(text[:end])
        attend[row, :end] = 1
        answer[row, start:end] = 1
    return Batch(ids, attend, answer)


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(token t+1 | tokens 0..t): logits [N, L, V], ids [N, L] -> [N, L-1].

    The shift: the logits at position t predict the token at t+1, so the last logits and the first token drop out.
    """
    logps = F.log_softmax(logits[:, :-1].float(), dim=-1)
    return logps.gather(2, ids[:, 1:, None]).squeeze(2)


def answer_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log p(answer | prompt) in nats, summed over the answer's tokens: [2B]."""
    logits = model(input_ids=batch.ids, attention_mask=batch.attend, use_cache=False).logits
    return (token_logps(logits, batch.ids) * batch.answer[:, 1:]).sum(1)


def dpo_logits(policy: Tensor, reference: Tensor, beta: float, lengths: Tensor | None = None) -> Tensor:
    """The argument of the sigmoid in equation 7.

    Args:
        policy, reference: log-probabilities of the answers, [2B], the chosen first.
        lengths: tokens of the answers, [2B]: the length-normalised form, in which an answer's log-ratio is the mean
            over its tokens and not their sum.

    Returns:
        [B]; positive where the policy prefers the chosen answer more than the reference does.
    """
    ratios = policy - reference
    if lengths is not None:
        ratios = ratios / lengths.clamp(min=1)
    chosen, rejected = ratios.chunk(2)
    return beta * (chosen - rejected)


def pair_logits(policy: nn.Module, reference: nn.Module, batch: Batch, settings: Settings) -> Tensor:
    """The logit of each pair, [B], with a graph to the policy's parameters only."""
    with torch.no_grad():
        reference_logps = answer_logps(reference, batch)
    lengths = batch.answer.sum(1) if settings.loss == "sigmoid_norm" else None
    return dpo_logits(answer_logps(policy, batch), reference_logps, settings.beta, lengths)


def micro_batches(pairs: Sequence[Pair], step: int, settings: Settings) -> Iterator[Batch]:
    """The forwards of step 0, 1, …: the pairs in their order, from the start again when they are used up."""
    size = settings.micro_batch
    first = step * size * settings.accumulation
    for start in range(first, first + size * settings.accumulation, size):
        yield collate([pairs[index % len(pairs)] for index in range(start, start + size)], settings.max_length)


def train(
    policy: nn.Module, reference: nn.Module, pairs: Sequence[Pair], steps: int, settings: Settings
) -> Iterator[float]:
    """Train the policy's parameters that require a gradient; yields the loss of each step, a mean over its pairs."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    policy.train()
    reference.eval()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / steps)
        total = 0.0
        for batch in micro_batches(pairs, step, settings):
            loss = -F.logsigmoid(pair_logits(policy, reference, batch, settings)).mean() / settings.accumulation
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield total


# -------------------------------------------------------------------------------------------------- a worked example

EXAMPLE = """\
One pair: log-probabilities of the whole answers, in nats, and beta = 0.1.

                      chosen   rejected
policy pi             {0:7.2f}    {1:7.2f}
reference pi_ref      {2:7.2f}    {3:7.2f}
log pi - log pi_ref   {4:+7.2f}    {5:+7.2f}     how much likelier each answer became
times beta            {6:+7.2f}    {7:+7.2f}     the implicit rewards

logit = {6:+.2f} - ({7:+.2f}) = {8:.2f}           the reward margin
sigmoid({8:.2f})      = {9:.4f}               the chance that the chosen answer wins, by Bradley and Terry
loss = -log {9:.4f} = {10:.4f}               ln 2 = 0.6931 where policy and reference are the same
gradient             = {11:.4f} x beta      how hard this pair still pulls: sigmoid(-logit)
"""


def explain(beta: float = 0.1) -> str:
    """The loss of one pair, step by step."""
    policy, reference = torch.tensor([-10.0, -15.0]), torch.tensor([-12.0, -12.5])
    ratios = policy - reference
    logit = dpo_logits(policy, reference, beta)
    figures = [*policy, *reference, *ratios, *(beta * ratios), logit, logit.sigmoid(), -F.logsigmoid(logit)]
    return EXAMPLE.format(*map(float, [*figures, (-logit).sigmoid()]))


def tokenised(tokenizer: Any, pair: Any) -> Pair:
    """A row of `data/train.jsonl` as the chat template renders it: an answer is what follows the prompt's rendering."""

    def ids(messages: list[dict[str, str]], **options: Any) -> list[int]:
        options |= pair.chat_template_kwargs
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))

    prompt = ids(pair.prompt, add_generation_prompt=True)
    return Pair(prompt, *(ids(pair.prompt + side)[len(prompt) :] for side in (pair.chosen, pair.rejected)))


if __name__ == "__main__":
    print(explain(), end="")
