"""The best tables for codes that are held, and codes as `any_precision` stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.quantizers.chunks import by_chunk

RIDGE = 1e-7
"""Of the sum of second moments: the change of a table costs so much. A code that no weight has keeps its entry."""
_AT_ONCE = 1 << 24
"""Entries of one-hot matrices that are held at a time."""


@jax.jit
def best_table(gram: jax.Array, w: jax.Array, codes: jax.Array, table: jax.Array) -> jax.Array:
    """The tables [n, c] that make D H D^T least for rows w [n, k] with codes [n, k].

    With P the one-hot matrix [k, c] of a row's codes and D the error with the table as it is, the change is
    -(P^T H P + ridge)^-1 P^T H D. A row for which rounding makes this no better keeps its table.
    """
    (n, k), size = w.shape, table.shape[1]
    error = jnp.take_along_axis(table, codes.astype(jnp.int32), 1) - w
    product = jnp.matmul(error, gram, precision=lax.Precision.HIGHEST)
    ridge = RIDGE * k * gram.diagonal().mean() * jnp.eye(size)

    def change(row: tuple[jax.Array, ...]) -> jax.Array:
        code, product = row
        hot = jax.nn.one_hot(code, size, dtype=jnp.float32)
        both = jnp.einsum("kc,kd->cd", hot, jnp.matmul(gram, hot, precision=lax.Precision.HIGHEST))
        slope = hot.T @ product
        off = jnp.linalg.solve(both + ridge, slope)
        return jnp.where(off @ both @ off < 2 * off @ slope, off, 0.0)  # what D H D^T changes by

    return table - lax.map(change, (codes, product), batch_size=max(1, min(n, _AT_ONCE // (k * size))))


def objective(gram: jax.Array, w: jax.Array, codes: jax.Array, table: jax.Array) -> jax.Array:
    """D H D^T of each row [n]."""
    error = jnp.take_along_axis(table.astype(jnp.float32), codes.astype(jnp.int32), 1) - w
    return (error * jnp.matmul(error, gram, precision=lax.Precision.HIGHEST)).sum(1)


@jax.jit
def better(
    gram: jax.Array, w: jax.Array, old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The new codes and tables, these rounded as the old ones are stored, of rows that are better so; others stay."""
    made = new[0], new[1].astype(old[1].dtype)
    won = (objective(gram, w, *made) < objective(gram, w, *old))[:, None]
    return jnp.where(won, made[0], old[0]), jnp.where(won, made[1], old[1])


def refitted(
    gram: jax.Array, w: jax.Array, fields: Mapping[str, jax.Array], widths: Sequence[int]
) -> dict[str, jax.Array]:
    """The tables of each width for rows w [n, k] with nested codes, better than or as good as the stored ones.

    With gram [c, k, k] rows are in c chunks. What overflows the tables' dtype is for the caller to refuse.
    """

    def one(gram: jax.Array, w: jax.Array, codes: jax.Array, table: jax.Array) -> jax.Array:
        gram = gram / gram.diagonal().mean()
        found = best_table(gram, w, codes, table.astype(jnp.float32))
        stored = found.astype(table.dtype)
        return jnp.where(jnp.isfinite(stored), better(gram, w, (codes, table), (codes, found))[1], stored)

    rows, codes = w.astype(jnp.float32), codes_of(fields["planes"], top := max(widths), w.shape[1])
    tables = {f"table{b}": codes >> (top - b) for b in widths}
    return {name: by_chunk(one, gram, rows, own, fields[name]) for name, own in tables.items()}


def codes_of(planes: jax.Array, bits: int, k: int) -> jax.Array:
    """Codes uint8 [n, k] from stored planes [bits, n, 1, j], the most significant first."""
    each = jnp.unpackbits(planes[:, :, 0], axis=-1, count=k, bitorder="little")
    return sum((each[p] << (bits - 1 - p) for p in range(bits)), jnp.zeros_like(each[0]))


def planes_of(codes: jax.Array, bits: int) -> jax.Array:
    """The inverse of `codes_of`."""
    each = [(codes >> p) & jnp.uint8(1) for p in reversed(range(bits))]
    return jnp.packbits(jnp.stack(each), axis=-1, bitorder="little")[:, :, None]
