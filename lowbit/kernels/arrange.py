"""Stored arrays into the kernels' layout and back, in jnp, some tiles of rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.ir.dtypes import numpy_dtype
from lowbit.kernels.decoders import ROWS, STAGE, Decoder
from lowbit.kernels.lanes import LANES, at_once
from lowbit.kernels.layout import Layout
from lowbit.passes.pointwise import code_width
from lowbit.passes.relayout import bit_positions

Fields = Mapping[str, jax.Array]
AT_ONCE = 4
"""Tiles of rows that are taken apart at a time: what bounds the memory beside the arrays."""


def arrange(to: Layout, fields: Fields) -> dict[str, jax.Array]:
    """A format's own fields in the kernels' layout. Differentiable in the parameters."""
    if to.as_stored:
        rows, inputs = to.tiles * ROWS, to.stages * STAGE
        whole = {name: jnp.pad(fields[name], ((0, rows - to.n), (0, inputs - to.k))) for name in to.words}
        return {name: a.reshape(to.tiles, ROWS, inputs) for name, a in whole.items()}
    out = {name: _tiled(to, name, fields[name]) for name in to.leaves}
    stored = {name: _rows_first(to, name, fields[name]) for name in to.code_bits}
    padded = [jnp.pad(a, ((0, to.tiles * ROWS - to.n), (0, 0))) for a in stored.values()]
    tiles = [a.reshape(to.tiles, ROWS, -1) for a in padded]
    words = jax.lax.map(lambda rows: _words(to, dict(zip(stored, rows, strict=True))), tiles, batch_size=AT_ONCE)
    return out | words | {name: fields[name] for name in to.books}


def restore(of: Layout, fields: Fields) -> dict[str, jax.Array]:
    """The inverse: fields in the kernels' layout as the format stores them. Differentiable in the parameters.

    Tiles beyond the rows of `of` may be missing.
    """
    if of.as_stored:
        return {name: fields[name].reshape(-1, of.stages * STAGE)[: of.n, : of.k] for name in of.words}
    out = {name: _untiled(of, name, fields[name]) for name in of.leaves}
    codes = jax.lax.map(partial(_entries, of), {name: fields[name] for name in of.words}, batch_size=AT_ONCE)
    for name, rows in codes.items():
        out[name] = _in_place(of, name, rows.reshape(len(rows) * ROWS, -1)[: of.n])
    return out | {name: fields[name] for name in of.books}


def _element(of: Layout, name: str) -> Any:
    return next(e for e in (*of.codes, *sum(of.leaves.values(), ())) if e.leaf.name == name)


def _rows_first(of: Layout, name: str, a: jax.Array) -> jax.Array:
    """[n, entries of a row]."""
    return jnp.moveaxis(a, of.place(_element(of, name)).axis, 0).reshape(of.n, -1)


def _in_place(of: Layout, name: str, rows: jax.Array) -> jax.Array:
    """The inverse of `_rows_first`."""
    e = _element(of, name)
    axis, sizes = of.place(e).axis, list(e.leaf.dims.values())
    return jnp.moveaxis(rows.reshape(of.n, *sizes[:axis], *sizes[axis + 1 :]), 0, axis)


def _tiled(to: Layout, name: str, a: jax.Array) -> jax.Array:
    """A parameter leaf as [tile, group, element, ROWS]."""
    elements = to.leaves[name]
    groups = to.groups(elements[0])
    starts = np.arange(groups) * elements[0].span
    columns = np.stack([to.place(e).column[np.minimum(starts, to.k - 1)] for e in elements], 1)
    rows = _rows_first(to, name, a)[:, columns.reshape(-1)].reshape(to.n, groups, len(elements))
    rows = jnp.where((starts < to.k)[None, :, None], rows, jnp.zeros((), rows.dtype))
    padded = jnp.pad(rows, ((0, to.tiles * ROWS - to.n), (0, 0), (0, 0)))
    return padded.reshape(to.tiles, ROWS, groups, -1).transpose(0, 2, 3, 1)


def _untiled(of: Layout, name: str, a: jax.Array) -> jax.Array:
    rows = a.transpose(0, 3, 1, 2).reshape(len(a) * ROWS, -1)[: of.n]
    return _in_place(of, name, rows[:, of.homes[name]])


def _words(to: Layout, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A tile of rows' arrays of words [stage, word, lane] from the code leaves' rows [ROWS, entries]."""
    holds = jnp.uint8 if to.bits <= 8 else jnp.uint32
    codes, below = jnp.zeros((ROWS, len(to.starts)), holds), 0
    for e in to.codes:
        place, width = to.place(e), code_width(e)
        shift = place.shift[None, to.starts].astype(rows[e.leaf.name].dtype)
        field = rows[e.leaf.name][:, place.column[to.starts]] >> shift
        codes |= (field & ((1 << width) - 1)).astype(holds) << below
        below += width
    stored = codes if to.decoder.meaning is None else jnp.asarray(_stored_as(to.decoder.meaning))[codes]
    in_tile = to.decoder.columns // to.decoder.grain
    ragged = -len(to.starts) % (to.stages * STAGE // to.decoder.grain)
    tiles = jnp.pad(stored, ((0, 0), (0, ragged))).reshape(ROWS, -1, in_tile).swapaxes(0, 1)
    code, bit = _sources(to.decoder)
    bits = tiles.reshape(-1, ROWS * in_tile)[:, code] >> bit[None].astype(holds) & 1
    words = _joined(bits.reshape(to.stages, -1, len(code) // (32 * LANES), LANES, 32), jnp.uint32)
    out, below = {}, 0
    for name, count in _counts(to).items():
        own = words[:, :, below : below + count].reshape(to.stages, -1, LANES)
        by_vector = own.reshape(to.stages, -1, at_once(own.shape[1]), LANES)
        out[name] = by_vector.swapaxes(2, 3).reshape(own.shape)
        below += count
    return out


def _counts(of: Layout) -> dict[str, int]:
    """Words that a lane has of each array for one of the decoder's tiles."""
    tiles = STAGE // of.decoder.columns
    return {name: of.fields[name].dims["w"] // tiles for name in of.words}


def _entries(of: Layout, words: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `_words`."""
    by_lane = []
    for name, count in _counts(of).items():
        own = words[name].reshape(of.stages, -1, LANES, at_once(words[name].shape[1])).swapaxes(2, 3)
        by_lane.append(own.reshape(-1, count * LANES))
    by_tile = jnp.concatenate(by_lane, 1)
    at, holds = bit_positions(of.decoder.codes(), of.decoder.bits), np.uint8 if of.bits <= 8 else np.uint32
    bits = by_tile[:, at // 32] >> (at % 32)[None].astype(np.uint32) & 1
    codes = _joined(bits, holds).swapaxes(0, 1).reshape(ROWS, -1)[:, : len(of.starts)]
    if of.decoder.meaning is not None:
        codes = jnp.asarray(np.array(of.decoder.meaning, np.uint8))[codes]
    out = {}
    for name, source in of.code_bits.items():
        bits = codes[:, source // of.bits] >> (source % of.bits)[None].astype(holds) & 1
        dtype = numpy_dtype(_element(of, name).leaf.dtype)
        out[name] = _joined(jnp.where((source >= 0)[None], bits, 0), dtype)
    return out


def _joined(bits: jax.Array, dtype: Any) -> jax.Array:
    """Words of the bits along the last axis, least significant first."""
    at = jnp.arange(bits.shape[-1], dtype=dtype).reshape((1,) * (bits.ndim - 1) + (-1,))
    return (bits.astype(dtype) << at).sum(-1, dtype=dtype)


@lru_cache(maxsize=64)
def _by_term(codes: Any, width: int) -> tuple[Any, Any]:
    at = bit_positions(codes, width)
    order = np.argsort(at.reshape(-1))
    return order // width, (order % width).astype(np.uint8)


def _sources(decoder: Decoder) -> tuple[Any, Any]:
    """For each bit of a tile's words: of which code it is, and which bit of it."""
    return _by_term(decoder.codes(), decoder.bits)


def _stored_as(meaning: Sequence[int]) -> Any:
    """What a code is stored as: the inverse of the decoder's meaning."""
    return np.argsort(meaning).astype(np.uint8)
