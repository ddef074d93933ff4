"""Cut a weight matrix into the groups that share scale factors, and check what the solvers are given."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.formats.planes import check_bits

T = TypeVar("T")
# Weights (or levels, if more) solved at a time, which bounds the scratch memory, and the fewest groups.
_BLOCK = 1 << 18
_FEWEST = 64


def to_groups(w: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Cuts each row of `w` into groups of `group` consecutive inputs.

    Args:
      w: `[N, K]`, one row an output; groups run along K, the input dim.
      group: weights in a group, at least 1. The last group is padded with zeros if `group` does not divide K.

    Returns:
      `values [N, G, group]` in the dtype of `w`, with `G = ceil(K / group)`, and `mask [G, group]`, true where
      `values` holds a weight and false where it holds padding. The mask is the same for every row.

    Raises:
      ValueError: `w` is not a matrix, has no inputs, or `group` is below 1.

    >>> values, mask = to_groups(jnp.ones((4, 10)), 8)
    >>> values.shape, mask.shape, int(mask.sum())
    ((4, 2, 8), (2, 8), 10)
    """
    if w.ndim != 2:
        raise ValueError(f"to_groups needs a matrix [N, K], got shape {w.shape}; reshape it first")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    rows, inputs = w.shape
    if inputs == 0:
        raise ValueError(f"to_groups needs at least one input, got w of shape {w.shape}")
    count = -(-inputs // group)
    padded = jnp.pad(w, ((0, 0), (0, count * group - inputs)))
    mask = jnp.arange(count * group) < inputs
    return padded.reshape(rows, count, group), mask.reshape(count, group)


def check_rows(values: jax.Array, bits: int, weights: jax.Array | None) -> None:
    """Raises unless `values [R, g]` is floating, `bits` is 1 to 8 and `weights` is None or `[P, g]`, P dividing R."""
    check_bits(bits)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must be [R, g], one group a row and at least one weight, got shape {values.shape}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"values must be floating point, got {values.dtype}; cast them to float32 first")
    if weights is None:
        return
    rows, size = values.shape
    if weights.ndim != 2 or weights.shape[1] != size or weights.shape[0] == 0 or rows % weights.shape[0]:
        raise ValueError(
            f"a mask or importance must be [P, {size}] with P dividing {rows}, the shape of values being "
            f"{values.shape}; got {weights.shape}"
        )


def check_rounds(rounds: int, least: int = 0) -> None:
    if type(rounds) is not int or rounds < least:
        raise ValueError(f"rounds must be an int, {least} or more, not {rounds!r}")


def in_blocks(
    solve: Callable[[jax.Array, jax.Array | None], T], values: jax.Array, weights: jax.Array | None, levels: int
) -> T:
    """`solve(values, weights)` of groups as in `check_rows`, in blocks of a few fixed sizes: it is compiled once for
    weights of every shape. Its results begin with the axis of the groups."""
    rows, size = values.shape
    block = min(max(_FEWEST, 1 << (rows - 1).bit_length()), max(1, _BLOCK // max(size, levels)))
    count = -(-rows // block)
    blocks = _blocks(values, count, block)

    def one(i: int | jax.Array) -> T:
        f = None if weights is None else weights[(i * block + jnp.arange(block)) % weights.shape[0]]
        return solve(_block(blocks, i), f)

    if isinstance(blocks, jax.core.Tracer):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], lax.map(one, jnp.arange(count)))
    return _joined([one(i) for i in range(count)], rows)


# One program each, and not one an operation: weights have many shapes, each of which is compiled for.


@partial(jax.jit, static_argnums=(1, 2))
def _blocks(values: jax.Array, count: int, block: int) -> jax.Array:
    return jnp.pad(values, ((0, count * block - len(values)), (0, 0))).reshape(count, block, -1)


@jax.jit
def _block(blocks: jax.Array, i: int | jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(blocks, i, keepdims=False)


@partial(jax.jit, static_argnums=1)
def _joined(parts: list[T], rows: int) -> T:
    return jax.tree.map(lambda *of: jnp.concatenate(of)[:rows], *parts)
