"""GPTQ and LNQ: quantizers under the products of each two inputs, of all outputs or of chunks of them."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.nn import LayerStats
from lowbit.quantizers import refit_tables
from lowbit.quantizers.chunks import in_chunks
from lowbit.quantizers.descent import descend
from lowbit.quantizers.tables import best_table, codes_of, planes_of
from lowbit.testing.quantizing import check_quantizer
from lowbit.testing.tolerance import gamma
from tests.models import arrays, assert_same

K, N = 70, 8
RNG = np.random.default_rng(0)
W = RNG.standard_normal((K, N)).astype(np.float32)
X = RNG.standard_normal((300, K)) @ (np.eye(K) + 0.3 * RNG.standard_normal((K, K)))
GRAM = jnp.asarray(X.T @ X / len(X), jnp.float32)
OTHER = jnp.asarray(np.diag(RNG.uniform(0.1, 3, K)), jnp.float32)
ALIKE = lb.any_precision(2, 2, table_dtype="float32")
EITHER = [pytest.param(lb.uniform(2), lb.gptq(), marks=pytest.mark.slow), (ALIKE, lb.lnq(1, 1))]


def error(q: lb.QuantArray, gram: Any = GRAM) -> float:
    """tr(D H D^T), in float64."""
    d = np.asarray(lb.dequantize(q), np.float64) - W
    return float((d * (np.asarray(gram, np.float64) @ d)).sum())


def objective(gram: Any, w: Any, codes: Any, table: Any) -> np.ndarray:
    """The same of each row, of rows w [n, k]."""
    d = np.take_along_axis(np.asarray(table, np.float64), np.asarray(codes, np.int64), 1) - np.asarray(w)
    return np.einsum("nk,kl,nl->n", d, np.asarray(gram, np.float64), d)


def rounded_up_to(gram: Any, errors: np.ndarray) -> np.ndarray:
    """What float32 may make of an objective: it compares sums of K squares times K entries."""
    return errors * (1 + gamma(3 * len(gram), "f32"))


# ---------------------------------------------------------------- GPTQ


def by_definition(w: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int, order: Any) -> Any:
    """Codes of w [n, k], in float64, with the inverse of H updated after each input."""
    w, left, out = w.astype(np.float64).copy(), list(order), np.zeros(w.shape, np.uint8)
    inverse = np.linalg.inv(gram)
    for i in order:
        out[:, i] = np.clip(np.round(w[:, i] / scale[:, i]) + zero[:, i], 0, top)
        off = (w[:, i] - scale[:, i] * (out[:, i] - zero[:, i])) / inverse[i, i]
        w[:, left] -= off[:, None] * inverse[i, left]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        left.remove(i)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_the_definition(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.quantizers.feedback.BLOCK", 32)
    q = lb.quantize_array(W, lb.uniform(3, group=20), lb.gptq(act_order), importance=GRAM)
    gram = np.asarray(GRAM, np.float64)
    moments = gram.diagonal() * (1 + 1e-4)
    damped = gram + (1e-4 + 0.01) * gram.diagonal().mean() * np.eye(K)
    order = np.argsort(-moments, kind="stable") if act_order else range(K)
    scale, zero = (np.repeat(np.asarray(q.fields[f], np.float64), 20, 1)[:, :K] for f in ("scale", "zero"))
    planes = np.unpackbits(np.asarray(q.fields["planes"]), axis=-1, bitorder="little")[..., :20]
    codes = sum(planes[p].astype(int) << p for p in range(3)).reshape(N, -1)[:, :K]
    np.testing.assert_array_equal(codes, by_definition(W.T, damped, scale, zero, 7, order))


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    fmt = lb.uniform(4, group=16, scale_dtype="float32")
    nearest = lb.quantize_array(W, fmt)
    for q in (lb.quantize_array(W, fmt, lb.gptq()), lb.quantize_array(W, fmt, lb.gptq(), importance=OTHER)):
        np.testing.assert_array_equal(lb.dequantize(q), lb.dequantize(nearest))


@pytest.mark.slow
def test_it_beats_rounding_to_nearest_and_the_largest_inputs_first_is_better() -> None:
    fmt = lb.uniform(3, group=35)
    nearest, plain, ordered = (
        error(lb.quantize_array(W, fmt, q, importance=GRAM)) for q in (None, lb.gptq(act_order=False), lb.gptq())
    )
    assert ordered < plain < 0.6 * nearest


@pytest.mark.slow
def test_a_group_whose_scale_underflows_spoils_no_other() -> None:
    zeros, tiny = W.copy(), W.copy()
    zeros[:35, 0] = tiny[:35, 0] = 0
    tiny[3, 0] = 1e-8  # a seventh of it is nothing in float16
    fmt = lb.uniform(3, group=35, scale_dtype="float16")
    a, b = (lb.dequantize(lb.quantize_array(w, fmt, lb.gptq(False), importance=GRAM)) for w in (zeros, tiny))
    np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- LNQ


def start(rows: int = N, bits: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    q = lb.quantize_array(W[:, :rows], lb.any_precision(bits, bits, table_dtype="float32"))
    return jnp.asarray(W.T[:rows]), codes_of(q.fields["planes"], bits, K), q.fields[f"table{bits}"]


def test_no_step_raises_the_objective() -> None:
    w, codes, table = start()
    before = objective(GRAM, w, codes, table)
    first = before
    for _ in range(4):
        table = best_table(GRAM, w, codes, table)
        fitted = objective(GRAM, w, codes, table)
        assert (fitted <= rounded_up_to(GRAM, before)).all()
        codes = descend(GRAM, w, codes, table)
        before = objective(GRAM, w, codes, table)
        assert (before <= rounded_up_to(GRAM, fitted)).all()
    assert (before < 0.7 * first).all()


def test_tables_are_those_of_least_squares_and_a_code_that_nobody_has_keeps_its_entry() -> None:
    w, codes, table = start(rows=3)
    codes = jnp.where(codes == 3, 2, codes)
    found = np.asarray(best_table(GRAM, w, codes, table))
    half = np.linalg.cholesky(np.asarray(GRAM, np.float64))
    for row in range(3):
        hot = np.eye(4)[np.asarray(codes[row])][:, :3]
        best = np.linalg.lstsq(half.T @ hot, half.T @ W[:, row].astype(np.float64), rcond=None)[0]
        condition = np.linalg.cond(hot.T @ np.asarray(GRAM) @ hot)
        np.testing.assert_allclose(found[row, :3], best, rtol=condition * gamma(3 * K, "f32"))
        assert found[row, 3] == table[row, 3]


@pytest.mark.parametrize("seed", range(4))
def test_descent_ends_where_exhaustive_search_does(seed: int) -> None:
    """Four inputs that depend on each other a little, four levels: every combination is tried."""
    rng = np.random.default_rng(seed)
    half = np.eye(4) + 0.15 * rng.standard_normal((4, 4))
    gram, w = half @ half.T, rng.standard_normal((5, 4))
    table = np.sort(rng.standard_normal((5, 4)))
    every = np.array(list(itertools.product(range(4), repeat=4)))
    costs = np.stack([objective(gram, np.repeat(w[r : r + 1], 256, 0), every, np.repeat(table[r : r + 1], 256, 0))
                      for r in range(5)])  # fmt: skip
    codes = jnp.asarray(np.abs(w[:, :, None] - table[:, None]).argmin(2), jnp.uint8)
    for _ in range(4):
        codes = descend(jnp.float32(gram), jnp.float32(w), codes, jnp.float32(table))
    np.testing.assert_array_equal(codes, every[costs.argmin(1)])


@pytest.mark.slow
def test_after_descent_no_single_code_can_be_changed_for_the_better() -> None:
    w, codes, table = start(rows=2)
    for _ in range(30):
        codes = descend(GRAM, w, codes, table)
    least = objective(GRAM, w, codes, table)
    for i, c in itertools.product(range(K), range(4)):
        assert (least <= rounded_up_to(GRAM, objective(GRAM, w, codes.at[:, i].set(c), table))).all()


@pytest.mark.slow
def test_lnq_beats_kmeans_and_more_rounds_are_not_worse() -> None:
    kmeans = error(lb.quantize_array(W, ALIKE, importance=GRAM.diagonal()))
    errors = [error(lb.quantize_array(W, ALIKE, lb.lnq(rounds), importance=GRAM)) for rounds in range(4)]
    assert (np.array(errors[1:]) <= rounded_up_to(GRAM, np.array(errors[:-1]))).all()
    assert errors[2] < 0.7 * kmeans


@pytest.mark.slow
def test_what_rounding_makes_worse_is_not_taken() -> None:
    """Weights that differ by less than tables in bfloat16 can tell: what least squares find is rounded off again."""
    rng, rows = np.random.default_rng(0), 64
    w = np.float32([-2, -1, 1, 3])[rng.integers(0, 4, (rows, K))] * (1 + 2**-9 * rng.standard_normal((rows, K)))
    fmt = lb.any_precision(2, 2, table_dtype="bfloat16")
    errors, same = [], np.tile(np.arange(K), (rows, 1))
    for quantizer, importance in ((None, GRAM.diagonal()), (lb.lnq(), GRAM)):
        q = lb.quantize_array(w, fmt, quantizer, dims=("n", "k"), importance=importance)
        errors.append(objective(GRAM, w, same, lb.dequantize(q)))
    assert (errors[1] <= rounded_up_to(GRAM, errors[0])).all() and (errors[1] < errors[0]).any()
    start = lb.quantize_array(w, fmt, dims=("n", "k"))
    before, after = (objective(GRAM, w, same, lb.dequantize(q)) for q in (start, refit_tables(start, w, gram=GRAM)))
    assert (after <= rounded_up_to(GRAM, before)).all() and (after < before).any()


@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_tables_that_cannot_be_solved_for_stay_as_they_are(value: float) -> None:
    """Solutions that are no minimum, of a matrix that is no mean of products, are not taken."""
    w, codes, table = start(rows=2)
    np.testing.assert_array_equal(best_table(value * GRAM, w, codes, table), table)


def test_a_change_of_tables_costs_a_ridge() -> None:
    """The entry of a code that only input 0 has, whose second moment is the ridge, goes half of the way."""
    k = 4
    ridge = 1e-7 * (k - 1)
    gram = jnp.diag(jnp.array([ridge, 1, 1, 1], jnp.float32))
    found = best_table(gram, jnp.array([[1.0, 2, 2, 2]]), jnp.array([[0, 1, 1, 1]], jnp.uint8), jnp.array([[0.0, 2]]))
    # k times the mean second moment is 3 and the ridge itself; the moment is rounded once, and so is each step.
    np.testing.assert_allclose(found, [[0.5, 2]], rtol=2e-7 + gamma(3 * k, "f32"))


@pytest.mark.slow
def test_tables_of_nested_codes_are_refitted_under_the_same_matrix() -> None:
    nested = lb.quantize_array(W, lb.any_precision(1, 3, table_dtype="float32"), importance=GRAM.diagonal())
    refitted = refit_tables(nested, W, gram=jnp.stack([GRAM, OTHER]))
    for width in (1, 2, 3):
        errors = []
        for q in (nested, refitted):
            d = np.asarray(lb.dequantize(QuantArray(q.fields, q.type.at(width))), np.float64) - W
            both = np.stack([np.asarray(GRAM, np.float64) @ d, np.asarray(OTHER, np.float64) @ d])
            errors.append((d * np.where(np.arange(N) < N // 2, both[0], both[1])).sum(0))
        old, new = errors
        assert (new <= rounded_up_to(GRAM, old)).all() and new.sum() < old.sum()
    np.testing.assert_array_equal(refitted.fields["planes"], nested.fields["planes"])
    narrow = lb.quantize_array(W, lb.any_precision(1, 1))
    with pytest.raises(
        ValueError, match=r"^the weight: 'table1' overflows float16; use table_dtype='float32' or 'bfloat"
    ):
        refit_tables(narrow, 1e6 * W, gram=GRAM)
    with pytest.raises(ValueError, match="both importance and gram were given"):
        refit_tables(nested, W, GRAM.diagonal(), gram=GRAM)


def test_refitted_tables_are_those_of_the_nested_codes() -> None:
    fmt, both = lb.any_precision(1, 2, table_dtype="float32"), jnp.stack([GRAM, OTHER])
    q = lb.quantize_array(W, fmt, lb.refitted_kmeans(), importance=both)
    nested = lb.quantize_array(W, fmt, importance=GRAM.diagonal())
    np.testing.assert_array_equal(q.fields["planes"][:, : N // 2], nested.fields["planes"][:, : N // 2])
    again = refit_tables(q, W, gram=both)
    means = lb.quantize_array(W, fmt, importance=in_chunks(both.diagonal(axis1=1, axis2=2), N).T)
    for width in (1, 2):
        errors = []
        for one in (means, q, again):
            d = np.asarray(lb.dequantize(QuantArray(one.fields, one.type.at(width))), np.float64) - W
            each = [(d * (np.asarray(g, np.float64) @ d)).sum(0) for g in both]
            errors.append(np.where(np.arange(N) < N // 2, *each))
        assert errors[1].sum() < errors[0].sum()
        np.testing.assert_allclose(errors[2], errors[1], rtol=1e-3)  # 1e-4 of the moments, and the ridge
    with pytest.raises(TypeError, match=r"RefittedKMeans.* any_precision"):
        lb.quantize_array(W, lb.bcq(2), lb.refitted_kmeans())


@pytest.mark.slow
def test_each_chunk_is_refitted_as_if_alone() -> None:
    """Also where an input goes against most others, so that its products with them add up to less than nothing."""
    against = np.where(GRAM[0] > 0, -1, 1) * np.where(np.arange(K) == 0, -1, 1)
    both, fmt = GRAM * jnp.asarray(against[:, None] * against[None], jnp.float32), lb.any_precision(1, 2)
    assert both[:2].sum() < 0
    whole = lb.quantize_array(W, fmt, lb.refitted_kmeans(), importance=both)
    parts = lb.quantize_array(W, fmt, lb.refitted_kmeans(), importance=jnp.stack([both, both]))
    means = lb.quantize_array(W, fmt, importance=both.diagonal())
    assert error(parts, both) == pytest.approx(error(whole, both), rel=1e-3)  # rounding of the solved tables
    assert error(whole, both) < error(means, both)


def test_codes_of_planes_and_back() -> None:
    q = lb.quantize_array(W, lb.any_precision(3, 3))
    codes = codes_of(q.fields["planes"], 3, K)
    assert codes.max() == 7
    np.testing.assert_array_equal(planes_of(codes, 3), q.fields["planes"])


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "bits", "quantizer"), [
    (lb.uniform(3, group=16, scale_dtype="float16"), 3, lb.gptq()),
    (lb.any_precision(3, 3), 3, lb.lnq()),
], ids=str)  # fmt: skip
def test_zero_constant_and_huge_weights(fmt: lb.Format, bits: int, quantizer: Any) -> None:
    check_quantizer(fmt, 5, 70, quantizer)


# ---------------------------------------------------------------- chunks of outputs


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "quantizer"), [(lb.uniform(3), lb.gptq()), (ALIKE, lb.lnq(1, 1))], ids=str)
def test_each_chunk_is_quantized_for_its_own_errors(fmt: lb.Format, quantizer: Any) -> None:
    both = lb.quantize_array(W, fmt, quantizer, importance=jnp.stack([GRAM, OTHER]))
    halves = [lb.quantize_array(W[:, : N // 2], fmt, quantizer, importance=GRAM),
              lb.quantize_array(W[:, N // 2 :], fmt, quantizer, importance=OTHER)]  # fmt: skip
    np.testing.assert_array_equal(lb.dequantize(both), jnp.concatenate([lb.dequantize(h) for h in halves], 1))


def test_guided_grams_weigh_rows_by_what_errors_of_a_chunk_cost() -> None:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    batches = [jnp.asarray(RNG.standard_normal((5, 3)), jnp.float32) for _ in range(2)]

    def loss(model: Any, x: jax.Array) -> jax.Array:
        return jnp.square(model(x)).mean()

    outer = nnx.Dict(layer=model)
    found = lb.calibrate(
        outer, batches, statistics=["guided_gram", "output_gradient"], loss=lambda m, x: loss(m.layer, x), chunks=2
    )["layer"]
    x = np.concatenate(batches).astype(np.float64)
    dy = 2 * np.asarray(model(jnp.concatenate(batches)), np.float64) / 20
    costs = np.square(1e3 * dy).reshape(10, 2, 2).mean(2)
    expected = np.einsum("rc,rk,rl->ckl", costs, x, x) / 10
    bound = gamma(60, "f32") * np.einsum("rc,rk,rl->ckl", costs, abs(x), abs(x)) / 10
    assert (np.abs(np.asarray(found.guided_gram) - expected) <= bound).all()
    np.testing.assert_allclose(found.output_gradient, np.square(dy).mean(0), rtol=gamma(60, "f32"))


def test_a_batch_without_rows_counts_for_nothing() -> None:
    model, x = nnx.Dict(a=nnx.Linear(3, 4, rngs=nnx.Rngs(0))), jnp.asarray(RNG.standard_normal((5, 3)), jnp.float32)
    measure = partial(lb.calibrate, statistics=["guided_gram"], loss=lambda m, x: jnp.square(m.a(x)).sum(), chunks=2)
    found, plain = measure(model, [x, x[:0]])["a"], measure(model, [x])["a"]
    assert found.rows == 5
    np.testing.assert_array_equal(found.guided_gram, plain.guided_gram)


@pytest.mark.slow
def test_rules_measure_what_the_quantizer_weighs_by() -> None:
    model = nnx.Dict(a=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    rules = [lb.Rule("a", ALIKE, lb.lnq(1, 1, weighs_by=("guided_gram",))), lb.Rule("b", lb.uniform(3), lb.gptq())]
    x = jnp.asarray(RNG.standard_normal((9, 6)), jnp.float32)
    stats = lb.calibrate(model, [x], rules=rules, loss=lambda m, x: jnp.square(m.b(m.a(x))).sum(), chunks=4)
    a, b = stats["a"].guided_gram, stats["b"].gram
    assert a is not None and a.shape == (4, 6, 6) and b is not None and b.shape == (4, 4)
    assert stats["a"].gram is None and stats["b"].guided_gram is None
    small = lb.quantize(model, rules, stats=stats)
    alone = lb.quantize_array(model.a.kernel.get_value(), ALIKE, rules[0].quantizer, importance=a)
    np.testing.assert_array_equal(small.a.kernel.array.fields["planes"], alone.fields["planes"])


# ---------------------------------------------------------------- calibrations that say little


def indefinite(k: int, loud: int) -> jax.Array:
    """Two inputs among k whose products are a little larger than any two numbers' may be, `loud` as large as others."""
    pair = np.array([[1, 1.005], [1.005, 1]]) * loud
    return jnp.asarray(np.block([[pair, np.zeros((2, k - 2))], [np.zeros((k - 2, 2)), np.eye(k - 2)]]), jnp.float32)


@pytest.mark.parametrize(("fmt", "quantizer"), EITHER, ids=str)
def test_products_that_are_not_positive_definite_are_damped_and_it_is_said(
    fmt: lb.Format, quantizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    singular = jnp.outer(jnp.ones(K), jnp.ones(K))  # all inputs are one: 1e-4 is enough, and nothing is said
    trouble = "the weight: the products of inputs are not positive definite"
    added = f"lowbit: {trouble}: 0.01 of the mean second moment is added to each"
    for gram, said in ((singular, []), (indefinite(K, 1), [added])):
        q = lb.quantize_array(W, fmt, quantizer, importance=gram)
        assert np.isfinite(lb.dequantize(q)).all() and caplog.messages == said
    even = "not even with the mean second moment added to each: calibrate on more rows"
    with pytest.raises(ValueError, match=f"^{trouble}, {even}$"):
        lb.quantize_array(jnp.ones((500, 4)), fmt, quantizer, importance=indefinite(500, 10**6))


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "quantizer"), EITHER, ids=str)
def test_layers_that_saw_nothing_or_only_zeros_are_named_and_their_errors_weigh_the_same(
    fmt: lb.Format, quantizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = nnx.Dict(a=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(6, 4, rngs=nnx.Rngs(1)))
    rules = [lb.Rule("**", fmt, quantizer)]
    plain = lb.quantize(model, rules)
    stats = lb.calibrate(model, [jnp.zeros((3, 6))], lambda m, x: m.a(x), rules=rules)
    assert set(stats) == {"a"} and caplog.messages == []
    small = lb.quantize(model, rules, stats=stats)
    assert caplog.messages == [
        "lowbit: stats has nothing of b: all their errors weigh the same",
        "lowbit: what stats has of a is zero: all their errors weigh the same",
    ]
    for name in ("a", "b"):
        np.testing.assert_array_equal(lb.dequantize(small[name].kernel.array), lb.dequantize(plain[name].kernel.array))


def test_products_with_nan_are_refused_by_the_layers_name() -> None:
    model = nnx.Dict(a=nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    rules = [lb.Rule("a", ALIKE, lb.lnq(weighs_by=("guided_gram",)))]
    stats = lb.calibrate(model, [jnp.full((3, 6), jnp.inf)], rules=rules, loss=lambda m, x: m.a(x).sum())
    message = (
        "'guided_gram' of layer 'a' in stats has 36 NaN or inf among its 36 numbers: measure it on data for which "
    )
    with pytest.raises(ValueError, match=f"^{message}all values of the model are finite$"):
        lb.quantize(model, rules, stats=stats)


@pytest.mark.slow
def test_rows_whose_weights_all_count_for_nothing_are_clustered_as_if_they_counted_alike() -> None:
    sensitivity = jnp.asarray(RNG.uniform(0, 1, (K, N)) ** 4, jnp.float32).at[:, 2].set(0)
    fmt = lb.any_precision(2, 3)
    weighed, plain = (lb.dequantize(lb.quantize_array(W, fmt, importance=f)) for f in (sensitivity, None))
    np.testing.assert_array_equal(weighed[:, 2], plain[:, 2])
    assert (weighed[:, 1] != plain[:, 1]).any()
    greedy, unweighed = (
        lb.dequantize(lb.quantize_array(W, lb.bcq(2), lb.greedy(), importance=f)) for f in (sensitivity, None)
    )
    np.testing.assert_allclose(greedy[:, 2], unweighed[:, 2], rtol=gamma(2 * K, "f32"))


@pytest.mark.parametrize(("fmt", "quantizer"), [(lb.uniform(2), lb.gptq()), (ALIKE, lb.lnq(1, 1))], ids=str)
def test_finished_layers_are_kept_and_the_matrix_tells_them_apart(
    fmt: lb.Format, quantizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rules = nnx.Dict(a=nnx.Linear(K, N, rngs=nnx.Rngs(0))), [lb.Rule("a", fmt, quantizer)]
    stats = {"a": LayerStats(None, None, 9, gram=GRAM)}
    want = arrays(lb.quantize(model, rules, stats=stats, resume=tmp_path))
    monkeypatch.setattr(type(quantizer), "__call__", lambda *_: pytest.fail("the layer was solved again"))
    assert_same(arrays(lb.quantize(model, rules, stats=stats, resume=tmp_path)), want)
    with pytest.raises(pytest.fail.Exception):
        lb.quantize(model, rules, stats={"a": LayerStats(None, None, 9, gram=OTHER)}, resume=tmp_path)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("call", "message"), [
    (partial(lb.quantize_array, W, lb.bcq(2), lb.gptq()), "makes uniform, not bcq"),
    (partial(lb.quantize_array, W, lb.any_precision(2, 3), lb.lnq()), "finds codes for one width, not for any_precis"),
    (partial(lb.gptq, damping=0.0), "damping is a share of the mean second moment, above 0 and below 1, not 0.0"),
    (partial(lb.lnq, cycles=0), "rounds must be an int, 1 or more, not 0"),
    (partial(lb.quantize_array, W, ALIKE, lb.lnq(), importance=jnp.stack([GRAM] * 3)),
     "has 3 chunks of outputs, and the weight 8 outputs: they must divide it"),
    (partial(lb.quantize_array, W, lb.codebook(1, 4, vec=2), lb.additive_codebooks(),
             importance=jnp.stack([GRAM] * 2)), r"finds codebooks for all outputs at once: .* not \(2, 70, 70\)"),
    (partial(lb.calibrate, nnx.Dict(a=nnx.Linear(2, 3, rngs=nnx.Rngs(0))), [jnp.ones((1, 2))],
             statistics=["guided_gram"], loss=lambda m, x: m.a(x).sum(), chunks=2),
     "layer 'a' has 3 outputs, which 2 chunks do not divide"),
    (partial(lb.calibrate, nnx.Dict(a=nnx.Linear(2, 3, rngs=nnx.Rngs(0))), [jnp.ones((1, 2))], chunks=0),
     "chunks must be a positive int, parts of each layer's outputs, not 0"),
])  # fmt: skip
def test_what_cannot_be_done(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
