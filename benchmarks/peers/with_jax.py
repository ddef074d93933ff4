"""lowbit itself, XLA's dense products, and tokamax."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.peer import HERE, Peer
from benchmarks.peers.weights import BOOKS, GROUP, Array, Weight

CLOCK = HERE + "jax_clock"


def planes(codes: Array, bits: int, groups: int) -> Array:
    """Codes [n, k] as lowbit stores them: u8 [bits, n, groups, k / groups / 8], plane 0 the least significant."""
    packed = [np.packbits(codes >> p & 1, axis=-1, bitorder="little") for p in range(bits)]
    return np.stack(packed).reshape(bits, len(codes), groups, -1)


def lowbit_array(w: Weight) -> Any:
    """The weight as lowbit keeps it on disk."""
    import lowbit as lb

    half, groups = {"scale_dtype": "float16"}, w.k // GROUP
    if w.what in BOOKS:
        m, vec, group = BOOKS[w.what]
        made = lb.codebook(m, 8, vec=vec, group=group, **half)
        codes = w.fields["codes"].reshape(m, w.n, w.k // (group or w.k), -1)
        fields = {"codes": codes, "codebooks": w.fields["codebooks"], "scale": w.fields["scale"]}
    elif "table" in w.fields:
        made = lb.any_precision(w.bits, w.bits)
        fields = {"planes": planes(w.fields["codes"], w.bits, 1)[::-1], f"table{w.bits}": w.fields["table"]}
    elif "alpha" in w.fields:
        made = lb.bcq(w.bits, group=GROUP, **half)
        fields = {"planes": planes(w.fields["codes"], w.bits, groups), "alpha": w.fields["alpha"]}
    else:
        made = lb.uniform(w.bits, group=GROUP, **half)
        zero = np.full((w.n, groups), 1 << w.bits - 1, np.uint8)
        scale = w.fields["scale"]
        fields = {"planes": planes(w.fields["codes"], w.bits, groups), "scale": scale, "zero": zero}
    return lb.QuantArray.of(fields, lb.QuantType((("k", w.k), ("n", w.n)), "bf16", made))


def lowbit_pack(w: Weight) -> Any:
    """In the layout of the kernels."""
    from lowbit.array import laid_out

    return laid_out(lowbit_array(w))


def lowbit_product(x: Any, w: Any) -> Any:
    import lowbit as lb

    return lb.matmul(x, w)


def dense_pack(w: Weight, dtype: str) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(w.fields["dense"], dtype)


def dense_product(x: Any, w: Any) -> Any:
    import jax.numpy as jnp

    return jnp.einsum("mk,nk->mn", x, w)


def fp8_product(x: Any, w: Any) -> Any:
    """Rows of x are rounded to e4m3 under a scale of their own: the dot is that of XLA in 8 bits."""
    import jax.numpy as jnp

    scale = jnp.max(jnp.abs(x), axis=1, keepdims=True).astype(jnp.float32) / 448
    rounded = (x / scale).astype(jnp.float8_e4m3fn)
    y = jnp.einsum("mk,nk->mn", rounded, w, preferred_element_type=jnp.float32)
    return (y * scale).astype(x.dtype)


def tokamax_pack(w: Weight) -> Any:
    """Signed codes [1, n, k], the order in memory that its kernel wants, and scales [1, groups, n]."""
    import jax.numpy as jnp

    codes = w.fields["codes"].astype(np.int8) - 8
    return jnp.asarray(codes[None]).astype(jnp.int4), jnp.asarray(w.fields["scale"].T[None], jnp.bfloat16)


def tokamax_product(x: Any, w: Any) -> Any:
    """Its grouped product, which is the one with int4 weights, of one group; by its Mosaic GPU kernel or not at all."""
    import jax.numpy as jnp
    import qwix
    import tokamax

    codes, scale = w
    weight = qwix.QArray(codes.swapaxes(1, 2), scale, qtype=jnp.int4)
    return tokamax.ragged_dot(x, weight, jnp.array([len(x)], jnp.int32), implementation="mosaic")


FORMATS = ("uniform4", "uniform3", "uniform2", "bcq4", "bcq3", "bcq2", "any_precision4", "any_precision3", *BOOKS)
DENSE = ("bfloat16", "float16")
PEERS = [
    *(Peer(f"lowbit {w}", w, "float16", "lowbit", lowbit_pack, lowbit_product, CLOCK) for w in FORMATS),
    Peer("lowbit uniform4 bf16", "uniform4", "bfloat16", "lowbit", lowbit_pack, lowbit_product, CLOCK),
    *(Peer(f"XLA {d}", "dense", d, "jax", partial(dense_pack, dtype=d), dense_product, CLOCK) for d in DENSE),
    # The matrix unit adds e4m3 products in less than float32.
    Peer("XLA e4m3", "e4m3", "bfloat16", "jax", partial(dense_pack, dtype="float8_e4m3fn"), fp8_product, CLOCK, True),
    Peer("tokamax int4", "uniform4", "bfloat16", "tokamax", tokamax_pack, tokamax_product, CLOCK),
]
