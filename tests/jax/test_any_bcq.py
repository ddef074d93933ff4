"""Nested binary coding: any_bcq and progressive expansion, which makes it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.quantizers import binary, expansion
from tests.jax.test_solvers import TINY, error_bound, mse, zoo

FORMAT = lb.any_bcq(2, 4, group=24, offset=True)
TYPE = lb.QuantType((("k", 45), ("n", 7)), "f32", FORMAT)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 45)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(45, 7)), jnp.float32)


def at(w: lb.QuantArray, width: int) -> lb.QuantArray:
    return lb.QuantArray(w.fields, w.type.at(width))


def alone(w: lb.QuantArray, b: int) -> lb.QuantArray:
    """Width b as a bcq array of its own."""
    fmt = lb.bcq(b, group=w.type.format["group"], offset=w.type.format["offset"])
    names = {"alpha": f"alpha{b}", "beta": f"beta{b}"} if fmt["offset"] else {"alpha": f"alpha{b}"}
    fields = {"planes": w.fields["planes"][:b], **{ours: w.fields[theirs] for ours, theirs in names.items()}}
    return lb.QuantArray.of(fields, replace(w.type, format=fmt))


# --- The format ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [lb.any_bcq(1, 2), FORMAT.at(3)], ids=str)
def test_the_kit(fmt: lb.Format) -> None:
    lb.testing.check_format(fmt)


def test_a_width_is_binary_coding_with_its_own_scales() -> None:
    w = lb.testing.random_array(TYPE)
    for width in FORMAT.widths:
        assert np.array_equal(lb.dequantize(at(w, width)), lb.dequantize(alone(w, width)))
        assert np.array_equal(lb.matmul(X, w, width=width), lb.matmul(X, alone(w, width)))


def test_planes_are_stored_once() -> None:
    assert list(TYPE.fields) == ["alpha2", "alpha3", "alpha4", "beta2", "beta3", "beta4", "planes"]
    assert TYPE.bits == 7 * 2 * (4 * 24 + 32 * (2 + 3 + 4 + 3))
    assert [TYPE.role(field) for field in TYPE.fields] == 6 * ["scale"] + ["code"]


@pytest.mark.parametrize("rows", [1, 64])
def test_a_width_costs_what_binary_coding_of_it_costs(rows: int) -> None:
    """The same forms in the same order, and the bytes of three planes."""

    def costs(fmt: lb.Format) -> list[Any]:
        t = lb.QuantType((("k", 512), ("n", 1024)), "f32", fmt)
        return [(form.name, form.cost) for form in lb.plan((rows, 512), t, "cpu").forms]

    assert costs(lb.any_bcq(2, 4, group=128).at(3)) == costs(lb.bcq(3, group=128))


def test_a_width_is_chosen_when_it_runs() -> None:
    w = lb.testing.random_array(TYPE)
    product = jax.jit(lambda x, w, width: lb.matmul(x, w, width=width))
    for width in (2, 3, 4):
        assert np.array_equal(product(X, w, jnp.int32(width)), lb.matmul(X, at(w, width)))
    assert product._cache_size() == 1


def test_what_the_format_refuses() -> None:
    with pytest.raises(ValueError, match=r"^widths go from lo to hi with 1 <= lo <= hi <= 8, not from 4 to 3"):
        lb.any_bcq(4, 3)
    with pytest.raises(ValueError, match=r"^width must be None or an int from lo = 2 to hi = 4, not 5"):
        lb.any_bcq(2, 4, width=5)
    with pytest.raises(ValueError, match=r"^offset must be True or False, not 1"):
        lb.any_bcq(2, 4, offset=1)
    with pytest.raises(ValueError, match=r"^group must be a positive int"):
        lb.any_bcq(2, 4, group=0)


# --- Progressive expansion -------------------------------------------------------------------------------------------


def decoded(code: expansion.NestedCode, i: int) -> np.ndarray:
    alpha = np.asarray(code.alphas[i], np.float64)
    signs = 2 * np.asarray(code.bits[:, : alpha.shape[1]], np.float64) - 1
    return np.einsum("rp,rpt->rt", alpha, signs) + (np.asarray(code.betas[i])[:, None] if code.betas else 0)


def expanded(w: np.ndarray, f: np.ndarray, theta: np.ndarray, signs: np.ndarray, rounds: int) -> tuple[Any, Any]:
    """One plane after these, weight by weight, in float64; theta is alphas, then the offset if there is one."""
    count, ones = len(signs), np.ones((len(theta) - len(signs), len(w)))
    theta = np.insert(theta, count, 0)
    for _ in range(rounds):
        left = w - theta[:count] @ signs - theta[count + 1 :].sum()
        every = np.stack([*signs, np.where(left >= 0, 1.0, -1.0), *ones])
        theta = np.linalg.lstsq((every * np.sqrt(f)).T, w * np.sqrt(f), rcond=None)[0]
    return theta, every[: count + 1]


@pytest.mark.slow
@pytest.mark.parametrize(("weighed", "offset"), [(False, False), (True, True)])
def test_expansion_matches_the_oracle(weighed: bool, offset: bool) -> None:
    rng = np.random.default_rng(3)
    values = jnp.asarray(rng.normal(size=(6, 64)) + rng.exponential(3, (6, 64)), jnp.float32)
    f = jnp.asarray(rng.uniform(0.1, 10, (6, 64)), jnp.float32) if weighed else jnp.ones((6, 64))
    given = {"rounds": 5, "offset": offset, "importance": f if weighed else None}
    code, start = expansion.solve(values, 2, 4, **given), binary.solve(values, 2, **given)
    for row in range(6):
        theta, signs = np.asarray(start.alpha[row], np.float64), 2.0 * np.asarray(start.bits[row]) - 1
        theta = theta if start.beta is None else np.append(theta, start.beta[row])
        for width in (3, 4):
            theta, signs = expanded(np.asarray(values[row], np.float64), np.asarray(f[row]), theta, signs, 5)
            assert np.array_equal(signs > 0, code.bits[row, :width] == 1)


@pytest.mark.slow
@pytest.mark.parametrize(("lo", "offset"), [(1, False), (2, True)])
def test_no_width_is_worse_than_a_narrower_one_nor_than_its_best_scales(lo: int, offset: bool) -> None:
    """In degenerate groups too; and the least width is the alternating solver's."""
    values = zoo()
    code = expansion.solve(values, lo, 4, offset=offset)
    errors = [mse(values, decoded(code, i)) for i in range(len(code.alphas))]
    start = mse(values, binary.decode(binary.solve(values, lo, offset=offset)))
    assert (np.abs(errors[0] - start) <= 2 * error_bound(np.asarray(values), lo)).all()
    for width, (before, after) in enumerate(pairwise(errors), lo + 1):
        assert (after <= before + 2 * error_bound(np.asarray(values), width)).all()
    for row, w in enumerate(np.asarray(values, np.float64)):
        signs = 2.0 * np.asarray(code.bits[row]) - 1
        every = np.stack([*signs, np.ones_like(w)]) if offset else signs
        least = w - every.T @ np.linalg.lstsq(every.T, w, rcond=None)[0]
        # And scales that are subnormal may be flushed to zero.
        assert errors[-1][row] <= (least**2).mean() + 2 * error_bound(values, 4)[row] + (4 * TINY) ** 2


@pytest.mark.slow
def test_the_least_width_is_the_alternating_solvers() -> None:
    w = lb.quantize_array(W, FORMAT)
    expected = lb.quantize_array(W, lb.bcq(2, group=24, offset=True), lb.alternating())
    assert np.array_equal(lb.dequantize(at(w, 2)), lb.dequantize(expected))


@pytest.mark.slow
def test_a_nested_width_is_near_one_of_its_own() -> None:
    """N(0, 1) in groups of 128: 1.09 times the error of alternating at 3 bits, 1.39 times at 4."""
    w = jax.random.normal(jax.random.key(0), (1024, 64))
    nested = lb.quantize_array(w, lb.any_bcq(2, 4, group=128))

    def error(q: lb.QuantArray) -> float:
        return float(jnp.mean((lb.dequantize(q) - w) ** 2))

    ratios = {b: error(at(nested, b)) / error(lb.quantize_array(w, lb.bcq(b, group=128))) for b in (3, 4)}
    assert 1 <= ratios[3] < 1.12
    assert 1 <= ratios[4] < 1.45


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(45,), (45, 7)])
def test_importance_lowers_the_error_where_it_is(shape: tuple[int, ...]) -> None:
    f = jnp.where(jnp.arange(45) % 4 == 0, 100.0, 1.0)
    f = f if shape == (45,) else jnp.broadcast_to(f[:, None], shape)
    for fmt in (FORMAT.at(2), FORMAT):
        weighed, plain = (
            float(jnp.average((lb.dequantize(q) - W) ** 2, weights=jnp.broadcast_to(f.reshape(45, -1), W.shape)))
            for q in (lb.quantize_array(W, fmt, importance=f), lb.quantize_array(W, fmt))
        )
        assert weighed < plain


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_zero_and_constant_weights(value: float) -> None:
    constant = lb.quantize_array(jnp.full((45, 7), value), FORMAT)
    assert all((lb.dequantize(at(constant, width)) == jnp.float32(value)).all() for width in (2, 3, 4))


def test_it_is_the_same_every_time() -> None:
    first, again = (lb.quantize_array(W, FORMAT) for _ in range(2))
    assert all(np.array_equal(first.fields[name], again.fields[name]) for name in TYPE.fields)


def test_what_the_quantizer_refuses() -> None:
    with pytest.raises(ValueError, match=r"^the weight has 1 NaN or inf among its 315 entries"):
        lb.quantize_array(W.at[0, 0].set(jnp.nan), FORMAT)
    with pytest.raises(TypeError, match=r"^ProgressiveSolver\(rounds=15\) makes any_bcq, not bcq\(bits=2\)"):
        lb.quantize_array(W, lb.bcq(2), lb.progressive())
    with pytest.raises(TypeError, match=r"^BinarySolver\(rounds=15\) makes bcq, not any_bcq"):
        lb.quantize_array(W, FORMAT, lb.alternating())
    with pytest.raises(ValueError, match=r"^rounds must be an int, 1 or more, not 0$"):
        lb.quantize_array(W, FORMAT, lb.progressive(0))
