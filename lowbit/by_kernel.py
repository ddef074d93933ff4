"""Products that are no form of a term: by this library's kernels, or with the weight decoded for the platform's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lowbit.array import QuantArray, own
from lowbit.devices import variant_here
from lowbit.ir.build import param
from lowbit.ir.dtypes import short
from lowbit.ir.expr import Contract
from lowbit.passes.in_int8 import COLUMNS
from lowbit.passes.int8_rows import rows
from lowbit.passes.lower_xla import align, emit
from lowbit.quant_type import QuantType, kernel_layout, readings

if TYPE_CHECKING:
    from lowbit.kernels.mma import Tuning


def dense(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """The weight decoded to x's dtype, then one product."""
    w = align(emit(t.decode, own(QuantArray(fields, t)).fields), t.decode.dims, dict(t.dims)).astype(x.dtype)
    axis = [dim for dim, _ in t.dims].index("k")
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


Schedule = tuple[int, int, int] | None
"""Columns, parts and depth (`lowbit.kernels.mma.Tuning`); None for those that the kernel finds itself."""


def by_mma(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], schedule: Schedule = None) -> jax.Array:
    """Weights in the kernels' layout, decoded on their way to the tensor cores, in whatever numerics."""
    from lowbit.kernels.mma import Tuning  # imports Mosaic GPU, which other platforms do without
    from lowbit.kernels.product import product

    tuned = None if schedule is None else Tuning(*schedule)
    if t.numerics != "float":
        return _by_int8(t, x, fields, tuned)
    return product(kernel_layout(t), x, fields, tuned, at=readings(t).index(t.decode), variant=variant_here())


def by_mma_dx(t: QuantType, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """The gradient of x from dy [m, n]: weights in the kernels' layout, decoded to shared memory."""
    from lowbit.kernels.mma_dx import input_gradient

    return input_gradient(kernel_layout(t), dy, fields, at=readings(t).index(t.decode))


def by_mma_dw(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> dict[str, jax.Array]:
    """The gradients of the parameters of rows in the kernels' layout: sums of dy^T x by codes, for dy [m, n]."""
    from lowbit.kernels.mma_dw import parameter_gradients

    return parameter_gradients(kernel_layout(t), x, dy, fields, at=readings(t).index(t.decode))


def by_mma_db(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> dict[str, jax.Array]:
    """Those of the tables that all rows share: sums of dy^T x by what the codes look up."""
    from lowbit.kernels.mma_db import table_gradients

    return table_gradients(kernel_layout(t), x, dy, fields, at=readings(t).index(t.decode))


def by_sums(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """Weights in the kernels' layout, looked up among sums of x."""
    from lowbit.kernels.product import product_by_sums

    return product_by_sums(kernel_layout(t), x, fields)


def _by_int8(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], tuned: Tuning | None) -> jax.Array:
    from lowbit.kernels.int8 import product_of_integers

    leaf, columns = param("x", short(x.dtype), None, m=x.shape[0], k=x.shape[1]), COLUMNS[t.numerics]
    codes, scales = (emit(e, {"x": x}) for e in rows(leaf, columns))
    of, at = kernel_layout(t), readings(t).index(t.decode)
    sums = product_of_integers(of, codes.reshape(-1, x.shape[1]), fields, at, tuned)
    by_column = sums.reshape(columns, len(x), -1)
    y = sum(by_column[i] * 256.0**-i for i in range(columns)) * scales[:, None]
    return y.astype(x.dtype)


def by_fp8(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], schedule: Schedule = None) -> jax.Array:
    """Weights in the kernels' layout that are e4m3, and x encoded as their format says: codes, and factors."""
    from lowbit.kernels.mma import Tuning
    from lowbit.kernels.product import product_of_codes

    tuned = None if schedule is None else Tuning(*schedule)
    encoded = t.format.activations(param("x", short(x.dtype), None, m=x.shape[0], k=x.shape[1]))
    factors = encoded.factors if isinstance(encoded, Contract) else (encoded,)
    (codes,) = (f for f in factors if "k" in f.dims)
    sums = product_of_codes(kernel_layout(t), emit(codes, {"x": x}), fields, readings(t).index(t.decode), tuned)
    for factor in factors:
        if factor is not codes:
            sums = sums * align(emit(factor, {"x": x}), factor.dims, {"m": len(x), "n": 1})
    return sums.astype(x.dtype)
