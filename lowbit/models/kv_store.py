"""Keys, or values, in a format of weights, the newest of them as they are.

Of each sequence and head they are a matrix of tokens by channels. A format's groups lie along k: where k is tokens, a
scale is shared by tokens of one channel, and where k is channels, by channels of one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowbit.array import QuantArray, over_stack
from lowbit.by_term import emit_in_order
from lowbit.formats import Format
from lowbit.ir.build import contract, param
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.ir.expr import Expr
from lowbit.passes.choose import forms
from lowbit.planning import machine_of
from lowbit.quant_type import QuantType
from lowbit.quantizers import Quantizer

BEYOND = jnp.iinfo(jnp.int32).max
"""A slot that no array has."""


@dataclass(frozen=True)
class Encoding:
    """How keys, or values, are stored.

    Attributes:
      format, quantizer: of tokens that are quantized.
      groups: what k is, and so what the format's groups lie along; n is the other.
      unit: tokens that are quantized at once; whole groups of them where groups lie along tokens.
      keep: the newest tokens that stay as they are, whatever the unit.
    """

    format: Format
    quantizer: Quantizer
    groups: Literal["tokens", "channels"]
    unit: int = 1
    keep: int = 0

    @property
    def token(self) -> str:
        """The dim of the stored matrix that counts tokens."""
        return "k" if self.groups == "tokens" else "n"

    @property
    def tail(self) -> int:
        """The most tokens that are not quantized."""
        return self.keep + self.unit - 1

    def settled(self, tokens: jax.Array) -> jax.Array:
        """How many of the first `tokens` are quantized."""
        return jnp.maximum(tokens - self.keep, 0) // self.unit * self.unit

    def type(self, tokens: int, head: int, dtype: Any) -> QuantType:
        sizes = {"n": head, "k": head} | {self.token: tokens}
        return QuantType(tuple(sizes.items()), short(dtype), self.format)


@lru_cache(maxsize=256)
def _axes(encoding: Encoding, t: QuantType) -> dict[str, tuple[int, int]]:
    """Of each stored array the axis that counts tokens, and the tokens that one place on it stands for.

    Raises ValueError for an array that all tokens share.
    """
    of = [t.resized(**{encoding.token: i * encoding.unit}).fields for i in (2, 4)]
    out = {}
    for name, leaf in of[0].items():
        sizes = zip(leaf.dims.values(), of[1][name].dims.values(), strict=True)
        if (axis := next((i for i, (two, four) in enumerate(sizes) if two != four), None)) is None:
            raise ValueError(f"{t.format} stores {name!r} for all tokens at once: a cache needs a format that does not")
        out[name] = axis, 2 * encoding.unit // list(leaf.dims.values())[axis]
    return out


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "tail"], meta_fields=["encoding"])
@dataclass(frozen=True)
class Store:
    """Keys, or values, of one layer: of each sequence and head the first `encoding.settled(length)` tokens quantized.

    Attributes:
      codes: a stack [B, kv_heads] of matrices, zeros where nothing is stored yet.
      tail: [B, kv_heads, encoding.tail, D], the tokens after those, then zeros.
    """

    codes: QuantArray
    tail: jax.Array
    encoding: Encoding

    @staticmethod
    def empty(encoding: Encoding, batch: int, slots: int, kv_heads: int, head: int, dtype: Any) -> Store:
        # At least two units, since a format may store one token without an axis for it.
        units = max((slots - encoding.keep) // encoding.unit, 2)
        t = encoding.type(units * encoding.unit, head, dtype)
        _axes(encoding, t)
        fields = {
            name: jnp.zeros((batch, kv_heads, *leaf.dims.values()), numpy_dtype(leaf.dtype))
            for name, leaf in t.fields.items()
        }
        return Store(QuantArray(fields, t), jnp.zeros((batch, kv_heads, encoding.tail, head), dtype), encoding)

    @property
    def slots(self) -> int:
        return dict(self.codes.type.dims)[self.encoding.token] + self.encoding.tail

    def append(self, new: jax.Array, place: jax.Array, before: jax.Array, after: jax.Array) -> Store:
        """With tokens [B, kv_heads, T, D], the `place`th ones [B, kv_heads, T] of each head: from `before` to `after`,
        [B, kv_heads]."""
        e = self.encoding
        start, stop = e.settled(before), e.settled(after)

        def pending(tail: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
            return jnp.pad(tail, ((0, len(new)), (0, 0))).at[at].set(new.astype(tail.dtype), mode="drop")

        def left(tokens: jax.Array, count: jax.Array) -> jax.Array:
            return tokens.at[count + jnp.arange(e.tail)].get(mode="fill", fill_value=0)

        tokens = heads(pending)(self.tail, new, place - start[..., None])
        most = (e.unit - 1 + new.shape[2]) // e.unit * e.unit
        fields = jax.lax.cond(
            (stop > start).any(),
            lambda: heads(partial(_written, e, self.codes.type))(self.codes.fields, tokens[:, :, :most], start, stop),
            lambda: self.codes.fields,
        )
        return Store(QuantArray(fields, self.codes.type), heads(left)(tokens, stop - start), e)


def heads(f: Callable[..., Any]) -> Callable[..., Any]:
    """Of one sequence and head, for all of them."""
    return jax.vmap(jax.vmap(f))


def _written(
    e: Encoding, t: QuantType, fields: dict[str, jax.Array], tokens: jax.Array, start: jax.Array, stop: jax.Array
) -> dict[str, jax.Array]:
    """The stored arrays of one head, with the first stop - start of `tokens` [T, D] quantized, from `start` on."""
    made = e.quantizer(tokens.T if e.token == "k" else tokens, t.format)
    out = {}
    for name, (axis, each) in _axes(e, t).items():
        shape = list(t.fields[name].dims.values())
        shape[axis] = len(tokens) // each
        at = start // each + jnp.arange(shape[axis])
        where = (slice(None),) * axis + (jnp.where(at < stop // each, at, BEYOND),)
        out[name] = fields[name].at[where].set(made[name].reshape(shape), mode="drop")
    return out


def product(x: jax.Array, w: QuantArray, over: str) -> jax.Array:
    """x [*stack, m, over] times each matrix of a stack, summed over its dim `over`: float32 [*stack, m, the other].

    It is the cheapest form of the term, so what follows for scales, as q (s code - m) = (q s) code - q m, is a pass's.
    """
    other = "n" if over == "k" else "k"
    term = _product(w.type, x.shape[-2], short(x.dtype), over, jax.default_backend())
    share = prod(w.stack)

    def one(w: QuantArray, x: jax.Array) -> jax.Array:
        return emit_in_order(term, {**w.fields, "x": x}, ("m", other), jnp.float32, share)

    out: jax.Array = over_stack(one, w, x)
    return out


@lru_cache(maxsize=4096)
def _product(t: QuantType, rows: int, dtype: Any, over: str, platform: str) -> Expr:
    x = param("x", dtype, None, **{"m": rows, over: dict(t.dims)[over]})
    return forms(contract((x, t.decode), (over,)), machine_of(platform))[0].term
