"""The schedule `sums`: its lane programs and its twin in the Mosaic GPU interpreter against the oracle, and what it
refuses, costs and is chosen for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.kernels.decoders import ROWS
from lowbit.kernels.lanes import LANES, by_leaf
from lowbit.kernels.layout import WARPGROUPS
from lowbit.kernels.partial import STEPS, Sums, filled_in_numpy, own_in_numpy, total_in_numpy
from lowbit.kernels.product import operands_of_sums, product_by_sums
from lowbit.kernels.verbs import Twin
from lowbit.passes.pointwise import UnsuitableError
from lowbit.planning import LoweringError
from lowbit.quant_type import QuantType, kernel_layout
from lowbit.testing import random_array
from lowbit.testing.checks import assert_product, random_rows
from lowbit.testing.terms import kernel_term
from tools.aot.model import BYTES, RATES
from tools.aot.report import END

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def array(fmt: lb.Format, n: int, k: int) -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), "f32", fmt))


def large(fmt: lb.Format, size: int = 8192) -> QuantType:
    return QuantType((("k", size), ("n", size)), "f32", fmt, layout="mma")


def check(y: Any, x: Any, w: QuantArray) -> None:
    assert y.shape == (len(x), w.shape[1]) and y.dtype == x.dtype
    assert_product(y, x, w, kernel_term(len(x), w.type, short(x.dtype), "sums"))


# ---------------------------------------------------------------- lane programs

FORMATS = (
    lb.bcq(1, group=128),
    lb.bcq(2, group=32, scale_dtype="bfloat16"),
    lb.bcq(3, group=64, offset=True, scale_dtype="float16"),
    lb.bcq(4),
    lb.codebook(2, 8, vec=8, group=32, scale_dtype="bfloat16"),
    lb.codebook(1, 8, vec=4),
    lb.codebook(1, 8, vec=16, group=256),
)


def by_lanes(w: QuantArray, x: Any) -> Any:
    """The product by the lane programs alone: chunk by chunk, tile by tile."""
    of = kernel_layout(w.type)
    how = Sums.of(of.program("f16"), len(x))
    words, *rest, inputs = map(np.asarray, operands_of_sums(of, how, jnp.asarray(x), laid_out(w).fields))
    leaves = dict(zip(by_leaf(how.program.weights), rest, strict=False))
    y = np.zeros((how.columns, of.tiles, ROWS), np.float32)
    for chunk in range(of.stages * how.chunks):
        first, stage = chunk * how.inputs, divmod(chunk, how.chunks)
        halves = np.split(inputs[:, first : first + how.inputs], WARPGROUPS, 1)
        table = np.concatenate([filled_in_numpy(how, half, *rest[len(leaves) :]) for half in halves])
        for tile in range(of.tiles):
            own = words[tile, stage[0]].reshape(how.chunks, how.source.words, -1)[stage[1]]
            group = [(e, first // e.span + g if e.span else 0) for e, g in how.stored]
            elements = by_leaf(how.program.weights)
            stored = [leaves[e.leaf.name][tile, g, elements[e.leaf.name].index(e)] for e, g in group]
            y[:, tile] += total_in_numpy(how, table, own, *stored)
    return y.reshape(how.columns, -1)[: len(x), : of.n]


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_lanes_look_up_the_oracles_product(fmt: lb.Format, m: int) -> None:
    w, x = array(fmt, 70, 300), random_rows(m, 300)
    check(by_lanes(w, x), x, w)


def test_what_is_infinite_stays_so() -> None:
    w, x = array(FORMATS[0], 128, 300), random_rows(1, 300)  # no padded rows, whose scales are zero
    x[0, 77] = np.inf
    assert np.array_equal(by_lanes(w, x) > 0, np.asarray(lb.dequantize(w))[77][None] > 0)


@pytest.mark.parametrize("fmt", [*FORMATS[:4], FORMATS[-1]], ids=str)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_lanes_that_load_together_meet_in_no_bank(fmt: lb.Format, m: int) -> None:
    """Of a load of 4, 8 or 16 bytes each, that go together in as many parts of a warp."""
    how = Sums.of(kernel_layout(large(fmt)).program("f16"), m)
    assert how.layers == 2
    rows = np.random.default_rng(0).integers(0, how.source.entries, (100, 32)) * how.shape[-1]
    banks = (rows + own_in_numpy(how)[:32] // 4)[..., None] + np.arange(m)
    for together in np.split(banks % 32, m, axis=1):
        assert all(len(set(one.reshape(-1))) == 32 for one in together)


@pytest.mark.parametrize("fmt", [*FORMATS, lb.bcq(4, group=32), lb.codebook(1, 8, vec=8)], ids=str)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_tables_and_what_is_in_flight_fit(fmt: lb.Format, m: int) -> None:
    of = kernel_layout(large(fmt))
    how = Sums.of(of.program("f16"), m)
    depth, steps = how.depth(STEPS), of.tiles // WARPGROUPS // how.bands(of)
    assert how.fixed(how.layers) + depth * how.stage <= 226 << 10 and depth in (2, 4)
    assert steps * how.columns <= STEPS and how.depth(1) == 1


# ---------------------------------------------------------------- the twin


@pytest.mark.parametrize(
    ("fmt", "dtype", "m", "n", "k", "bands"),
    [
        pytest.param(lb.bcq(3, group=128, offset=True), "float32", 1, 130, 300, 1, marks=pytest.mark.slow),
        (lb.codebook(2, 8, vec=8, group=32, scale_dtype="bfloat16"), "bfloat16", 3, 65, 200, None),
        pytest.param(lb.bcq(1), "float16", 4, 65, 300, None, marks=pytest.mark.slow),
        pytest.param(lb.codebook(1, 8, vec=4, group=128), "float32", 1, 200, 140, 1, marks=pytest.mark.slow),
        pytest.param(lb.codebook(2, 8, vec=8, group=256), "float16", 2, 200, 300, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_product(fmt: lb.Format, dtype: str, m: int, n: int, k: int, bands: int | None) -> None:
    w, x = array(fmt, n, k), random_rows(m, k, dtype=dtype)
    verbs = Twin(interpret_params(detect_races=True))
    y = jax.block_until_ready(product_by_sums(kernel_layout(w.type), jnp.asarray(x), laid_out(w).fields, bands, verbs))
    assert not races_found()
    check(y, x, w)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fmt", "m", "why"),
    [
        (lb.uniform(4), 1, "its weights are no sums of vectors from codebooks, nor of scales with signs"),
        (lb.any_precision(3, 4), 1, "its weights are no sums of vectors from codebooks, nor of scales with signs"),
        (lb.any_bcq(2, 4, group=128), 1, "its words hold the planes of several widths"),
        (lb.bcq(4, offset=True), 1, "with an offset, words of four planes are those of two tables"),
        (lb.bcq(2), 5, "tables of sums serve at most 4 rows of x, and it has 5"),
        (lb.codebook(1, 4, vec=4, group=128), 1, "tables of sums are for at least 32 vectors of 4 and more, not 16 v"),
        (lb.codebook(1, 8, vec=2), 1, "tables of sums are for at least 32 vectors of 4 and more, not 256 vectors of 2"),
        (lb.codebook(1, 6, vec=4), 1, "6 bits for 4 inputs do not fill 2 words of a lane with an even number of codes"),
        (lb.codebook(4, 8, vec=16), 1, "its tables and buffers take 247296 bytes, and shared memory has 231424 for"),
    ],
    ids=str,
)
def test_what_lanes_cannot_look_up_is_refused_by_the_plan(fmt: lb.Format, m: int, why: str) -> None:
    t = large(fmt, 256)
    with pytest.raises(UnsuitableError, match=why):
        Sums.of(kernel_layout(t).program("f16"), m)
    found = lb.plan((m, 256), t, "gpu", "float16")
    assert f"sums     refused: {why}" in str(found)
    with pytest.raises(LoweringError, match=f"sums     refused: {why}"):
        found.choice("sums")


def test_it_is_refused_where_mma_is() -> None:
    w = array(lb.bcq(2), 64, 256)
    for t, platform, dtype, why in (
        (w.type, "gpu", "float16", "the weight is in its format's own layout: lb.prepare the model for its GPU"),
        (laid_out(w).type, "cpu", "float16", "it is for GPUs"),
        (laid_out(w).type, "gpu", "float64", "x is f64, and it adds in float32"),
        (array(lb.bcq(2, group=96), 64, 288).type, "gpu", "float16", "groups of 96 inputs do not line up with 256"),
    ):
        assert f"sums     refused: {why}" in str(lb.plan((1, dict(t.dims)["k"]), t, platform, dtype))


# ---------------------------------------------------------------- what it costs


def rows_of_the_page() -> dict[str, dict[str, str]]:
    table = PAGE.read_text("utf-8").partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[0] == "kernel")
    return {line[0].strip("`"): dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head)}


def on_the_page(name: str) -> tuple[lb.Format, int]:
    """Format and rows of x of a kernel of this schedule there."""
    what, m = re.fullmatch(r"(?:codebook_)?(\w+)_sums_m(\d)", name).groups()  # type: ignore[union-attr]
    kinds = {f"bcq{bits}": lb.bcq(bits, group=128, scale_dtype="float16") for bits in (1, 2, 3, 4)}
    kinds |= {f"m{c}v{v}": lb.codebook(c, 8, vec=v, group=128, scale_dtype="float16") for c, v in ((1, 4), (2, 8))}
    return kinds[what], int(m)


def worst(row: dict[str, str]) -> float:
    """The fullest pipe, in percent."""
    (found,) = re.findall(r"(\d+)%", row["worst"].partition(" of ")[0])
    return float(found)


def meeting(how: Sums) -> float:
    """Words for a weight that look-ups wait for where two lanes meet."""
    return how.looks * how.columns * (2 - how.layers) / (how.inputs * ROWS / LANES)


SUMMED = [name for name in rows_of_the_page() if "_sums_" in name]


@pytest.mark.parametrize("name", SUMMED)
def test_the_plan_counts_what_the_page_counts(name: str) -> None:
    """Instructions and words for a weight, but for those of look-ups that meet, which no code shows."""
    row, (fmt, m) = rows_of_the_page()[name], on_the_page(name)
    t = large(fmt)
    how = Sums.of(kernel_layout(t).program("f16"), m)
    fed = 8 * BYTES / t.bits_per_weight
    assert fed * (how.loaded - meeting(how)) / RATES["LSU"] == pytest.approx(float(row["LSU"][:-1]) / 100, rel=0.05)
    assert fed * how.issued / RATES["issue"] == pytest.approx(float(row["issue"][:-1]) / 100, rel=0.1)


@pytest.mark.parametrize("name", [name for name in SUMMED if name.endswith("_m1")])
def test_the_page_compares_what_it_counts(name: str) -> None:
    rows, what = rows_of_the_page(), name.removesuffix("_sums_m1")
    section = PAGE.read_text("utf-8").partition("## Multiply or look up")[2]
    (said,) = re.findall(rf"^\| `{what}` \|(.*)\|$", section, re.MULTILINE)
    mma, *sums = (float(cell.strip(" *%")) for cell in said.split("|"))
    assert mma == worst(rows[f"{what}_bf16_m8"])
    for m, percent in zip((1, 2, 4), sums, strict=True):
        t, row = large(on_the_page(name)[0]), rows[f"{what}_sums_m{m}"]
        how = Sums.of(kernel_layout(t).program("f16"), m)
        waited = 100 * 8 * BYTES / t.bits_per_weight * meeting(how) / RATES["LSU"]
        assert percent == pytest.approx(max(worst(row), float(row["LSU"][:-1]) + waited), rel=0.04)


def test_it_is_chosen_for_two_codebooks_and_one_row() -> None:
    kernels = {name: on_the_page(name) for name in SUMMED}
    chosen = {name: lb.plan((m, 8192), large(fmt), "gpu", "bfloat16") for name, (fmt, m) in kernels.items()}
    assert {name for name, found in chosen.items() if found.choice().name == "sums"} == {"codebook_m2v8_sums_m1"}
    assert {found.choice().name for found in chosen.values()} == {"sums", "mma"}


def test_a_program_for_cuda_holds_the_kernel() -> None:
    t = large(lb.codebook(2, 8, vec=8, group=128), 4096)
    fields = {name: jax.ShapeDtypeStruct(tuple(f.dims.values()), numpy_dtype(f.dtype)) for name, f in t.fields.items()}
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    made = jax.jit(lambda x, f: lb.matmul(x, QuantArray(f, t))).trace(x, fields).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in made.as_text() and made.out_info.dtype == jnp.bfloat16
