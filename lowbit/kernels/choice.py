"""Whether a kernel can run a product, why not, and what it is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lowbit.ir.dtypes import DType
from lowbit.ir.expr import Expr
from lowbit.kernels.layout import layout
from lowbit.passes.pointwise import UnsuitableError

KERNELS = ("mma",)
BYTES_A_NANOSECOND = 3350 * 0.8
"""Of an H100's memory, at the share of its peak that streaming kernels are expected to reach."""
PRODUCTS_A_NANOSECOND = 495_000 * 0.6
"""Multiply-adds of its tensor cores in halves, likewise."""
LAUNCH = 5_000.0
"""Nanoseconds: launching, filling the pipeline, and adding the parts of k."""


@dataclass(frozen=True)
class KernelChoice:
    """One kernel for one product.

    Attributes:
      refused: why it cannot run; None if it can.
      bytes: read, of weights and activations.
      nanoseconds: predicted.
    """

    name: str
    refused: str | None
    bytes: int
    nanoseconds: float


def choice_of_mma(m: int, decode: Expr, stored: int, laid_out: str, dtype: DType, machine: str) -> KernelChoice:
    """The schedule `mma` for x [m, k] in `dtype` by a weight of `stored` bytes in the layout `laid_out`."""
    n, k = decode.dims["n"], decode.dims["k"]
    nbytes = stored + 2 * m * k
    columns = 8 * ceil(m / 8)
    time = LAUNCH + max(nbytes / BYTES_A_NANOSECOND, columns * n * k / PRODUCTS_A_NANOSECOND)
    return KernelChoice("mma", _refusal(decode, laid_out, dtype, machine), nbytes, time)


def _refusal(decode: Expr, laid_out: str, dtype: DType, machine: str) -> str | None:
    if machine != "gpu":
        return "it runs on NVIDIA GPUs of compute capability 9.0"
    try:
        layout(decode)
    except UnsuitableError as err:
        return str(err)
    if laid_out != "mma":
        return "the weight is in its format's own layout; lb.prepare brings it into the kernels'"
    if dtype not in ("f16", "bf16"):
        return f"x is {dtype}, and the matrix unit multiplies halves: cast it to bfloat16 or float16"
    return None
