"""Caches that hold keys and values in formats of weights: KIVI's, floats of 8 bits, integers of 8 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from lowbit.formats import k_quant, scaled_fp8, uniform
from lowbit.models.attention import Dense, How, LayerCache
from lowbit.models.cache import DenseCache
from lowbit.models.config import Config
from lowbit.models.kv_store import BEYOND, Encoding, Store, heads, product
from lowbit.quantizers import MinMax, RoundToE4m3, round_to_nearest


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "positions", "length"], meta_fields=["slots"])
@dataclass(frozen=True)
class QuantCache:
    """Keys and values of one layer, each in an `Encoding`. It is also one part of attention: see `attend`.

    Heads hold the same tokens, or with an axis of heads in `positions` and `length` each its own.

    Attributes:
      positions: int32 [B, 1 or kv_heads, S], of tokens in the order they came in, -1 where there is none.
      length: int32 [B, 1 or kv_heads], tokens stored.
      slots: tokens that can be stored.
    """

    keys: Store
    values: Store
    positions: jax.Array
    length: jax.Array
    slots: int

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> QuantCache:
        """With new tokens, [B, T, kv_heads, D] at int32 [B, 1 or kv_heads, T]; those at negative positions, and beyond
        the last slot, are left out."""
        new = jnp.broadcast_to(positions, (*self.length.shape, positions.shape[2]))
        place = self.length[..., None] + jnp.cumsum(new >= 0, axis=-1) - 1
        taken = (new >= 0) & (place < self.slots)
        place, length = jnp.where(taken, place, BEYOND), self.length + taken.sum(-1, dtype=jnp.int32)
        each = (k.shape[0], k.shape[2])
        before, after, at = (
            jnp.broadcast_to(a, each + a.shape[2:]) for a in (self.length, length, place.astype(jnp.int32))
        )
        return QuantCache(
            self.keys.append(k.swapaxes(1, 2), at, before, after),
            self.values.append(v.swapaxes(1, 2), at, before, after),
            heads(lambda old, at, new: old.at[at].set(new, mode="drop"))(self.positions, place, new),
            length,
            self.slots,
        )

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, how: How
    ) -> tuple[jax.Array, QuantCache]:
        """See `lowbit.models.attention.LayerCache`. New tokens are seen as they are: they are quantized after that."""
        out = how.attend(q, positions, [self, Dense(k, v, positions[:, None])])
        return out, self.append(k, v, positions[:, None])

    def scores(self, q: jax.Array) -> jax.Array:
        """See `lowbit.models.attention.Part`. Slots are tokens in the order they came in, quantized or not."""
        rows = q.transpose(0, 2, 3, 1, 4)
        x = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
        old, e = self.keys.codes, self.keys.encoding
        of_codes = product(x, old, "n" if e.token == "k" else "k")
        of_tail = jnp.einsum("bhrd,bhsd->bhrs", x, self.keys.tail.astype(x.dtype), preferred_element_type=jnp.float32)
        room = self.positions.shape[-1] - of_codes.shape[-1]
        scores = jnp.pad(of_codes, ((0, 0), (0, 0), (0, 0), (0, room)))
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=-1)
        return heads(put)(scores, of_tail, self._settled(e, x)).reshape(*rows.shape[:-1], -1)

    def mixed(self, weights: jax.Array) -> jax.Array:
        """See `lowbit.models.attention.Part`."""
        b, h, g, t, _ = weights.shape
        x = weights.reshape(b, h, g * t, -1).astype(self.values.tail.dtype)
        old, e = self.values.codes, self.values.encoding
        tokens = dict(old.type.dims)[e.token]
        # Weights of tokens in the tail meet zeros here.
        of_codes = product(x[..., :tokens], old, e.token)
        take = partial(jax.lax.dynamic_slice_in_dim, slice_size=e.tail, axis=-1)
        w = heads(take)(x, self._settled(e, x))
        of_tail = jnp.einsum("bhrs,bhsd->bhrd", w, self.values.tail, preferred_element_type=jnp.float32)
        return (of_codes + of_tail).reshape(b, h, g, t, -1).transpose(0, 3, 1, 2, 4)

    def _settled(self, e: Encoding, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(e.settled(self.length), like.shape[:2])


_appended = jax.jit(QuantCache.append)


def expect_dense(cache: Sequence[LayerCache]) -> Sequence[DenseCache]:
    """The cache itself. Raises TypeError, naming the layer, for one that is not dense."""
    for i, entry in enumerate(cache):
        if not isinstance(entry, DenseCache):
            raise TypeError(
                f"layer {i} has a {type(entry).__name__}: fill a dense cache, and quantize what is left of it"
            )
    return cast(Sequence[DenseCache], cache)


class QuantKV(ABC):
    """A `lowbit.models.cache.CacheKind` of two encodings. A kind of your own is a frozen dataclass that has them."""

    @property
    @abstractmethod
    def encodings(self) -> tuple[Encoding, Encoding]:
        """Of keys and of values."""

    def empty(self, config: Config, batch: int, slots: int, dtype: Any) -> tuple[QuantCache, ...]:
        """See `lowbit.models.cache.CacheKind`."""
        sizes = batch, slots, config.kv_heads, config.head
        return tuple(self._layer(*sizes, 1, dtype) for _ in range(config.layers))

    def of(self, cache: Sequence[DenseCache], slots: int) -> tuple[QuantCache, ...]:
        """Caches that hold what dense ones do, in the order of their slots, with room for `slots` tokens a head.

        Where heads hold different tokens, after KVzip, each head's are quantized on their own, and groups that lie
        along tokens are made of those that are left. Tokens that do not fit are left out.

        Raises TypeError for a cache that is not dense.
        """
        out = []
        for c in expect_dense(cache):
            batch, _, kv_heads, head = c.k.shape
            empty = self._layer(batch, slots, kv_heads, head, c.positions.shape[1], c.k.dtype)
            out.append(_appended(empty, c.k, c.v, c.positions))
        return tuple(out)

    def _layer(self, batch: int, slots: int, kv_heads: int, head: int, lanes: int, dtype: Any) -> QuantCache:
        keys, values = (Store.empty(e, batch, slots, kv_heads, head, dtype) for e in self.encodings)
        positions = jnp.full((batch, lanes, max(keys.slots, values.slots)), -1, jnp.int32)
        return QuantCache(keys, values, positions, jnp.zeros((batch, lanes), jnp.int32), slots)


@dataclass(frozen=True)
class Kivi(QuantKV):
    """Keys quantized along tokens and values along channels, except the newest (KIVI, Liu et al., ICML 2024).

    `Kivi(2)` is the published cache: code = round((x - min) / scale), scale = (max - min) / (2^bits - 1), with a scale
    and minimum for each `group` tokens of a channel of the rotated keys, and for each `group` channels of a token's
    values. Keys wait until there are `residual` of them, values until `residual` newer ones have come. A head whose
    size is no multiple of `group` has a smaller last group. NaN and inf spoil their groups.

    Bytes a token, layer and head of D channels, far from the start: D (bits + 2 s / group) / 4 for scales of s bits.

    Args:
      bits: 2, 4 or 8.
      group: entries that share a scale and a minimum.
      residual: tokens, a multiple of `group`.
      scale_dtype: of scales and minima, "float16", or "bfloat16" or "float32" for entries beyond 65504.

    Raises ValueError for other bits, a group that is no positive int, or a residual that it does not divide.

    >>> import lowbit as lb
    >>> lb.models.Kivi(4, residual=64)
    Kivi(bits=4, group=32, residual=64, scale_dtype='float16')
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, not {self.bits!r}")
        if type(self.group) is not int or self.group < 1:
            raise ValueError(f"group must be a positive int, not {self.group!r}")
        if type(self.residual) is not int or self.residual < 1 or self.residual % self.group:
            raise ValueError(
                f"residual = {self.residual!r} tokens are not whole groups of {self.group}: make it a positive multiple"
            )
        self.encodings  # noqa: B018  raises for a scale_dtype that is none

    @property
    def encodings(self) -> tuple[Encoding, Encoding]:
        fmt = k_quant(self.bits, self.group, self.group, scale_bits=0, scale_dtype=self.scale_dtype)
        keys = Encoding(fmt, MinMax(), "tokens", unit=self.residual)
        return keys, Encoding(fmt, MinMax(), "channels", keep=self.residual)


@dataclass(frozen=True)
class Fp8KV(QuantKV):
    """Every token in e4m3, with a float32 scale for each head's key and value: D + 4 bytes each.

    >>> import lowbit as lb
    >>> str(lb.models.Fp8KV().encodings[0].format)
    'scaled_fp8()'
    """

    @property
    def encodings(self) -> tuple[Encoding, Encoding]:
        return (Encoding(scaled_fp8(), RoundToE4m3(), "channels"),) * 2


@dataclass(frozen=True)
class Int8KV(QuantKV):
    """Every token in integers of 8 bits, with a float32 scale and a zero point for each head's key and value: D + 5
    bytes each.

    >>> import lowbit as lb
    >>> str(lb.models.Int8KV().encodings[0].format)
    'uniform(bits=8)'
    """

    @property
    def encodings(self) -> tuple[Encoding, Encoding]:
        return (Encoding(uniform(8), round_to_nearest(), "channels"),) * 2
