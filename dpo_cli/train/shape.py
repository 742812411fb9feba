"""What of an architecture decides its memory: its parameters, and what a layer keeps for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.families import family_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP
FUSED = ("qkv_proj", "gate_up_proj")  # Phi's, each several of them in one


@dataclass(frozen=True)
class Shape:
    """Of a decoder with gated MLPs; widths are in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    modules: tuple[str, ...] = LINEARS  # the linear ones of a layer
    norms: int = 2  # of a layer, as wide as the hidden state
    qk_norm: bool = True
    bias: int = 0  # elements of a layer's linear biases
    whole: int = 0  # weights of linear modules that a 4-bit repository leaves in 16 bits

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a shape off a transformers config; a DpoError where the formulas don't know such an architecture."""
        text = config.get_text_config()
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        family = family_of(config.to_dict())
        modules = family.linear if family else LINEARS
        if (
            any(getattr(text, name, None) is None for name in names)
            or getattr(text, "num_experts", None)
            or not {*modules} <= {*LINEARS, *FUSED}
        ):
            raise DpoError(
                f"memory is predicted for dense decoders such as Qwen3, not for {text.model_type}",
                where="model.id",
                hint="train without --plan; engine.preflight tries the longest pairs before step 1",
            )
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        q, kv = heads * head_dim, kv_heads * head_dim
        bias = 0
        if text.model_type == "qwen2":
            bias = q + 2 * kv
        elif getattr(text, "attention_bias", False):
            bias = q + 2 * kv + text.hidden_size
        shape = cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=text.vocab_size,
            tied=bool(text.tie_word_embeddings),
            modules=modules,
            norms=family.norms if family else 2,
            qk_norm=family.qk_norm if family else False,
            bias=bias,
        )
        in_16bit = models.modules_in_16bit(getattr(config, "quantization_config", None))
        return replace(shape, whole=shape.weights_of(in_16bit)) if in_16bit else shape

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        """Of the hidden state, the MLP, the queries, and the keys or values."""
        return self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """A layer's linear modules, as (inputs, outputs)."""
        h, i, q, kv = self._widths
        sides = ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h), (h, q + 2 * kv), (h, 2 * i))
        return {name: one for name, one in zip(LINEARS + FUSED, sides, strict=True) if name in self.modules}

    @property
    def linear(self) -> int:
        """Weights of all layers' linear modules: what NF4 quantises, but for `whole`."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.sides.values())

    @property
    def other(self) -> int:
        """Parameters outside of them: embedding, untied head, norms, biases."""
        norms = self.norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * (norms + self.bias) + self.hidden

    @property
    def parameters(self) -> int:
        return self.linear + self.other

    def weights_of(self, modules: Sequence[str]) -> int:
        """Count the weights of the layers' linear modules that stay in 16 bits where these modules are to."""
        return sum(
            inputs * outputs
            for layer in range(self.layers)
            for name, (inputs, outputs) in self.sides.items()
            if models.stays_in_16bit(
                f"model.layers.{layer}.{'self_attn' if name in (*ATTENTION, 'qkv_proj') else 'mlp'}.{name}", modules
            )
        )

    def lora(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of a LoRA: rank x (inputs + outputs) for each module it sits on."""
        return self.layers * rank * sum(sum(sides) for name, sides in self.sides.items() if name in targets)

    def kept(
        self, width: int, rank: int, targets: Sequence[str], *, row: int = 0, again: float = 0.0, casts: bool = False
    ) -> int:
        """Bytes that one layer keeps for the backward, per token, with frozen weights and transformers' forward.

        Read off Qwen3's forward in transformers 5.17: float32 inputs of the norms and their factors, SDPA's
        inputs, output and log-sum-exp, the MLP's four products, the adapters' inner activations.
        `tests/train/test_memory.py` counts them.

        Args:
            width: bytes of an activation (2 for bfloat16, 4 for float32).
            row: tokens of a padded row, 0 without padding; its mask repeats keys and values for each head, and is
                kept, as a bias, for each layer.
            again: where a prefix is shared, the tokens of the texts after the first, for each token of the stream:
                keys and values are repeated there too, and once more for each of these texts; and the outputs are
                kept in parts and as one.
            casts: the frozen weights are 16-bit, where PEFT casts each LoRA's input to the LoRA's float32, and
                autocast back: a copy for each, not one for all that read the same. (4-bit layers leave it to autocast.)
        """
        h, i, q, kv = self._widths
        norms = 4 * (self.norms * h + self.norms)
        norms += 4 * (q + kv + self.heads + self.kv_heads) if self.qk_norm else 0
        products = width * (4 * i + 2 * h + 2 * q + 2 * kv) + 4 * self.heads
        adapter = width * rank * sum(name in targets for name in self.sides)
        copies = 0
        if row or again:
            copies += 2 * (q - kv) + row
        if again:
            copies += round(2 * q * again) + (q if "o_proj" in targets else 0)
        if casts:
            read = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
            copies += h * sum(max(sum(name in targets for name in some) - 1, 0) for some in read)
            copies += q if "o_proj" in targets and not again else 0
        return norms + products + adapter + width * copies

    def fuses(self, targets: Sequence[str]) -> bool:
        """Whether Unsloth's fused LoRA kernels take a layer: they want a LoRA on each linear module, and no bias."""
        return set(LINEARS) <= set(targets) and not self.bias

    def kept_fused(self, width: int, flex: bool) -> int:
        """Bytes that one layer keeps for the backward, per token, in Unsloth's fused kernels.

        What their `save_for_backward` name (2026.10.9; rms_layernorm, qk_norm_rope, fast_lora), and
        `tests/unsloth_real/test_memory.py` counts: the input of both norms and their output; q and k before their
        norms; attention's q, k, v and output; the MLP's e and g; factors and log-sum-exp in float32. With `flex`, the
        shared prefix, FlexAttention keeps a padded output, and LoRA_W another (not counted: a GPU's kernel).
        """
        h, i, q, kv = self._widths
        factors = 4 * (2 + 2 * self.heads + self.kv_heads)
        return width * (4 * h + 2 * i + 3 * q + 3 * kv + (q if flex else 0)) + factors
