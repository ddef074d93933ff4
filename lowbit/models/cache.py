"""The cache of keys and values: arrays of a fixed size, so that no step compiles anew."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lowbit.models.attention import Dense, How, LayerCache
from lowbit.models.config import Config


class CacheKind(Hashable, Protocol):
    """How keys and values are stored. Hashable, so that what is compiled for one kind is found again."""

    def empty(self, config: Config, batch: int, slots: int, dtype: Any) -> tuple[LayerCache, ...]:
        """The caches of all layers for `batch` sequences, axis 0 of each of their arrays, of up to `slots` tokens that
        are computed in `dtype`."""
        ...


@dataclass(frozen=True)
class DenseKV:
    """Keys and values as they are."""

    def empty(self, config: Config, batch: int, slots: int, dtype: Any) -> tuple[LayerCache, ...]:
        """See `CacheKind`."""
        return tuple(DenseCache.empty(batch, slots, config.kv_heads, config.head, dtype) for _ in range(config.layers))


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "positions", "length"], meta_fields=[])
@dataclass(frozen=True)
class DenseCache:
    """Keys and values of one layer as they are.

    Attributes:
      k, v: [B, S, kv_heads, D].
      positions: int32 [B, 1, S], of each slot, -1 where it holds nothing; [B, kv_heads, S] where heads differ in that.
      length: int32 [B], slots of each sequence in use: the first ones.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    length: jax.Array

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head: int, dtype: Any) -> DenseCache:
        # Two arrays, for none can be donated twice.
        k, v = (jnp.zeros((batch, slots, kv_heads, head), dtype) for _ in range(2))
        return DenseCache(k, v, jnp.full((batch, 1, slots), -1, jnp.int32), jnp.zeros(batch, jnp.int32))

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> DenseCache:
        """With new tokens, [B, T, kv_heads, D] at int32 [B, T]; those at negative positions, and beyond the last slot,
        are left out."""
        taken = positions >= 0
        slot = jnp.where(taken, self.length[:, None] + jnp.cumsum(taken, axis=1) - 1, self.k.shape[1])
        row = jnp.arange(len(slot))[:, None]
        return DenseCache(
            self.k.at[row, slot].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[row, slot].set(v.astype(self.v.dtype), mode="drop"),
            self.positions.at[row, :, slot].set(positions[..., None], mode="drop"),
            self.length + taken.sum(axis=1, dtype=jnp.int32),
        )

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, how: How
    ) -> tuple[jax.Array, DenseCache]:
        """See `lowbit.models.attention.LayerCache`."""
        new = self.append(k, v, positions)
        return how.attend(q, positions, [Dense(new.k, new.v, new.positions)]), new
