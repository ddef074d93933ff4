"""Which tokens are drawn, beside a direct reading of the definitions in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.models import Sampling


def kept(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Which tokens of logits [V] are left: temperature, then top-k, top-p and min-p, each of what the last one left."""
    scores = logits.astype(np.float64) / s.temperature
    left = np.ones(len(scores), bool)

    def probability() -> np.ndarray:
        p = np.where(left, np.exp(scores - scores[left].max()), 0)
        return p / p.sum()

    if s.top_k is not None:
        left &= scores >= np.sort(scores)[::-1][min(s.top_k, len(scores)) - 1]
    if s.top_p is not None and s.top_p < 1:
        p, rising = probability(), np.argsort(np.where(left, scores, -np.inf), kind="stable")
        rare = np.cumsum(p[rising]) <= 1 - s.top_p
        left[rising[:-1][rare[:-1]]] = False
    if s.min_p is not None:
        p = probability()
        left &= p >= s.min_p * p.max()
    return left


SETTINGS = [
    Sampling(1.0),
    Sampling(0.7, top_k=1),
    Sampling(0.7, top_k=5),
    Sampling(1.3, top_k=100),
    Sampling(1.0, top_p=0.37),
    Sampling(1.0, top_p=1.0),
    Sampling(2.0, top_p=1e-6),
    Sampling(1.0, min_p=0.21),
    Sampling(1.0, min_p=0.0),
    Sampling(1.0, min_p=1.0),
    Sampling(0.9, top_k=7, top_p=0.83, min_p=0.11),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_what_is_left_out(sampling: Sampling) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32) * 2
    rows[1] = 0.0  # all equally likely
    rows[2, :4] = rows[2].max()  # ties at the top
    rows[3, 3] = 1e4  # all of the probability
    rows[4, ::2] = rows[4, 0]
    found = np.asarray(sampling.kept(jnp.asarray(rows)))
    np.testing.assert_array_equal(found > -np.inf, [kept(row, sampling) for row in rows])
    for row, out in zip(rows, found, strict=True):
        there, top = out > -np.inf, row.max()
        # Two float32 roundings, of a difference and a quotient.
        want = (row.astype(np.float64) - top) / sampling.temperature
        np.testing.assert_allclose(out[there], want[there], rtol=2 * np.finfo(np.float32).eps)


def test_frequencies_are_the_probabilities() -> None:
    logits, count = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), 20_000
    keys = jax.random.split(jax.random.key(1), count)
    drawn = Sampling(1.0, top_k=3)(jnp.broadcast_to(logits, (count, 4)), keys)
    found, want = np.bincount(drawn, minlength=4) / count, np.array([0, 2, 3, 4]) / 9
    assert found[0] == 0
    assert np.all(np.abs(found - want) < 5 * np.sqrt(want * (1 - want) / count) + 1e-12)  # five standard deviations


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    tokens = Sampling(top_k=2)(jnp.array([[0.0, 2.0, 2.0], [5.0, -1.0, 5.0]]), jax.random.split(jax.random.key(0), 2))
    assert tokens.tolist() == [1, 0]


def test_a_row_does_not_depend_on_the_others() -> None:
    sampling = jax.jit(Sampling(0.8, top_k=20, top_p=0.9, min_p=0.01))
    logits, keys = jax.random.normal(jax.random.key(0), (6, 40)), jax.random.split(jax.random.key(1), 6)
    together = sampling(logits, keys).tolist()
    assert together == [int(sampling(logits[i : i + 1], keys[i : i + 1])[0]) for i in range(6)]
    assert len(set(together)) > 1


def test_a_small_temperature_does_not_overflow() -> None:
    found = Sampling(1e-30)(jnp.array([[1e4, 2e4, -1e4]]), jax.random.split(jax.random.key(0), 1))
    assert found.tolist() == [1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -0.1}, r"temperature = -0.1: it must be 0, for the likeliest token, or above"),
        ({"temperature": float("nan")}, r"temperature = nan: it must be 0"),
        ({"temperature": float("inf")}, r"temperature = inf: it must be 0"),
        ({"top_k": 0}, r"top_k = 0: keep at least 1 token, or give None for all"),
        ({"top_p": 0.0}, r"top_p = 0.0: a probability above 0 and up to 1, or None"),
        ({"top_p": 1.5}, r"top_p = 1.5: a probability"),
        ({"min_p": -0.1}, r"min_p = -0.1: a share from 0 to 1, or None"),
        ({"min_p": 1.1}, r"min_p = 1.1: a share"),
    ],
)
def test_numbers_out_of_range(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        lb.models.Sampling(**given)  # type: ignore[arg-type]
