"""x @ w by the schedules `mma`, `fp8` and `sums`, for weights in the kernels' layout: padding, the launch, and the
parts of k summed."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp

from lowbit.devices import Variant
from lowbit.ir.dtypes import short
from lowbit.kernels import ampere, mma
from lowbit.kernels.alu import HALVES, Half
from lowbit.kernels.arrange import Fields
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import STAGE
from lowbit.kernels.fp8 import fp8
from lowbit.kernels.fp8 import tuning as fp8_tuning
from lowbit.kernels.lanes import Program
from lowbit.kernels.layout import Layout
from lowbit.kernels.mma import MOST_DEEP, Shape, Tuning
from lowbit.kernels.partial import Sums
from lowbit.kernels.sums import sums
from lowbit.kernels.verbs import Verbs

SCHEDULES: dict[Variant, Any] = {"hopper": mma, "ampere": ampere}
"""By variant: modules with `mma`, its `tuning` and COLUMNS_A_BLOCK."""


def product(
    of: Layout, x: jax.Array, fields: Fields, tuned: Tuning | None = None, verbs: Verbs | None = None, at: int = 0,
    variant: Variant = "hopper",
) -> jax.Array:  # fmt: skip
    """x [m, k] in float16 or bfloat16 by weights as `of` lays them out: [m, n], accumulated in float32, in x's dtype.

    Args:
      tuned: parameters of the schedule, those of `tuning` if None.
      verbs: what it runs on, the GPU if None.
      at: which of its widths the weights are read at.
      variant: of the schedule.
    """
    schedule = SCHEDULES[variant]
    m = x.shape[0]
    kind = short(x.dtype)
    if kind not in ("f16", "bf16"):
        raise TypeError(f"x is {x.dtype}: the matrix unit multiplies float16 and bfloat16")
    padded = padded_rows(m, schedule.COLUMNS_A_BLOCK)
    program, shape = of.program(kind, at), Shape(padded, of.tiles, of.stages)
    run = schedule.mma(program, shape, tuned or schedule.tuning(shape, program), verbs)
    x_padded = jnp.pad(x, ((0, padded - m), (0, of.stages * STAGE - of.k)))
    parts = run(*operands(of, program, fields, at), in_order(x_padded, program.decoder.consecutive))
    return parts.sum(0)[: of.n, :m].T.astype(x.dtype)


def operands(of: Layout, program: Program, fields: Fields, at: int) -> list[jax.Array]:
    """Words, parameters and, where all rows share some, tables."""
    stored = [fields[name] for name in of.read(at) if name not in of.books]
    decoder = program.decoder
    return [*stored, shared_tables(program, decoder, fields)] if isinstance(decoder, Books) else stored


def product_of_codes(
    of: Layout, x: jax.Array, fields: Fields, at: int, tuned: Tuning | None = None, verbs: Verbs | None = None
) -> jax.Array:
    """x [m, k] in e4m3 by weights that are stored as e4m3 but for a factor: [m, n] in float32."""
    if (factor := of.weights[at].float8) is None:
        raise TypeError("the weights are not stored as e4m3")
    padded, inputs = padded_rows(len(x)), of.stages * STAGE
    shape = Shape(padded, of.tiles, of.stages)
    (name,) = of.read(at)
    w = jax.lax.bitcast_convert_type(fields[name], jnp.float8_e4m3fn)
    parts = fp8(shape, tuned or fp8_tuning(shape), verbs)(w, jnp.pad(x, ((0, padded - len(x)), (0, inputs - of.k))))
    return parts.sum(0)[: of.n, : len(x)].T * factor


def product_by_sums(
    of: Layout, x: jax.Array, fields: Fields, bands: int | None = None, verbs: Verbs | None = None
) -> jax.Array:
    """x [m, k], of at most 4 rows, by weights that are looked up among partial sums: [m, n] in x's dtype, accumulated
    in float32, which weights and sums are in too.

    Args:
      bands: of rows, those of `Sums.bands` if None.
      verbs: what it runs on, the GPU if None.

    Raises UnsuitableError for weights, or rows, that they do not suit.
    """
    m, how = len(x), Sums.of(of.program("f16"), len(x))
    run = sums(of, how, bands or how.bands(of), verbs)
    parts = run(*operands_of_sums(of, how, x, fields))
    return parts.sum(0).swapaxes(0, 1).reshape(how.columns, -1)[:m, : of.n].astype(x.dtype)


def operands_of_sums(of: Layout, how: Sums, x: jax.Array, fields: Fields) -> list[jax.Array]:
    """What the schedule takes: words, scales, codebooks and x."""
    padded = jnp.pad(x.astype(jnp.float32), ((0, how.columns - len(x)), (0, of.stages * STAGE - of.k)))
    stored = [fields[name] for name in of.read() if name not in of.books]
    if isinstance(decoder := how.program.decoder, Books):
        return [*stored, jnp.stack(vectors(decoder, fields, jnp.float32)), padded]
    return [*stored, in_order(padded, how.source.grain)]  # a lane has every fourth pair of inputs


def nearby(of: Layout, m: int, kind: Half | None, at: int = 0, variant: Variant = "hopper") -> tuple[Tuning, ...]:
    """Schedules that differ in one parameter, by one step, from that of a product: of x [m, k] in the halves `kind`,
    or in e4m3 for None."""
    schedule = SCHEDULES[variant]
    shape = Shape(padded_rows(m, schedule.COLUMNS_A_BLOCK), of.tiles, of.stages)
    own = fp8_tuning(shape) if kind is None else schedule.tuning(shape, of.program(kind, at))
    return around(own, shape, schedule.COLUMNS_A_BLOCK)


def around(own: Tuning, shape: Shape, most: int = mma.COLUMNS_A_BLOCK) -> tuple[Tuning, ...]:
    """Schedules that differ in one parameter, by one step, with at most so many columns."""
    columns = [c for c in range(8, most + 1, 8) if shape.m % c == 0]
    parts = [p for p in range(1, shape.stages + 1) if shape.stages % p == 0]
    depths = [2**i for i in range(1, MOST_DEEP.bit_length())]
    found = [replace(own, columns=c) for c in _beside(own.columns, columns)]
    found += [replace(own, parts=p) for p in _beside(own.parts, parts)]
    found += [replace(own, depth=d) for d in _beside(own.depth, depths)]
    return tuple(f for f in found if f.depth <= max(2, shape.stages // f.parts))


def _beside(value: int, values: list[int]) -> list[int]:
    """The value before, and the one after."""
    i = values.index(value)
    return values[max(0, i - 1) : i] + values[i + 1 : i + 2]


def padded_rows(m: int, most: int = mma.COLUMNS_A_BLOCK) -> int:
    """Rows of x as blocks take them, each so many at most."""
    return 8 * ceil(m / 8) if m <= most else most * ceil(m / most)


def in_order(x: jax.Array, consecutive: int) -> jax.Array:
    """x with its inputs where WGMMA reads them, if a lane has more than two that follow each other; and the inverse for
    as many pairs as a row has lanes."""
    blocks = x.reshape(len(x), -1, 4, consecutive // 2, 2)  # quarter of a warp's row, pair, input
    return blocks.swapaxes(2, 3).reshape(x.shape)


def shared_tables(program: Program, decoder: Books, fields: Fields) -> jax.Array:
    """Tables of all rows as they are copied to shared memory, from what is stored."""
    each = vectors(decoder, fields, HALVES[program.kind])
    return jnp.broadcast_to(jnp.stack(each)[:, :, None], decoder.shape).reshape(program.table_shape)


def vectors(decoder: Books, fields: Fields, dtype: Any) -> list[jax.Array]:
    """The vectors [entry, input] of each look-up."""
    each = []
    for lookup in decoder.lookups:
        at = [int(w.values[0, 0]) for w in lookup.at]
        kept = {lookup.axis, len(at) - 1}
        entries = fields[lookup.table.name][tuple(slice(None) if i in kept else p for i, p in enumerate(at))]
        ragged = decoder.shape[1] - len(entries)
        each.append(jnp.pad(entries.astype(dtype), ((0, ragged), (0, 0))))
    return each
