"""Ways to run a product that are no form of its term: whether they can, why not, and what they are predicted to take.

mma      the kernel: weights are decoded on their way to the tensor cores
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

KERNELS = ("mma", "dense")
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
    m: int, readings: Sequence[Expr], stored: int, laid_out: str, dtype: DType, machine: str
) -> tuple[KernelChoice, ...]:
    """Of x [m, k] in `dtype` by a weight of which `stored` bytes are read, in the layout `laid_out`."""
    n, k = readings[0].dims["n"], readings[0].dims["k"]
    nbytes, products = stored + 2 * m * k, 8 * ceil(m / 8) * n * k
    streamed = nbytes / BYTES_A_NANOSECOND
    fused = LAUNCH + max(streamed, products / (PRODUCTS_A_NANOSECOND * DECODING))
    dense = 2 * LAUNCH + restoring(n * k, stored, laid_out) + streamed + 4 * n * k / BYTES_A_NANOSECOND
    halves = None if machine == "gpu" and dtype in ("f16", "bf16") else _no_halves(dtype, machine)
    return (
        KernelChoice("mma", halves or _no_layout(readings, laid_out), nbytes, fused),
        KernelChoice("dense", halves, nbytes, dense + products / (PRODUCTS_A_NANOSECOND * MULTIPLYING)),
    )


def restoring(weights: int, stored: int, laid_out: str) -> float:
    """Nanoseconds to bring an array into its format's own layout: a few loops in which codes are bytes."""
    return 0.0 if laid_out == "own" else RESTORING_LAUNCHES + 4 * (weights + stored) / BYTES_A_NANOSECOND


def _no_halves(dtype: DType, machine: str) -> str:
    if machine != "gpu":
        return "it is for GPUs"
    return f"x is {dtype}, and it multiplies halves: cast x to bfloat16 or float16"


def _no_layout(readings: Sequence[Expr], laid_out: str) -> str | None:
    try:
        layout(*readings)
    except UnsuitableError as err:
        return str(err)
    return None if laid_out == "mma" else "the weight is in its format's own layout: lb.prepare the model for its GPU"
