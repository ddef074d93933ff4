"""Ways to run a product that are no form of its term: whether they can, why not, and what they are predicted to take.

mma      the kernel: weights are decoded on their way to the tensor cores, to halves or to integers of 8 bits
sums     the kernel for few activations: what they make of all that codes can say is summed first, and looked up
fp8      the kernel for weights and activations in e4m3, which the tensor cores multiply as they are
dense    the weight is decoded once, to halves, and multiplied by the platform's own matrix product

And for the gradient of the activations:

mma_dx   the kernel: weights are decoded to shared memory, where the tensor cores multiply them
xla_dx   the cheapest form of its term

And for those of the weight's parameters:

mma_dw   the kernel: sums of dy^T x by codes, as `lowbit.kernels.by_code` says
xla_dw   the cheapest forms of their terms

But for those of tables that all rows share:

mma_db   the kernel: sums of dy^T x by the vectors that codes look up, as `lowbit.kernels.buckets` says
xla_db   the cheapest forms of their terms
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TypeVar

from lowbit.devices import no_kernels_here, variant_here
from lowbit.ir.dtypes import DType, bits
from lowbit.ir.expr import Expr
from lowbit.kernels.buckets import Buckets
from lowbit.kernels.by_code import CodeSums
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import OneBit, Wide
from lowbit.kernels.lanes import Program
from lowbit.kernels.layout import SMS, WARPGROUPS, Layout, layout
from lowbit.kernels.memory import DY_ROWS, too_much_before_hopper, too_much_for_dx, too_much_for_int8, too_much_for_mma
from lowbit.kernels.partial import Sums
from lowbit.passes.pointwise import UnsuitableError

KERNELS = ("mma", "sums", "fp8", "dense")
DX, DW, DB = ("mma_dx", "xla_dx"), ("mma_dw", "xla_dw"), ("mma_db", "xla_db")
GRADIENTS = (*DX, *DW, *DB)
BYTES_A_NANOSECOND = 3350 * 0.8
"""Of an H100's memory, at the share of its peak that streaming kernels are expected to reach."""
PRODUCTS_A_NANOSECOND = 495_000
"""Multiply-adds of its tensor cores in halves."""
DECODING, MULTIPLYING = 0.45, 0.75
"""Shares of that which are expected with weights decoded on the way, and without. None of these is measured yet."""
LAUNCH = 5_000.0
"""Nanoseconds: launching, filling the pipeline, and adding the parts of k."""
RESTORING_LAUNCHES = 25_000.0
CLOCKS_A_NANOSECOND = SMS * 1.755
LOADED, ISSUED = 32, 128
"""Words of shared memory that an SM moves for its lanes each clock, and instructions of a lane that it issues."""
INSTRUCTIONS: dict[type, float] = {OneBit: 1.6, Wide: 10}
"""Of `mma` for a weight, as `make aot` counts them, where an SM issues fewer than memory brings weights for."""

_Sums = TypeVar("_Sums", CodeSums, Buckets)


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

    def unless(self, why: str | None) -> KernelChoice:
        """The same, refused for this too; the first reason stays."""
        return self if why is None or self.refused is not None else replace(self, refused=why)


def kernel_choices(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, dtype: DType, machine: str
) -> tuple[KernelChoice, ...]:
    """Of x [m, k] in `dtype` by a weight in the layout `laid_out`: `stored` bytes of it, read as `readings[at]`."""
    n, k = readings[0].dims["n"], readings[0].dims["k"]
    nbytes, products = stored + 2 * m * k, 8 * ceil(m / 8) * n * k
    streamed = nbytes / BYTES_A_NANOSECOND
    refused = _no_decoder(readings, at, laid_out)
    lanes = 0.0 if refused else n * k * _decoding(layout(*readings).program("f16", at))
    refused = refused or too_much_for_mma(layout(*readings).program("f16", at))
    fused = LAUNCH + max(streamed, lanes, products / (PRODUCTS_A_NANOSECOND * DECODING))
    dense = 2 * LAUNCH + restoring(readings, stored, laid_out) + streamed + 4 * n * k / BYTES_A_NANOSECOND
    halves = _no_halves(dtype, machine)
    return (
        KernelChoice("mma", halves or refused, nbytes, fused),
        sums_choice(m, readings, at, stored, laid_out, dtype, machine),
        KernelChoice("dense", halves, nbytes, dense + products / (PRODUCTS_A_NANOSECOND * MULTIPLYING)),
    )


def _decoding(program: Program) -> float:
    """Nanoseconds for one weight, by what its lanes do."""
    decoder = program.decoder
    words = decoder.bits / decoder.grain / 32
    if isinstance(decoder, Books):
        words += len(decoder.lookups) / 2  # halves of as many vectors
    return _busy(words, INSTRUCTIONS.get(type(decoder), 0))


def _busy(words: float, instructions: float) -> float:
    """Nanoseconds that all SMs are busy for one weight with so many words and instructions of a lane."""
    return max(words / LOADED, instructions / ISSUED) / CLOCKS_A_NANOSECOND


def sums_choice(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, dtype: DType, machine: str
) -> KernelChoice:
    """Of x [m, k] by a weight that is read as `readings[at]`."""
    nbytes = stored + bits(dtype) // 8 * m * readings[0].dims["k"]
    if machine != "gpu":
        how: Sums | str = "it is for GPUs"
    elif bits(dtype) > 32:
        how = f"x is {dtype}, and it adds in float32"
    else:
        how = _no_layout(readings, laid_out) or _sums(m, readings, at)
    if isinstance(how, str):
        return KernelChoice("sums", how, nbytes, LAUNCH + nbytes / BYTES_A_NANOSECOND)
    return KernelChoice("sums", None, nbytes, LAUNCH + _summing(how, layout(*readings), nbytes))


def _sums(m: int, readings: Sequence[Expr], at: int) -> Sums | str:
    try:
        return Sums.of(layout(*readings).program("f16", at), m)
    except UnsuitableError as err:
        return str(err)


def _summing(how: Sums, of: Layout, nbytes: int) -> float:
    """Nanoseconds to make the tables, to look up, and to write and read the sums of each chunk."""
    chunks = of.stages * how.chunks
    tables = ceil(chunks * how.bands(of) / SMS) * prod(how.shape) * SMS / LOADED / CLOCKS_A_NANOSECOND
    looking_up = max(nbytes / BYTES_A_NANOSECOND, of.n * of.k * _busy(how.loaded, how.issued))
    return tables + looking_up + 2 * 4 * chunks * how.columns * of.n / BYTES_A_NANOSECOND


def int8_choice(
    m: int, columns: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, machine: str
) -> KernelChoice:
    """Of x [m, k], which becomes so many integers of 8 bits an entry, by a weight that is read as `readings[at]`."""
    refused = _no_integers(readings, at, laid_out) if machine == "gpu" else "it is for GPUs"
    return _in_8_bits("mma", refused, columns * m, readings[0], stored)


def _in_8_bits(name: str, refused: str | None, m: int, w: Expr, stored: int) -> KernelChoice:
    """A product of m rows of bytes."""
    n, k = w.dims["n"], w.dims["k"]
    nbytes, products = stored + m * k, 8 * ceil(m / 8) * n * k
    nanoseconds = LAUNCH + max(nbytes / BYTES_A_NANOSECOND, products / (2 * PRODUCTS_A_NANOSECOND * DECODING))
    return KernelChoice(name, refused, nbytes, nanoseconds)


def _no_integers(readings: Sequence[Expr], at: int, laid_out: str) -> str | None:
    if (why := _no_layout(readings, laid_out)) is not None:
        return why
    try:
        return too_much_for_int8(layout(*readings).integers(at).halves)
    except UnsuitableError as err:
        return str(err)


def fp8_choice(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, code: DType, machine: str
) -> KernelChoice:
    """Of x [m, k], which becomes `code`, by a weight that is read as `readings[at]`."""
    refused = _no_float8(readings, at, laid_out, code) if machine == "gpu" else "it is for GPUs"
    return _in_8_bits("fp8", refused, m, readings[0], stored)


def no_kernel_here(name: str, readings: Sequence[Expr] = (), at: int = 0) -> str | None:
    """Why the GPU that programs run on has not this kernel, `mma` for a weight; None where there is no GPU."""
    if (why := no_kernels_here()) is not None or variant_here() == "hopper":
        return why
    if name != "mma":
        return "it is for compute capability 9.0 only"
    return too_much_before_hopper(layout(*readings).program("f16", at))


def dx_choice(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, dtype: DType, machine: str
) -> KernelChoice:
    """Of the gradient of x [m, k] from dy [m, n], by a weight that is read as `readings[at]`."""
    n, k, rows = readings[0].dims["n"], readings[0].dims["k"], DY_ROWS * ceil(m / DY_ROWS)
    nbytes, products = stored + 2 * m * n, rows * n * k
    multiplied = max(nbytes / BYTES_A_NANOSECOND, products / (PRODUCTS_A_NANOSECOND * DECODING))
    summed = 2 * WARPGROUPS * 4 * rows * k / BYTES_A_NANOSECOND  # written, and read again
    halves = _no_halves(dtype, machine)
    refused = halves or _no_decoder(readings, at, laid_out) or too_much_for_dx(layout(*readings).program("f16", at))
    return KernelChoice("mma_dx", refused, nbytes, LAUNCH + multiplied + summed)


def _no_float8(readings: Sequence[Expr], at: int, laid_out: str, code: DType) -> str | None:
    if code != "e4m3":
        return f"it multiplies e4m3, and x becomes {code}"
    if (why := _no_layout(readings, laid_out)) is not None:
        return why
    return None if layout(*readings).weights[at].float8 else "the weights are not stored as e4m3"


def dw_choice(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, dtype: DType, machine: str
) -> KernelChoice:
    """Of the gradients of the parameters of rows, for x [m, k] and a product's cotangent [m, n], both in `dtype`."""
    n, k = readings[0].dims["n"], readings[0].dims["k"]
    sums = _no_halves(dtype, machine) or _sums_of(CodeSums, readings, at, laid_out)
    made = _of_outer("mma_dw", m, readings[0], stored)
    if isinstance(sums, str):
        return made.unless(sums)
    return replace(made, nanoseconds=made.nanoseconds + n * k * _busy(0, sums.instructions))


def db_choice(
    m: int, readings: Sequence[Expr], at: int, stored: int, laid_out: str, dtype: DType, machine: str
) -> KernelChoice:
    """The same of all tables that all rows share."""
    sums = _no_halves(dtype, machine) or _sums_of(Buckets, readings, at, laid_out)
    made = _of_outer("mma_db", m, readings[0], stored)
    if isinstance(sums, str):
        return made.unless(sums)
    of = layout(*readings)
    parts = 2 * 4 * of.tiles * of.stages * sums.words / BYTES_A_NANOSECOND  # written, and read again
    added = of.n * of.k * _busy(sums.loaded, sums.issued)
    return replace(made, nanoseconds=made.nanoseconds + (sums.bands(of)[0] - 1) * LAUNCH + added + parts)


def _of_outer(name: str, m: int, w: Expr, stored: int) -> KernelChoice:
    """dy^T x, tile by tile, beside so many bytes of weights."""
    n, k = w.dims["n"], w.dims["k"]
    nbytes = stored + 2 * m * (n + k)
    multiplied = max(nbytes / BYTES_A_NANOSECOND, m * n * k / (PRODUCTS_A_NANOSECOND * MULTIPLYING))
    return KernelChoice(name, None, nbytes, LAUNCH + multiplied)


def _sums_of(kind: type[_Sums], readings: Sequence[Expr], at: int, laid_out: str) -> _Sums | str:
    """What is summed, or why that does not give the gradients."""
    if (why := _no_layout(readings, laid_out)) is not None:
        return why
    try:
        return kind(layout(*readings).program("f16", at))
    except UnsuitableError as err:
        return str(err)


def restoring(readings: Sequence[Expr], stored: int, laid_out: str) -> float:
    """Nanoseconds to bring an array into its format's own layout: a few loops in which codes are bytes."""
    if laid_out == "own" or layout(*readings).as_stored:
        return 0.0
    weights = readings[0].dims["n"] * readings[0].dims["k"]
    return RESTORING_LAUNCHES + 4 * (weights + stored) / BYTES_A_NANOSECOND


def _no_halves(dtype: DType, machine: str) -> str | None:
    if machine != "gpu":
        return "it is for GPUs"
    if dtype in ("f16", "bf16"):
        return None
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
