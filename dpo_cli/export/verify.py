"""Is the exported file the model that was evaluated? Each check is {name, value, limit, ok}.

The yardstick is the trained adapter on the 16-bit base. The 4-bit model that training saw differs from it by
quantisation alone, which no export can help.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dpo_cli.records import Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Starting limits, from a toy model with random weights (merging alone: mean KL 7e-4, top-1 98 % in bfloat16, 1e-9
# and 100 % in float32).
MAX_MEAN_KL = 5e-3  # nats per token
MIN_TOP1 = 0.95
MIN_EFFECT = 0.5  # of the adapter's own effect

FIXTURES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Name two uses of baking soda."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "用三句话介绍如何给多肉浇水，谢谢！"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "你好！How can I help?"},
        {"role": "user", "content": "“引号”、emoji 🙂, and\n\ta tab"},
    ],
)


class Check(TypedDict):
    name: str
    value: Any
    limit: Any
    ok: bool


def check_structure(folder: Path, base: Path) -> list[Check]:
    """The files of a merged model: every shard there and no other, 16-bit, not quantised, tied as the base is."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base_config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    shards = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    listed = {"model.safetensors"}
    if index.is_file():
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    wrong = sorted(shards ^ listed)
    dtype, tied = config.get("dtype"), config.get("tie_word_embeddings")
    base_tied = base_config.get("tie_word_embeddings")
    return [
        {"name": "merged.shards", "value": wrong, "limit": [], "ok": not wrong},
        {"name": "merged.dtype", "value": dtype, "limit": "16-bit", "ok": dtype in ("bfloat16", "float16")},
        {"name": "merged.tied", "value": tied, "limit": base_tied, "ok": tied == base_tied},
        {
            "name": "merged.quantised",
            "value": "quantization_config" in config,
            "limit": False,
            "ok": "quantization_config" not in config,
        },
    ]


def check_adapter_files(folder: Path) -> list[Check]:
    """The adapter's tensors: the policy's only, no second adapter's."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        foreign = [key for key in file.keys() if ".ref." in key]  # noqa: SIM118 - not a dict
    return [{"name": "adapter.foreign_tensors", "value": len(foreign), "limit": 0, "ok": not foreign}]


def check_template(name: str, exported: Any, trained: Any) -> list[Check]:
    """The exported tokenizer has training's chat template and turns the same chats into the same tokens."""
    digests = [hashlib.sha256(str(one.chat_template).encode()).hexdigest() for one in (exported, trained)]
    differ = 0
    for messages in FIXTURES:
        for thinking in (False, True):
            one, other = (
                tokenizer.apply_chat_template(
                    messages, tokenize=True, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
                )
                for tokenizer in (exported, trained)
            )
            differ += one != other
    return [
        {"name": f"{name}.template", "value": digests[0], "limit": digests[1], "ok": digests[0] == digests[1]},
        {"name": f"{name}.template_tokens_differ", "value": differ, "limit": 0, "ok": differ == 0},
    ]


def token_logps(model: PreTrainedModel, rows: Sequence[list[int]], last: int) -> list[torch.Tensor]:
    """For each row of token ids the log-probabilities [up to `last`, vocabulary] at its last positions, on the CPU."""
    import torch

    device = next(model.parameters()).device
    results = []
    for ids in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=device), logits_to_keep=last, use_cache=False).logits
        results.append(logits[0].float().log_softmax(-1).cpu())
    return results


def mean_kl(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Mean over positions of KL(one ‖ other) = Σ p log(p/q), in nats."""
    import torch

    terms = [(p.exp() * (p - q)).sum(-1) for p, q in zip(one, other, strict=True)]
    return float(torch.cat(terms).mean())


def top1_agreement(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Share of positions whose likeliest token is the same."""
    import torch

    return float(torch.cat([(p.argmax(-1) == q.argmax(-1)).float() for p, q in zip(one, other, strict=True)]).mean())


def check_parity(
    name: str, exported: Sequence[torch.Tensor], tuned: Sequence[torch.Tensor], base: Sequence[torch.Tensor]
) -> list[Check]:
    """The export says what adapter-on-base says, and differs from the base as much as that does.

    Args:
        exported, tuned, base: `token_logps` of the reloaded export, of the adapter on the 16-bit base, of the base.
    """
    kl, top1 = mean_kl(tuned, exported), top1_agreement(tuned, exported)
    effect, wanted = mean_kl(exported, base), MIN_EFFECT * mean_kl(tuned, base)
    return [
        {"name": f"{name}.mean_kl", "value": kl, "limit": MAX_MEAN_KL, "ok": kl <= MAX_MEAN_KL},
        {"name": f"{name}.top1_agreement", "value": top1, "limit": MIN_TOP1, "ok": top1 >= MIN_TOP1},
        {"name": f"{name}.effect", "value": effect, "limit": wanted, "ok": effect >= wanted},
    ]
