"""The products that are timed on a GPU: shapes, batches, formats, what each must read, and what is promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

import lowbit as lb
from benchmarks.gpu_results import Peaks, Row, Target
from lowbit.backward import planned_dx
from lowbit.ir.cost import cost
from lowbit.ir.dtypes import short
from lowbit.kernels.choice import DX
from lowbit.planning import Plan

SHAPES = ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 4096))
"""Outputs by inputs."""
BATCHES = (1, 2, 4, 8, 16, 64, 512, 2048)
DTYPES = ("bfloat16", "float16")
NESTED_SHAPES = ((28672, 4096), (28672, 5120), (35840, 5120), (65536, 5120))
FEW, MANY = (32, 64, 128, 256), (512, 1024, 2048)
"""Of nested floats, in float16, which is what they hold."""
FORMATS = {
    "uniform4": lb.uniform(4, group=128, scale_dtype="float16"),
    "bcq4": lb.bcq(4, group=128, scale_dtype="float16"),
    "bcq3": lb.bcq(3, group=128, scale_dtype="float16"),
    "bcq2": lb.bcq(2, group=128, scale_dtype="float16"),
    "bcq1": lb.bcq(1, group=128, scale_dtype="float16"),
    "any_precision4": lb.any_precision(3, 4),
    "any_precision3": lb.any_precision(3, 4, width=3),
    "m1v4": lb.codebook(1, 8, vec=4, group=128, scale_dtype="float16"),
    "m2v8": lb.codebook(2, 8, vec=8, group=128, scale_dtype="float16"),
    "nested_fp16": lb.nested_fp(),
    "nested_fp8": lb.nested_fp(8),
}
INT8 = {f"{name}_int8x2": name for name in ("uniform4", "bcq3", "bcq2", "any_precision4", "any_precision3")}
"""Products of the same weights in 8-bit integers, with few rows."""
IN_BOTH = ("uniform4", "bcq4", "bcq3", "bcq2")
"""Timed in both halves, the others in the first."""
HALVES, COPY = "halves", "copy"
"""A weight of 16 bits in an ordinary product; reading and writing memory."""
WEIGHTS = tuple(
    (*whats, *(name for name, what in INT8.items() if what in whats))
    for whats in (
        *((what,) for what in (HALVES, *IN_BOTH, "bcq1", "m1v4", "m2v8")), ("any_precision4", "any_precision3")
    )
)  # fmt: skip
NESTED = ((HALVES,), ("nested_fp16", "nested_fp8"))
"""Widths and numerics of one array stand together."""
BACK, BACK_BATCHES = ("uniform4", "bcq3", "any_precision4", "m1v4"), (64, 512, 2048)
"""Whose gradients of activations are timed, of the first shape and the last."""
PREFILL = 512
"""Rows from which on decoding once and an ordinary product are a candidate too."""
SUMMED = ("bcq4", "bcq3", "bcq2", "bcq1", "m1v4", "m2v8")
"""What `sums` looks up too, for at most so many rows:"""
SUMMED_ROWS = 4


@dataclass(frozen=True)
class Case:
    """One product x [m, k] @ w [k, n], or the gradient of x in it.

    Attributes:
      what: a name of FORMATS or INT8, or HALVES.
      lowering: what it is asked to run as; None for products with dense weights. DX are those of gradients.
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
    def back(self) -> bool:
        """Whether it is a gradient."""
        return self.lowering in DX

    @property
    def type(self) -> lb.QuantType:
        """Of the weight, in the kernels' layout; of a format."""
        return replace(canonical(self.what, self.n, self.k), layout="mma")

    @property
    def stored(self) -> int:
        """Bytes of the weight, those that `lb.report` counts; of one read at several widths, those of this width."""
        if self.what == HALVES:
            return 2 * self.n * self.k
        own = canonical(self.what, self.n, self.k)
        return cost(own.decode).bytes if own.format.widths else own.bits // 8

    @property
    def bytes(self) -> int:
        """Of the weight, and of activations read and written once."""
        return self.stored + 2 * self.m * (self.k + self.n)

    def roofline(self, of: Peaks) -> float:
        """Seconds that memory or the matrix unit, in 8 bits twice as fast, needs at the least, whichever is more."""
        products = of.products * (2 if self.what == "nested_fp8" else 1)
        return max(self.bytes / of.memory, 2 * self.m * self.n * self.k / products)

    def predicted(self) -> dict[str, float]:
        """Seconds by the library's own model of its candidates."""
        if self.what == HALVES:
            return {}
        return {c.name: c.nanoseconds / 1e9 for c in self.plan().choices if c.name == self.lowering}

    def chosen(self) -> str | None:
        """What `lb.matmul` runs unasked."""
        return None if self.what == HALVES else self.plan().choice().name

    def plan(self) -> Plan:
        if self.back:
            return planned_dx(self.m, self.type, short(self.dtype), "gpu")
        return lb.plan((self.m, self.k), self.type, "gpu", self.dtype)


def canonical(what: str, n: int, k: int) -> lb.QuantType:
    """A format's type at a size, laid out as on disk."""
    numerics: Literal["float", "int8x2"] = "int8x2" if what in INT8 else "float"
    return lb.QuantType((("k", k), ("n", n)), "bf16", FORMATS[INT8.get(what, what)], numerics=numerics)


def groups() -> list[list[Case]]:
    """All cases, those of one weight together: first what is promised, then the largest weights."""
    weights = [(n, k, whats) for n, k in SHAPES for whats in WEIGHTS]
    weights += [(n, k, whats) for n, k in NESTED_SHAPES for whats in NESTED]
    every = [[case for what in whats for case in cases(what, n, k)] for n, k, whats in weights]
    promised = {need for target in targets() for need in target.needs}
    first = [[case for case in group if case.name in promised] for group in every]
    rest = [[case for case in group if case.name not in promised] for group in every]
    return [group for group in (*first, *rest) if group]


def cases(what: str, n: int, k: int) -> list[Case]:
    """Those of one weight: first bfloat16."""
    if (n, k) in NESTED_SHAPES:
        return [Case(what, n, k, m, "float16", way) for m in (*FEW, *MANY) for way in ways(what, m)]
    batches = [m for m in BATCHES if m < PREFILL] if what in INT8 else BATCHES
    out = [Case(what, n, k, m, DTYPES[0], way) for m in batches for way in ways(what, m)]
    both = what in (HALVES, *IN_BOTH)
    out += [Case(what, n, k, m, DTYPES[1], ways(what, m)[0]) for m in BATCHES if both]
    if (n, k) in (SHAPES[0], SHAPES[-1]) and what in (HALVES, *BACK):
        some = DX[-1:] if what == HALVES else DX
        out += [Case(what, n, k, m, DTYPES[0], way) for m in BACK_BATCHES for way in some]
    return out


def ways(what: str, m: int) -> list[str | None]:
    """What a product is asked to run as. That of XLA in 8 bits is its decode: a dot of e4m3."""
    if what == HALVES:
        return [None]
    if what == "nested_fp8":
        return ["fp8", "decode"]
    if what in SUMMED and m <= SUMMED_ROWS:
        return ["mma", "sums"]
    return ["mma", "dense"] if m >= PREFILL else ["mma"]


def targets() -> list[Target]:
    """What was promised: of the first shape in bfloat16, and of nested floats."""
    (n, k), dtype = SHAPES[0], DTYPES[0]
    dense = Case(HALVES, n, k, 2048, dtype, None).name
    out = []
    for what in (*IN_BOTH, "any_precision4", "any_precision3", "m1v4"):
        one, eight = (Case(what, n, k, m, dtype, "mma").name for m in (1, 8))
        many = [Case(what, n, k, 2048, dtype, how).name for how in ways(what, 2048)]
        size = f"{what} {n}x{k}"
        stored = f"{size}, m=1: stored bytes a second over those of a copy"
        out.append(Target(stored, (one, COPY), _bandwidth, 0.75, True))
        if what in IN_BOTH:
            out.append(Target(f"{size}: time at m=8 over m=1", (eight, one), _times, 1.3, False))
            out.append(Target(f"{size}, m=2048: speed over dense bfloat16", (dense, *many), _least_speed, 0.8, True))
    for n, k in NESTED_SHAPES:
        out.append(_beside_dense("nested_fp16", n, k, FEW, "mean time", _mean_time, 1.06, False))
        out.append(_beside_dense("nested_fp16", n, k, MANY, "mean time", _mean_time, 1.2, False))
        out.append(_beside_dense("nested_fp8", n, k, MANY, "least speed", _least_speed, 1.5, True))
    return out


def _beside_dense(
    what: str, n: int, k: int, batches: Sequence[int], said: str, value: Callable[..., float], limit: float, least: bool
) -> Target:
    needs = [case.name for each in (HALVES, what) for case in cases(each, n, k) if case.m in batches]
    name = f"{what} {n}x{k}, m={batches[0]} to {batches[-1]}: {said} over dense float16"
    return Target(name, tuple(needs), value, limit, least)


def _bandwidth(row: Row, copy: Row) -> float:
    return float(row["stored"] / row["seconds"] / (copy["bytes"] / copy["seconds"]))


def _times(a: Row, b: Row) -> float:
    return float(a["seconds"] / b["seconds"])


def _mean_time(*rows: Row) -> float:
    return mean(_over_dense(rows))


def _least_speed(*rows: Row) -> float:
    return 1 / max(_over_dense(rows))


def _over_dense(rows: Sequence[Row]) -> list[float]:
    """Seconds of the fastest way over those of a weight in 16 bits, for each number of rows of x."""
    dense = {row["m"]: row["seconds"] for row in rows if row["what"] == HALVES}
    return [min(r["seconds"] for r in rows if r["m"] == m and r["what"] != HALVES) / s for m, s in dense.items()]
