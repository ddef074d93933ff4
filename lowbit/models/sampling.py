"""Which token comes next, given the logits."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import jax
import jax.numpy as jnp

from lowbit.models.prompts import expect_count


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: those left out by what is given, in this order, are never drawn.

    Attributes:
      temperature: that logits are divided by; 0 takes the likeliest token, of several the first.
      top_k: keep the k likeliest tokens, and those as likely as the last of them; None for all.
      top_p: keep the likeliest tokens that together reach this probability (Holtzman et al. 2020); None for all. Of
        equally likely ones at the border those with larger numbers stay.
      min_p: keep tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024); None for all.

    Raises ValueError for a number that is out of range, TypeError for a top_k that is no integer.

    >>> import jax, jax.numpy as jnp, lowbit as lb
    >>> logits, keys = jnp.array([[0.0, 3.0, 2.0]]), jax.random.split(jax.random.key(0), 1)
    >>> int(lb.models.Sampling()(logits, keys)[0]), int(lb.models.Sampling(temperature=0.8, top_k=1)(logits, keys)[0])
    (1, 1)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature = {self.temperature}: it must be 0, for the likeliest token, or above")
        if self.top_k is not None:
            expect_count("top_k", self.top_k, "keep at least 1 token, or give None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: a probability above 0 and up to 1, or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}: a share from 0 to 1, or None")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Tokens int32 [B] of logits [B, V], each drawn with its own key [B]: no row depends on another."""
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.kept(logits)).astype(jnp.int32)

    def kept(self, logits: jax.Array) -> jax.Array:
        """Logits float32 [B, V] of what tokens are drawn from, -inf for what is left out."""
        logits = logits.astype(jnp.float32)
        scores = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature  # that a small one may not overflow
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores = _without(scores, scores < jax.lax.top_k(scores, self.top_k)[0][:, -1:])
        if self.top_p is not None and self.top_p < 1:
            order = jnp.argsort(scores, axis=-1)
            rising = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), order, axis=-1)
            rare = (jnp.cumsum(rising, axis=-1) <= 1 - self.top_p).at[:, -1].set(False)
            scores = _without(scores, jnp.take_along_axis(rare, jnp.argsort(order, axis=-1), axis=-1))
        if self.min_p is not None:
            likely = jax.nn.softmax(scores, axis=-1)
            scores = _without(scores, likely < self.min_p * likely.max(axis=-1, keepdims=True))
        return scores


def _without(scores: jax.Array, left_out: jax.Array) -> jax.Array:
    return jnp.where(left_out, -jnp.inf, scores)
