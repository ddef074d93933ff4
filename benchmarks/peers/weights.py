"""The weights of the race, the same for everyone whose format can hold them: numpy alone, from a fixed seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
GROUP = 128
"""Inputs that share scales."""
BLOCK = 4_194_301
"""Random numbers that are repeated to fill a weight: a prime, so that rows differ."""
BOOKS = {"m1v4": (1, 4, GROUP), "m2v8": (2, 8, GROUP), "m2v8row": (2, 8, None)}
"""Codebooks of 256 vectors: their number, the size of a vector, inputs that share a scale (None for all of a row)."""
NF4_BLOCK = 64
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
"""NormalFloat4, QLoRA (Dettmers et al., NeurIPS 2023), appendix E."""


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] by the arrays that every format of its kind is made from.

    Attributes:
      what: `dense`, `e4m3`, `nf4`, a name of BOOKS, or a kind with its bits: `uniform4`, `bcq3`, `any_precision3`.
      fields: `codes` u8 [n, k], of codebooks [m, n, k / vec]; `scale` [n, groups], `alpha` [bits, n, groups], `table`
        [n, 2**bits] and `codebooks` [m, 256, vec] in float16, `scale` of nf4 in float32; `dense` float32 [n, k].
    """

    what: str
    n: int
    k: int
    fields: Mapping[str, Array]

    @property
    def bits(self) -> int:
        """Of a code, or of a weight's share of one."""
        named = {"dense": 16, "e4m3": 8, "nf4": 4} | dict.fromkeys(BOOKS, 2)
        return named.get(self.what) or int(self.what[-1])

    @property
    def roundings(self) -> int:
        """Of one weight where it is decoded in halves: of codebooks sum and scale, of nf4 entry, scale and product."""
        return {**{name: m + 1 for name, (m, _, _) in BOOKS.items()}, "nf4": 3}.get(self.what, 0)

    def columns(self, inputs: Array) -> tuple[Array, Array]:
        """The weights of some inputs in float64 [n, inputs], and the magnitudes that are added up to make each."""
        groups = inputs // GROUP
        if self.what in ("dense", "e4m3"):
            exact = self.fields["dense"][:, inputs].astype(np.float64)
            return exact, np.abs(exact)
        if self.what in BOOKS:
            return self._vectors(inputs)
        codes, rows = self.fields["codes"][:, inputs], np.arange(self.n)[:, None]
        if self.what == "nf4":
            exact = NF4.astype(np.float64)[codes] * self.fields["scale"][:, inputs // NF4_BLOCK]
        elif "table" in self.fields:
            exact = self.fields["table"].astype(np.float64)[rows, codes]
        elif "alpha" in self.fields:
            bits = codes >> np.arange(self.bits).reshape(-1, 1, 1) & 1
            terms = self.fields["alpha"].astype(np.float64)[:, :, groups] * (2.0 * bits - 1)
            return terms.sum(0), np.abs(terms).sum(0)
        else:
            zero = 1 << self.bits - 1
            exact = self.fields["scale"].astype(np.float64)[:, groups] * (codes.astype(np.float64) - zero)
        return exact, np.abs(exact)

    def _vectors(self, inputs: Array) -> tuple[Array, Array]:
        m, vec, group = BOOKS[self.what]
        scale = self.fields["scale"].astype(np.float64)[:, inputs // (group or self.k)]
        codes, books = self.fields["codes"][:, :, inputs // vec], self.fields["codebooks"].astype(np.float64)
        terms = np.stack([books[b][codes[b], inputs % vec] for b in range(m)]) * scale
        return terms.sum(0), np.abs(terms).sum(0)


def make(what: str, n: int, k: int) -> Weight:
    """The weight of a kind and size: always the same. Uniform codes are symmetric, their zero point is 2**(bits - 1).

    So formats with and without zero points hold it. Scales have so few bits that decoding with them, where weights are
    codes times scales, is exact in float16 and bfloat16. Raises ValueError for an unknown kind.
    """
    rng = np.random.default_rng(0)
    if what in ("dense", "e4m3"):
        return Weight(what, n, k, {"dense": np.resize(_floats(rng, what), (n, k))})
    if what == "nf4":
        scale = rng.random((n, k // NF4_BLOCK), np.float32) / 64
        return Weight(what, n, k, {"codes": _codes(rng, 4, n, k), "scale": scale})
    if what in BOOKS:
        m, vec, group = BOOKS[what]
        books = rng.standard_normal((m, 256, vec)).astype(np.float16)
        fields = {"codes": _codes(rng, 8, m, n, k // vec), "codebooks": books}
        return Weight(what, n, k, fields | {"scale": _scales(rng, n, k // (group or k))})
    kind, bits = what[:-1], int(what[-1])
    made = {
        "uniform": lambda: {"scale": _scales(rng, n, k // GROUP)},
        "bcq": lambda: {"alpha": _scales(rng, bits, n, k // GROUP)},
        "any_precision": lambda: {"table": rng.standard_normal((n, 1 << bits)).astype(np.float16)},
    }
    if kind not in made:
        others = ", ".join(("dense", "e4m3", "nf4", *BOOKS))
        raise ValueError(f"no weight is called {what!r}: {others}, or one of {', '.join(made)} with its bits")
    return Weight(what, n, k, {"codes": _codes(rng, bits, n, k), **made[kind]()})


def _codes(rng: np.random.Generator, bits: int, *shape: int) -> Array:
    return np.resize(rng.integers(0, 1 << bits, BLOCK, np.uint8), shape)


def _scales(rng: np.random.Generator, *shape: int) -> Array:
    """2**-8 to 2**-7 with 4 significant bits: times codes of 4 bits they have 8, which both halves hold."""
    return (rng.integers(8, 16, shape) / 2.0**11).astype(np.float16)


def _floats(rng: np.random.Generator, what: str) -> Array:
    """Normal numbers that both halves hold, or e4m3."""
    mantissa, exponent = np.frexp(rng.standard_normal(BLOCK))
    bits, least = (8, -13) if what == "dense" else (4, -5)
    exact = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return np.where(exponent < least, 0, exact).astype(np.float32)
