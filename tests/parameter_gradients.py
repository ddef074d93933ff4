"""What the sums of `lowbit.kernels.by_code` and `buckets` may be off by, from their arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, dequantize, own
from lowbit.ir.build import param
from lowbit.ir.dtypes import short
from lowbit.ir.oracle import evaluate
from lowbit.ir.transpose import transpose
from lowbit.ir.walk import params
from lowbit.kernels.buckets import LEAST, Buckets
from lowbit.kernels.by_code import CodeSums
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import ROWS
from lowbit.kernels.mma_dw import by_span
from lowbit.passes.scalar import evaluated
from lowbit.quant_type import kernel_layout, readings
from lowbit.testing.terms import product_term
from lowbit.testing.tolerance import assert_within, gamma, rounded


def check_parameter_gradients(got: Mapping[str, Any], x: Any, dy: Any, w: QuantArray) -> None:
    """`got` are the oracle's cotangents of the float fields of w, which is in the kernels' layout, and so are they.

    A sum over a set of bits has no more roundings than rows and inputs, and its error is at most that many times the
    sum of |dy| |x|. A table's entry is made of the sums over the sets that have all of its bits. Vectors from tables of
    all rows are rounded to halves, and so is each sum of two.
    """
    term = product_term(len(x), w.type, short(x.dtype))
    there, bounds, before = (
        own(QuantArray({**w.fields, **a}, w.type)).fields for a in (got, _bounds(got, x, dy, w), {})
    )
    for name in got:
        if name not in params(term):  # of another width
            assert not np.asarray(there[name]).any()
            continue
        exact = _cotangent(name, x, dy, before, w)
        bound = rounded(exact, np.asarray(bounds[name], np.float64), params(term)[name].dtype)
        assert_within(there[name], exact, bound, f"the cotangent of {name!r}")


def check_table_gradients(got: Mapping[str, Any], x: Any, dy: Any, w: QuantArray, products: int | None = None) -> None:
    """`got` are the oracle's cotangents of tables that all rows share, of w in the kernels' layout.

    A sum has a rounding for each of `products` in an entry of dy^T x (as many as rows, if None), for each tile, and
    three to become integers and float32 again: its error is at most that many times the sum of |s| |dy| |x|. Each entry
    that is added is also off by at most 2^-(2 L + 1) of the largest of its tile, or of what is taken for it.
    """
    of, before = kernel_layout(w.type), own(w).fields
    buckets = Buckets(of.program(short(x.dtype), readings(w.type).index(w.type.decode)))
    sizes, ones = (
        {name: f(a) if jnp.issubdtype(a.dtype, jnp.floating) else a for name, a in before.items()}
        for f in (jnp.abs, jnp.ones_like)
    )
    of_x, of_dy = np.abs(x.astype(np.float64)), np.abs(dy.astype(np.float64))
    decode = w.type.decode
    scales = evaluate(decode, {**sizes, **{name: ones[name] for name in got}})  # those of all tables together
    scales = scales.transpose([list(decode.dims).index(d) for d in ("n", "k")])
    largest = max((of_dy.T @ of_x * scales).max(), LEAST)
    roundings = (len(x) if products is None else products) + of.tiles * of.stages + 3
    first = np.arange(len(x))[:, None] == 0  # a row of ones counts the vectors
    for name in got:
        exact = _cotangent(name, x, dy, before, w)
        size = _cotangent(name, np.abs(x), np.abs(dy), sizes, w)
        count = _cotangent(name, (0 * x + first).astype(x.dtype), (0 * dy + first).astype(dy.dtype), ones, w)
        bound = gamma(roundings, "f32") * size + 2.0 ** -(2 * buckets.most + 1) * largest * count
        bound = rounded(exact, bound, short(w.fields[name].dtype))
        assert_within(got[name], exact, bound, f"the cotangent of {name!r}")


def _cotangent(name: str, x: Any, dy: Any, fields: Mapping[str, Any], w: QuantArray) -> Any:
    """The oracle's, in the field's order of dims."""
    term = product_term(len(x), w.type, short(x.dtype))
    leaf = params(term)[name]
    pulled = transpose(term, leaf, param("dy", short(dy.dtype), None, m=len(x), n=dy.shape[1]))
    exact = evaluate(pulled, {**fields, "x": x, "dy": dy})
    return exact.transpose([list(pulled.dims).index(d) for d in leaf.dims])


def _bounds(got: Mapping[str, Any], x: Any, dy: Any, w: QuantArray) -> dict[str, jax.Array]:
    of = kernel_layout(w.type)
    sums = CodeSums(of.program(short(x.dtype), readings(w.type).index(w.type.decode)))
    size = np.abs(dy.astype(np.float64)).T @ np.abs(x.astype(np.float64))
    looked_up = 0.0
    if isinstance(decoder := sums.program.decoder, Books):
        ones = {
            name: jnp.ones_like(a) if name in got else jnp.abs(a) if name in of.books else a
            for name, a in w.fields.items()
        }  # fmt: skip
        size = size * np.asarray(dequantize(QuantArray(ones, w.type)), np.float64).T
        looked_up = gamma(2 * len(decoder.lookups) - 1, short(x.dtype))
    whole = np.zeros((of.tiles * ROWS, of.stages * sums.spans * sums.span))
    whole[: of.n, : of.k] = size
    spans = jnp.asarray(whole.reshape(of.tiles, ROWS, -1, sums.span).sum(-1).swapaxes(1, 2))
    out = {name: jnp.zeros(w.fields[name].shape) for name in got}
    for code, entry in enumerate(sums.entries):
        supersets = sum(code & subset == code for subset in sums.subsets)

        def value(floats: Any, entry: Any = entry) -> jax.Array:
            return jnp.broadcast_to(
                evaluated(entry, by_span(of, sums, {**w.fields, **floats}).__getitem__), spans.shape
            )

        (slopes,) = jax.vjp(value, {name: jnp.asarray(w.fields[name]) for name in got})[1](spans.astype(jnp.float32))
        out = {name: total + supersets * jnp.abs(slopes[name]) for name, total in out.items()}
    terms = len(x) + of.stages * sums.spans * sums.span + 4 * len(sums.entries)
    return {name: (gamma(terms, "f32") + looked_up) * total for name, total in out.items()}
