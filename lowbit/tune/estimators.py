"""Estimates of ||(W_h - W_l) x|| that cost less than a product (DP-LLM, Park et al. 2025, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.nn.statistics import norm

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
DTYPE = jnp.bfloat16
"""Of projections. Rounding moves a sum of many terms by less than a part in 256, the projection itself by a tenth."""


@dataclass(frozen=True)
class Estimators:
    """How the estimators of layers are found.

    Attributes:
      r2: a line in ||x|| is taken where it explains at least this share of the variance, or else a projection.
      size: rows of a projection.
      steps, rate: of gradient descent on a projection, each on all inputs.
      seed: of the random projection that it starts from.
    """

    r2: float = 0.9
    size: int = 64
    steps: int = 10_000
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.steps < 0 or not self.rate > 0:
            raise ValueError(
                f"size={self.size}, steps={self.steps}, rate={self.rate}: a projection has a row at least, no steps or "
                "more, and a rate above 0"
            )

    def line(self, norms: Any, errors: Any) -> dict[str, jax.Array] | None:
        """The line of a layer, as `lb.nn.Switch` takes it, or None if it explains too little. Of its inputs x, float32
        [rows], `norms` are ||x|| and `errors` ||(W_h - W_l) x||."""
        slope, offset, r2 = line(np.asarray(norms, np.float64), np.asarray(errors, np.float64))
        return {"slope": jnp.float32(slope), "offset": jnp.float32(offset)} if r2 >= self.r2 else None

    def projected(self, x: jax.Array, delta: jax.Array, errors: Any, number: int) -> dict[str, jax.Array]:
        """The projection of a layer, the `number`-th, as `lb.nn.Switch` takes it.

        Args:
          x: float32 [rows, k], its inputs.
          delta: float32 [k, n], W_h - W_l.
          errors: float32 [rows], ||x delta||; more where a format rounds activations too.
        """
        drawn = random_projection(jax.random.fold_in(jax.random.key(self.seed), number), delta, self.size)
        start = fitted(drawn, x, jnp.asarray(errors))
        return {"projection": tuned(start, x, jnp.asarray(errors), self.steps, self.rate).astype(DTYPE)}


def line(x: Array, y: Array) -> tuple[float, float, float]:
    """Slope, offset and R^2 of the line nearest to y in squares."""
    rows = np.stack([x, np.ones_like(x)], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(rows, y)
    left, whole = np.square(y - slope * x - offset).sum(), np.square(y - y.mean()).sum()
    return float(slope), float(offset), float(1 - left / whole) if whole > 0 else 1.0


def random_projection(key: jax.Array, delta: jax.Array, size: int) -> jax.Array:
    """G [size, k] with ||G x|| near ||x delta||: A delta^T, A [size, n] normal with the variance 1 / size."""
    a = jax.random.normal(key, (size, delta.shape[1])) / size**0.5
    return jnp.matmul(a, delta.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def fitted(g: jax.Array, x: jax.Array, errors: jax.Array) -> jax.Array:
    """The multiple of a projection whose estimates are nearest to the errors in squares."""
    estimates = norm(x @ g.T)
    square = jnp.vdot(estimates, estimates)
    return g * jnp.where(square > 0, jnp.vdot(estimates, errors) / jnp.where(square > 0, square, 1), 1)


@jax.jit
def tuned(g: jax.Array, x: jax.Array, errors: jax.Array, steps: int, rate: float) -> jax.Array:
    """The projection with the least mean squared error of its estimates, of those that gradient descent passes.

    The rate is the published one, a number for all layers. Where it is too large for one the steps lead away, and what
    they began with stays.
    """

    def cost(g: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(norm(x @ g.T) - errors))

    def step(_: int, at: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        g, best, least = at
        value, gradient = jax.value_and_grad(cost)(g)
        best, least = jnp.where(value < least, g, best), jnp.minimum(value, least)
        return g - rate * gradient, best, least

    last, best, least = jax.lax.fori_loop(0, steps, step, (g, g, jnp.float32(jnp.inf)))
    return jnp.where(cost(last) < least, last, best)
