"""x @ w in few bits on a GPU beside dense 16-bit products: `python benchmarks/gpu_matmul.py [PART=i/n] [--list]`.

Results are added one by one to benchmarks/results/<device>_jax-<version>/gpu_matmul.json, under $OUT if that is set. A
run goes on where another stopped; a part of all takes less than nine minutes, or stops and says how much is left.
`--list` needs no GPU: shapes, stored bytes, and the time that each product takes at least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

import jax
import jax.numpy as jnp
import numpy as np

import lowbit as lb
from benchmarks.cold import copies
from benchmarks.gpu_cases import COPY, HALVES, Case, canonical, groups, targets
from benchmarks.gpu_results import Peaks, Results, Row, here, hopper, newest, opened, part, peaks
from benchmarks.gpu_timing import profiled, timed
from lowbit.array import QuantArray, laid_out
from lowbit.ir.dtypes import short
from lowbit.passes.choose import Form
from lowbit.testing.checks import assert_dx, assert_product, random_array, random_rows
from lowbit.testing.terms import kernel_term
from lowbit.testing.tolerance import assert_within, dot_tolerance, tiny

NAME = "gpu_matmul"
SECONDS = 500
"""A part stops before the next case after so long."""
COPIED = 1 << 29
FAILURES = 3
"""In a row, after which the device is taken to be beyond use."""
SAMPLE = 16
"""Outputs, and at most so many rows over 4, that are compared with the oracle: it is slow."""


# ---------------------------------------------------------------- without a GPU


def measured_copy(rows: dict[str, Row]) -> float | None:
    """Bytes a second, read and written."""
    return rows[COPY]["bytes"] / rows[COPY]["seconds"] if COPY in rows else None


def listing(cases: Sequence[Case], results: Results) -> Iterator[str]:
    """Every product with its bytes, the least times for them, the library's prediction and what was measured, in us."""
    of = peaks(results.machine["device"])
    copied = measured_copy(results.rows)
    speed = f"{copied / 1e12:.2f} TB/s" if copied else "not measured"
    yield f"{results.machine['device']}: {of.memory / 1e12:.2f} TB/s, {of.products / 1e12:.0f} TFLOP/s; copy {speed}"
    yield f"{'product [out x in]':48} {'stored':>12} {'at peak':>9} {'at copy':>13} {'predicted':>10} {'measured':>13}"
    for case in cases:
        at_copy = f"{1e6 * case.roofline(replace(of, memory=copied)):.1f}" if copied else "not measured"
        guess = case.predicted().get(case.lowering or "")
        row = results.rows.get(case.name)
        took = f"{1e6 * row['seconds']:.1f}" if row else "not measured"
        said = f"{1e6 * guess:.1f}" if guess else "-"
        yield f"{case.name:48} {case.stored:>12,} {1e6 * case.roofline(of):>9.1f} {at_copy:>13} {said:>10} {took:>13}"


def promises(rows: dict[str, Row]) -> Iterator[str]:
    """The targets as a table in Markdown."""
    yield "| target | limit | measured |"
    yield "| --- | --- | --- |"
    yield from (target.line(rows) for target in targets())


# ---------------------------------------------------------------- on a GPU


def copy(cupti: bool) -> Row:
    """Reads and writes memory as fast as an elementwise program of XLA can."""
    buffers = [jnp.full(COPIED // 4, i, jnp.uint32) for i in range(2)]
    _, row = timed(lambda a, b: (a ^ 1, b ^ 1), buffers, 2, cupti)
    return {"name": COPY, "bytes": 2 * COPIED, **row}


def rotation(group: Sequence[Case]) -> tuple[Any, list[Any]]:
    """The weight of a group of cases on the host, and different ones on the device to use in turn."""
    first, count = group[0], copies(min(case.stored for case in group))
    if first.what == HALVES:
        made = [jax.random.normal(jax.random.key(i), (first.n, first.k), jnp.bfloat16) for i in range(count)]
        return np.asarray(made[0]), made
    own = random_array(canonical(first.what, first.n, first.k))
    laid = jax.jit(laid_out)(own)
    return jax.device_get(own), [laid, *(_varied(laid, jnp.int32(i)) for i in range(1, count))]


@jax.jit
def _varied(w: QuantArray, i: jax.Array) -> QuantArray:
    """The same codes and scales elsewhere: all are valid, also those that are read as floats."""
    return jax.tree.map(lambda a: jnp.roll(a, i), w)


def products(case: Case, x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
    """One product with each of the weights; x is dy for gradients."""
    if case.what == HALVES:
        return [jnp.einsum("mn,nk->mk" if case.back else "mk,nk->mn", x, w) for w in weights]
    typed = [QuantArray(w.fields, case.type) for w in weights]
    if case.back:
        return [gradient(case, x, w) for w in typed]
    return [lb.matmul(x, w, lowering=case.lowering) for w in typed]


def gradient(case: Case, dy: jax.Array, w: QuantArray) -> jax.Array:
    """Of x; the product itself is not computed."""
    x = jnp.zeros((len(dy), case.k), dy.dtype)
    dx: jax.Array = jax.vjp(lambda x: lb.matmul(x, w, lowering=case.lowering), x)[1](dy)[0]
    return dx


def measure(case: Case, host: Any, weights: Sequence[Any], of: Peaks, cupti: bool) -> Row:
    """One case: timed, and its first product compared with the oracle."""
    if case.what == HALVES:
        weights = [w.astype(case.dtype) for w in weights]
    x = jnp.asarray(random_rows(case.m, case.n if case.back else case.k) / 64, case.dtype)  # sums stay within float16
    out, times = timed(partial(products, case), (x, weights), len(weights), cupti)
    row = {"name": case.name, "what": case.what, "n": case.n, "k": case.k, "m": case.m, "dtype": case.dtype}
    row |= {"lowering": case.lowering, "chosen": case.chosen(), "stored": case.stored, "bytes": case.bytes}
    row |= {"at_peak": case.roofline(of), "predicted": case.predicted(), "weights": len(weights), **times}
    try:
        if case.back:
            check_gradient(case, host, x, weights[0])
        else:
            check(case, host, np.asarray(x), out[0])
    except AssertionError as err:
        row["wrong"] = str(err)
    return row


def check(case: Case, host: Any, x: Any, y: jax.Array) -> None:
    """Some rows and columns of a product against the oracle, within the bound of its arithmetic."""
    columns = np.unique(np.linspace(0, case.n - 1, SAMPLE).astype(int))
    rows = np.unique(np.linspace(0, case.m - 1, SAMPLE // 4).astype(int))
    got, some = np.asarray(y[rows][:, columns]), x[rows]
    if case.what == HALVES:
        w = np.asarray(jnp.asarray(host[columns]).astype(case.dtype)).astype(np.float64)
        exact, size = some.astype(np.float64) @ w.T, np.abs(some.astype(np.float64)) @ np.abs(w).T
        bound = dot_tolerance(case.k, "float32", case.dtype) * size + tiny(case.dtype)
        assert_within(got, exact, bound, case.name)
        return
    few = sampled(host, columns, canonical(case.what, case.n, case.k))
    kernel = case.lowering in ("mma", "sums", "fp8")  # which take no array in its format's own layout
    form = None if kernel else lb.plan(some.shape, few.type, "gpu", some.dtype).choice(case.lowering)
    name = case.lowering or "mma"
    term = form.term if isinstance(form, Form) else kernel_term(len(some), few.type, short(some.dtype), name)
    assert_product(got, some, few, term)


def check_gradient(case: Case, host: Any, dy: jax.Array, w: Any) -> None:
    """A gradient of few outputs against the oracle: the others get none."""
    few = np.unique(np.linspace(0, case.n - 1, SAMPLE).astype(int))
    rows = np.unique(np.linspace(0, case.m - 1, SAMPLE // 4).astype(int))
    (dx,) = jax.jit(partial(products, case))(jnp.zeros_like(dy).at[:, few].set(dy[:, few]), [w])
    got, some = np.asarray(dx[rows]), np.asarray(dy[rows][:, few])
    if case.what != HALVES:
        return assert_dx(got, some, sampled(host, few, canonical(case.what, case.n, case.k)), case.lowering == "mma_dx")
    weights = np.asarray(jnp.asarray(host[few]).astype(case.dtype)).astype(np.float64)
    exact, size = some.astype(np.float64) @ weights, np.abs(some.astype(np.float64)) @ np.abs(weights)
    assert_within(got, exact, dot_tolerance(case.n, "float32", case.dtype) * size + tiny(case.dtype), case.name)


def sampled(w: QuantArray, columns: Any, read_as: lb.QuantType) -> QuantArray:
    """Some outputs of a weight on the host. What all outputs share stays as it is."""
    dims = {name: list(leaf.dims) for name, leaf in read_as.fields.items()}
    fields = {
        name: np.take(a, columns, dims[name].index("n")) if "n" in dims[name] else a for name, a in w.fields.items()
    }
    return QuantArray(fields, read_as.resized(n=len(columns)))


def run(chosen: Sequence[Sequence[Case]], results: Results, seconds: float) -> int:
    """Measures what is not there yet, and says what is left, wrong or failed. The number of what is wrong or failed."""
    start, cupti, of = time.monotonic(), profiled(), peaks(results.machine["device"])
    failed = in_a_row = 0
    if not results.done(COPY):
        results.add(copy(cupti))
    for group in chosen:
        todo = [case for case in group if not results.done(case.name)]
        if not todo or time.monotonic() - start > seconds or in_a_row >= FAILURES:
            continue
        host, weights = rotation(group)
        for case in todo:
            if time.monotonic() - start > seconds or in_a_row >= FAILURES:
                break
            try:
                results.add(measure(case, host, weights, of, cupti))
                in_a_row = 0
            except Exception as err:  # one that does not run must not cost the others
                failed, in_a_row = failed + 1, in_a_row + 1
                print(f"FAILED {case.name}: {type(err).__name__}: {str(err)[:2000]}", flush=True)
                continue
            print(list(listing([case], results))[-1], flush=True)
        del host, weights
    wrong = [row for row in results.rows.values() if "wrong" in row]
    for row in wrong:
        print(f"WRONG {row['name']}: {row['wrong']}")
    left = sum(not results.done(case.name) for group in chosen for case in group)
    print(f"{len(results.rows)} results in {results.path}; {left} of this part are left{', run it again' * bool(left)}")
    return failed + len(wrong)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", default="1/1", help="PART=i/n: every n-th weight from the i-th on")
    parser.add_argument("--list", action="store_true", help="what would be measured, and what was; needs no GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"stop after so many (default {SECONDS})")
    given = parser.parse_args(args)
    chosen = part(groups(), given.part)
    if given.list:
        print(*listing([case for group in chosen for case in group], results := newest(NAME)), sep="\n")
        print(*promises(results.rows), sep="\n")
        return 0
    results = opened(NAME, here(hopper(parser).device_kind))
    bad = run(chosen, results, given.seconds)
    print(*promises(results.rows), sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
