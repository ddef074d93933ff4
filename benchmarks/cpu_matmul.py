"""Time of x @ w in few bits beside dense float32: `python -m benchmarks.cpu_matmul --json out.json`.

With `lowbit[bench]` installed, beside the integer formats of qwix too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

import lowbit as lb
from benchmarks.harness import Row, interleaved, main, row

SHAPES = ((4096, 4096), (4096, 14336))
BATCHES = (1, 4, 16, 64, 256)
FORMATS = {
    "bcq2_g128": lb.bcq(2, group=128),
    "bcq3_g128": lb.bcq(3, group=128),
    "bcq4_g128": lb.bcq(4, group=128),
    "uniform4_g128": lb.uniform(4, group=128),
}
LEARNED = {
    "codebook_m1v4_g128": lb.codebook(1, 8, vec=4, group=128),
    "codebook_m2v8_g128": lb.codebook(2, 8, vec=8, group=128),
    "codebook_m2v8": lb.codebook(2, 8, vec=8),
    "any_precision_8": lb.any_precision(3, 8),
}
"""Formats whose solvers take longer than all the products: timed on random codes and tables."""
WIDTHS = (3, 4)
"""At which the arrays of `any_precision_8` are read too."""


def weights(k: int, n: int) -> dict[str, lb.QuantArray]:
    """One random matrix in every format. Greedy codes: how good they are does not change the time."""
    w = jax.random.normal(jax.random.key(0), (k, n))
    out = {name: lb.quantize_array(w, fmt, lb.greedy() if fmt.name == "bcq" else None) for name, fmt in FORMATS.items()}
    dims = (("k", k), ("n", n))
    out |= {name: lb.testing.random_array(lb.QuantType(dims, "f32", fmt)) for name, fmt in LEARNED.items()}
    nested = out["any_precision_8"]
    return out | {f"any_precision_{b}_of_8": lb.QuantArray(nested.fields, nested.type.at(b)) for b in WIDTHS}


def programs(k: int, n: int, batch: int, quantized: dict[str, lb.QuantArray]) -> dict[str, Callable[[], Any]]:
    """The products to time: dense in both layouts, each format, and 3 bits decoded before an ordinary product."""
    x = jax.random.normal(jax.random.key(1), (batch, k))
    w = jax.random.normal(jax.random.key(0), (k, n))
    out: dict[str, Callable[[], Any]] = {
        "dense x @ W": partial(jax.jit(jnp.matmul), x, w),
        "dense x @ W.T": partial(jax.jit(lambda x, wt: x @ wt.T), x, w.T.copy()),
    }
    product = jax.jit(lb.matmul)
    out |= {name: partial(product, x, q) for name, q in quantized.items()}
    decoded = jax.jit(lambda x, q: x @ lb.dequantize(q))
    out["decode_then_dot_bcq3"] = partial(decoded, x, quantized["bcq3_g128"])
    return out | peers(x, w)


def peers(x: jax.Array, w: jax.Array) -> dict[str, Callable[[], Any]]:
    """The same product by qwix, if it is installed: int4 in groups of 128, int8 with a scale an output."""
    if find_spec("qwix") is None:
        return {}
    import qwix

    group = {0: min(128, w.shape[0])}
    int4 = qwix.quantize(w, "int4", channelwise_axes=(1,), tiled_axes=group)
    int8 = qwix.quantize(w, "int8", channelwise_axes=(1,))
    product = jax.jit(qwix.dot)
    return {"qwix_int4_g128": partial(product, x, int4), "qwix_int8": partial(product, x, int8)}


def measure() -> Iterator[Row]:
    for k, n in SHAPES:
        quantized = weights(k, n)
        for batch in BATCHES:
            times = interleaved(programs(k, n, batch, quantized))
            dense = min(times.pop("dense x @ W"), times.pop("dense x @ W.T"))
            size = "" if n == k else f"_{k}x{n}"
            yield row(f"dense{size}_batch{batch}", 1e3 * dense, "ms", "itself", 1e3 * dense)
            for name, seconds in times.items():
                yield row(f"{name}{size}_batch{batch}", 1e3 * seconds, "ms", "dense float32", 1e3 * dense)


if __name__ == "__main__":
    if find_spec("qwix") is None:
        print("qwix is not installed, so it is not compared: pip install 'lowbit[bench]'")
    main("x @ w on this machine's default device", lambda: list(measure()))
