"""How long programs take on a GPU.

The clock is CUPTI, NVIDIA's profiling interface, through `jax.experimental.mosaic.gpu.profiler.measure` (the same in
jax 0.10 to 0.12): the sum of the kernels' own durations, which a slow host cannot lengthen. A program multiplies by so
many different weights, in turn, that none is still in the L2 cache when its turn comes again. The host's clock around
the same program is kept beside it; where CUPTI does not work it is all there is, and results say so.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from benchmarks.cold import ROUNDS, middle
from benchmarks.gpu_results import Row


def profiled() -> bool:
    """Whether CUPTI counts kernels here; says why not."""
    x = jnp.ones((1024, 1024))
    try:
        _, found = profiler.measure(jax.jit(lambda x: x * 2), aggregate=False)(x)
    except Exception as err:
        print(f"CUPTI does not work here, so times are the host's, launches included: {err}", flush=True)
        return False
    if not found:
        print("CUPTI sees no kernels here, so times are the host's, launches included", flush=True)
    return bool(found)


def timed(program: Callable[..., Any], args: Sequence[Any], products: int, cupti: bool) -> tuple[Any, Row]:
    """The results of `program(*args)` and seconds for one of its `products`: median, spread, by kernel, by the host;
    and the bytes of memory that it takes beside its arguments and results."""
    compiled = jax.jit(program).lower(*args).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
    out = jax.block_until_ready(compiled(*args))
    host = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        host.append((time.perf_counter() - start) / products)
    wall = middle(host)
    beside = {"wall": wall["seconds"], "temporary": temporary}
    if not cupti:
        return out, {**wall, "clock": "host", **beside}
    kernels: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        _, found = profiler.measure(compiled, aggregate=False)(*args)
        kernels.append(by_name(found or [], products))
    times = middle([sum(k.values()) for k in kernels])
    return out, {**times, "clock": "CUPTI", **beside, "kernels": kernels[0]}


def by_name(found: Sequence[tuple[str, float]], products: int) -> dict[str, float]:
    """Seconds a product of each kernel, from milliseconds of every launch."""
    out: dict[str, float] = defaultdict(float)
    for name, milliseconds in found:
        out[name] += milliseconds / 1e3 / products
    return dict(out)
