"""Products of jax, and how long they take: the clock of `gpu_timing`, CUPTI where it works."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_timing
from benchmarks.cold import copies
from benchmarks.peers.peer import Peer
from benchmarks.peers.weights import Array

_profiled = cache(gpu_timing.profiled)


def run(peer: Peer, x: Array, packed: Any) -> Array:
    return np.asarray(_product(peer.product)(jnp.asarray(x, peer.dtype), packed), np.float32)


_product = cache(jax.jit)


def nbytes(packed: Any) -> int:
    """Those in memory: int4 counts half a byte on a GPU."""
    bits = {"int4": 4, "uint4": 4}
    return sum(a.size * bits.get(a.dtype.name, 8 * a.dtype.itemsize) // 8 for a in jax.tree.leaves(packed))


def rotation(packed: Any) -> list[Any]:
    return [packed, *(jax.tree.map(jnp.copy, packed) for _ in range(copies(nbytes(packed)) - 1))]


def timed(peer: Peer, x: Array, rotated: list[Any]) -> dict[str, Any]:
    program = partial(_products, peer.product)
    _, row = gpu_timing.timed(program, (jnp.asarray(x, peer.dtype), rotated), len(rotated), _profiled())
    return row


def _products(product: Any, x: jax.Array, rotated: list[Any]) -> list[jax.Array]:
    return [product(x, packed) for packed in rotated]


def versions() -> dict[str, str]:
    return {"jax": jax.__version__}
