"""Gradients of parameters: sums by codes against plain loops, the schedule's twin against the oracle's cotangents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit as lb
from lowbit.array import QuantArray, laid_out, own
from lowbit.compat import interpret_params, races_found
from lowbit.ir.build import cast
from lowbit.ir.expr import Expr
from lowbit.kernels.by_code import CodeSums, in_numpy, polynomial
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.mma_dw import by_span, parameter_gradients
from lowbit.kernels.verbs import HALVES, Twin
from lowbit.passes.pointwise import UnsuitableError
from lowbit.passes.scalar import evaluated
from lowbit.planning import LoweringError
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing.checks import random_array, random_rows
from lowbit.testing.tolerance import gamma
from tests.fp3 import fp3_rows
from tests.parameter_gradients import check_parameter_gradients

LINEAR, ALL = (0, 1, 2, 4, 8), tuple(range(16))
FORMATS = {
    lb.bcq(1, group=128): (0,),
    lb.bcq(2, group=32): LINEAR[:3],
    lb.bcq(3, group=64): LINEAR[:4],
    lb.bcq(4, group=128): LINEAR[:4],  # one bit is a sign
    lb.bcq(4, group=128, offset=True): LINEAR,
    lb.uniform(2): LINEAR[:3],
    lb.uniform(4, group=512): LINEAR,
    lb.any_precision(2, 5, width=2): ALL[:4],
    lb.any_precision(2, 5, width=3): ALL[:8],
    lb.any_precision(3, 5, width=4): ALL,
    lb.any_bcq(2, 4, group=64, width=4): LINEAR,
}
QUICK = (lb.bcq(2, group=32), lb.uniform(2), lb.any_precision(2, 5, width=2), lb.any_bcq(2, 4, group=64, width=4))


def array(fmt: lb.Format, n: int, k: int) -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), "f32", fmt))


def sums_of(w: QuantArray, kind: Any = "f16") -> CodeSums:
    return CodeSums(kernel_layout(w.type).program(kind, readings(w.type).index(w.type.decode)))


@given(st.integers(0, 4).flatmap(lambda b: st.lists(st.integers(-9, 9), min_size=1 << b, max_size=1 << b)))
def test_a_function_of_bits_is_a_polynomial(values: list[int]) -> None:
    terms = polynomial(values)
    assert [sum(t for a, t in enumerate(terms) if code & a == a) for code in range(len(values))] == values


@pytest.mark.parametrize(
    "fmt", [pytest.param(fmt, marks=() if fmt in QUICK else pytest.mark.slow) for fmt in FORMATS], ids=str
)
def test_sums_by_codes(fmt: lb.Format) -> None:
    """Of one stage, against plain loops over the codes that the weights say."""
    w, g = distinct(array(fmt, ROWS, STAGE)), random_rows(ROWS, STAGE)
    sums, of = sums_of(w), kernel_layout(w.type)
    assert sums.subsets == FORMATS[fmt]
    words = [np.asarray(laid_out(w).fields[name])[0, 0] for name in list(of.words)[: len(sums.program.arrays)]]
    got = np.stack([in_numpy(sums, at, g, words) for at in range(sums.spans)], 1)  # [subset, span, row]
    codes = codes_of(w, sums)
    by_span = g.astype(np.float64).reshape(codes.shape)
    if sums.odd:
        by_span = np.where(codes >> sums.program.weights.bits - 1 & 1, -by_span, by_span)
    for subset, of_spans in zip(sums.subsets, got, strict=True):
        exact = (by_span * (codes & subset == subset)).sum(-1)
        assert (np.abs(of_spans.T - exact) <= gamma(sums.span, "f32") * np.abs(by_span).sum(-1)).all()


def distinct(w: QuantArray) -> QuantArray:
    """The same with other tables, if they are stored: no two entries of a row are the same half."""
    own = {
        name: np.broadcast_to(np.arange(a.shape[-1], dtype=a.dtype), a.shape)
        for name, a in w.fields.items() if w.type.role(name) == "codebook"
    }  # fmt: skip
    return QuantArray({**w.fields, **own}, w.type)


def codes_of(w: QuantArray, sums: CodeSums) -> Any:
    """The codes [n, span, k] as they are stored: the entry that each weight is."""
    parameters = by_span(kernel_layout(w.type), sums, laid_out(w).fields)
    entries = np.stack([np.asarray(evaluated(e, parameters.__getitem__))[0].T for e in sums.entries])  # [code, n, span]
    entries = np.concatenate([entries, -entries]) if sums.odd else entries
    dense = np.asarray(lb.dequantize(w)).T.reshape(ROWS, sums.spans, -1)
    return np.abs(dense - entries[..., None]).argmin(0)


@pytest.mark.parametrize(
    ("fmt", "kind", "m", "k"),
    [
        pytest.param(lb.bcq(3, group=64, scale_dtype="bfloat16"), "bf16", 70, 301, marks=pytest.mark.slow),
        (lb.uniform(4), "f16", 5, 70),
        pytest.param(lb.bcq(4, group=512), "f16", 70, 700, marks=pytest.mark.slow),
        pytest.param(lb.any_precision(3, 5, width=4), "f16", 5, 301, marks=pytest.mark.slow),
        pytest.param(lb.bcq(2, group=32), "f16", 5, 301, marks=pytest.mark.slow),
        pytest.param(lb.any_bcq(2, 4, group=64, width=3), "bf16", 5, 70, marks=pytest.mark.slow),
        pytest.param(fp3_rows(), "f16", 5, 70, marks=pytest.mark.slow),
        pytest.param(lb.k_quant(4, scale_dtype="float32"), "f16", 5, 301, marks=pytest.mark.slow),  # of two spans
        # of the scales; inputs in another order
        pytest.param(lb.codebook(1, 8, vec=4, group=32), "f16", 5, 70, marks=pytest.mark.slow),
        pytest.param(lb.codebook(2, 8, vec=8, group=128), "bf16", 5, 301, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_cotangent(fmt: lb.Format, kind: Any, m: int, k: int) -> None:
    w = laid_out(array(fmt, 65, k))
    x, dy = random_rows(m, k, dtype=HALVES[kind]), random_rows(m, 65, dtype=HALVES[kind], seed=3)
    check_parameter_gradients(by_twin(x, dy, w), x, dy, w)
    assert not races_found()


def by_twin(x: Any, dy: Any, w: QuantArray) -> dict[str, jax.Array]:
    at = readings(w.type).index(w.type.decode)
    verbs = Twin(interpret_params(detect_races=True))
    return parameter_gradients(kernel_layout(w.type), jnp.asarray(x), jnp.asarray(dy), w.fields, at, verbs)


def test_instructions_of_an_entry() -> None:
    """As `make aot` finds them, about: what reduces across lanes and stores comes on top."""
    counted = {fmt: sums_of(array(fmt, ROWS, STAGE)).instructions for fmt in FORMATS}
    assert list(counted.values()) == [3, 5, 7, 9, 9, 5, 9, 7, 14, 27, 9]


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        (lb.nested_fp(), "its weights have no parameters of their rows"),
        (lb.any_precision(3, 5, width=5), "its codes have 5 bits, and it sums for at most 4"),
    ],
    ids=str,
)
def test_what_is_not_summed(fmt: lb.Format, why: str) -> None:
    with pytest.raises(UnsuitableError, match=why):
        sums_of(array(fmt, ROWS, STAGE))


def test_tables_of_all_rows_are_not_summed() -> None:
    scaled = sums_of(array(lb.codebook(1, 8, vec=4, group=128), ROWS, STAGE))
    assert scaled.subsets == (0,) and scaled.instructions < 6 and scaled.unscaled
    with pytest.raises(UnsuitableError, match="no parameters of their rows: 'codebooks' is a table of all rows"):
        CodeSums(scaled.unscaled)


def test_only_halves_are_multiplied() -> None:
    w = laid_out(array(lb.bcq(2), 13, 70))
    with pytest.raises(TypeError, match="x is float32 and dy float16: the matrix unit multiplies two float16 or two"):
        by_twin(random_rows(1, 70), random_rows(1, 13, dtype="float16"), w)


# ---------------------------------------------------------------- programs, and the choice

KERNEL = "custom_call @mosaic_gpu"
W = random_array(QuantType((("k", 300), ("n", 100)), "bf16", lb.bcq(2, group=64), (("alpha", "p", 1),)))
THERE = laid_out(W)
X = jnp.asarray(random_rows(5, 300, dtype="bfloat16"))


def scales(w: QuantArray, x: jax.Array = X, **how: Any) -> jax.Array:
    """The gradient of the scales that train."""

    def loss(first: jax.Array) -> jax.Array:
        return lb.matmul(x, QuantArray({**w.fields, "alpha_first": first}, w.type), **how).astype(jnp.float32).sum()

    return jax.grad(loss)(w.fields["alpha_first"])


def for_cuda(f: Any, *args: Any) -> str:
    return str(jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


def test_a_program_for_cuda_holds_the_kernel() -> None:
    assert for_cuda(scales, THERE).count(KERNEL) == 1  # neither the product nor the gradient of x is computed
    assert KERNEL not in for_cuda(scales, W)
    assert KERNEL not in for_cuda(scales, THERE, X.astype("float32"))
    assert KERNEL not in str(jax.jit(scales).lower(THERE).as_text())


def test_on_a_cpu_gradients_are_those_of_the_plain_array() -> None:
    there = QuantArray({**THERE.fields, "alpha_first": jax.jit(scales)(THERE)}, THERE.type)
    np.testing.assert_array_equal(own(there).fields["alpha_first"], jax.jit(scales)(W))


@pytest.mark.slow
def test_gradients_of_gradients_are_those_of_the_plain_array() -> None:
    def slope(x: jax.Array, w: QuantArray) -> jax.Array:
        return (scales(w, x) ** 2).sum()

    both = [jax.jit(jax.grad(slope))(X, w) for w in (THERE, W)]
    np.testing.assert_array_equal(*(np.asarray(dx, np.float32) for dx in both))
    assert KERNEL in for_cuda(slope, X, THERE)


@pytest.mark.slow
def test_a_stack_and_an_export() -> None:
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), THERE)
    both = jax.vmap(scales)
    np.testing.assert_array_equal(jax.jit(both)(stack)[1], jax.jit(scales)(THERE))
    assert KERNEL in for_cuda(both, stack)
    made = jax.export.export(jax.jit(scales), platforms=["cpu", "cuda"])(THERE)
    assert KERNEL in made.mlir_module()
    np.testing.assert_array_equal(made.call(THERE), jax.jit(scales)(THERE))


def test_explain_lists_the_ways_to_the_gradients() -> None:
    def line(w: QuantArray, platform: str = "gpu", dtype: str = "bfloat16") -> str:
        table = lb.explain(w, batch=64, platform=platform, dtype=dtype, gradient=True).split("\n\n")[2].splitlines()
        assert table[0] == f"dw of x[64, k] @ {w.type} on {platform}"
        assert any(row.startswith("xla_dw ") for row in table)
        return next(row for row in table if row.startswith("mma_dw "))

    assert "us" in line(THERE) and f"{THERE.type.bits // 8 + 2 * 64 * 400:,}" in line(THERE)
    for w, platform, dtype, why in (
        (THERE, "cpu", "bfloat16", "it is for GPUs"),
        (W, "gpu", "bfloat16", "the weight is in its format's own layout: lb.prepare the model for its GPU"),
        (THERE, "gpu", "float32", "x is f32, and it multiplies halves: cast x to bfloat16 or float16"),
        (laid_out(array(rounding(), 64, 256)), "gpu", "bfloat16", "it multiplies x as it is, and rounding() rounds it"),
    ):
        assert f"refused: {why}" in line(w, platform, dtype)
    without = lb.explain(laid_out(array(lb.nested_fp(), 64, 256)), platform="gpu", dtype="float16", gradient=True)
    assert "dw of" not in without and "dx[1, k] of" in without


@lb.register_format("rounding", activations=lambda x: cast(cast(x, "e4m3"), x.dtype))
def rounding(n: int, k: int) -> Expr:
    return lb.uniform(4, group=32).decode(n=n, k=k)


@pytest.mark.parametrize("fmt", [lb.uniform(4, group=128), lb.bcq(3, group=128), lb.any_precision(2, 3)], ids=str)
def test_plans_of_gradients_in_other_numerics_are_those_in_floats(fmt: lb.Format) -> None:
    plain = laid_out(array(fmt, 128, 256))
    other = QuantArray(plain.fields, replace(plain.type, numerics="int8x2"))
    tables = (lb.explain(w, 64, "gpu", "bfloat16", gradient=True).split("\n\n")[1:] for w in (plain, other))
    assert next(tables) == next(tables)


def test_the_page_says_what_the_table_counts() -> None:
    """What runs once a tile is counted with 8 iterations, and with 64."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    rows = [[cell.strip(" `%") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    counted = {row[0]: float(row[4]) for row in rows if "_dw_" in row[0]}
    said = {row[0]: row for row in rows if f"{row[0]}_dw_bf16_m512" in counted and len(row) == 6}
    assert len(said) == len(counted) // 2
    for name, (_, _, instructions, clocks, *products) in said.items():
        few, many = (counted[f"{name}_dw_bf16_m{m}"] for m in (512, 4096))
        once = few - 8 * (many - few) / 56
        assert float(instructions) == pytest.approx(once, abs=0.06)  # of one decimal
        assert float(clocks.replace(",", "")) == pytest.approx(once * ROWS * STAGE / 128, abs=6 + 0.01 * 128)
        assert products == ["4,096", "32,768"]


@pytest.mark.slow
def test_lowering_names_the_way_to_the_gradients() -> None:
    np.testing.assert_array_equal(scales(THERE, lowering="xla_dw"), scales(THERE))
    with pytest.raises(LoweringError) as refused:
        scales(THERE, lowering=["xla_dx", "mma_dw"])
    message = str(refused.value)
    assert message.startswith(f"lowering 'mma_dw' cannot run dw of x[5, k] @ {THERE.type}: use one of xla_dw")
    assert "mma_dw   refused: it is for GPUs" in message
