"""The sizes and choices that tell one transformer family from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.models.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "layer"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a `Decoder` or an `Encoder` is made of. A family is nothing but one of these.

    Attributes:
      vocab: tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads, kv_heads: of queries, and of keys and values; the first a multiple of the second.
      head: size of one head.
      hidden: size of the MLP's inner layer, of each expert where there are several.
      context: positions the model was made for; learned ones end there.
      ropes: of each layer, how queries and keys are rotated; None where positions are learned.
      position_offset: rows of the table of learned positions before the one of position 0.
      windows: of each layer, how many positions a query sees, itself included; None for all.
      norm, eps: the kind of normalization and what it adds to the variance.
      qk_norm: normalize each head of queries and keys.
      pre_norm, post_norm: normalize what a block's halves are given, and what they return. With `post_norm` alone,
        as in BERT, it is the sum with the residual stream that is normalized.
      activation: of the MLP.
      gated: whether the MLP's activation multiplies a second product of its input.
      qkv_bias, out_bias, mlp_bias, head_bias: which layers add one.
      attention_scale: that queries are multiplied by; head ** -0.5 if None.
      attention_cap, logit_cap: c in c tanh(x / c) of attention scores and of logits; None for none.
      embed_scale: that embeddings are multiplied by.
      tied: whether the head is the embedding's table.
      experts, experts_per_token: of the MLP; 0 experts for a plain one.
      normalize_experts: whether the weights of a token's experts sum to 1.
      token_types: rows of the table of token types, of an encoder.
      token_head, pooler: which heads an encoder has: over the vocabulary, and of the first token.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    context: int
    ropes: tuple[Rope, ...] | None = None
    position_offset: int = 0
    windows: tuple[int | None, ...] = ()
    norm: Norm = "rms"
    eps: float = 1e-6
    qk_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    normalize_experts: bool = True
    token_types: int = 0
    token_head: bool = False
    pooler: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head", "hidden", "context"):
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} = {size!r}: it must be an integer of at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads of queries cannot share {self.kv_heads} heads of keys evenly")
        for name in ("ropes", "windows"):
            if (given := getattr(self, name)) and len(given) != self.layers:
                raise ValueError(f"{name} has {len(given)} entries for {self.layers} layers")
        if not (isinstance(self.eps, float | int) and self.eps >= 0):
            raise ValueError(f"eps = {self.eps!r}: it must be a number, not negative")
        if bad := [w for w in self.windows if w is not None and (type(w) is not int or w < 1)]:
            raise ValueError(f"a window of {bad[0]!r} positions: it must be an integer of at least 1, or None for all")
        if bad := [rope.size for rope in self.ropes or () if rope.size > self.head]:
            raise ValueError(f"{bad[0]} entries of a head of {self.head} cannot rotate")
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token = {self.experts_per_token} of {self.experts} experts")

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rope(self, layer: int) -> Rope | None:
        return self.ropes[layer] if self.ropes else None
