"""Direct Preference Optimization in plain PyTorch, the whole of it, from the paper and without a trainer library.

Rafailov et al. 2023, arXiv 2305.18290. A pair is a prompt x with a chosen answer y_w and a rejected one y_l. With the
policy pi, the frozen reference pi_ref and beta > 0, equation 7 is

    loss = -log sigmoid(beta * [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)])

It serves three times: as an oracle that dpo-cli's training is compared with, in the speed comparison as the DPO that
people write by hand (rows padded to the longest, each pair's prompt computed four times, logits made for every
position), and to be read and run:

    python -m tests.reference.mini_dpo --explain
    python -m tests.reference.mini_dpo recipes/smoke.yaml     trains on the recipe's prepared data, into runs/smoke-mini
    dpo-cli eval recipes/smoke.yaml --set name=smoke-mini
    dpo-cli eval recipes/smoke.yaml --compare runs/smoke-mini
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    max_grad_norm: float = 1.0  # 0: gradients are not clipped
    max_length: int = 1024  # tokens of prompt + answer; what is longer is cut at the end


def collate(pairs: Sequence[Pair], max_length: int, device: Any = None) -> Batch:
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
    return Batch(ids.to(device), attend.to(device), answer.to(device))


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


def micro_batches(pairs: Sequence[Pair], step: int, settings: Settings, device: Any) -> Iterator[Batch]:
    """The forwards of step 0, 1, …: the pairs in their order, from the start again when they are used up."""
    size = settings.micro_batch
    first = step * size * settings.accumulation
    for start in range(first, first + size * settings.accumulation, size):
        chosen = [pairs[index % len(pairs)] for index in range(start, start + size)]
        yield collate(chosen, settings.max_length, device)


def train(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Sequence[Pair],
    steps: int,
    settings: Settings,
    watch: Callable[[Tensor], None] = lambda logits: None,
) -> Iterator[float]:
    """Train the policy's parameters that require a gradient; yields the loss of each step, a mean over its pairs.

    On a GPU the forward runs in 16 bits (autocast); of float16 the loss is scaled, so that no gradient is 0.
    `watch` sees the logits of each forward.
    """
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    device = weights[0].device
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if not on_gpu or torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu and dtype == torch.float16)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    policy.train()
    reference.eval()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / steps)
        total = 0.0
        for batch in micro_batches(pairs, step, settings, device):
            with torch.autocast(device.type, dtype, enabled=on_gpu):
                logits = pair_logits(policy, reference, batch, settings)
                loss = -F.logsigmoid(logits).mean() / settings.accumulation
            scaler.scale(loss).backward()
            total += loss.item()
            watch(logits.detach())
        if settings.max_grad_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield total


# ------------------------------------------------------------------------------------------- from here on, to be run

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


def run_recipe(path: Path, settings: list[str], runs: Path) -> Path:
    """Train a recipe's DPO by this file, into a run called `<name>-mini`; returns the run's folder."""
    from dpo_cli import backends, models
    from dpo_cli.cli import app
    from dpo_cli.disk import write_json
    from dpo_cli.job import open_run
    from dpo_cli.machine import device_name
    from dpo_cli.recipe import load
    from dpo_cli.records import read_pairs, write_jsonl
    from dpo_cli.train.progress import peak_memory

    settings = [*settings, f"name={load(path, settings).name}-mini"]
    options = [part for one in settings for part in ("--set", one)]
    app(["prepare", str(path), "--runs-dir", str(runs), *options], standalone_mode=False)
    recipe, run = open_run(path, settings, runs)
    args = recipe.train
    if args.method != "dpo" or args.losses not in (["sigmoid"], ["sigmoid_norm"]) or recipe.model.adapter:
        raise SystemExit("this is DPO with loss_type sigmoid or sigmoid_norm, from a fresh LoRA")
    torch.manual_seed(recipe.seed)
    policy, tokenizer = models.load_for_training(recipe, backends.Backend("hf", "plain PyTorch"))
    reference = models.load_base(recipe)

    pairs = [tokenised(tokenizer, pair) for pair in read_pairs(run.train_pairs)]
    random.Random(recipe.seed).shuffle(pairs)
    chosen = Settings(
        beta=args.beta, loss=args.losses[0], learning_rate=args.learning_rate, max_grad_norm=args.max_grad_norm,
        micro_batch=args.per_device_train_batch_size, accumulation=args.gradient_accumulation_steps,
        max_length=recipe.model.max_length,
    )  # fmt: skip
    at_once = chosen.micro_batch * chosen.accumulation
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(pairs) / at_once)
    log: list[dict[str, Any]] = []
    seen: list[Tensor] = []
    began = time.monotonic()
    record = run.started("train", recipe) | {"backend": "plain PyTorch", "device": device_name("train")}
    for step, loss in enumerate(train(policy, reference, pairs, steps, chosen, seen.append), 1):
        margins = torch.cat(seen)
        seen.clear()
        accuracy = float((margins > 0).float().mean())
        log.append(
            {"loss": loss, "rewards/accuracies": accuracy, "rewards/margins": float(margins.mean()), "step": step}
        )
        print(f"step {step}/{steps}  loss {loss:.4f}  accuracy {accuracy:.3f}", flush=True)
    seconds = time.monotonic() - began
    metrics = {
        "steps": steps, "seconds": round(seconds, 3), "pairs_per_second": round(steps * at_once / seconds, 3),
        "peak_memory_bytes": peak_memory(), "final": log[-1], "resumed_from": None,
    }  # fmt: skip
    with run.stage("train", recipe, record) as draft:
        policy.save_pretrained(str(draft.folder / "adapter"))
        tokenizer.save_pretrained(str(draft.folder / "adapter"))
        write_jsonl(draft.folder / "log.jsonl", log)
        write_json(draft.folder / "metrics.json", metrics)
    print(f"{metrics['pairs_per_second']} pairs/s -> {run.adapter}")
    return run.folder


def main() -> None:
    """Explain the loss, or train a recipe."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference.mini_dpo", description="DPO in plain PyTorch.")
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--explain", action="store_true", help="print the loss of one pair, step by step")
    given = parser.parse_args()
    if given.explain or given.recipe is None:
        print(explain(), end="")
    else:
        run_recipe(given.recipe, given.settings, given.runs_dir)


if __name__ == "__main__":
    main()
