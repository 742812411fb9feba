"""`engine.shared_prefix`: what the texts of a pair or a list have in common is computed once, and the numbers stay.

A causal model's state at a token depends only on the tokens up to it, so the states of a common opening serve all
texts. One method is wrapped, the backbone's forward. It takes TRL's right-padded batch `[2B, L]`, rows i and B + i one
pair, runs it as a single row

    [common opening | rest of chosen | rest of rejected] x B

with the positions the tokens had, and puts the hidden states back into `[2B, L, H]`. Lists of any number of answers
have their rows one after the other, and a rest each (`SharedPrefix.lists`). On the real tokens of a right-padded batch
this is the identity. (What PaddleNLP's DPO does with a mask over one row, and arXiv 2410.20305 with FlexAttention.)
With dropout on, the opening gets one mask and not one per text: valid training, but not TRL's numbers.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from dpo_cli.errors import DpoError

ATTENTION = "dpo_cli_shared_prefix"  # the name our attention has in transformers' registry
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Group(NamedTuple):
    """Where texts of one prompt lie in the row: [start, prefix) is of all of them, then come the rests up to `ends`."""

    start: int
    prefix: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """How a batch `[N, L]` becomes a row of T tokens: `ids.view(-1)[source]`, and `states[gather]` back."""

    source: Tensor  # [T]
    positions: Tensor  # [1, T]
    gather: Tensor  # [N, L]; 0 at padding, whose states nobody reads
    groups: list[Group]


class SharedPrefix:
    """The wrapped forward of one backbone. Copies with its model (`copy.deepcopy`), and is saved nowhere.

    Attributes:
        enabled: False sends everything through the untouched forward.
        padded_tokens, stream_tokens: N x L of each forward that shared, and what it computed instead, added up.
    """

    def __init__(self, backbone: Any, unsloth: bool) -> None:
        self.enabled = True
        self.padded_tokens = self.stream_tokens = 0
        self._backbone, self._untouched, self._unsloth = backbone, backbone.forward, unsloth
        self._lists: list[int] | None = None  # rows of each list in the batch; None where rows are pairs

    @contextmanager
    def lists(self, present: Tensor | None) -> Iterator[None]:
        """Take batches for lists with the answers `present` `[B, K]`, their rows one after the other; None: pairs."""
        self._lists = None if present is None else present.sum(1).tolist()
        try:
            yield
        finally:
            self._lists = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's forward: shared for a training batch, the untouched one for all else (generation, say)."""
        stream = self._stream(args, kwargs)
        if stream is None:
            return self._untouched(*args, **kwargs)
        ids = kwargs.pop("input_ids")
        del kwargs["attention_mask"]
        kwargs.pop("position_ids", None)
        if self._unsloth:  # any mask is refused beside its hook, and without the hook a 4-D mask is dropped in training
            groups = [(p - start, [b - a for a, b in pairwise((p, *ends))]) for start, p, ends in stream.groups]
            kwargs |= {"attention_mask": None, "prefix_seg_info": _unsloth_hook()(groups, ids.device)[0]}
        else:  # transformers hands a 4-D mask on as it is, and makes one of its own from positions if it gets none
            kwargs |= {"attention_mask": ids.new_empty(1, 1, 0, 0), "shared_groups": stream.groups}
        row = ids.reshape(-1)[stream.source][None]
        out = self._untouched(input_ids=row, position_ids=stream.positions, **kwargs)
        states = out.last_hidden_state[0]
        gather = stream.gather.to(states.device)
        out.last_hidden_state = states.index_select(0, gather.view(-1)).view(*gather.shape, -1)
        self.padded_tokens += ids.numel()
        self.stream_tokens += row.numel()
        return out

    def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream | None:
        """None where this call asks for what one row of mixed texts cannot give, or for anything unknown."""
        # Unsloth's PEFT forward hands `logits_to_keep=0` and `num_logits_to_keep=0` down, which ask for nothing.
        given = {name for name, value in kwargs.items() if torch.is_tensor(value) or value not in (None, False, 0)}
        texts = {"input_ids", "attention_mask"}
        if not self.enabled or args or not texts <= given <= texts | {"return_dict"}:
            return None  # positions, embeddings, a cache, attentions or all states
        if kwargs.get("use_cache") is not False or kwargs.get("return_dict") is False:
            return None
        config = self._backbone.config
        if config.output_attentions or config.output_hidden_states:
            return None
        if hasattr(self._backbone.get_input_embeddings(), "neftune_noise_alpha"):
            return None  # its noise is scaled by the length of a row
        return _lay_out(kwargs["input_ids"], kwargs["attention_mask"], self._lists)


def unsupported(model: Any, unsloth: bool = False) -> str | None:
    """Why this causal language model (with `unsloth`, of Unsloth's) cannot share a prompt; None if it can."""
    config, backbone = model.config, _backbone(model)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        return "it is not a plain text decoder"
    if any(getattr(config, name, None) for name in EXPERTS):
        return "it is a mixture of experts, whose router sees the whole batch"
    if window or any("sliding" in kind or "chunked" in kind for kind in kinds):
        return "its layers attend through a sliding window"
    if kinds - {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    if backbone is None:
        return f"the decoder layers of {type(model).__name__} are not where they are looked for"
    if unsloth:
        if getattr(config, "attention_dropout", 0):
            return "it has attention dropout, which Unsloth's kernel for shared prefixes leaves out"
        try:
            _unsloth_hook()
        except Exception as error:  # where there is no GPU it may raise anything
            return f"this Unsloth has no hook for shared prefixes ({type(error).__name__})"
        return None
    if not backbone._supports_attention_backend or not all(hasattr(one.self_attn, "config") for one in backbone.layers):
        return f"the attention of {type(backbone).__name__} cannot be replaced"
    used = config._attn_implementation
    return None if used == "sdpa" else f"its attention is {used}, and only sdpa can be replaced"


def of(model: Any) -> SharedPrefix | None:
    """What `install` has put on a model; None where it has not."""
    there = getattr(getattr(_backbone(model), "forward", None), "__self__", None)
    return there if isinstance(there, SharedPrefix) else None


def install(model: Any, unsloth: bool = False) -> SharedPrefix:
    """Share prefixes in this model from now on; a DpoError where `unsupported` gives a reason.

    The model's own config is left as it is, so that nothing of this is ever saved: its attention layers get a copy.
    Doing it twice gives the same object again.
    """
    backbone, there = _backbone(model), of(model)
    if there is not None:
        return there
    reason = unsupported(model, unsloth)
    if reason or backbone is None:
        raise DpoError(f"the prompt cannot be shared: {reason}", hint="set engine.shared_prefix: off")
    if not unsloth:
        AttentionInterface.register(ATTENTION, _attention)
        config = copy.copy(backbone.config)
        config._attn_implementation = ATTENTION
        for layer in backbone.layers:
            layer.self_attn.config = config
    shared = SharedPrefix(backbone, unsloth)
    backbone.forward = shared.forward
    return shared


def pair_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Tokens `[B]` of each pair of a right-padded batch `[2B, L]`, chosen first, its common opening counted once."""
    (chosen, rejected), (real, other_real) = input_ids.chunk(2), attention_mask.bool().chunk(2)
    return attention_mask.bool().sum(1).view(2, -1).sum(0) - _in_common(chosen, real, rejected, other_real)


def members(rows: int, lists: Sequence[int] | None) -> list[list[int]]:
    """The rows of each pair, i and B + i, or of each list, one after the other."""
    if lists is None:
        return [[index, rows // 2 + index] for index in range(rows // 2)]
    return [list(range(end - count, end)) for count, end in zip(lists, accumulate(lists), strict=True)]


# ------------------------------------------------------------------------------------------------------------ pieces


def _backbone(model: Any) -> Any:
    """The module under the head whose `layers` have a `self_attn` each; None if there is none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(base, "base_model", None)
    layers = getattr(backbone, "layers", None)
    found = backbone is not base and layers is not None and all(hasattr(one, "self_attn") for one in layers)
    return backbone if found else None


def _unsloth_hook() -> Callable[..., Any]:
    """What makes Unsloth's segment table; by name, for Unsloth has to be imported before us."""
    kernel: Any = importlib.import_module("unsloth.utils.prefix_grouper_kernel")
    return kernel.build_seg_info_multigroup


def _in_common(one: Tensor, real: Tensor, other: Tensor, other_real: Tensor) -> Tensor:
    """Tokens that rows `[N, L]` begin with in common, `[N]`."""
    return (real & other_real & (one == other)).long().cumprod(1).sum(1)


def _lay_out(ids: Tensor, mask: Tensor, lists: Sequence[int] | None = None) -> Stream | None:
    """The row for a batch of pairs or lists `[N, L]`; None if it is not right-padded texts with a token each."""
    if getattr(mask, "shape", None) != ids.shape or ids.shape[1] < 2:
        return None
    rows, length = ids.shape
    together = members(rows, lists)
    if sum(map(len, together)) != rows:
        return None
    firsts = torch.empty(rows, dtype=torch.long)
    for group in together:
        firsts[group] = group[0]
    firsts = firsts.to(ids.device)
    real, columns = mask.bool(), torch.arange(length, device=ids.device)
    lengths = real.sum(1)
    fine = (real == (columns < lengths[:, None])).all() & (lengths > 0).all()
    # One read from the device a batch: every `int(tensor)` would wait for the GPU.
    right_padded, *numbers = torch.cat([fine[None], lengths, _in_common(ids, real, ids[firsts], real[firsts])]).tolist()
    if not right_padded:
        return None
    columns = torch.arange(length)
    source, positions, groups, at = [], [], [], 0
    gather = torch.zeros(rows, length, dtype=torch.long)
    for group in together:
        opening = min(numbers[rows + index] for index in group)
        start, ends = at, list[int]()
        for index in group:
            known = opening if ends else 0  # the first text brings the opening along
            end = numbers[index]
            source.append(index * length + columns[known:end])
            positions.append(columns[known:end])
            gather[index, :known] = start + columns[:known]
            gather[index, known:end] = at + columns[: end - known]
            at += end - known
            ends.append(at)
        groups.append(Group(start, start + opening, tuple(ends)))
    here = ids.device
    return Stream(torch.cat(source).to(here), torch.cat(positions)[None].to(here), gather.to(here), groups)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_groups: list[Group] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a row of groups, `[1, heads, T, D]`: a causal call for each text, so nothing of T x T is ever made.

    Queries of a group's opening and first text see what is before them in it; those of another rest see the opening and
    what is before them in their rest. Without `shared_groups`, transformers' own.
    """
    if shared_groups is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if torch.is_autocast_enabled(query.device.type):  # it casts for attention, but not for causal_lower_right's kernels
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    parts = []
    for start, prefix, ends in shared_groups:
        q, k, v = (one[:, :, start : ends[0]] for one in (query, key, value))
        parts.append(attend(q, k, v, is_causal=True))
        for begin, end in pairwise(ends):
            if end > begin:
                k, v = (torch.cat([one[:, :, start:prefix], one[:, :, begin:end]], 2) for one in (key, value))
                bias = _lower_right(end - begin, k.shape[2], k.device)
                parts.append(attend(query[:, :, begin:end], k, v, attn_mask=bias))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _lower_right(queries: int, keys: int, device: Any) -> Any:
    """The mask under which the last query sees all keys, the one before all but the last, and so on."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)  # flash kernels know it, so no mask is made
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
