"""The schedule `mma` in 8-bit integers: codes become WGMMA's operand A as integers, x in one or two columns is B.

Sums within a group, or a stage of it, are exact in 32 bits, and are added up in float32, each times the factor of its
group. Where tables are those of whole rows, as they are stored, sums over a whole part of k are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.ir.build import param
from lowbit.ir.dtypes import short
from lowbit.kernels.arrange import Fields
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.int8_lanes import Integers
from lowbit.kernels.layout import WARPGROUPS, Layout
from lowbit.kernels.memory import fetched
from lowbit.kernels.mma import AXES, BYTES, Schedule, Shape, Tuning, deepest, launch, pipelined, send
from lowbit.kernels.product import around, padded_rows
from lowbit.kernels.verbs import Gpu, Verbs
from lowbit.passes.int8_rows import rows
from lowbit.passes.lower_xla import emit
from lowbit.passes.scalar import Element, Number


def tuning(shape: Shape, program: Integers) -> Tuning:
    """As `lowbit.kernels.mma.tuning`."""
    rest = fetched(program.halves, parameters=not program.halves.of_rows)
    return deepest(shape, lambda columns: columns * STAGE + rest)


def nearby(of: Layout, m: int, at: int) -> tuple[Tuning, ...]:
    """Schedules that differ in one parameter, by one step, from that of a product of x i8 [m, k]."""
    shape = Shape(padded_rows(m), of.tiles, of.stages)
    return around(tuning(shape, of.integers(at)), shape)


def int8(program: Integers, shape: Shape, tuned: Tuning, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The product as a function (*words, *parameters, x) -> f32 [parts, n, m], as `lowbit.kernels.mma.mma` has them,
    but x i8 [m, k] in the program's order; and where tables come rounded, their bytes u32 [tile, 1, word, ROWS] instead
    of parameters, and sums that their factors are still to be multiplied with."""
    run = verbs or Gpu()
    return launch(partial(_body, program, Schedule(program.halves, shape, tuned, run)), shape, tuned, run)


def _body(program: Integers, parts: Schedule, *refs: Any) -> None:
    *inputs, out, staging = refs
    verbs, tuned, span = parts.verbs, parts.tuned, program.span
    words, parameters, x = parts.sorted(inputs)
    row, part, column, group = at = [lax.axis_index(axis) for axis in AXES]
    steps, tile = parts.shape.stages // tuned.parts, row * WARPGROUPS + group
    first = part * steps

    def kept() -> list[jax.Array]:
        """What is of whole rows."""
        if program.of_rows:
            return [verbs.rows(parameters[0].at[tile, 0, i], False) for i in range(program.table_words)]
        return parts.stored(parameters, tile, False) if program.halves.of_rows else []

    def compute(pipeline: Callable[..., Any]) -> None:
        zeros = verbs.zeros((ROWS, tuned.columns), jnp.int32 if program.of_rows else jnp.float32)
        total, *_ = pipeline((zeros, *kept()))
        staging[group] = total.astype(jnp.float32)
        send(staging, out, tuned, at)

    def step(_: Any, *args: Any) -> Any:
        *stage, (total, *of_rows) = args
        words, parameters, x = parts.sorted(stage)
        stored = of_rows if program.halves.of_rows else parts.stored(parameters, group, True)
        integers, factors = verbs.integers(program, [verbs.words(ref.at[group, 0]) for ref in words], *stored)
        for i, weights in enumerate(integers):
            sums = verbs.integer_product(weights, x.at[:, pl.ds(i * span, span)])
            total = total + (verbs.times_rows(factors[i], sums) if factors else sums)
        verbs.release()
        return total, *of_rows

    specs = parts.specs(lambda k: (row, first + k), not program.halves.of_rows)
    specs.append(plgpu.BlockSpec((tuned.columns, STAGE), lambda k: (column, first + k), transforms=BYTES))
    pipelined(step, steps, specs, tuned.depth, compute)(*words, *([] if program.halves.of_rows else parameters), x)


def product_of_integers(
    of: Layout, x: jax.Array, fields: Fields, at: int, tuned: Tuning | None = None, verbs: Verbs | None = None
) -> jax.Array:
    """x i8 [m, k] by weights as `of` lays them out, rounded as `lowbit.passes.in_int8` says: [m, n] in float32."""
    program = of.integers(at)
    padded, inputs = padded_rows(len(x)), of.stages * STAGE
    shape = Shape(padded, of.tiles, of.stages)
    whole = jnp.pad(x, ((0, padded - len(x)), (0, inputs - of.k)))
    words, parameters, factors = [fields[name] for name in of.words_read(at)], [], None
    if program.of_rows:
        bytes_, factors = _rounded(of, program, fields)
        parameters = [bytes_]
    else:
        parameters = [fields[name] for name in of.read(at)[len(words) :]]
    run = int8(program, shape, tuned or tuning(shape, program), verbs)
    sums = run(*words, *parameters, _in_order(whole, program)).sum(0)[: of.n, : len(x)].T
    if factors is not None:
        sums = sums * factors[None, : of.n]
    return sums if program.affine is None else sums + _of_zeros(of, program, whole[: len(x)], fields)


def _in_order(x: jax.Array, program: Integers) -> jax.Array:
    blocks = x.reshape(len(x), -1, 2, 2, 4, 2)  # j1, j0, q, e
    return blocks.transpose(0, 1, *(2 + axis for axis in program.order)).reshape(x.shape)


def _rounded(of: Layout, program: Integers, fields: Fields) -> tuple[jax.Array, jax.Array]:
    """Tables of whole rows as bytes, four in a word, and their factors [row]."""
    table = jnp.stack([_values(of, e, fields)[:, 0] for e in program.halves.weights.parameters], -1)
    tiles, rows_, entries = table.shape
    codes, scales = (
        emit(e, {"table": table}) for e in rows(param("table", short(table.dtype), t=tiles, r=rows_, c=entries))
    )
    words = lax.bitcast_convert_type(codes.reshape(tiles, rows_, -1, 4), jnp.uint32)
    return jnp.moveaxis(words, -1, 1)[:, None], scales.reshape(-1)


def _of_zeros(of: Layout, program: Integers, x: jax.Array, fields: Fields) -> jax.Array:
    """What is added to the codes, times the sums of x: [m, n]."""
    assert program.affine is not None
    scale, sign, zero = program.affine
    factors = sign * _values(of, scale, fields).astype(jnp.float32)
    factors *= zero.value if isinstance(zero, Number) else _values(of, zero, fields).astype(jnp.float32)
    groups = factors.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % groups if not scale.span else groups * scale.span - x.shape[1])))
    sums = padded.reshape(len(x), groups, -1).sum(-1, dtype=jnp.int32).astype(jnp.float32)
    made = jnp.einsum("mg,tgr->mtr", sums, factors, precision=lax.Precision.HIGHEST)
    return made.reshape(len(x), -1)[:, : of.n]


def _values(of: Layout, e: Element, fields: Fields) -> jax.Array:
    """A parameter [tile, group, ROWS]."""
    return fields[e.leaf.name][:, :, of.leaves[e.leaf.name].index(e)]
