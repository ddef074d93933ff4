"""The process that times candidates for `lb.autotune`: `python -m lowbit.measuring` answers lines of JSON with lines of
JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from math import ceil
from time import perf_counter_ns
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, laid_out
from lowbit.autotuning.cache import Cache, entry_of, key_of
from lowbit.autotuning.lookup import tuned
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ops import matmul
from lowbit.passes.pipeline import PIPELINES, run
from lowbit.quant_type import QuantType, type_from_json
from lowbit.testing.checks import random_array, random_rows
from lowbit.testing.terms import kernel_term, product_term
from lowbit.testing.tolerance import Array, assert_within, exact_and_bound, rounded

ROWS, OUTPUTS = 8, 64
"""Rows of x, and outputs, that differ; more repeat them, so that each result is checked at the price of few."""
REPEATS, AT_LEAST = 5, 2_000_000
"""Times that are taken, and the nanoseconds that each lasts or more."""
ROTATED, MOST_COPIES = 256 << 20, 16
"""Bytes of weights that are read before one is read again, but no more copies of one: a model's weights are in no cache
when their turn comes."""


def operands(m: int, t: QuantType, dtype: Any) -> tuple[Array, QuantArray, QuantType, dict[str, Array]]:
    """x [m, k] and w; the type of the part of w that it repeats, and that part's fields with those rows of x, as leaves
    of its product."""
    sizes, plain = dict(t.dims), replace(t, layout="own")
    few = plain.resized(n=min(sizes["n"], OUTPUTS))
    if any(not _repeats(few, plain, name) for name in plain.fields):
        few = plain
    part = {name: np.asarray(a) for name, a in random_array(few).fields.items()}
    fields = {name: _repeated(a, tuple(plain.fields[name].dims.values())) for name, a in part.items()}
    rows = random_rows(min(m, ROWS), sizes["k"], dtype=numpy_dtype(dtype))
    w = QuantArray.of(fields, plain)
    return _repeated(rows, (m, sizes["k"])), w if t.layout == "own" else laid_out(w), few, {**part, "x": rows}


def _repeats(few: QuantType, t: QuantType, name: str) -> bool:
    """Whether a field has more entries along n than that of few outputs, and no other dim."""
    one, other = few.fields[name].dims, t.fields[name].dims
    return tuple(one) == tuple(other) and all(one[d] == other[d] for d in one if d != "n")


def _repeated(a: Array, shape: tuple[int, ...]) -> Array:
    for axis, size in enumerate(shape):
        if a.shape[axis] != size:
            a = np.take(a, np.arange(size) % a.shape[axis], axis)
    return a


def expected(few: QuantType, env: dict[str, Array], dtype: Any, lowering: str) -> tuple[Array, Array]:
    """The exact result for the part that repeats, [m, n], and the bound on the error of a lowering."""
    m = len(env["x"])
    product = product_term(m, few, dtype)
    exact, _ = exact_and_bound(product, env, ("m", "n"))
    term = run(product, PIPELINES[lowering]) if lowering in PIPELINES else kernel_term(m, few, dtype, lowering)
    _, bound = exact_and_bound(term, env, ("m", "n"))
    return exact, rounded(exact, bound, numpy_dtype(dtype))


@lru_cache(maxsize=1)
def _held(product: str) -> tuple[Any, list[QuantArray], QuantType, dict[str, Array]]:
    """The operands of a product, on the device, with copies of w; all its candidates follow each other."""
    asked = json.loads(product)
    import_module(asked["module"])
    x, w, few, env = operands(asked["m"], type_from_json(asked["type"]), asked["dtype"])
    stored = sum(a.nbytes for a in w.fields.values())
    copies = range(min(MOST_COPIES, max(2, ceil(ROTATED / stored))))
    return jnp.asarray(x), [jax.tree.map(partial(jnp.array, copy=True), w) for _ in copies], few, env


def measure(asked: dict[str, Any]) -> float:
    """Nanoseconds of a call. Raises AssertionError for a result that is wrong, and whatever the candidate raises."""
    kind = jax.devices()[0].device_kind
    if kind != asked["device"]:
        raise RuntimeError(f"this process has a {kind}, and times are wanted of a {asked['device']}")
    x, copies, few, env = _held(json.dumps({k: asked[k] for k in ("m", "type", "dtype", "module")}))
    lowering, schedule = asked["candidate"]["lowering"], asked["candidate"]["schedule"]
    entry = entry_of("", kind, lowering, schedule and tuple(schedule), 0.0, {})
    cache = Cache({key_of(asked["m"], copies[0].type, asked["dtype"], kind): entry})
    with tuned(cache, "error"):  # through the look-up that takes it later
        # One program of all copies where the host starts kernels more slowly than they run.
        programs = [copies] if jax.default_backend() == "gpu" else [[w] for w in copies]
        run_all = jax.jit(lambda x, ws: [matmul(x, w) for w in ws])
        calls = [partial(run_all, x, ws) for ws in programs]
        y = np.asarray(calls[0]()[0])
        exact, bound = (_repeated(a, y.shape) for a in expected(few, env, asked["dtype"], lowering))
        assert_within(y, exact, bound, f"{lowering}: y [m, n]")
        return timed(calls) * len(programs) / len(copies)


def timed(calls: Sequence[Callable[[], Any]]) -> float:
    """Nanoseconds of one of several calls, made in turn: the median of several runs, each of as many rounds as it takes
    to be long. The device waits for none of them."""

    def run_of(rounds: int) -> int:
        start = perf_counter_ns()
        for _ in range(rounds):
            made = [call() for call in calls]
        jax.block_until_ready(made)
        return perf_counter_ns() - start

    rounds = 1
    while run_of(rounds) < AT_LEAST:
        rounds *= 2
    return float(np.median([run_of(rounds) / rounds for _ in range(REPEATS)])) / len(calls)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    answers.write(json.dumps({"device": jax.devices()[0].device_kind}) + "\n")
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"nanoseconds": measure(json.loads(line))}
        except Exception as err:  # a candidate may raise anything: it is the answer
            answer = {"error": f"{type(err).__name__}: {err}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
