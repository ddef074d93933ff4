"""Encoders in the manner of BERT (Devlin et al. 2019), of the same blocks as the decoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.models.config import Config
from lowbit.models.decoder import Block, norm, positions
from lowbit.models.mlp import ACTIVATIONS


class TokenHead(nnx.Module):
    """What a masked token was: a dense layer and a norm before the product with the embedding's table."""

    def __init__(self, config: Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(config.width, config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = norm(config, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab, param_dtype))
        self.activation = config.activation

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """What the embedding's table multiplies: [..., width] -> the same shape."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))


class Encoder(nnx.Module):
    """A bidirectional encoder, with the heads that its config asks for.

    Args:
      config: what it is made of; positions are learned.
      dtype: what its layers compute in; that of all parameters together if None, and norms are float32.
      param_dtype: of weights and biases.
      rngs: for random weights, its stream `params`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=4, head=4, hidden=32, context=64, norm="layer",
    ...     pre_norm=False, post_norm=True, activation="gelu", gated=False, token_types=2, tied=True, token_head=True,
    ... )
    >>> model = lb.models.Encoder(config, rngs=nnx.Rngs(0))
    >>> hidden = model(jnp.zeros((2, 5), jnp.int32))
    >>> hidden.shape, model.logits(hidden).shape
    ((2, 5, 16), (2, 5, 32))
    """

    def __init__(self, config: Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        if config.token_types < 1:
            raise ValueError(f"token_types = {config.token_types}: an encoder has at least one")
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        embed = partial(nnx.Embed, features=config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.embed, self.positions, self.types = (
            embed(rows) for rows in (config.vocab, config.context + config.position_offset, config.token_types)
        )
        self.embed_norm = norm(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, i, causal=False, **kinds) for i in range(config.layers)])
        if config.token_head:
            self.head = TokenHead(config, **kinds)
        if config.pooler:
            self.pooler = nnx.Linear(config.width, config.width, **kinds)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None) -> jax.Array:
        """What it makes of every token in the sight of all others.

        Args:
          tokens: int [B, T].
          mask: bool [B, T], False where a sequence has no token, at its left or its right; all tokens if None.
          types: int [B, T], of each token; all 0 if None.

        Returns [B, T, width]; what stands where there is no token means nothing. Raises ValueError as `Decoder` does.
        """
        at = positions(tokens, mask, self.config.context)
        x = self.embed(jnp.where(at >= 0, tokens, 0)) + self.positions(jnp.maximum(at, 0) + self.config.position_offset)
        x = self.embed_norm(x + self.types(jnp.zeros_like(tokens) if types is None else types))
        for block in self.layers:
            x, *_ = block(x, at)
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Of what each token is, for a config with `token_head`: [..., width] -> float32 [..., vocab]."""
        if not self.config.token_head:
            raise ValueError("this encoder has no head over tokens: its config states token_head = False")
        out = self.embed.attend(self.head(hidden)).astype(jnp.float32)
        return out + self.head.bias.get_value().reshape((1,) * (out.ndim - 1) + (-1,))

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """Of a sequence, from its first token, for a config with `pooler`: [B, T, width] -> [B, width].

        Padding must be at the right.
        """
        if not self.config.pooler:
            raise ValueError("this encoder has no pooler: its config states pooler = False")
        return jnp.tanh(self.pooler(hidden[:, 0]))
