"""Additive codebooks under the second moments of the inputs: Adam and beam search."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.quantizers.additive import _search, _Target
from lowbit.quantizers.codebook import CodebookCode
from lowbit.testing.quantizing import check_quantizer
from lowbit.testing.tolerance import gamma

K, N = 70, 20
FMT = lb.codebook(2, 4, vec=3, group=12)
RNG = np.random.default_rng(0)
W = RNG.standard_normal((K, N)).astype(np.float32)
X = RNG.standard_normal((300, K)) @ (np.eye(K) + 0.3 * RNG.standard_normal((K, K)))
GRAM = jnp.asarray(X.T @ X / len(X), jnp.float32)


@cache
def quantized(rounds: int = 100, beam: int = 1) -> lb.QuantArray:
    return lb.quantize_array(W, FMT, lb.additive_codebooks(rounds, beam), importance=GRAM)


def error(q: lb.QuantArray, gram: np.ndarray | None = None) -> float:
    """Mean squared error of the output, or of the weight with the identity, in float64."""
    d = np.asarray(lb.dequantize(q), np.float64) - W
    return float((d * ((X.T @ X / len(X) if gram is None else gram) @ d)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("beam", [1, 3])
def test_no_round_raises_the_error(beam: int) -> None:
    errors = np.array([error(quantized(rounds, beam)) for rounds in range(6)])
    assert (errors[1:] <= (1 + gamma(3 * K + N, "f32")) * errors[:-1]).all()
    assert errors[-1] < 0.5 * errors[0] and error(quantized(beam=beam)) <= errors[-1]


@pytest.mark.slow
def test_a_wider_beam_finds_better_codes() -> None:
    assert error(quantized(1, beam=3)) < error(quantized(1, beam=1))


@pytest.mark.slow
def test_beats_residual_kmeans_under_either_error() -> None:
    start = lb.quantize_array(W, FMT)
    assert error(quantized()) < 0.5 * error(start)
    plain = lb.quantize_array(W, FMT, lb.additive_codebooks())
    assert error(plain, np.eye(K)) < error(start, np.eye(K)) < error(quantized(), np.eye(K))


def test_a_beam_of_all_hypotheses_finds_the_best_codes() -> None:
    """One vector a row, so that every pair of codes can be tried."""
    rng, count, rows = np.random.default_rng(1), 8, 6
    books, w = rng.standard_normal((2, count, 3)), rng.standard_normal((rows, 3))
    scale, half = rng.standard_normal((rows, 1)), rng.standard_normal((3, 3))
    gram = half @ half.T
    every = scale[:, None] * (books[0][:, None] + books[1][None]).reshape(1, -1, 3) - w[:, None]
    costs = np.einsum("npv,vu,npu->np", every, gram, every)
    first = jnp.asarray(rng.integers(0, count, (2, rows, 1, 1)))
    code = CodebookCode(first, *(jnp.asarray(a, jnp.float32) for a in (books, scale)))
    target = _Target(jnp.asarray(w, jnp.float32), jnp.ones((rows, 1)), jnp.asarray(gram, jnp.float32))
    found = np.asarray(_search(target, code, jax.random.key(0), beam=count).codes)[:, :, 0, 0]
    np.testing.assert_array_equal(found[0] * count + found[1], costs.argmin(1))


@pytest.mark.slow
def test_is_deterministic() -> None:
    again = lb.quantize_array(W, FMT, lb.additive_codebooks(), importance=GRAM)
    assert all(np.array_equal(again.fields[name], a) for name, a in quantized().fields.items())


@pytest.mark.slow
def test_zero_constant_and_huge_weights_and_where_codes_lie() -> None:
    check_quantizer(lb.codebook(2, 5, vec=2, group=16, scale_dtype="float16"), 5, 70, lb.additive_codebooks())


@pytest.mark.slow
def test_groups_of_zeros_decode_to_zeros() -> None:
    w = jnp.asarray(W).at[:12].set(0.0).at[:, 3].set(0.0)
    decoded = np.asarray(lb.dequantize(lb.quantize_array(w, FMT, lb.additive_codebooks(), importance=GRAM)))
    assert not decoded[:12].any() and not decoded[:, 3].any() and np.isfinite(decoded).all()


def test_inputs_that_were_always_zero_still_have_weights() -> None:
    dead = GRAM.at[:24].set(0.0).at[:, :24].set(0.0)
    q = lb.quantize_array(W, FMT, lb.additive_codebooks(), importance=dead)
    assert np.square(np.asarray(lb.dequantize(q))[:24] - W[:24]).mean() < 0.5 * np.square(W[:24]).mean()


@pytest.mark.slow
def test_a_stack_has_one_gram_or_one_each() -> None:
    stack, twice = np.stack([W, W[::-1]]), jnp.stack([GRAM, GRAM + jnp.eye(K)])
    shared = lb.quantize_array(stack, FMT, lb.additive_codebooks(), importance=GRAM)
    each = lb.quantize_array(stack, FMT, lb.additive_codebooks(), importance=twice)
    for name, a in quantized().fields.items():
        np.testing.assert_array_equal(shared.fields[name][0], a)
        np.testing.assert_array_equal(each.fields[name][0], a)
    assert not np.array_equal(shared.fields["codebooks"][1], each.fields["codebooks"][1])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (GRAM.at[3, 4].set(jnp.nan), f"has 1 NaN or inf among its {K * K} numbers: measure it on data for which all"),
        (
            -GRAM,
            "is not symmetric and positive semidefinite, as x.T @ x is for any x [rows, k]: give the mean over rows",
        ),
        (jnp.eye(K).at[0, 1].set(0.5), "is not symmetric and positive semidefinite"),
        (GRAM * (1 - 2 * jnp.eye(K)[::-1]), "is not symmetric and positive semidefinite"),
    ],
    ids=["nan", "negative", "not symmetric", "indefinite"],
)
def test_what_is_no_mean_of_products(gram: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=f"^the importance of the weight {re.escape(message)}"):
        lb.quantize_array(W, FMT, lb.additive_codebooks(), importance=gram)


@pytest.mark.parametrize("shape", [(K,), (K, N), (2, 2, K, K)])
def test_an_importance_of_another_shape(shape: tuple[int, ...]) -> None:
    message = (
        f"the weight has {K} inputs and the shape ({K}, {N}), but the importance has shape {shape}: this quantizer "
        f"takes the mean of the products of each two inputs, [{K}, {K}], or that of each chunk of outputs"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(W, FMT, lb.additive_codebooks(), importance=jnp.ones(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds must be an int, 0 or more, not -1"),
        ({"beam": 0}, "beam must be a positive int, the hypotheses kept for each row, not 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        lb.additive_codebooks(**options)


def test_other_formats_are_refused() -> None:
    message = "AdditiveCodebooks(rounds=100, beam=1) makes codebook, not bcq(bits=2)"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(W, lb.bcq(2), lb.additive_codebooks())
