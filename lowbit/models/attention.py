"""Attention over keys and values that may lie in several parts, each stored in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.models.config import Config
from lowbit.nn.switch import Rows, ask, asks_older

BLOCK = 512
"""Queries that are scored at once: scores are float32 [B, heads, BLOCK, keys]."""


class Part(Protocol):
    """Keys and values that are stored in one way.

    Attributes:
      positions: int32 [B, 1, S] or [B, kv_heads, S], of each slot; negative where it holds nothing.
    """

    @property
    def positions(self) -> jax.Array: ...

    def scores(self, q: jax.Array) -> jax.Array:
        """The products with the keys: [B, T, kv_heads, G, D] -> float32 [B, kv_heads, G, T, S]."""
        ...

    def mixed(self, weights: jax.Array) -> jax.Array:
        """The values under weights: float32 [B, kv_heads, G, T, S] -> float32 [B, T, kv_heads, G, D]."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "positions"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """Keys and values [B, S, kv_heads, D] as they are."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array

    def scores(self, q: jax.Array) -> jax.Array:
        return jnp.einsum("bthgd,bshd->bhgts", q, self.k.astype(q.dtype), preferred_element_type=jnp.float32)

    def mixed(self, weights: jax.Array) -> jax.Array:
        return jnp.einsum("bhgts,bshd->bthgd", weights.astype(self.v.dtype), self.v, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class How:
    """What of attention a family chooses.

    Attributes:
      scale: that scores are multiplied by.
      cap: c in c tanh(score / c), None for none.
      window: how many positions a query sees, itself included; None for all.
      causal: whether a query sees only positions up to its own.
    """

    scale: float
    cap: float | None = None
    window: int | None = None
    causal: bool = True

    def scores(self, q: jax.Array, positions: jax.Array, part: Part) -> jax.Array:
        """float32 [B, kv_heads, G, T, S], the lowest number where a query does not see a slot."""
        scores = part.scores(q) * self.scale
        if self.cap is not None:
            scores = self.cap * jnp.tanh(scores / self.cap)
        return jnp.where(self.sees(positions, part.positions)[:, :, None], scores, jnp.finfo(jnp.float32).min)

    def sees(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Which slots the queries at positions [B, T] see: bool [B, 1 or kv_heads, T, S]."""
        q, k = q[:, None, :, None], k[:, :, None, :]
        seen = k >= 0
        if self.causal:
            seen &= k <= q
        return seen if self.window is None else seen & (q - k < self.window)

    def attend(self, q: jax.Array, positions: jax.Array, parts: Sequence[Part]) -> jax.Array:
        """Softmax attention: [B, T, kv_heads, G, D] at positions int [B, T] -> the same shape and dtype.

        Queries go in blocks, one after the other. A query that sees nothing, as one that is padding, gets a mean that
        means nothing.
        """
        if not q.size:
            return q
        if q.shape[1] <= BLOCK:
            return self._block(q, positions, parts)
        one = jax.checkpoint(
            lambda block: self._block(block[0], block[1], parts)
        )  # else gradients hold all blocks' scores
        out = jax.lax.map(one, blocks(q, positions)).swapaxes(0, 1)
        return out.reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]

    def _block(self, q: jax.Array, positions: jax.Array, parts: Sequence[Part]) -> jax.Array:
        scores = [self.scores(q, positions, part) for part in parts]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
        ends = [sum(s.shape[-1] for s in scores[: i + 1]) for i in range(len(scores) - 1)]
        mixed = [part.mixed(w) for part, w in zip(parts, jnp.split(weights, ends, axis=-1), strict=True)]
        return sum(mixed[1:], start=mixed[0]).astype(q.dtype)


def blocks(q: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries [B, T, ...] at positions [B, T] in blocks of at most `BLOCK`: [n, B, t, ...] and [n, B, t], the last one
    filled up with padding. To be mapped over: blocks that do not wait for each other may all be in memory at once."""
    count = -(-q.shape[1] // BLOCK)
    size = -(-q.shape[1] // count)

    def cut(a: jax.Array, fill: int) -> jax.Array:
        more = [(0, 0), (0, count * size - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]
        padded = jnp.pad(a, more, constant_values=fill)
        return padded.reshape(len(a), count, size, *a.shape[2:]).swapaxes(0, 1)

    return cut(q, 0), cut(positions, -1)


class LayerCache(Protocol):
    """The keys and values of one layer, a pytree."""

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, how: How
    ) -> tuple[jax.Array, LayerCache]:
        """Store new keys and values, and attend to all that is stored, these included.

        Args:
          q: [B, T, kv_heads, G, D], scaled by nothing.
          k, v: [B, T, kv_heads, D].
          positions: int32 [B, T], of queries and new keys; negative where a sequence has no token.
          how: of the layer.

        Returns what attention gives, [B, T, kv_heads, G, D], and the new cache, of the same shapes.
        """
        ...


class Attention(nnx.Module):
    """Multi-head attention, several heads of queries to one of keys and values."""

    def __init__(
        self, config: Config, layer: int, *, causal: bool = True, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        size, kv_size = config.heads * config.head, config.kv_heads * config.head
        self.q = linear(config.width, size, use_bias=config.qkv_bias)
        self.k = linear(config.width, kv_size, use_bias=config.qkv_bias)
        self.v = linear(config.width, kv_size, use_bias=config.qkv_bias)
        self.o = linear(size, config.width, use_bias=config.out_bias)
        if config.qk_norm:
            norm = partial(nnx.RMSNorm, config.head, epsilon=config.eps, dtype=dtype, rngs=rngs)
            self.q_norm, self.k_norm = norm(), norm()
        self.qk_norm, self.rope, self.head = config.qk_norm, config.rope(layer), config.head
        scale = config.head**-0.5 if config.attention_scale is None else config.attention_scale
        self.how = How(scale, config.attention_cap, config.window(layer), causal)

    @property
    def asks_older(self) -> bool:
        return asks_older(self.q, self.k, self.v)

    def __call__(
        self, x: jax.Array, rows: Rows, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, width] at positions int32 [B, T] -> the same shape, and the new cache."""
        positions = rows.positions
        q, k, v = (self._by_head(ask(layer, x, rows)) for layer in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        grouped = q.reshape(*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], self.head)
        if cache is None:
            out = self.how.attend(grouped, positions, [Dense(k, v, positions[:, None])])
        else:
            out, cache = cache.attend(grouped, k, v, positions, self.how)
        return ask(self.o, out.reshape(*x.shape[:2], q.shape[2] * self.head), rows), cache

    def _by_head(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], y.shape[2] // self.head, self.head)
