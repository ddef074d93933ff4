"""Ways to run a product that are no form of its term: whether they can, why not, and what they are predicted to take.

mma      the kernel: weights are decoded on their way to the tensor cores, to halves or to integers of 8 bits
fp8      the kernel for weights and activations in e4m3, which the tensor cores multiply as they are
dense    the weight is decoded once, to halves, and multiplied by the platform's own matrix product
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lowbit.ir.dtypes import DType
from lowbit.ir.expr import Expr
from lowbit.kernels.layout import layout
from lowbit.passes.pointwise import UnsuitableError

KERNELS = ("mma", "fp8", "dense")
BYTES_A_NANOSECOND = 3350 * 0.8
"""Of an H100's memory, at the share of its peak that streaming kernels are expected to reach."""
PRODUCTS_A_NANOSECOND = 495_000
"""Multiply-adds of its tensor cores in halves."""
DECODING, MULTIPLYING = 0.45, 0.75
"""Shares of that which are expected with weights decoded on the way, and without. None of these is measured yet."""
LAUNCH = 5_000.0
"""Nanoseconds: launching, filling the pipeline, and adding the parts of k."""
RESTORING_LAUNCHES = 25_000.0


@dataclass(frozen=True)
class KernelChoice:
    """One way to run one product.

    Attributes:
      refused: why it cannot; None if it can.
      bytes: read, of weights and activations.
      nanoseconds: predicted.
    """

    name: str
    refused: str | None
    bytes: int
    nanoseconds: float


def kernel_choices(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, dtype: DType, machine: str
) -> tuple[KernelChoice, ...]:
    """Of x [m, k] in `dtype` by a weight in the layout `laid_out`: `stored` bytes of it, read as `readings[at]`."""
    n, k = readings[0].dims["n"], readings[0].dims["k"]
    nbytes, products = stored + 2 * m * k, 8 * ceil(m / 8) * n * k
    streamed = nbytes / BYTES_A_NANOSECOND
    fused = LAUNCH + max(streamed, products / (PRODUCTS_A_NANOSECOND * DECODING))
    dense = 2 * LAUNCH + restoring(readings, stored, laid_out) + streamed + 4 * n * k / BYTES_A_NANOSECOND
    halves = None if machine == "gpu" and dtype in ("f16", "bf16") else _no_halves(dtype, machine)
    return (
        KernelChoice("mma", halves or _no_decoder(readings, at, laid_out), nbytes, fused),
        KernelChoice("dense", halves, nbytes, dense + products / (PRODUCTS_A_NANOSECOND * MULTIPLYING)),
    )


def int8_choice(
    m: int, columns: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, machine: str
) -> KernelChoice:
    """Of x [m, k], which becomes so many integers of 8 bits an entry, by a weight that is read as `readings[at]`."""
    n, k = readings[0].dims["n"], readings[0].dims["k"]
    nbytes, products = stored + columns * m * k, 8 * ceil(columns * m / 8) * n * k
    nanoseconds = LAUNCH + max(nbytes / BYTES_A_NANOSECOND, products / (2 * PRODUCTS_A_NANOSECOND * DECODING))
    refused = _no_integers(readings, at, laid_out) if machine == "gpu" else "it is for GPUs"
    return KernelChoice("mma", refused, nbytes, nanoseconds)


def _no_integers(readings: Sequence[Expr], at: int, laid_out: str) -> str | None:
    if (why := _no_layout(readings, laid_out)) is not None:
        return why
    try:
        layout(*readings).integers(at)
    except UnsuitableError as err:
        return str(err)
    return None


def fp8_choice(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, code: DType, machine: str
) -> KernelChoice:
    """Of x [m, k], which becomes `code`, by a weight that is read as `readings[at]`."""
    n, k = readings[0].dims["n"], readings[0].dims["k"]
    nbytes, products = stored + m * k, 8 * ceil(m / 8) * n * k
    nanoseconds = LAUNCH + max(nbytes / BYTES_A_NANOSECOND, products / (2 * PRODUCTS_A_NANOSECOND * DECODING))
    refused = _no_float8(readings, at, laid_out, code) if machine == "gpu" else "it is for GPUs"
    return KernelChoice("fp8", refused, nbytes, nanoseconds)


def _no_float8(readings: Sequence[Expr], at: int, laid_out: str, code: DType) -> str | None:
    if code != "e4m3":
        return f"it multiplies e4m3, and x becomes {code}"
    if (why := _no_layout(readings, laid_out)) is not None:
        return why
    return None if layout(*readings).weights[at].float8 else "the weights are not stored as e4m3"


def restoring(readings: Sequence[Expr], stored: int, laid_out: str) -> float:
    """Nanoseconds to bring an array into its format's own layout: a few loops in which codes are bytes."""
    if laid_out == "own" or layout(*readings).as_stored:
        return 0.0
    weights = readings[0].dims["n"] * readings[0].dims["k"]
    return RESTORING_LAUNCHES + 4 * (weights + stored) / BYTES_A_NANOSECOND


def _no_halves(dtype: DType, machine: str) -> str:
    if machine != "gpu":
        return "it is for GPUs"
    return f"x is {dtype}, and it multiplies halves: cast x to bfloat16 or float16"


def _no_decoder(readings: Sequence[Expr], at: int, laid_out: str) -> str | None:
    if (why := _no_layout(readings, laid_out)) is not None:
        return why
    try:
        layout(*readings).check_decoded(at)
    except UnsuitableError as err:
        return str(err)
    return None


def _no_layout(readings: Sequence[Expr], laid_out: str) -> str | None:
    try:
        layout(*readings)
    except UnsuitableError as err:
        return str(err)
    return None if laid_out == "mma" else "the weight is in its format's own layout: lb.prepare the model for its GPU"
