"""Rotary positions (RoFormer, Su et al. 2021) and the ways to stretch them over longer contexts."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Linear:
    """Positions divided by a factor (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Low frequencies divided by a factor, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Yarn:
    """Low frequencies divided by a factor, and attention made sharper (YaRN, Peng et al. 2023).

    `fast` and `slow` are turns over the original context between which frequencies are blended; `attention` multiplies
    the rotated heads, 0.1 ln(factor) + 1 if None.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """How heads are rotated by their positions.

    Attributes:
      base: of the frequencies.
      size: how many of a head's entries rotate, an even number; the rest stay.
      scaling: of the frequencies.
    """

    base: float
    size: int
    scaling: Linear | Llama3 | Yarn | None = None

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2:
            raise ValueError(f"{self.size} entries of a head cannot rotate in pairs: their number must be even")
        for name, number in {"base": self.base, "factor": 1.0 if self.scaling is None else self.scaling.factor}.items():
            if not (isinstance(number, float | int) and number > 0):
                raise ValueError(f"{name} = {number!r} of a rotation: it must be a number above 0")

    def frequencies(self) -> np.ndarray:
        """float32 [size / 2], radians a position."""
        plain = 1.0 / self.base ** (np.arange(0, self.size, 2, dtype=np.float32) / self.size)
        match self.scaling:
            case None:
                return plain
            case Linear(factor):
                return plain / np.float32(factor)
            case Llama3(factor, low, high, original):
                turns = original * plain / (2 * pi)
                kept = np.clip((turns - low) / (high - low), 0, 1)
            case Yarn() as yarn:
                factor, kept = yarn.factor, self._kept(yarn)
        return (plain * kept + plain / factor * (1 - kept)).astype(np.float32)

    def _kept(self, yarn: Yarn) -> np.ndarray:
        """How much of each frequency is kept: all of the fast ones, none of the slow ones, a ramp between."""

        def index(turns: float) -> float:
            return self.size * log(yarn.original / (turns * 2 * pi)) / (2 * log(self.base))

        low, high = index(yarn.fast), index(yarn.slow)
        if yarn.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        return 1 - np.clip((np.arange(self.size // 2) - low) / max(high - low, 0.001), 0, 1)

    @property
    def gain(self) -> float:
        """That rotated entries are multiplied by."""
        if not isinstance(self.scaling, Yarn):
            return 1.0
        given = self.scaling.attention
        return 0.1 * log(max(self.scaling.factor, 1.0)) + 1.0 if given is None else given

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate [B, T, H, D] by the positions int [B, T]: entry i pairs with i + size / 2. The dtype of `x`."""
        angles = positions[..., None, None].astype(jnp.float32) * self.frequencies().reshape(1, 1, 1, -1)
        cos, sin = (jnp.asarray(f(angles) * self.gain, x.dtype) for f in (jnp.cos, jnp.sin))
        a, b, rest = jnp.split(x, (self.size // 2, self.size), axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
