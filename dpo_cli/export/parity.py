"""Is the exported file the model that was evaluated? Each check is {name, value, limit, ok}.

Every export is compared with the trained adapter on the 16-bit base. The 4-bit model that training saw differs from
that by quantisation alone, which no export can help: that gap is reported, and fails nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from dpo_cli import chat
from dpo_cli.export import merge, outputs
from dpo_cli.export.base import INDEX, TOKENIZER_FILES, WHOLE, read_json, stored
from dpo_cli.export.outputs import Outputs
from dpo_cli.language import mostly_han


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


def at_most(name: str, value: float, limit: float) -> Check:
    return {"name": name, "value": _finite(value), "limit": limit, "ok": value <= limit}


def at_least(name: str, value: float, limit: float) -> Check:
    return {"name": name, "value": _finite(value), "limit": limit, "ok": value >= limit}


def between(name: str, value: float, least: float, most: float) -> Check:
    return {"name": name, "value": _finite(value), "limit": [least, most], "ok": least <= value <= most}


def failed(name: str, why: str, wanted: str) -> Check:
    """What could not even be looked at."""
    return {"name": name, "value": why, "limit": wanted, "ok": False}


def reported(name: str, value: float | str) -> Check:
    """A figure that has no limit."""
    return {"name": name, "value": _finite(value) if isinstance(value, float) else value, "limit": None, "ok": True}


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


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
    """The files of a merged model: whole shards and nothing foreign, the base's tensors in 16 bits, the base's config.

    The config by itself, for what a model says on short texts tells little of its norms' epsilon or its longest text.
    """
    try:
        config, tensors = read_json(folder / "config.json"), stored(folder)
    except (OSError, ValueError) as error:
        return [equal("merged.shards", [str(error).splitlines()[0].replace(f"{folder}/", "")], [])]
    base_config, wanted = read_json(base / "config.json"), stored(base)
    named = {tensor.file.name for tensor in tensors.values()} | (
        {INDEX} if len(tensors) and _indexed(folder) else set()
    )
    there = {path.name for path in folder.iterdir()} - {"config.json", "README.md", *TOKENIZER_FILES}
    shapes, wanted_shapes = ({name: one.shape for name, one in all_.items()} for all_ in (tensors, wanted))
    dtype = config.get("dtype", config.get("torch_dtype"))
    found = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    dtypes = {found[one.dtype] for one in tensors.values() if one.dtype in found} | {dtype}
    odd = {name for name, one in tensors.items() if one.dtype not in found and one.dtype != wanted.get(name, one).dtype}
    tied, base_tied = config.get("tie_word_embeddings"), base_config.get("tie_word_embeddings")
    other = {key for key in config.keys() | base_config.keys() if config.get(key) != base_config.get(key)}
    return [
        equal("merged.shards", sorted(there ^ named), []),
        equal("merged.tensors", sorted({name for name, _ in shapes.items() ^ wanted_shapes.items()} | odd)[:5], []),
        {
            "name": "merged.dtype",
            "value": "+".join(sorted(map(str, dtypes))),
            "limit": "16-bit",
            "ok": len(dtypes) == 1 and dtype in ("bfloat16", "float16"),
        },
        equal("merged.tied", tied, base_tied),
        equal("merged.quantised", "quantization_config" in config, False),
        equal("merged.config_differs", sorted(other - {"dtype", "torch_dtype", "_name_or_path"}), []),
        equal("merged.names_a_path", "_name_or_path" in config, False),
    ]


def check_weights(folder: Path, base: Path, adapter: Path) -> list[Check]:
    """Every tensor of a merged model, to the bit: the base's with the adapter's change, rounded to what is stored.

    Two tensors exchanged, or bits that a disk lost, may change what a model says by less than any limit on that. It is
    the writer's own sum; that the sum is right, one in float64 shows.
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
        at_most("merged.rounded_otherwise", rounded / max(weights, 1), ROUNDED),
    ]


def _indexed(folder: Path) -> bool:
    return (folder / INDEX).is_file() or not (folder / WHOLE).is_file()


def check_adapter_files(folder: Path, trained: Path, base_name: str, revision: str | None = None) -> list[Check]:
    """The trained adapter's tensors, byte for byte, and its settings; no second adapter; its base the 16-bit one.

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
        return [equal("adapter.readable", str(error).splitlines()[0], True)]
    known = {"adapter_config.json", merge.WEIGHTS, "README.md", *TOKENIZER_FILES}
    foreign += [path.name for path in folder.iterdir() if path.name not in known]
    other = {key for key in config.keys() | own.keys() if config.get(key) != own.get(key)}
    return [
        equal("adapter.foreign_tensors", len(foreign), 0),
        equal("adapter.base", config.get("base_model_name_or_path"), base_name),
        equal("adapter.revision", config.get("revision"), revision),
        equal("adapter.weights_equal", same, True),
        equal("adapter.config_differs", sorted(other - {"base_model_name_or_path", "revision"}), []),
    ]


def check_tokenizer_files(name: str, folder: Path, expected: Mapping[str, bytes]) -> list[Check]:
    """The base's tokenizer files, all of them and no other, byte for byte, and training's template.

    Args:
        expected: `merge.tokenizer_files`.
    """
    other = [
        file
        for file in dict.fromkeys([*TOKENIZER_FILES, *expected])
        if ((folder / file).read_bytes() if (folder / file).is_file() else None) != expected.get(file)
    ]
    return [equal(f"{name}.tokenizer_files", other, [])]


def check_template(name: str, exported: Any, trained: Any) -> list[Check]:
    """The exported tokenizer has training's chat template, vocabulary and end, and makes the same tokens of chats.

    The vocabulary whole, for the fixtures use little of it; but for a token for padding that training added.
    """
    digests = [hashlib.sha256(str(one.chat_template).encode()).hexdigest() for one in (exported, trained)]
    differ = 0
    for messages in outputs.fixtures(trained):
        for thinking in (False, True):
            one, other = (
                tokenizer.apply_chat_template(
                    messages, tokenize=True, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
                )
                for tokenizer in (exported, trained)
            )
            differ += one != other
    here, wanted = exported.get_vocab(), trained.get_vocab()
    other = {token for token, _ in here.items() ^ wanted.items()}
    other -= {trained.pad_token} - here.keys()
    return [
        equal(f"{name}.template", *digests),
        equal(f"{name}.template_tokens_differ", differ, 0),
        equal(f"{name}.vocabulary_differs", sorted(other)[:5], []),
        equal(f"{name}.merges_equal", _merges(exported) == _merges(trained), True),
        equal(f"{name}.end_token", exported.eos_token, trained.eos_token),
    ]


def check_ends(name: str, files: Mapping[str, bytes], base: Path, trained: Any) -> list[Check]:
    """Generation ends at special tokens, the end of training's answers among them.

    Args:
        files: `merge.tokenizer_files`; without a `generation_config.json` the base's config is what names the ends.
    """
    own = json.loads(files.get("generation_config.json", b"{}"))
    named = own.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    ids = {*(named if isinstance(named, list) else [named])} - {None}
    special = {one for one, token in trained.added_tokens_decoder.items() if token.special} | {*trained.all_special_ids}
    end = chat.turn_end(trained) or trained.eos_token_id
    return [
        equal(f"{name}.ends_at_text", sorted(ids - special), []),
        equal(f"{name}.ends_with_answers", not ids or end in ids, True),
    ]


def _merges(tokenizer: Any) -> Any:
    """How text is cut and joined into tokens, of a tokenizer.json; None of a tokenizer that is none."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(fast.to_str()) if fast else {}
    return [state.get("normalizer"), state.get("pre_tokenizer"), state.get("model", {}).get("merges")]


# ---------------------------------------------------------------------------------------------------------- behaviour


def mean_kl(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Mean over positions of KL(one ‖ other) = Σ p log(p/q), in nats."""
    terms = [(p.exp() * (p - q)).sum(-1) for p, q in zip(one, other, strict=True)]
    return float(torch.cat(terms).mean())


def top1_agreement(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Share of positions whose likeliest token is the same."""
    return float(torch.cat([(p.argmax(-1) == q.argmax(-1)).float() for p, q in zip(one, other, strict=True)]).mean())


def carried(one: Sequence[torch.Tensor], tuned: Sequence[torch.Tensor], base: Sequence[torch.Tensor]) -> float:
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


def check_parity(
    name: str,
    exported: Sequence[torch.Tensor],
    tuned: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    limits: Limits = LIMITS["bfloat16"],
) -> list[Check]:
    """The export says what adapter-on-base says, and differs from the base as much as that does.

    Args:
        exported, tuned, base: `token_logps` of the reloaded export, of the adapter on the 16-bit base, of the base.
    """
    kl, top1 = mean_kl(tuned, exported), top1_agreement(tuned, exported)
    checks = [at_most(f"{name}.mean_kl", kl, limits.kl), at_least(f"{name}.top1_agreement", top1, limits.top1)]
    if limits.logps is not None:
        apart = max(float((p - q).abs().max()) for p, q in zip(tuned, exported, strict=True))
        checks.append(at_most(f"{name}.max_logp_difference", apart, limits.logps))
    effect, own, share = mean_kl(exported, base), mean_kl(tuned, base), carried(exported, tuned, base)
    faint = own < FAINT
    # Rounding adds an effect of its own, which an adapter may well drown in: that much more is let through.
    checks.append(between(f"{name}.effect", effect, -FAINT if faint else EFFECT[0] * own, EFFECT[1] * own + limits.kl))
    if faint:
        return [*checks, reported(f"{name}.carried", share)]
    return [*checks, between(f"{name}.carried", share, *CARRIED)]


def check_answers(name: str, exported: Outputs, tuned: Outputs, texts: Sequence[str], limits: Limits) -> list[Check]:
    """The export's own greedy answers: the same tokens at first, then as good ones as adapter-on-base gives.

    How many of the answers are not empty, come to an end and are in the prompt's language is compared with
    adapter-on-base, for a model may well ramble: none may be emptier, and rounding may change one otherwise.

    Args:
        texts: the prompts that both answered.
    """
    shares = []
    for one, other in zip(exported.answers, tuned.answers, strict=True):
        length = min(GREEDY, max(len(one.ids), len(other.ids)))
        same = next((at for at in range(length) if one.ids[at : at + 1] != other.ids[at : at + 1]), length)
        shares.append(same / length if length else 1.0)
    checks = [at_least(f"{name}.greedy_tokens", sum(shares) / len(shares), limits.greedy)]

    counts = [
        {
            "answers_not_empty": sum(bool(answer.text.strip()) for answer in said.answers),
            "answers_ended": sum(answer.finished for answer in said.answers),
            "answers_in_language": sum(
                mostly_han(answer.text) == mostly_han(text) for answer, text in zip(said.answers, texts, strict=True)
            ),
        }
        for said in (exported, tuned)
    ]
    for key, count in counts[0].items():
        wanted = counts[1][key] - (key != "answers_not_empty")
        checks.append(at_least(f"{name}.{key}", count, max(wanted, 0)))
    return checks


def check_gap(
    name: str, trained: Sequence[torch.Tensor], tuned: Sequence[torch.Tensor], limits: Limits | None
) -> list[Check]:
    """How far the model that was trained is from adapter-on-base: reported, or with limits where both are 16-bit."""
    sizes = trained[0].shape[-1], tuned[0].shape[-1]
    if sizes[0] != sizes[1]:
        return [equal(f"{name}.vocabulary", *sizes)]
    kl, top1 = mean_kl(trained, tuned), top1_agreement(trained, tuned)
    if limits:
        return [at_most(f"{name}.mean_kl", kl, limits.kl), at_least(f"{name}.top1_agreement", top1, limits.top1)]
    return [reported(f"{name}.mean_kl", kl), reported(f"{name}.top1_agreement", top1)]


def check_vectors(name: str, model: Any, base: Path) -> list[Check]:
    """What 4 bits leave whole, norms above all, is the 16-bit base's: of the rest nothing tells rounding from another
    training of the same shapes, such as Qwen3's own base and chat models.

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
