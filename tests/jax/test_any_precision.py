"""Formats that are read at several widths: any_precision, and products at a width chosen when they run."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.ir import param
from lowbit.quantizers import refit_tables
from lowbit.quantizers.kmeans import nested_kmeans_rows

FORMAT = lb.any_precision(2, 4)
TYPE = lb.QuantType((("k", 45), ("n", 7)), "f32", FORMAT)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 45)), jnp.float32)


@pytest.fixture(scope="module")
def w() -> lb.QuantArray:
    return lb.testing.random_array(TYPE)


@pytest.fixture(scope="module")
def product() -> Any:
    return jax.jit(lambda x, w, width: lb.matmul(x, w, width=width))


WIDER = lb.any_precision(2, 5, width=3, table_dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [lb.any_precision(2, 3), FORMAT, WIDER], ids=str)
def test_the_kit(fmt: lb.Format) -> None:
    lb.testing.check_format(fmt)


def test_codes_of_a_width_are_the_leading_bits(w: lb.QuantArray) -> None:
    planes = np.unpackbits(np.asarray(w.fields["planes"]), axis=-1, bitorder="little")[:, :, 0, :45]
    for width in FORMAT.widths:
        code = sum(planes[p].astype(int) << (width - 1 - p) for p in range(width))
        table = np.asarray(w.fields[f"table{width}"], np.float32)
        decoded = lb.dequantize(lb.QuantArray(w.fields, TYPE.at(width)))
        assert np.array_equal(decoded, np.take_along_axis(table, code, 1).T)


def test_all_widths_are_stored_once(w: lb.QuantArray) -> None:
    assert list(TYPE.fields) == ["planes", "table2", "table3", "table4"]
    assert TYPE.bits == 7 * (4 * 8 * 6 + 16 * (4 + 8 + 16))
    assert all(TYPE.at(b).fields == TYPE.fields for b in FORMAT.widths)
    assert [TYPE.role(field) for field in TYPE.fields] == ["code", "codebook", "codebook", "codebook"]


def test_a_width_is_chosen_when_it_runs(w: lb.QuantArray, product: Any) -> None:
    for width in (2, 3, 4):
        assert np.array_equal(product(X, w, jnp.int32(width)), lb.matmul(X, w, width=width))
    assert np.array_equal(product(X, w, jnp.int32(0)), lb.matmul(X, w, width=2))  # the nearest there is
    assert np.array_equal(product(X, w, jnp.int8(100)), lb.matmul(X, w, width=4))
    assert product._cache_size() == 2  # int32 and int8: no width compiles again


def test_a_width_reads_its_own_planes_alone(w: lb.QuantArray, product: Any) -> None:
    lowered = product.lower(X, w, jnp.int32(3))
    assert lowered.as_text().count("stablehlo.case") == 1
    sliced = re.findall(r"\(tensor<4x7x1x6xui8>\) -> tensor<([23])x7x1x6xui8>", lowered.as_text())
    assert sorted(sliced) == ["2", "3"]  # and width 4 takes all of them
    assert lowered.compile().as_text().count(" conditional(") == 1


@pytest.mark.parametrize(
    ("width", "rows", "name"), [(2, 1, "select"), (4, 1, "select"), (8, 1, "decode"), (3, 64, "decode")]
)
def test_the_form_that_is_cheaper_runs(width: int, rows: int, name: str) -> None:
    wide = lb.QuantType((("k", 4096), ("n", 4096)), "f32", lb.any_precision(2, 8, width))
    assert lb.plan((rows, 4096), wide, "cpu").forms[0].name == name


@pytest.mark.slow
def test_gradients_reach_the_table_of_the_width(w: lb.QuantArray, product: Any) -> None:
    gradient = jax.grad(lambda w, b: product(X, w, b).sum(), allow_int=True)
    for width in FORMAT.widths:
        found = gradient(w, jnp.int32(width)).fields
        expected = jax.grad(lambda w, b=width: lb.matmul(X, w, width=b).sum(), allow_int=True)(w).fields
        for other in FORMAT.widths:
            name = f"table{other}"
            assert np.array_equal(found[name], expected[name]) and bool(found[name].any()) == (other == width)


def test_what_is_refused(w: lb.QuantArray) -> None:
    with pytest.raises(ValueError, match="is read at widths 2 to 4, not 5"):
        lb.matmul(X, w, width=5)
    with pytest.raises(ValueError, match="is read at widths 2 to 4, not True"):
        TYPE.at(True)
    other = lb.testing.random_array(replace(TYPE, format=lb.bcq(2)))
    for width in (2, jnp.int32(2)):
        with pytest.raises(ValueError, match=r"^bcq\(bits=2\) is read at one width only"):
            lb.matmul(X, other, width=width)
    for wrong in (jnp.float32(2), jnp.array([2, 3])):
        with pytest.raises(TypeError, match=r"^width is \w+\[.*\]: give one integer"):
            lb.matmul(X, w, width=wrong)
    with pytest.raises(ValueError, match=r"3 widths under jax\.vmap"):
        jax.vmap(lambda b: lb.matmul(X, w, width=b))(jnp.arange(3))


@pytest.mark.parametrize(("lo", "hi"), [(0, 3), (4, 3), (3, 9), (2.0, 3)])
def test_widths_that_there_are_not(lo: Any, hi: Any) -> None:
    with pytest.raises(ValueError, match=r"^widths go from lo to hi with 1 <= lo <= hi <= 8, not"):
        lb.any_precision(lo, hi)


@pytest.mark.parametrize("width", [1, 5, 3.0])
def test_a_width_of_its_own_is_one_of_them(width: Any) -> None:
    with pytest.raises(ValueError, match=f"^width must be None or an int from lo = 2 to hi = 4, not {width}"):
        lb.any_precision(2, 4, width)


def test_readings_store_the_same_arrays() -> None:
    @lb.register_format("readings_that_differ", views=("width", lambda **_: (1, 2)))
    def differ(n: int, k: int, width: int = 1) -> Any:
        return param("scale", "f32", n=n, w=width).sum("w") * param("codes", "u8", n=n, k=k)

    with pytest.raises(ValueError, match=r"^param 'scale' occurs as f32\[n=7 w=1\] and as f32\[n=7 w=2\]"):
        _ = replace(TYPE, format=differ()).fields


def test_tables_of_the_wrong_width(w: lb.QuantArray) -> None:
    swapped = {**w.fields, "table3": w.fields["table4"]}
    with pytest.raises(ValueError, match=r"stores 'table3' as f16\[n=7 c=8\], but the array is float16\[7, 16\]"):
        lb.QuantArray.of(swapped, TYPE)
    with pytest.raises(ValueError, match=r"stores 'table3' as f16\[n=7 c=8\], but the array is float16\[7, 16\]"):
        lb.quantize_array(W, FORMAT, lambda w, fmt: swapped)
    missing = {name: a for name, a in w.fields.items() if name != "table2"}
    with pytest.raises(ValueError, match=r"stores \['planes', 'table2', 'table3', 'table4'\], but the fields are"):
        lb.QuantArray.of(missing, TYPE)


# --- The quantizer ---------------------------------------------------------------------------------------------------

W = np.random.default_rng(1).normal(size=(45, 7)).astype(np.float32)
EXACT = lb.any_precision(2, 4, table_dtype="float32")


def errors(q: lb.QuantArray, w: np.ndarray) -> list[float]:
    """Of every width, squared and added up."""
    read = (lb.dequantize(lb.QuantArray(q.fields, q.type.at(b))) for b in q.type.format.widths)
    return [float(jnp.square(r - w).sum()) for r in read]


def test_quantized_weights_are_what_k_means_found() -> None:
    q = lb.quantize_array(W, EXACT)
    codes, tables = nested_kmeans_rows(W.T, None, 2, 4)
    for b in EXACT.widths:
        assert np.array_equal(q.fields[f"table{b}"], tables[b].astype(np.float32))
        want = np.take_along_axis(tables[b].astype(np.float32), (codes >> (4 - b)).astype(int), 1)
        assert np.array_equal(lb.dequantize(lb.QuantArray(q.fields, q.type.at(b))), want.T)
    assert errors(q, W) == sorted(errors(q, W), reverse=True)
    rounded = lb.quantize_array(W, FORMAT)
    assert np.array_equal(rounded.fields["planes"], q.fields["planes"])
    assert np.array_equal(rounded.fields["table4"], tables[4].astype(np.float16))


@pytest.mark.slow
def test_it_traces() -> None:
    q = lb.quantize_array(W, EXACT)
    of = partial(lb.quantize_array, fmt=EXACT)
    stack = np.stack([W, -W])
    for made in (
        jax.jit(of)(W),
        jax.tree.map(itemgetter(0), jax.vmap(of)(stack)),
        lb.quantize_array(W.T, EXACT, dims=("n", "k")),
    ):
        assert all(np.array_equal(made.fields[name], a) for name, a in q.fields.items())


def test_errors_are_weighed_by_statistics() -> None:
    f = np.exp(np.random.default_rng(2).normal(size=45)).astype(np.float32)
    plain, weighed = (lb.quantize_array(W, EXACT, importance=g) for g in (None, jnp.asarray(f)))
    of_weights = lb.quantize_array(W, EXACT, importance=jnp.asarray(np.tile(f[:, None], (1, 7))))
    assert all(np.array_equal(weighed.fields[name], a) for name, a in of_weights.fields.items())
    # At the least width, that of k-means proper, each is the better one by its own measure.
    ours, theirs = (np.asarray(lb.dequantize(lb.QuantArray(q.fields, q.type.at(2)))) - W for q in (weighed, plain))
    assert (f[:, None] * ours**2).sum() < (f[:, None] * theirs**2).sum() and (ours**2).sum() > (theirs**2).sum()


def test_rules_weigh_by_the_statistics_that_are_named() -> None:
    model = nnx.Sequential(nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    rules = [lb.Rule("layers/0", EXACT, lb.nested_kmeans(("gradient_square",)))]
    batches, loss = [jnp.asarray(X[:, :16])], lambda m, x: jnp.square(m(x)).sum()
    stats = lb.calibrate(model, batches, rules=rules, loss=loss)
    array = lb.quantize(model, rules, stats=stats).layers[0].kernel.array
    kernel, measured = model.layers[0].kernel[...], jnp.asarray(stats["layers/0"].gradient_square)
    same = lb.quantize_array(kernel, EXACT, importance=measured)
    assert all(np.array_equal(array.fields[name], a) for name, a in same.fields.items())


def test_weights_that_it_refuses() -> None:
    with pytest.raises(TypeError, match=r"^NestedKMeans\(\) makes any_precision, not bcq\(bits=2\)$"):
        lb.quantize_array(W, lb.bcq(2), lb.nested_kmeans())
    with pytest.raises(ValueError, match=r"^w: 'table2' overflows float16; use table_dtype='float32' or 'bfloat16'$"):
        lb.quantize_array(1e6 * W, FORMAT, name="w")
    with pytest.raises(ValueError, match=r"^w: 'table2' underflows float16; use table_dtype='float32' or scale"):
        lb.quantize_array(1e-6 * W, FORMAT, name="w")
    with pytest.raises(ValueError, match=r"^w has 1 NaN or inf among its 315 entries"):
        lb.quantize_array(np.where(W == W.max(), np.nan, W), FORMAT, name="w")


# --- Tables for given codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [("k", "n"), pytest.param(("n", "k"), marks=pytest.mark.slow)])
def test_refitted_tables_are_the_means_of_what_codes_stand_for(dims: tuple[str, str]) -> None:
    rng = np.random.default_rng(3)
    t = lb.QuantType(tuple(zip(dims, (24, 5), strict=True)), "f32", EXACT)
    given = [lb.testing.random_array(t, seed=seed) for seed in (0, 1)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *given)
    w, f = rng.normal(size=(2, 24, 5)).astype(np.float32), rng.uniform(1, 2, (2, 24, 5)).astype(np.float32)
    made = refit_tables(stack, w, jnp.asarray(f))
    assert np.array_equal(made.fields["planes"], stack.fields["planes"])
    for b in EXACT.widths:
        each = {id(q): np.asarray(lb.dequantize(lb.QuantArray(q.fields, t.at(b)))) for q in given}
        new = np.asarray(lb.dequantize(lb.QuantArray(made.fields, t.at(b))))
        for at, q in enumerate(given):
            for n in range(t.shape[dims.index("n")]):
                old, got, x, g = (np.take(a, n, dims.index("n")) for a in (each[id(q)], new[at], w[at], f[at]))
                for value in np.unique(old):  # random entries differ, so one value is one code
                    inside = old == value
                    want = np.average(x[inside].astype(np.float64), weights=g[inside])
                    # float64 sums of at most 24 products, rounded to float32
                    assert np.abs(got[inside] - want).max() <= 2.0**-23 * np.abs(x[inside]).max()
            table, before = np.asarray(made.fields[f"table{b}"][at]), np.asarray(q.fields[f"table{b}"])
            unused = ~(table[..., None] == np.unique(new[at])).any(-1)
            assert np.array_equal(table[unused], before[unused])


def test_refitting_what_the_quantizer_made_changes_nothing() -> None:
    q = lb.quantize_array(W, EXACT)
    again = refit_tables(q, W)
    for b in EXACT.widths:  # both are means in float64, rounded to float32
        np.testing.assert_allclose(again.fields[f"table{b}"], q.fields[f"table{b}"], rtol=2.0**-23)
    moved = W + 0.1 * np.random.default_rng(4).normal(size=W.shape).astype(np.float32)
    assert all(
        after < before for after, before in zip(errors(refit_tables(q, moved), moved), errors(q, moved), strict=True)
    )


def test_what_refitting_refuses() -> None:
    q = lb.quantize_array(W, EXACT)
    with pytest.raises(TypeError, match=r"^refit_tables takes any_precision arrays; this one is bcq\(bits=2\)$"):
        refit_tables(lb.quantize_array(W, lb.bcq(2)), W)
    with pytest.raises(ValueError, match=r"^up has shape \(7, 45\), but the array has \(45, 7\): give the weight"):
        refit_tables(q, W.T, name="up")
    with pytest.raises(ValueError, match=r"^the weight has 315 NaN or inf among its 315 entries"):
        refit_tables(q, W * np.nan)
    with pytest.raises(ValueError, match=r"^the importance of the weight has 45 NaN, inf or negative numbers"):
        refit_tables(q, W, -jnp.ones(45))
    with pytest.raises(ValueError, match=r"^the weight: 'table2' overflows float16; use table_dtype="):
        refit_tables(lb.quantize_array(W, FORMAT), 1e6 * W)
