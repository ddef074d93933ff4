"""One decoder-only transformer for all families: what differs is its `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.models.attention import Attention, LayerCache
from lowbit.models.config import Config
from lowbit.models.mlp import MLP, Mixture
from lowbit.nn.switch import Rows, ask

Cache = tuple[LayerCache, ...]
FED = ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up")
"""Layers of a block that multiply the residual stream, normed."""


def norm(config: Config, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Its parameters are float32 whatever the model's are: they are few, and Gemma's are sums with 1."""
    kind = nnx.RMSNorm if config.norm == "rms" else partial(nnx.LayerNorm, use_fast_variance=False)
    return kind(config.width, epsilon=config.eps, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(
        self, config: Config, layer: int, *, causal: bool = True, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attn = Attention(config, layer, causal=causal, **kinds)
        self.mlp = (Mixture if config.experts else MLP)(config, **kinds)
        self.pre_norm, self.post_norm = config.pre_norm, config.post_norm
        if config.pre_norm:
            self.attn_norm, self.mlp_norm = (norm(config, dtype=dtype, rngs=rngs) for _ in range(2))
        if config.post_norm:
            self.attn_post_norm, self.mlp_post_norm = (norm(config, dtype=dtype, rngs=rngs) for _ in range(2))

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: LayerCache | None = None,
        before: jax.Array | None = None,
        halfway: bool = False,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """One block.

        Layers that choose their widths asynchronously (DP-LLM, Park et al. 2025, section 5.2) are asked by the residual
        stream as it was one sublayer before, normed as their input is.

        Args:
          x: [B, T, width], the residual stream.
          positions: int32 [B, T].
          cache: of the layer.
          before: [B, T, width], the stream without what the MLP of the block before added.
          halfway: whether the next block asks for that of this one.

        Returns the stream, the layer's new cache, and if `halfway` the stream without what the MLP has added.
        """
        older = None if before is None else self._normed(before, "attn_norm")
        y, cache = self.attn(self._normed(x, "attn_norm"), Rows(positions, older), cache)
        after = self._added(x, y, "attn_post_norm")
        older = self._normed(x, "mlp_norm") if self.mlp.asks_older else None
        y = self.mlp(self._normed(after, "mlp_norm"), Rows(positions, older))
        return self._added(after, y, "mlp_post_norm"), cache, after if halfway else None

    @property
    def asks_older(self) -> bool:
        """Whether it asks for `before`."""
        return self.attn.asks_older

    def _normed(self, x: jax.Array, name: str) -> jax.Array:
        return getattr(self, name)(x) if self.pre_norm else x

    def _added(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
        if not self.post_norm:
            return x + y
        after = getattr(self, name)
        return x + after(y) if self.pre_norm else after(x + y)


class Decoder(nnx.Module):
    """A decoder-only language model of any of the families that `lb.models.load` knows.

    Args:
      config: what it is made of.
      dtype: what its layers compute in; that of all parameters together if None, and norms are float32. So are logits.
      param_dtype: of weights and biases.
      rngs: for random weights, its stream `params`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=2, head=4, hidden=32, context=64,
    ...     ropes=(lb.models.Rope(10_000.0, 4),),
    ... )
    >>> model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 32)
    """

    def __init__(self, config: Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        embed = partial(nnx.Embed, features=config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.embed = embed(config.vocab)
        if config.ropes is None:
            self.positions = embed(config.context + config.position_offset)
        self.layers = nnx.List(
            [Block(config, i, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for i in range(config.layers)]
        )
        if config.pre_norm:
            self.norm = norm(config, dtype=dtype, rngs=rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.width, config.vocab, use_bias=config.head_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at every place.

        Args:
          tokens: int [B, T].
          mask: bool [B, T], False where a sequence has no token, at its left or its right; all tokens if None.

        Returns float32 [B, T, vocab]; what stands where there is no token means nothing, and a token at a position that
        was not learned gives NaN. Raises ValueError for other shapes, and without a mask for more tokens than there are
        learned positions.
        """
        learned = self.config.context if self.config.ropes is None else None
        at = positions(tokens, mask, learned)
        return self.logits(self.hidden(tokens, at)[0], at)

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, cache: Sequence[LayerCache] | None = None
    ) -> tuple[jax.Array, Cache]:
        """What the head multiplies.

        Args:
          tokens: int [B, T].
          positions: int32 [B, T], of each token in its sequence, counted from 0 and continuing those in the cache;
            negative where there is none.
          cache: of what came before, one entry a layer; None to attend to these tokens alone.

        Returns [B, T, width], and the new cache, () without one.
        """
        x = self.embed(jnp.where(positions >= 0, tokens, 0))  # padding may be any number, whose row would be NaN
        x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.config.ropes is None:
            x = x + self.positions(jnp.maximum(positions, 0) + self.config.position_offset)
        entries: Sequence[LayerCache | None] = [None] * len(self.layers) if cache is None else cache
        asks = [getattr(block, "asks_older", False) for block in self.layers]  # what stands for a block may not say
        after, before = [], None
        for block, entry, halfway in zip(self.layers, entries, [*asks[1:], False], strict=True):
            x, new, before = block(x, positions, entry, before, halfway)
            after.append(new)
        return self.norm(x) if self.config.pre_norm else x, tuple(entry for entry in after if entry is not None)

    @property
    def fed(self) -> frozenset[str]:
        """The layers that are told of an older input, by path: see `lb.tune.switched`."""
        return frozenset(f"layers/{i}/{name}" for i in range(1, len(self.layers)) for name in FED)

    def logits(self, hidden: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """[..., width] -> float32 [..., vocab]. `positions` int32 [...], negative where there is no token, tell a head
        that switches what not to count; all are tokens if None."""
        if self.config.tied:
            out = self.embed.attend(hidden)
        else:
            out = self.head(hidden) if positions is None else ask(self.head, hidden, Rows(positions))
        out = out.astype(jnp.float32)
        cap = self.config.logit_cap
        return out if cap is None else cap * jnp.tanh(out / cap)


def positions(tokens: jax.Array, mask: jax.Array | None, learned: int | None = None) -> jax.Array:
    """int32 [B, T]: which token of its sequence each one is, -1 where the mask is False.

    Raises ValueError for other shapes, and without a mask for more than the `learned` positions, None for any number.
    """
    if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
        given = "" if mask is None else f" and mask {mask.shape}"
        raise ValueError(f"tokens have shape {tokens.shape}{given}: give both as [B, T]")
    if mask is None:
        if learned is not None and tokens.shape[1] > learned:
            raise ValueError(f"{tokens.shape[1]} tokens for a model that has learned {learned} positions: give it less")
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
