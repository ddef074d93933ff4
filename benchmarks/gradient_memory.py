"""Scale gradients: temporary memory and time, beside the dense weight's gradient and ordinary autodiff.

python -m benchmarks.gradient_memory --json out.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

import lowbit as lb
from benchmarks.harness import Row, interleaved, main, row
from lowbit.array import QuantArray

K = N = 4096
BATCH = 64


def gradient(product: Callable[[jax.Array, QuantArray], jax.Array]) -> Callable[..., jax.Array]:
    """The gradient in alpha of sum(product(x, w) * dy): what a backward pass computes for one layer."""

    def compute(x: jax.Array, w: QuantArray, dy: jax.Array) -> jax.Array:
        def loss(alpha: jax.Array) -> jax.Array:
            return (product(x, QuantArray({**w.fields, "alpha": alpha}, w.type)) * dy).sum()

        return jax.grad(loss)(w.fields["alpha"])

    return compute


def measure() -> Iterator[Row]:
    x, dy = (jax.random.normal(jax.random.key(i), (BATCH, size)) for i, size in enumerate((K, N)))
    w = lb.quantize_array(jax.random.normal(jax.random.key(2), (K, N)), lb.bcq(3, group=128), lb.greedy())
    arguments: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "dense x.T @ dy": (lambda x, dy: x.T @ dy, (x, dy)),
        "dense dy.T @ x": (lambda x, dy: dy.T @ x, (x, dy)),
        "scale_gradient": (gradient(lb.matmul), (x, w, dy)),
        "autodiff_scale_gradient": (gradient(lambda x, w: x @ lb.dequantize(w)), (x, w, dy)),
    }
    compiled = {name: jax.jit(f).lower(*args).compile() for name, (f, args) in arguments.items()}
    times = interleaved({name: partial(compiled[name], *args) for name, (_, args) in arguments.items()})
    dense = min(times["dense x.T @ dy"], times["dense dy.T @ x"])
    for name in ("scale_gradient", "autodiff_scale_gradient"):
        temp: int = compiled[name].memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
        yield row(f"{name}_temp", temp, "bytes", "the dense float32 weight", K * N * 4)
        yield row(f"{name}_time", 1e3 * times[name], "ms", "the dense weight's gradient", 1e3 * dense)


if __name__ == "__main__":
    main(f"Gradient of 3-bit scales, {K}x{N}, batch {BATCH}", lambda: list(measure()))
