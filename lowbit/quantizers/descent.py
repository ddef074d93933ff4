"""Codes and tables of rows in turns, each step the best for what is held: LNQ of GuidedQuant (Kim et al., ICML 2025).

With D = q - w the error of a row [k] and H = E[x x^T], which may be weighed by what errors of the outputs cost, the
objective is D H D^T, row by row. For codes that are held the best table is that of `best_table`; with all held but the
code of input i, the best one is that of the entry nearest to q_i - (H D)_i / H_ii. Neither step raises the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.formats.format import Format
from lowbit.quantizers.chunks import by_chunk
from lowbit.quantizers.groups import check_rounds
from lowbit.quantizers.nested import by_moments
from lowbit.quantizers.quantizer import Fields, expect_format
from lowbit.quantizers.tables import best_table, better, codes_of, planes_of

BLOCK = 128
"""Inputs whose H D is kept up to date while they change."""


@dataclass(frozen=True)
class Lnq:
    """Tables by least squares and codes by coordinate descent, in turns. Make one with `lb.lnq`."""

    rounds: int = 2
    cycles: int = 4
    weighs_by: tuple[str, ...] = field(default=("gram",), repr=False)
    takes_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        check_rounds(self.cycles, 1)

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; `importance` [k, k] or, for chunks of the outputs, [c, k, k]; else the identity."""
        expect_format(fmt, "any_precision", self)
        b, rows = fmt["hi"], w.astype(jnp.float32)
        if fmt["lo"] != b:
            raise ValueError(f"{self} finds codes for one width, not for {fmt}: lb.nested_kmeans nests them")
        gram, start = by_moments(w, fmt, importance)
        solve = partial(_solve, self.rounds, self.cycles)
        codes, table = by_chunk(solve, gram, rows, codes_of(start["planes"], b, w.shape[1]), start[f"table{b}"])
        return {"planes": planes_of(codes, b), f"table{b}": table}


def lnq(rounds: int = 2, cycles: int = 4, weighs_by: tuple[str, ...] = ("gram",)) -> Lnq:
    """LNQ for `any_precision(b, b)`, a table of 2**b values for each row: the error of the layer's output is small.

    It starts with the k-means of `lb.nested_kmeans`, weighed by second moments. Then come `rounds` times the best
    tables and `cycles` passes of coordinate descent over the codes, and the best tables once more; a row whose error a
    round does not lower stays as it is, and so does one that rounding to `table_dtype` makes worse than k-means.
    1e-4 of the mean second moment is added to each input's, and more, with a logged warning, to a matrix that is not
    positive definite then: ten times as much at a time, as published. Least squares have a ridge of 1e-7.

    Args:
      rounds, cycles: T and K of the publication, which has 2 and 4.
      weighs_by: ("gram",), the mean products of each two inputs, or ("guided_gram",), the same weighed by what errors
        of the outputs cost the loss, as GuidedQuant has it. `lb.calibrate(..., rules=)` measures what is named.

    The importance that `lb.quantize_array` hands on is that matrix [k, k], or one for each chunk of the outputs
    [c, k, k]; without it the error is that of the weight.

    >>> import jax, lowbit as lb
    >>> x = jax.random.normal(jax.random.key(0), (256, 8)) @ jax.random.normal(jax.random.key(1), (8, 32))
    >>> w, fmt = jax.random.normal(jax.random.key(2), (32, 64)), lb.any_precision(2, 2)
    >>> plain = lb.quantize_array(w, fmt)
    >>> for_these = lb.quantize_array(w, fmt, lb.lnq(), importance=x.T @ x / 256)
    >>> bool((x @ (lb.dequantize(for_these) - w)).std() < 0.5 * (x @ (lb.dequantize(plain) - w)).std())
    True
    """
    return Lnq(rounds, cycles, weighs_by)


@jax.jit
def _solve(
    rounds: int, cycles: int, gram: jax.Array, w: jax.Array, codes: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Codes [n, k] and tables [n, c], as stored, from those to start with. No row is worse than at the start."""
    gram = gram / gram.diagonal().mean()

    def turn(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, table = state
        found = lax.fori_loop(0, cycles, lambda _, c: descend(gram, w, c, table), codes)
        return better(gram, w, state, (found, best_table(gram, w, found, table)))

    fitted = best_table(gram, w, codes, table.astype(jnp.float32))
    return better(gram, w, (codes, table), lax.fori_loop(0, rounds, turn, (codes, fitted)))


@jax.jit
def descend(gram: jax.Array, w: jax.Array, codes: jax.Array, table: jax.Array) -> jax.Array:
    """One pass over the inputs in order, each taking the code that is best while all others stay."""
    k = w.shape[1]
    more = -k % BLOCK
    padded = jnp.pad(gram, (0, more)) + jnp.diag(jnp.pad(jnp.zeros(k), (0, more), constant_values=1.0))
    levels = table.T

    def block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, error = state
        across = lax.dynamic_slice_in_dim(padded, b * BLOCK, BLOCK)
        within = lax.dynamic_slice_in_dim(across, b * BLOCK, BLOCK, 1)
        own, d = (lax.dynamic_slice_in_dim(a, b * BLOCK, BLOCK) for a in (codes, error))
        own, d = _visit(within, levels, own, d, _times(across, error))
        return tuple(lax.dynamic_update_slice_in_dim(a, v, b * BLOCK, 0) for a, v in ((codes, own), (error, d)))  # type: ignore[return-value]

    decoded = jnp.take_along_axis(table, codes.astype(jnp.int32), 1)
    start = tuple(jnp.pad(a.T, ((0, more), (0, 0))) for a in (codes, decoded - w))
    found, _ = lax.fori_loop(0, (k + more) // BLOCK, block, start)
    return found[:k].T


def _visit(
    gram: jax.Array, levels: jax.Array, codes: jax.Array, error: jax.Array, product: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Codes and errors [BLOCK, n] of a block after its visit, `product` being its H D, `levels` [c, n] the tables."""

    def one(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes, error, product = state
        now = jnp.take_along_axis(levels, codes[i][None].astype(jnp.int32), 0)[0]
        wanted = now - product[i] / gram[i, i]
        new = jnp.abs(levels - wanted[None]).argmin(0)
        change = jnp.take_along_axis(levels, new[None], 0)[0] - now
        product = product + gram[i][:, None] * change[None]
        return codes.at[i].set(new.astype(codes.dtype)), error.at[i].add(change), product

    codes, error, _ = lax.fori_loop(0, len(codes), one, (codes, error, product))
    return codes, error


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
