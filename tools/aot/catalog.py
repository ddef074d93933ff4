"""The kernels that `make aot` compiles: every way to decode, in both halves, for some rows of activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lowbit as lb
from lowbit.devices import Variant
from lowbit.formats.format import Format
from lowbit.ir.dtypes import DType, numpy_dtype
from lowbit.ir.dtypes import bits as dtype_bits
from lowbit.kernels.alu import Half
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.int8 import product_of_integers
from lowbit.kernels.lanes import LANES
from lowbit.kernels.layout import WARPGROUPS, Layout
from lowbit.kernels.memory import STEP
from lowbit.kernels.mma_db import table_gradients
from lowbit.kernels.mma_dw import parameter_gradients
from lowbit.kernels.mma_dx import input_gradient
from lowbit.kernels.partial import Sums
from lowbit.kernels.product import product, product_by_sums, product_of_codes
from lowbit.quant_type import QuantType, kernel_layout, readings
from tests.fp3 import fp3_rows

SCALES: dict[Half, str] = {"f16": "float16", "bf16": "bfloat16"}
SIZE = 8192
"""Of the square weight: a loop over k remains in every part of it."""


@dataclass(frozen=True)
class Listed:
    """A kernel as `tools.aot.report.Kernel` has it."""

    name: str
    function: Callable[..., Any]
    avals: tuple[Any, ...]
    weights: int
    bits: float
    wgmmas: int
    target: float | None
    times: int | None = None


def catalog() -> Iterator[Listed]:
    aims = {
        "uniform4": (lb.uniform, 4, 0.9),
        "bcq2": (lb.bcq, 2, 0.9),
        "bcq3": (lb.bcq, 3, 0.9),
        "bcq4": (lb.bcq, 4, 1.0),
    }
    for name, (make, bits, target) in aims.items():
        for kind, scale in SCALES.items():
            fmt = make(bits, group=128, scale_dtype=scale)
            yield listed(f"{name}_{kind}_m8", fmt, kind, 8, target)
        yield listed(f"{name}_bf16_m64", fmt, "bf16", 64, None)
        yield listed(f"{name}_bf16_m256", fmt, "bf16", 256, None)
        yield listed(f"{name}_f32_scales_bf16_m8", make(bits, group=128), "bf16", 8, target)
    yield listed("bcq1_bf16_m8", lb.bcq(1, group=128, scale_dtype="bfloat16"), "bf16", 8, None)
    yield listed("bcq4_offset_bf16_m8", lb.bcq(4, group=128, offset=True, scale_dtype="bfloat16"), "bf16", 8, None)
    yield listed("fp3_rows_bf16_m8", fp3_rows(), "bf16", 8, 0.9)  # a format from outside the library
    for width, lo in ((2, 2), (3, 3), (4, 3), (3, 2), (4, 2)):
        nested = lb.any_precision(lo, 8, width=width)
        for kind in SCALES:
            yield listed(f"any_precision{lo}_at_{width}_{kind}_m8", nested, kind, 8, 1.0)
    for kind, half in SCALES.items():
        yield listed(f"codebook_m1v4_f32_scales_{kind}_m8", lb.codebook(1, 8, vec=4, group=128), kind, 8, 1.0)
        yield listed(f"codebook_m1v4_{kind}_m8", lb.codebook(1, 8, vec=4, group=128, scale_dtype=half), kind, 8, None)
        yield listed(f"codebook_m2v8_{kind}_m8", lb.codebook(2, 8, vec=8, group=128, scale_dtype=half), kind, 8, None)
    for m in (8, 64, 256):
        yield listed(f"nested_fp_at_16_f16_m{m}", lb.nested_fp(), "f16", m, 1.0 if m == 8 else None)
    yield listed("nested_fp_at_16_bf16_m8", lb.nested_fp(), "bf16", 8, None)
    for m in (8, 64, 512):
        yield listed_fp8(f"nested_fp_at_8_m{m}", m)
    for width in (3, 4):
        fmt = lb.any_bcq(2, 4, group=128, scale_dtype="bfloat16", width=width)
        yield listed(f"any_bcq2_at_{width}_bf16_m8", fmt, "bf16", 8, None)
    for width in (5, 8):
        yield listed(f"any_precision3_at_{width}_bf16_m8", lb.any_precision(3, 8, width=width), "bf16", 8, None)
    yield from in_integers()
    yield listed("uniform4_rows_bf16_m8", lb.uniform(4, scale_dtype="bfloat16"), "bf16", 8, 0.9)
    yield from by_sums()
    yield from gradients()


def gradients() -> Iterator[Listed]:
    """Of activations, and of parameters."""
    formats = {
        "bcq2": lb.bcq(2, group=128, scale_dtype="bfloat16"),
        "bcq3": lb.bcq(3, group=128, scale_dtype="bfloat16"),
        "bcq4": lb.bcq(4, group=128, scale_dtype="bfloat16"),
        "uniform4": lb.uniform(4, group=128, scale_dtype="bfloat16"),
        "any_precision3_at_3": lb.any_precision(3, 8, width=3),
        "any_precision3_at_4": lb.any_precision(3, 8, width=4),
        "codebook_m1v4": lb.codebook(1, 8, vec=4, group=128, scale_dtype="bfloat16"),
        "codebook_m2v8": lb.codebook(2, 8, vec=8, group=128, scale_dtype="bfloat16"),
    }
    for m in (64, 512):
        for name in ("bcq3", "uniform4", "any_precision3_at_4", "codebook_m1v4"):
            yield listed_dx(f"{name}_dx_bf16_m{m}", formats[name], m)
    for name, fmt in formats.items():
        for m in (512, 4096):
            yield listed_dw(f"{name}_dw_bf16_m{m}", parameter_gradients, fmt, m)
    for name in ("codebook_m1v4", "codebook_m2v8"):
        for m in (512, 4096):
            yield listed_dw(f"{name}_db_bf16_m{m}", table_gradients, formats[name], m)


def by_sums() -> Iterator[Listed]:
    formats = {f"bcq{bits}": lb.bcq(bits, group=128, scale_dtype="float16") for bits in (1, 2, 3, 4)}
    for books, vec in ((1, 4), (2, 8)):
        formats[f"codebook_m{books}v{vec}"] = lb.codebook(books, 8, vec=vec, group=128, scale_dtype="float16")
    for name, fmt in formats.items():
        for m in (1, 2, 4):
            yield listed_sums(f"{name}_sums_m{m}", fmt, m)


def in_integers() -> Iterator[Listed]:
    """Products in 8-bit integers."""
    yield listed_int8("uniform4_int8x2_m8", lb.uniform(4, group=128, scale_dtype="bfloat16"), 8, 0.9)
    for bits in (2, 3, 4):
        yield listed_int8(f"bcq{bits}_int8x2_m8", lb.bcq(bits, group=128, scale_dtype="bfloat16"), 8, 0.9)
    for width, lo in ((2, 2), (3, 3), (4, 3), (3, 2), (4, 2)):
        yield listed_int8(f"any_precision{lo}_at_{width}_int8x2_m8", lb.any_precision(lo, 8, width=width), 8, 0.9)
    yield listed_int8("bcq3_int8x2_m64", lb.bcq(3, group=128, scale_dtype="bfloat16"), 64, None)


def before_hopper() -> Iterator[Listed]:
    """The kernels for compute capability 8."""
    batches: tuple[tuple[Half, int], ...] = (("f16", 8), ("bf16", 8), ("bf16", 16))
    for kind, m in batches:
        for name, make, bits in (("uniform4", lb.uniform, 4), *((f"bcq{b}", lb.bcq, b) for b in (2, 3, 4))):
            fmt = make(bits, group=128, scale_dtype=SCALES[kind])
            yield listed(f"{name}_{kind}_m{m}", fmt, kind, m, 0.9, "ampere")
        for width, lo in ((2, 2), (3, 3), (4, 3)):
            fmt = lb.any_precision(lo, 8, width=width)
            yield listed(f"any_precision{lo}_at_{width}_{kind}_m{m}", fmt, kind, m, 0.9, "ampere")


def listed(name: str, fmt: Format, kind: Half, m: int, target: float | None, variant: Variant = "hopper") -> Listed:
    """The product of x [m, SIZE] with a SIZE by SIZE weight, read at its format's width."""
    like = laid_out(name, partial(product, variant=variant), fmt, kind, m, STAGE // 16, target)
    if variant == "hopper":
        return like
    # A block has the tiles of as many warpgroups.
    return replace(like, weights=WARPGROUPS * like.weights, wgmmas=WARPGROUPS * STAGE // 16 * m // 8)


def listed_dx(name: str, fmt: Format, m: int) -> Listed:
    """The gradient of x in that product, from dy [m, SIZE] in bfloat16. One WGMMA has all inputs of a stage."""
    return laid_out(name, input_gradient, fmt, "bf16", m, ROWS // 16, None)


def listed_int8(name: str, fmt: Format, m: int, target: float | None) -> Listed:
    """The product of x in two columns of 8-bit integers."""
    return laid_out(name, product_of_integers, fmt, "i8", 2 * m, STAGE // 32, target)


def laid_out(
    name: str, run: Callable[..., Any], fmt: Format, kind: DType, m: int, wgmmas: int, target: float | None
) -> Listed:
    """`run` of a layout, activations or their gradient, and fields."""
    t = QuantType((("k", SIZE), ("n", SIZE)), "f32", fmt, layout="mma")
    of, at = kernel_layout(t), readings(t).index(t.decode)
    fields = stored(of)
    x = jax.ShapeDtypeStruct((m, SIZE), numpy_dtype(kind))
    read = sum(fields[field].size * dtype_bits(of.fields[field].dtype) for field in of.read(at)) / SIZE**2
    return Listed(name, partial(run, of, at=at), (x, fields), ROWS * STAGE // LANES, read, wgmmas, target)


def listed_sums(name: str, fmt: Format, m: int) -> Listed:
    """As `listed`, by the schedule `sums`."""
    of = kernel_layout(QuantType((("k", SIZE), ("n", SIZE)), "f32", fmt, layout="mma"))
    fields = stored(of)
    read = sum(fields[field].size * dtype_bits(of.fields[field].dtype) for field in of.read()) / SIZE**2
    weights = ROWS * Sums.of(of.program("f16"), m).inputs // LANES
    x = jax.ShapeDtypeStruct((m, SIZE), jnp.float16)
    return Listed(name, partial(product_by_sums, of), (x, fields), weights, read, 0, None)


def stored(of: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays like those of a layout."""
    return {
        field: jax.ShapeDtypeStruct(tuple(leaf.dims.values()), numpy_dtype(leaf.dtype))
        for field, leaf in of.fields.items()
    }


def listed_fp8(name: str, m: int) -> Listed:
    """The product of x [m, SIZE] in e4m3 with the first bytes of a SIZE by SIZE weight."""
    of = kernel_layout(QuantType((("k", SIZE), ("n", SIZE)), "f32", lb.nested_fp(8), layout="mma"))
    fields = {field: array for field, array in stored(of).items() if field in of.read(0)}
    x = jax.ShapeDtypeStruct((m, SIZE), jnp.float8_e4m3fn)
    run = partial(product_of_codes, of, at=0)
    return Listed(name, lambda x, fields: run(x, fields), (x, fields), ROWS * STAGE // LANES, 8.0, STAGE // 32, None)


def listed_dw(name: str, run: Callable[..., Any], fmt: Format, m: int) -> Listed:
    """Gradients of what that weight is made of, from x and dy [m, SIZE] in bfloat16."""
    like = laid_out(name, run, fmt, "bf16", m, STEP // 16, None)
    x, fields = like.avals
    return replace(like, avals=(x, x, fields), times=m // STEP)
