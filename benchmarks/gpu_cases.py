"""The products that are timed on a GPU: shapes, batches, formats, what each must read, and what is promised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import lowbit as lb
from benchmarks.gpu_results import Peaks, Row, Target

SHAPES = ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 4096))
"""Outputs by inputs."""
BATCHES = (1, 2, 4, 8, 16, 64, 512, 2048)
DTYPES = ("bfloat16", "float16")
FORMATS = {
    "uniform4": lb.uniform(4, group=128, scale_dtype="float16"),
    "bcq4": lb.bcq(4, group=128, scale_dtype="float16"),
    "bcq3": lb.bcq(3, group=128, scale_dtype="float16"),
    "bcq2": lb.bcq(2, group=128, scale_dtype="float16"),
}
HALVES, COPY = "halves", "copy"
"""A weight of 16 bits in an ordinary product; reading and writing memory."""
PREFILL = 512
"""Rows from which on decoding once and an ordinary product are a candidate too."""


@dataclass(frozen=True)
class Case:
    """One product x [m, k] @ w [k, n].

    Attributes:
      what: a name of FORMATS, or HALVES.
      lowering: what it is asked to run as; None for dense weights.
    """

    what: str
    n: int
    k: int
    m: int
    dtype: str
    lowering: str | None

    @property
    def name(self) -> str:
        lowering = f" {self.lowering}" if self.lowering else ""
        return f"{self.what}{lowering} {self.n}x{self.k} m={self.m} {self.dtype}"

    @property
    def type(self) -> lb.QuantType:
        """Of the weight, in the kernels' layout; of a format."""
        return replace(canonical(self.what, self.n, self.k), layout="mma")

    @property
    def stored(self) -> int:
        """Bytes of the weight, those that `lb.report` counts."""
        return 2 * self.n * self.k if self.what == HALVES else canonical(self.what, self.n, self.k).bits // 8

    @property
    def bytes(self) -> int:
        """Of the weight, and of activations read and written once."""
        return self.stored + 2 * self.m * (self.k + self.n)

    def roofline(self, of: Peaks) -> float:
        """Seconds that memory or the matrix unit needs at the least, whichever is more."""
        return max(self.bytes / of.memory, 2 * self.m * self.n * self.k / of.products)

    def predicted(self) -> dict[str, float]:
        """Seconds by the library's own model of its candidates."""
        if self.what == HALVES:
            return {}
        found = lb.plan((self.m, self.k), self.type, "gpu", self.dtype)
        return {c.name: c.nanoseconds / 1e9 for c in found.choices if c.name == self.lowering}

    def chosen(self) -> str | None:
        """What `lb.matmul` runs unasked."""
        if self.what == HALVES:
            return None
        return lb.plan((self.m, self.k), self.type, "gpu", self.dtype).choice().name


def canonical(what: str, n: int, k: int) -> lb.QuantType:
    """A format's type at a size, laid out as on disk."""
    return lb.QuantType((("k", k), ("n", n)), "bf16", FORMATS[what])


def groups() -> list[list[Case]]:
    """All cases, those of one weight together: first what is promised, then the largest weights."""
    whats = (HALVES, *FORMATS)
    promised = {need for target in targets() for need in target.needs}
    first = [[case for case in cases(what, *SHAPES[0]) if case.name in promised] for what in whats]
    rest = [[case for case in cases(what, n, k) if case.name not in promised] for n, k in SHAPES for what in whats]
    return first + rest


def cases(what: str, n: int, k: int) -> list[Case]:
    """Those of one weight: first bfloat16."""
    if what == HALVES:
        return [Case(what, n, k, m, dtype, None) for dtype in DTYPES for m in BATCHES]
    out = [Case(what, n, k, m, DTYPES[0], "mma") for m in BATCHES]
    out += [Case(what, n, k, m, DTYPES[0], "dense") for m in BATCHES if m >= PREFILL]
    return out + [Case(what, n, k, m, DTYPES[1], "mma") for m in BATCHES]


def targets() -> list[Target]:
    """What was promised, of the first shape in bfloat16."""
    (n, k), dtype = SHAPES[0], DTYPES[0]
    dense = Case(HALVES, n, k, 2048, dtype, None).name
    out = []
    for what in FORMATS:
        one, eight = (Case(what, n, k, m, dtype, "mma").name for m in (1, 8))
        many = [Case(what, n, k, 2048, dtype, how).name for how in ("mma", "dense")]
        size = f"{what} {n}x{k}"
        out += [
            Target(f"{size}, m=1: stored bytes a second over those of a copy", (one, COPY), _bandwidth, 0.75, True),
            Target(f"{size}: time at m=8 over m=1", (eight, one), _times, 1.3, False),
            Target(f"{size}, m=2048: speed over dense bfloat16", (dense, *many), _speed, 0.8, True),
        ]
    return out


def _bandwidth(row: Row, copy: Row) -> float:
    return float(row["stored"] / row["seconds"] / (copy["bytes"] / copy["seconds"]))


def _times(a: Row, b: Row) -> float:
    return float(a["seconds"] / b["seconds"])


def _speed(dense: Row, *ours: Row) -> float:
    return float(dense["seconds"] / min(row["seconds"] for row in ours))
