"""Products with a stack of weights, each row with its own: the experts of a mixture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lowbit.array import QuantArray, expect_array
from lowbit.ops import explained, matmul


def grouped_matmul(x: jax.Array, w: QuantArray, group_sizes: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot` with a quantized stack: the first `group_sizes[0]` rows times w[0], the next times w[1], ...

    Args:
      x: floating [rows, k], sorted by expert.
      w: a stack [experts] of quantized matrices with dims k and n.
      group_sizes: integers [experts], the rows of each. Rows beyond their sum give zeros; where the sum is more than
        there are rows, the last groups have fewer.

    Returns [rows, n] in x's dtype, accumulated in float32. Gradients reach x and the scales; in forward mode too within
    `lb.ops.differentiable("jvp")`.

    With no more rows than experts, each row is multiplied by its own expert's codes, all at once. Otherwise the rows of
    each expert are cut into tiles of rows / experts, at most twice as many as experts, and one tile after the other is
    multiplied: at no time is more decoded than a product with one expert does. A symbolic number of rows, as in
    `jax.export`, is multiplied row by row.

    Raises TypeError for an x that is not floating, group sizes that are no integers, a w that is no QuantArray, or
    forward mode elsewhere, ValueError for shapes that do not fit.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.stack([jnp.eye(4), -jnp.eye(4)]), lb.uniform(4))
    >>> lb.grouped_matmul(jnp.ones((3, 4)), w, jnp.array([2, 1]))[:, 0].round().tolist()
    [1.0, 1.0, -1.0]
    """
    x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    _check(x, expect_array(w, "grouped_matmul"), group_sizes)
    (rows, k), (experts,) = x.shape, w.stack
    if rows == 0:
        return jnp.zeros((0, dict(w.type.dims)["n"]), x.dtype)
    if isinstance(rows, int):
        size, most = -(-rows // experts), min(rows, experts)
        tiles = (rows - most) // size + most  # with r rows an expert needs at most (r - 1) / size + 1 of them
    else:
        size, tiles = 1, rows
    place, expert = _tiles(group_sizes, rows, size, tiles)
    cut = jnp.zeros((tiles * size, k), x.dtype).at[place].set(x, mode="drop").reshape(tiles, size, k)
    scales = {name: v[expert] for name, v in w.fields.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def one(tile: tuple[jax.Array, jax.Array, dict[str, jax.Array]]) -> jax.Array:
        x, expert, scales = tile
        codes = {name: v[expert] for name, v in w.fields.items() if name not in scales}
        return matmul(x, QuantArray({**scales, **codes}, w.type))

    with explained():
        if size == 1 and isinstance(rows, int):
            y = jax.vmap(one)((cut, expert, scales))
        else:  # a loop whose gradient would otherwise keep the codes of every tile
            y = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (cut, expert, scales))
    return y.reshape(tiles * size, -1).at[place].get(mode="fill", fill_value=0)


def _tiles(group_sizes: jax.Array, rows: int, size: int, tiles: int) -> tuple[jax.Array, jax.Array]:
    """For each row its place among tiles * size, beyond them for a row of no group; and for each tile its expert."""
    sizes = group_sizes.astype(jnp.int32)  # or narrow ones would overflow where they are summed
    ends, counts = jnp.cumsum(sizes), -(-sizes // size)
    starts, tile_ends = ends - sizes, jnp.cumsum(counts)
    first_tile = tile_ends - counts
    row = jnp.arange(rows)
    expert = jnp.searchsorted(ends, row, side="right")
    held = jnp.minimum(expert, len(group_sizes) - 1)
    place = jnp.where(expert == held, first_tile[held] * size + row - starts[held], tiles * size)
    of_tile = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right")
    return place, jnp.minimum(of_tile, len(group_sizes) - 1)


def _check(x: jax.Array, w: QuantArray, group_sizes: Any) -> None:
    k = dict(w.type.dims)["k"]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x is {x.dtype}{list(x.shape)}; grouped_matmul takes floating activations: cast it")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(
            f"group_sizes are {group_sizes.dtype}{list(group_sizes.shape)}: give the rows of each as integers"
        )
    if len(w.stack) != 1 or not w.stack[0]:
        raise ValueError(f"w has the stack {list(w.stack)}; grouped_matmul takes a stack [experts] of {w.type}")
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x has shape {x.shape}, but w is a stack {list(w.stack)} of {w.type}: x must be [rows, {k}]")
    if group_sizes.shape != w.stack:
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, but w is a stack {list(w.stack)}: one for each")
