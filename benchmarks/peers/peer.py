"""What takes part in the race: one package, one format, one way to call it; and the check that it multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import numpy as np

from benchmarks.peers.weights import Array, Weight

NONZERO, PROBES = 4, 128
"""Inputs that are not zero in a row of x that checks a product; such rows."""
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
LEAST = {"float16": 2.0**-14, "bfloat16": 2.0**-126}
"""Half of a half's relative step, and the least normal number: below it results may be flushed to zero."""
HERE = "benchmarks.peers."
MODULES = tuple(HERE + name for name in ("with_jax", "libraries", "papers"))


@dataclass(frozen=True)
class Peer:
    """One contender.

    Attributes:
      name: unique.
      what: the weight it multiplies by, see `weights.make`.
      dtype: of activations and results.
      needs: the module that must be there.
      pack: the weight as it stores it, on the device.
      product: x [m, k] and what `pack` made to y [m, n].
      clock: the module that moves arrays and measures time, see `Clock`.
      adds_in_halves: whether sums over k may be rounded to halves on the way.
      rival: the format of lowbit that it is compared with, its own if None; dense ones are compared with all.
    """

    name: str
    what: str
    dtype: str
    needs: str
    pack: Callable[[Weight], Any]
    product: Callable[[Any, Any], Any]
    clock: str = HERE + "torch_clock"
    adds_in_halves: bool = False
    rival: str | None = None

    @property
    def there(self) -> bool:
        """Whether the module can be found; it is not imported."""
        return find_spec(self.needs) is not None

    @property
    def module(self) -> str:
        """That lists it in PEERS: the one its product is defined in."""
        return self.product.__module__


class Clock(Protocol):
    """A module that runs products of one framework."""

    def run(self, peer: Peer, x: Array, packed: Any) -> Array:
        """The product in float32 on the host, of x in float32."""

    def nbytes(self, packed: Any) -> int:
        """Bytes that a product reads of the weight."""

    def rotation(self, packed: Any) -> Any:
        """So many copies that one is out of the L2 cache when it comes again."""

    def timed(self, peer: Peer, x: Array, rotated: Any) -> dict[str, Any]:
        """Seconds of one product, with their spread, the clock, and `wall`: with the gaps between kernels."""

    def versions(self) -> dict[str, str]:
        """Of the framework and CUDA."""


def everyone() -> list[Peer]:
    """All of them; none of their packages is imported."""
    return [peer for module in MODULES for peer in import_module(module).PEERS]


def find(module: str, name: str) -> Peer:
    (found,) = (peer for peer in import_module(module).PEERS if peer.name == name)
    return found


def clock_of(peer: Peer) -> Clock:
    return cast(Clock, import_module(peer.clock))


def probes(k: int) -> tuple[Array, Array]:
    """Inputs [rows, NONZERO] that are not zero, and their signs: together one of every k / (PROBES * NONZERO)."""
    rng, rows = np.random.default_rng(1), min(PROBES, k // NONZERO)
    edges = np.linspace(0, k, rows * NONZERO + 1).astype(int)
    return rng.integers(edges[:-1], edges[1:]).reshape(NONZERO, rows).T, rng.choice([-1.0, 1.0], (rows, NONZERO))


def expected(peer: Peer, weight: Weight) -> tuple[Array, Array, Array]:
    """Rows of x, their products with the decoded weight in float64, for every output, and bounds on a peer's error.

    Rows of x are zero but for a few inputs of 1 and -1, so that sums are short and the bound is sharp: a wrong weight
    shows, as does a tile of k that is left out or taken twice. An output is the sum of a few weights, each rounded so
    many times on its way: to halves where it is decoded, where it is added up if that is done in halves, and twice
    where the result is made (a scale may come last); else to float32, at most 16 times (Higham, Accuracy and Stability
    of Numerical Algorithms, 3.1).
    """
    inputs, signs = probes(weight.k)
    x = np.zeros((len(inputs), weight.k), np.float32)
    np.put_along_axis(x, inputs, signs.astype(np.float32), 1)
    exact, size = (part.reshape(weight.n, *inputs.shape) for part in weight.columns(inputs.reshape(-1)))
    roundings = weight.roundings + 2 + NONZERO * peer.adds_in_halves
    relative = roundings * UNIT[peer.dtype] / (1 - roundings * UNIT[peer.dtype]) + 2.0**-20
    bound = relative * size.sum(-1) + roundings * LEAST[peer.dtype]
    return x, np.einsum("nrj,rj->rn", exact, signs), bound.T


def check(expected: tuple[Array, Array, Array], m: int, product: Callable[[Array], Array]) -> None:
    """Holds products of m rows at a time to what is `expected`. Raises AssertionError."""
    x, exact, bound = expected
    for first in range(0, len(x), m):
        rows = np.arange(first, first + m) % len(x)
        compare(product(x[rows]), exact[rows], bound[rows])


def compare(got: Array, exact: Array, bound: Array) -> None:
    """Raises AssertionError with what differs by more than its bound, NaN too."""
    if got.shape != exact.shape:
        raise AssertionError(f"y has shape {list(got.shape)}, not {list(exact.shape)}")
    wrong = ~(np.abs(got - exact) <= bound)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} differ; at {at}: {got[at]:g}, not {exact[at]:g} +- {bound[at]:.2g}"
        )
