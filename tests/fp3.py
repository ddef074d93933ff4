"""A format that lowbit does not have, written as a user would: a signed float of 3 bits, and a scale for each row."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lowbit as lb
from lowbit.formats.planes import pack_planes
from lowbit.ir import Expr, Gather, Unpack, const, contract, merge, param, slice_


@lb.register_format("fp3_rows")
def fp3_rows(n: int, k: int) -> Expr:
    """A sign and two bits of exponent: 0, 1, 2, 4 and their negatives, stored as three planes."""
    bits = Unpack(param("planes", "u8", p=3, n=n, j=-(-k // 8)), 1, "v", 8)
    code = contract((bits, const([1, 2, 4], "i32", "p")), ("p",))
    value = Gather(const(VALUES, "f32", "c"), code, "c") * param("scale", "f32", n=n)
    return slice_(merge(value, "j", "v", into="k"), "k", 0, k)


VALUES = [0, 1, 2, 4, 0, -1, -2, -4]


@partial(jax.jit, static_argnums=1)
def nearest(w: jax.Array, fmt: lb.Format) -> dict[str, jax.Array]:
    """The nearest value of each weight, the largest of a row at 4."""
    largest = jnp.abs(w).max(1)
    scale = jnp.where(largest > 0, largest / 4, 1.0)
    error = w[..., None] / scale[:, None, None] - jnp.array(VALUES).reshape(1, 1, 8)
    planes = jnp.abs(error).argmin(-1)[None] >> jnp.arange(3).reshape(3, 1, 1) & 1
    return {"planes": pack_planes(planes[:, :, None])[:, :, 0], "scale": scale}  # one group a row


def model() -> tuple[nnx.Module, jax.Array]:
    """Two layers of it."""
    dense = nnx.Sequential(nnx.Linear(13, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    return lb.quantize(dense, [lb.Rule("**", fp3_rows(), nearest)]), jnp.ones((2, 13))
