"""Time, memory and error of the solvers: `python benchmarks/quantize_speed.py --json out.json`.

The baseline of binary coding is the alternation as it is published: for every weight the nearest of all levels, for
every group the normal equations over all its weights. It runs on a share of the rows, and its time is scaled up.

That of nested k-means, with `lowbit[bench]` installed, is flash1dkmeans, the package of the published code. Errors are
weighed by squares of random numbers, as if they were gradients.

Additive codebooks stand beside residual k-means, which they start from, and beside what AQLM's own code once gave.

GPTQ stands beside rounding to nearest, and LNQ beside the k-means that it starts from and the time that it may take.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowbit as lb

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script has its own folder there, not the repository's root
from benchmarks.harness import Row, main, row

K = N = 4096
BITS, GROUP, ROUNDS = 3, 128, 15
LO, HI = 3, 8
SHARE = 16
"""One row in so many is given to the baseline."""
LAYER = 1024
LNQ_SECONDS = 600.0
"""At most, for a 4096 x 4096 weight at 2 bits."""
AQLM_ERROR, AQLM_SECONDS = 0.03068, 55.3
"""What the method's own code makes of `correlated_layer(1024, 4096)` on a CPU with 2 cores: `AQEngine(layer).quantize`
of github.com/Vahe1994/AQLM at commit e79a896, with torch 2.15 and the defaults of its `main.py`, but XTX in float32:
2 codebooks of 8 bits, groups of 8 inputs, learning rate 1e-4, 100 steps a round, 1 % tolerance, beam 1. The error is
the better one of seeds 0 (0.03108) and 1, the time that of seed 0."""


@partial(jax.jit, static_argnums=(1, 2))
def published(w: jax.Array, bits: int, rounds: int) -> tuple[jax.Array, jax.Array]:
    """Alternating binary coding of groups [R, g], weight by weight: scales [R, bits] and signs [R, bits, g]."""
    scales, signs, rest = [], [], w
    for _ in range(bits):
        signs.append(jnp.where(rest >= 0, 1.0, -1.0))
        scales.append(jnp.abs(rest).mean(1))
        rest = rest - scales[-1][:, None] * signs[-1]
    patterns = ((jnp.arange(2**bits)[:, None] >> jnp.arange(bits)[None]) & 1) * 2.0 - 1.0

    def step(_: int, b: jax.Array) -> jax.Array:
        alpha = solve(b)
        levels = alpha @ patterns.T
        nearest = jnp.abs(w[:, :, None] - levels[:, None, :]).argmin(-1)
        return jnp.take(patterns, nearest, axis=0).swapaxes(1, 2)

    def solve(b: jax.Array) -> jax.Array:
        normal = jnp.einsum("rpg,rqg->rpq", b, b) + 1e-4 * jnp.eye(bits)[None]
        return jnp.linalg.solve(normal, jnp.einsum("rpg,rg->rp", b, w)[..., None])[..., 0]

    b = jax.lax.fori_loop(0, rounds, step, jnp.stack(signs, 1))
    return solve(b), b


def seconds(run: Callable[[], Any], calls: int = 3) -> float:
    """The fastest of a few calls, compilation left out."""
    jax.block_until_ready(run())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def resident() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def correlated_layer(k: int, rows: int) -> tuple[Any, Any]:
    """A weight [k, k] with heavy tails, and the mean [k, k] of products of inputs with common factors, some loud."""
    rng = np.random.default_rng(0)
    w = 0.02 * rng.standard_t(5, (k, k))
    own = rng.standard_normal((rows, k))
    shared = rng.standard_normal((rows, k // 16)) @ rng.standard_normal((k // 16, k)) / np.sqrt(k // 16)
    x = (own + 2 * shared) * np.exp(0.5 * rng.standard_normal(k))
    return w.astype(np.float32), (x.T @ x / rows).astype(np.float32)


def of_output(w: Any, gram: Any, fmt: lb.Format, solver: Any, importance: Any) -> tuple[float, float]:
    """Seconds with compilation, and the squared error of the output over that of a weight of zeros."""
    start = time.perf_counter()
    array = jax.block_until_ready(lb.quantize_array(w, fmt, solver, importance=jnp.asarray(importance)))
    took = time.perf_counter() - start
    d = np.asarray(lb.dequantize(array), np.float64) - w
    return took, float((d * (gram @ d)).sum() / (w * (gram @ w.astype(np.float64))).sum())


def additive() -> Iterator[Row]:
    w, gram = correlated_layer(LAYER, 4 * LAYER)
    error, took = {}, {}
    for name, solver, importance in (
        ("kmeans", lb.residual_kmeans(), gram.diagonal()),
        ("additive", lb.additive_codebooks(), gram),
    ):
        took[name], error[name] = of_output(w, gram, lb.codebook(2, 8, vec=8), solver, importance)
    yield row("m2v8_kmeans", took["kmeans"], "s", "additive codebooks", took["additive"])
    yield row("m2v8_kmeans_error", error["kmeans"], "of the output", "additive codebooks", error["additive"])
    yield row("m2v8_additive", took["additive"], "s", "AQLM's own code, as stated", AQLM_SECONDS)
    yield row("m2v8_additive_error", error["additive"], "of the output", "AQLM's own code, as stated", AQLM_ERROR)


def second_order() -> Iterator[Row]:
    w, gram = correlated_layer(K, K)
    for name, fmt, solver, start, starts_from, importance in (
        ("gptq4", lb.uniform(4, group=GROUP), lb.gptq(), lb.round_to_nearest(), "round to nearest", gram),
        ("lnq2", lb.any_precision(2, 2), lb.lnq(), lb.nested_kmeans(), "k-means", gram.diagonal()),
    ):
        first, before = of_output(w, gram, fmt, start, importance)
        took, after = of_output(w, gram, fmt, solver, gram)
        yield row(name, took, "s", starts_from, first)
        yield row(f"{name}_error", after, "of the output", starts_from, before)
        if name == "lnq2":
            yield row("lnq2_of_limit", took, "s", "the most it may take on 2 cores", LNQ_SECONDS)
            if took > LNQ_SECONDS:
                raise SystemExit(f"lnq at 2 bits took {took:.0f} s for {K}x{K}, and may take {LNQ_SECONDS:.0f}")


def binary() -> Iterator[Row]:
    w = jax.block_until_ready(jax.random.normal(jax.random.key(0), (K, N)))
    fmt = lb.bcq(BITS, group=GROUP)
    # Memory first: the peak of a process only grows. The first call compiles, which counts here.
    before = resident()
    array = jax.block_until_ready(lb.quantize_array(w, fmt, lb.alternating(ROUNDS)))
    yield row("bcq3_alternating_peak", resident() - before, "bytes", "the float32 weight", w.nbytes)
    ours = seconds(lambda: lb.quantize_array(w, fmt, lb.alternating(ROUNDS)))
    groups = w.T.reshape(-1, GROUP)[::SHARE]
    direct = SHARE * seconds(lambda: published(groups, BITS, ROUNDS), 1)
    yield row("bcq3_alternating", ours, "s", "weight by weight, as published", direct)
    alpha, signs = published(groups, BITS, ROUNDS)
    theirs = float(jnp.mean((jnp.einsum("rp,rpg->rg", alpha, signs) - groups) ** 2))
    error = float(jnp.mean((lb.dequantize(array) - w) ** 2))
    yield row("bcq3_alternating_mse", error, "per weight of N(0, 1)", "weight by weight, as published", theirs)
    greedy = lb.quantize_array(w, fmt, lb.greedy())
    yield row("bcq3_greedy_mse", float(jnp.mean((lb.dequantize(greedy) - w) ** 2)), "per weight", "alternating", error)


def published_nested() -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The published loop over rows, on all cores, around the two functions of flash1dkmeans: of w and its weights, both
    float32 [n, k], codes uint8 [n, k] and entries float32 [n, widths, 2**HI]."""
    import numba
    from flash1dkmeans import numba_kmeans_1d_k_cluster as seed
    from flash1dkmeans import numba_kmeans_1d_two_cluster as split

    @numba.njit
    def one(w: np.ndarray, f: np.ndarray, number: int, codes: np.ndarray, tables: np.ndarray) -> None:
        order = np.argsort(w)
        x, g = w[order], f[order].astype(np.float64)
        y = x.astype(np.float64)
        s, sx, sxx = np.cumsum(g), np.cumsum(g * y), np.cumsum(g * y * y)
        entries, edges = seed(x, 1 << LO, 50, s, sx, sxx, 0, len(x), number)
        tables[0, : 1 << LO] = entries
        for b in range(LO, HI):
            new, cuts = np.repeat(entries, 2), np.repeat(edges, 2)[:-1]
            for c in range(1 << b):
                if edges[c] < edges[c + 1]:
                    both, at = split(x, s, sx, edges[c], edges[c + 1])
                    new[2 * c : 2 * c + 2], cuts[2 * c + 1] = both, at[1]
            entries, edges = new, cuts
            tables[b + 1 - LO, : 2 << b] = entries
        for c in range(1 << HI):
            codes[order[edges[c] : edges[c + 1]]] = c

    @numba.njit(parallel=True)
    def solve(w: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, tables = np.empty(w.shape, np.uint8), np.empty((len(w), HI - LO + 1, 1 << HI), np.float32)
        for r in numba.prange(len(w)):
            one(w[r], f[r], r, codes[r], tables[r])
        return codes, tables

    solved: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = solve
    return solved


def inertia(w: np.ndarray, f: np.ndarray, decoded: np.ndarray) -> float:
    return float((f * (w.astype(np.float64) - decoded) ** 2).mean())


def nested() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    w, gradient = (jnp.asarray(rng.standard_normal((K, N), np.float32)) for _ in range(2))
    quantize = partial(lb.quantize_array, w, lb.any_precision(LO, HI, table_dtype="float32"))
    weighed = partial(quantize, importance=gradient**2)
    start = time.perf_counter()
    array = jax.block_until_ready(weighed())
    first = time.perf_counter() - start
    ours, plain = seconds(weighed), seconds(quantize)
    if find_spec("flash1dkmeans") is None:
        print("flash1dkmeans is not installed, so it is not compared: pip install 'lowbit[bench]'")
        yield row("nested3to8_first_call", first, "s", "after it", ours)
        yield row("nested3to8_unweighed", plain, "s", "weighed", ours)
        return
    rows, f, name = np.asarray(w).T.copy(), np.square(np.asarray(gradient)).T.copy(), "flash1dkmeans"
    solve, start = published_nested(), time.perf_counter()
    codes, tables = solve(rows, f)
    theirs_first = time.perf_counter() - start
    theirs = seconds(lambda: solve(rows, f))
    yield row("nested3to8_first_call", first, "s", f"{name}, compiled", theirs_first)
    yield row("nested3to8", ours, "s", name, theirs)
    yield row("nested3to8_unweighed", plain, "s", f"{name}, weighed", theirs)
    for b in range(LO, HI + 1):
        read = np.asarray(lb.dequantize(lb.QuantArray(array.fields, array.type.at(b)))).T
        base = np.take_along_axis(tables[:, b - LO], (codes >> (HI - b)).astype(np.intp), 1)
        yield row(f"nested3to8_error{b}", inertia(rows, f, read), "per weight", name, inertia(rows, f, base))


def measure() -> Iterator[Row]:
    yield from binary()
    yield from nested()
    yield from second_order()
    yield from additive()


if __name__ == "__main__":
    main(
        f"Solvers on {K}x{N}: {BITS} planes in groups of {GROUP}, {ROUNDS} rounds; nested {LO} to {HI} bits",
        lambda: list(measure()),
    )
