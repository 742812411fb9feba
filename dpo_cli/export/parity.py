"""Is the exported file the model that was evaluated? Each check is {name, value, limit, ok}.

Every export is compared with the trained adapter on the 16-bit base. The 4-bit model that training saw differs from
that by quantisation alone, which no export can help: that gap is reported, and fails nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from operator import ne
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from dpo_cli import chat
from dpo_cli.disk import read_json
from dpo_cli.errors import first_line
from dpo_cli.export import merge, outputs
from dpo_cli.export.base import INDEX, TOKENIZER_FILES, Stored, dtype_16bit, stored
from dpo_cli.export.outputs import Expected, Outputs

Logps = Sequence[torch.Tensor]  # of rows, each [positions, vocabulary]


class Check(TypedDict):
    """One line of `verify.json`: what was measured, its value, its limit, and whether it is within."""

    name: str
    value: Any
    limit: Any
    ok: bool


def passed(checks: Sequence[Check]) -> bool:
    return all(check["ok"] for check in checks)


def equal(name: str, value: Any, wanted: Any) -> Check:
    return {"name": name, "value": value, "limit": wanted, "ok": value == wanted}


def within(name: str, value: float, least: float | None = None, most: float | None = None) -> Check:
    """Check a figure against limits; without any it is reported only."""
    limit = [least, most] if least is not None and most is not None else most if least is None else least
    ok = (least is None or value >= least) and (most is None or value <= most)
    return {"name": name, "value": value if math.isfinite(value) else None, "limit": limit, "ok": ok}  # JSON: no NaN


class Limits(NamedTuple):
    """How far an export may be from the expected.

    `kl`: most mean KL in nats per token; `top1`: least share of positions with the same likeliest token; `logps`: most
    difference of any log-probability; `greedy`: least share of GREEDY tokens that come out the same, one after another.
    """

    kl: float
    top1: float
    logps: float | None
    greedy: float


# By the precision that the weights are stored in. Measured on random models of 2 to 28 layers (whose answers are less
# sure of themselves than a real model's) with adapters of 0.01 to 0.7 nats: KL up to 4e-4 in bfloat16 and 4e-6 in
# float16, top-1 from 0.967 and 0.994, greedy tokens from 0.63 and 0.93, carried 0.998 to 1.001.
LIMITS = {
    "float32": Limits(1e-6, 0.999, 1e-3, 0.999),
    "float16": Limits(5e-4, 0.98, None, 0.5),
    "bfloat16": Limits(5e-3, 0.95, None, 0.25),
}
EFFECT = (0.5, 2.0)  # times the adapter's own effect
CARRIED = (0.75, 1.25)  # of the adapter's change, in its direction
# Nats per token. A fainter adapter is lost in part where 16 bits can't hold so small a change of a weight: of one of
# 1e-5 nats bfloat16 carries 0.8, of 1e-6 nats 0.4. Then there is nothing to ask for.
FAINT = 5e-5
# Share of the changed weights that round to another neighbour than the sum in float64 does. Measured for changes of
# 1e-4 to 1 times the weights: up to 4e-4 in float32; in bfloat16 from 2e-3 where the change is 1e-3 of the weights.
ROUNDED = 1e-3
GREEDY = 16  # tokens of each greedy answer that are compared


# ------------------------------------------------------------------------------------------------------------- files


def check_structure(folder: Path, base: Path) -> list[Check]:
    """Check the files of a merged model: whole shards and no others, the base's tensors in 16 bits, the base's config.

    The config too, for short answers tell little of its norms' epsilon or its longest text.
    """
    try:
        config, tensors = read_json(folder / "config.json"), stored(folder)
    except (OSError, ValueError) as error:
        return [equal("merged.shards", [first_line(error).replace(f"{folder}/", "")], [])]
    original, before = read_json(base / "config.json"), stored(base)
    original.pop("_name_or_path", None)
    dtype = dtype_16bit(before)

    def described(tensors: Mapping[str, Stored], dtypes: Mapping[str, str]) -> set[tuple[Any, ...]]:
        return {(name, one.shape, dtypes.get(one.dtype, one.dtype)) for name, one in tensors.items()}

    stored_as = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    wanted = described(before, dict.fromkeys(("BF16", "F16", "F32", "F64"), stored_as))
    there = {path.name for path in folder.iterdir()} - {"config.json", INDEX, "README.md", *TOKENIZER_FILES}
    differ = {key for key in config.keys() | original.keys() if config.get(key) != original.get(key)}
    return [
        equal("merged.shards", sorted(there ^ {tensor.file.name for tensor in tensors.values()}), []),
        equal("merged.tensors", sorted({name for name, *_ in described(tensors, {}) ^ wanted})[:5], []),
        equal("merged.dtype", config.get("dtype", config.get("torch_dtype")), dtype),
        equal("merged.config_differs", sorted(differ - {"dtype", "torch_dtype"}), []),
    ]


def check_weights(folder: Path, base: Path, adapter: Path) -> list[Check]:
    """Check every tensor of a merged model, to the bit: the base's with the adapter's change, rounded to 16 bits.

    Two tensors exchanged, or bits that a disk lost, may change outputs by less than any limit on those. It is the
    writer's own sum; that the sum is right, one in float64 shows.
    """
    tensors, before = stored(folder), stored(base)
    change = merge.read_adapter(adapter, base, before)
    wrong, rounded, weights = [], 0, 0
    for name, tensor in tensors.items():
        there, plain = merge.read_tensor(tensor, name), merge.read_tensor(before[name], name)
        if not torch.equal(there, change.apply(name, plain).to(there.dtype)):
            wrong.append(name)
        if name in change.factors and name not in change.whole:
            down, up = change.factors[name]
            exact = plain.double() + change.scale * (up.double() @ down.double())
            rounded += int((there != exact.to(there.dtype)).sum())
            weights += there.numel()
    return [
        equal("merged.weights", wrong[:5], []),
        within("merged.rounded_otherwise", rounded / max(weights, 1), most=ROUNDED),
    ]


def check_adapter_files(folder: Path, trained: Path, base_name: str, revision: str | None = None) -> list[Check]:
    """Check that the trained adapter's weights and settings are there, no second adapter, and its base the 16-bit one.

    Args:
        trained: `train/adapter`.
        base_name, revision: what it is to name as its base.
    """
    try:
        with safe_open(folder / merge.WEIGHTS, framework="np") as file:
            foreign = [key for key in file.keys() if ".ref." in key]  # noqa: SIM118 - not a dict
        config, own = (read_json(one / "adapter_config.json") for one in (folder, trained))
        same = (folder / merge.WEIGHTS).read_bytes() == (trained / merge.WEIGHTS).read_bytes()
    except (OSError, ValueError, SafetensorError) as error:
        return [equal("adapter.readable", first_line(error), True)]
    known = {"adapter_config.json", merge.WEIGHTS, "README.md", *TOKENIZER_FILES}
    foreign += [path.name for path in folder.iterdir() if path.name not in known]
    own |= {"base_model_name_or_path": base_name, "revision": revision}
    differ = {key for key in config.keys() | own.keys() if config.get(key) != own.get(key)}
    return [
        equal("adapter.foreign", foreign[:5], []),
        equal("adapter.weights_equal", same, True),
        equal("adapter.config_differs", sorted(differ), []),
    ]


def check_tokenizer_files(name: str, folder: Path, expected: Mapping[str, bytes]) -> list[Check]:
    """Check that the files of `merge.tokenizer_files` are there, all of them and no other, byte for byte."""
    there = {file: (folder / file).read_bytes() for file in TOKENIZER_FILES if (folder / file).is_file()}
    return [equal(f"{name}.tokenizer_files", sorted({file for file, _ in there.items() ^ expected.items()}), [])]


def check_template(name: str, exported: Any, trained: Any) -> list[Check]:
    """Check that the exported tokenizer has training's chat template, vocabulary and end, and makes the same tokens.

    The vocabulary whole, for the fixtures use little of it; but for a token for padding that training added.
    """

    def tokens(tokenizer: Any) -> list[Any]:
        return [
            chat.chat_tokens(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
            for messages in outputs.fixtures(trained)
            for thinking in (False, True)
        ]

    def merges(tokenizer: Any) -> Any:
        fast = getattr(tokenizer, "backend_tokenizer", None)
        state = json.loads(fast.to_str()) if fast else {}
        return [state.get("normalizer"), state.get("pre_tokenizer"), state.get("model", {}).get("merges")]

    digests = [hashlib.sha256(str(one.chat_template).encode()).hexdigest() for one in (exported, trained)]
    here = exported.get_vocab()
    other = {token for token, _ in here.items() ^ trained.get_vocab().items()} - ({trained.pad_token} - here.keys())
    return [
        equal(f"{name}.template", *digests),
        equal(f"{name}.template_tokens_differ", sum(map(ne, tokens(exported), tokens(trained))), 0),
        equal(f"{name}.vocabulary_differs", sorted(other)[:5], []),
        equal(f"{name}.merges_equal", merges(exported) == merges(trained), True),
        equal(f"{name}.end_token", exported.eos_token, trained.eos_token),
    ]


def check_ends(name: str, files: Mapping[str, bytes], base: Path, trained: Any) -> list[Check]:
    """Check that generation ends at special tokens, the end of training's answers among them.

    Args:
        files: `merge.tokenizer_files`; without a `generation_config.json` the base's config is what names the ends.
    """
    named = merge.named_ends(files, base)
    ids = {*(named if isinstance(named, list) else [named])} - {None}
    special = {one for one, token in trained.added_tokens_decoder.items() if token.special} | {*trained.all_special_ids}
    end = chat.turn_end(trained) or trained.eos_token_id
    return [
        equal(f"{name}.ends_at_text", sorted(ids - special), []),
        equal(f"{name}.ends_with_answers", not ids or end in ids, True),
    ]


# ---------------------------------------------------------------------------------------------------------- behaviour


def mean_kl(one: Logps, other: Logps) -> float:
    """Mean over positions of KL(one ‖ other) = Σ p log(p/q), in nats."""
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(one, other, strict=True)]).mean())


def top1_agreement(one: Logps, other: Logps) -> float:
    """Share of positions whose likeliest token is the same."""
    return float(torch.cat([(p.argmax(-1) == q.argmax(-1)).float() for p, q in zip(one, other, strict=True)]).mean())


def carried(one: Logps, tuned: Logps, base: Logps) -> float:
    """The share of the adapter's change that a model has: 1 for the tuned one, 0 for the base, at any noise.

    Least squares of (one - base) on (tuned - base) over log-probabilities, weighted by the tuned model's
    probabilities: Σ p (one - base)(tuned - base) / Σ p (tuned - base)². What rounding does is as good as orthogonal
    to the change, so this tells a rounded base from a rounded tuned model where a mean KL is all noise.
    """
    above = below = 0.0
    for o, t, b in zip(one, tuned, base, strict=True):
        weighted = t.exp() * (t - b)
        above += float((weighted * (o - b)).sum())
        below += float((weighted * (t - b)).sum())
    return above / below if below else 1.0


def check_gap(name: str, one: Logps, other: Logps, kl: float | None = None, top1: float | None = None) -> list[Check]:
    """Check how far two models are apart; reported only where there are no limits."""
    sizes = one[0].shape[-1], other[0].shape[-1]
    if sizes[0] != sizes[1]:
        return [equal(f"{name}.vocabulary", *sizes)]
    return [
        within(f"{name}.mean_kl", mean_kl(one, other), most=kl),
        within(f"{name}.top1_agreement", top1_agreement(one, other), least=top1),
    ]


def check_parity(name: str, exported: Logps, expected: Expected, limits: Limits = LIMITS["bfloat16"]) -> list[Check]:
    """Check that the reloaded export is near adapter-on-base, and differs from the base as much as that does.

    Args:
        exported: `token_logps` of it at the rows of `expected`.
    """
    tuned, base = expected.tuned.logps, expected.base
    checks = check_gap(name, tuned, exported, limits.kl, limits.top1)
    if limits.logps is not None:
        apart = max(float((p - q).abs().max()) for p, q in zip(tuned, exported, strict=True))
        checks.append(within(f"{name}.max_logp_difference", apart, most=limits.logps))
    own = mean_kl(tuned, base)
    faint = own < FAINT
    # Rounding adds an effect of its own, which an adapter may well drown in: that much more is let through.
    least, most = -FAINT if faint else EFFECT[0] * own, EFFECT[1] * own + limits.kl
    return [
        *checks,
        within(f"{name}.effect", mean_kl(exported, base), least, most),
        within(f"{name}.carried", carried(exported, tuned, base), *([] if faint else CARRIED)),
    ]


def check_answers(name: str, exported: Outputs, expected: Expected, limits: Limits) -> list[Check]:
    """Check an export's own greedy answers: the same tokens at first, then as good as those of adapter-on-base.

    How many of the answers are not empty and come to an end is compared with adapter-on-base, for a model may well
    ramble: none may be emptier, and rounding may change one otherwise.
    """
    shares = []
    for one, other in zip(exported.answers, expected.tuned.answers, strict=True):
        length = min(GREEDY, max(len(one.ids), len(other.ids)))
        same = next((at for at in range(length) if one.ids[at : at + 1] != other.ids[at : at + 1]), length)
        shares.append(same / length if length else 1.0)

    both = (exported.answers, expected.tuned.answers)
    filled, least_filled = (sum(bool(answer.text.strip()) for answer in answers) for answers in both)
    ended, least_ended = (sum(answer.finished for answer in answers) for answers in both)
    return [
        within(f"{name}.greedy_tokens", sum(shares) / len(shares), least=limits.greedy),
        within(f"{name}.answers_not_empty", filled, least=least_filled),
        within(f"{name}.answers_ended", ended, least=max(least_ended - 1, 0)),
    ]


def check_vectors(name: str, model: Any, base: Path) -> list[Check]:
    """Check that what 4 bits leave whole, norms above all, is the 16-bit base's.

    Of the rest nothing tells rounding from another training of the same shapes, such as Qwen3's base and chat models.

    Args:
        model: the 4-bit model, by the names of the base's tensors.
    """
    tensors, wrong = stored(base), []
    for key, vector in model.named_parameters():
        if vector.ndim == 1 and key in tensors:
            there, wanted = vector.detach().float().cpu(), merge.read_tensor(tensors[key], key).float()
            if there.shape != wanted.shape or not (there - wanted).norm() <= 1e-3 * wanted.norm():
                wrong.append(key)
    return [equal(f"{name}.base_differs", wrong[:5], [])]
