"""The kernels that `make aot` compiles: every way to decode, in both halves, for some rows of activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lowbit as lb
from lowbit.formats.format import Format
from lowbit.ir.dtypes import bits as dtype_bits
from lowbit.ir.dtypes import numpy_dtype
from lowbit.kernels.alu import HALVES, Half
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.int8 import product_of_integers
from lowbit.kernels.lanes import LANES
from lowbit.kernels.layout import Layout
from lowbit.kernels.product import product, product_of_codes
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


def in_integers() -> Iterator[Listed]:
    """Products in 8-bit integers."""
    yield listed_int8("uniform4_int8x2_m8", lb.uniform(4, group=128, scale_dtype="bfloat16"), 8, 0.9)
    for bits in (2, 3, 4):
        yield listed_int8(f"bcq{bits}_int8x2_m8", lb.bcq(bits, group=128, scale_dtype="bfloat16"), 8, 0.9)
    for width, lo in ((2, 2), (3, 3), (4, 3), (3, 2), (4, 2)):
        yield listed_int8(f"any_precision{lo}_at_{width}_int8x2_m8", lb.any_precision(lo, 8, width=width), 8, 0.9)
    yield listed_int8("bcq3_int8x2_m64", lb.bcq(3, group=128, scale_dtype="bfloat16"), 64, None)


def listed(name: str, fmt: Format, kind: Half, m: int, target: float | None) -> Listed:
    """The product of x [m, SIZE] with a SIZE by SIZE weight, read at its format's width."""
    of, at, fields, read = stored(fmt)
    x = jax.ShapeDtypeStruct((m, SIZE), HALVES[kind])
    return Listed(name, partial(product, of, at=at), (x, fields), ROWS * STAGE // LANES, read, STAGE // 16, target)


def listed_int8(name: str, fmt: Format, m: int, target: float | None) -> Listed:
    """The same of x in two columns of 8-bit integers."""
    of, at, fields, read = stored(fmt)
    x, run = jax.ShapeDtypeStruct((2 * m, SIZE), jnp.int8), partial(product_of_integers, of, at=at)
    return Listed(name, run, (x, fields), ROWS * STAGE // LANES, read, STAGE // 32, target)


def stored(fmt: Format) -> tuple[Layout, int, dict[str, jax.ShapeDtypeStruct], float]:
    """A SIZE by SIZE weight in the kernels' layout, which of its widths is read, its arrays, and bits of a weight."""
    t = QuantType((("k", SIZE), ("n", SIZE)), "f32", fmt, layout="mma")
    of, at = kernel_layout(t), readings(t).index(t.decode)
    fields = {
        field: jax.ShapeDtypeStruct(tuple(leaf.dims.values()), numpy_dtype(leaf.dtype))
        for field, leaf in of.fields.items()
    }
    read = sum(fields[field].size * dtype_bits(of.fields[field].dtype) for field in of.read(at)) / SIZE**2
    return of, at, fields, read


def listed_fp8(name: str, m: int) -> Listed:
    """The product of x [m, SIZE] in e4m3 with the first bytes of a SIZE by SIZE weight."""
    of = kernel_layout(QuantType((("k", SIZE), ("n", SIZE)), "f32", lb.nested_fp(8), layout="mma"))
    fields = {
        field: jax.ShapeDtypeStruct(tuple(of.fields[field].dims.values()), numpy_dtype(of.fields[field].dtype))
        for field in of.read(0)
    }
    x = jax.ShapeDtypeStruct((m, SIZE), jnp.float8_e4m3fn)
    run = partial(product_of_codes, of, at=0)
    return Listed(name, lambda x, fields: run(x, fields), (x, fields), ROWS * STAGE // LANES, 8.0, STAGE // 32, None)
