"""Lane programs decode every weight exactly as the oracle does, into the registers that Pallas expects."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import lowbit as lb
from lowbit.ir import cast, evaluate, param
from lowbit.kernels import alu
from lowbit.kernels.alu import HALVES, NumpyAlu
from lowbit.kernels.decoders import COLUMNS, ROWS, STAGE, Eights, OneBit, ScaledIntegers, SignedTable, TwoBits
from lowbit.kernels.lane_gpu import ROW, WORDS
from lowbit.kernels.lanes import LANES, Program, at_once, from_registers, groups_of, row_registers
from lowbit.kernels.layout import layout
from lowbit.kernels.pick import LARGEST_ZERO, pick
from lowbit.passes.pointwise import UnsuitableError, pointwise
from lowbit.passes.relayout import bit_positions
from lowbit.passes.scalar import Element
from tests.fp3 import fp3_rows
from tests.staged import staged
from tests.weights import value

Array = np.ndarray[Any, Any]
FORMATS = {
    OneBit: (lb.bcq(1, group=64), lb.uniform(1)),
    TwoBits: (lb.bcq(2, group=128), lb.uniform(2, group=32)),
    Eights: (
        lb.bcq(3, group=128, scale_dtype="float16"),
        fp3_rows(),
        lb.bcq(4, group=256, offset=True, scale_dtype="bfloat16"),
        lb.bcq(4, group=32, offset=True),
    ),
    SignedTable: (lb.bcq(4, group=64),),
    ScaledIntegers: (lb.uniform(4, group=128), lb.uniform(4, scale_dtype="float16")),
}
CASES = [pytest.param(d, f, id=f"{d.__name__}-{f}") for d, formats in FORMATS.items() for f in formats]


@cache
def program(fmt: lb.Format, kind: Any) -> Program:
    return layout(fmt.decode(ROWS, 2 * STAGE)).program(kind)


def parameters(p: Program, seed: int) -> dict[tuple[Element, int], Array]:
    """Values that either half holds exactly, none of them zero and no two of a row alike."""
    rng = np.random.default_rng(seed)
    floats = rng.permuted(np.tile(np.arange(1, 129), (ROWS, 1)), axis=1) * rng.choice([-1, 1], (ROWS, 128))
    out = {}
    for i, (e, g) in enumerate(p.inputs):
        if e.leaf.dtype == "u8":
            out[e, g] = rng.integers(0, 256, ROWS).astype(np.uint8)
        else:
            out[e, g] = (floats[:, i] / 128).astype({"f16": np.float16, "bf16": HALVES["bf16"]}.get(e.leaf.dtype, "f4"))
    return out


def random_words(p: Program, seed: int) -> Array:
    """[word, lane]."""
    return np.random.default_rng(seed).integers(0, 1 << 32, (sum(p.words), LANES), dtype=np.uint32)


def in_memory(words: Array) -> Array:
    """A lane's words four by four, or as many as divide theirs, as one vector is loaded."""
    return words.reshape(-1, at_once(len(words)), LANES).transpose(0, 2, 1).reshape(words.shape)


def oracle(p: Program, words: Array, stored: dict[tuple[Element, int], Array]) -> Array:
    """The stage in float64: codes by the decoder's term, and the entries of their groups."""
    b, term = p.decoder.bits, p.decoder.codes()
    tiles = [words[b * t : b * (t + 1)].reshape(b, 4, 8, 4) for t in range(STAGE // COLUMNS)]
    order = [list(term.dims).index(d) for d in ("n", "k")]
    codes = np.concatenate([evaluate(term, {"words": t}).transpose(order) for t in tiles], 1).astype(np.int64)
    if p.decoder.meaning is not None:
        codes = np.array(p.decoder.meaning)[codes]

    def at(e: Element) -> Array:
        by_group = np.stack([stored[e, g].astype(np.float64) for g in range(groups_of(e))], 1)
        return np.repeat(by_group, STAGE // groups_of(e), axis=1)

    entries = [np.broadcast_to(value(x, at), codes.shape) for x in p.weights.entries]
    return np.choose(codes, entries)


def half(exact: Array, kind: Any) -> Array:
    """Rounded once; the values are exact in float32, from which ml_dtypes rounds."""
    single = exact.astype(np.float32)
    np.testing.assert_array_equal(single, exact)
    return single.astype(HALVES[kind]).astype(np.float64)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("decoder", "fmt"), CASES)
def test_a_stage_is_the_oracles_rounded_once(decoder: type, fmt: lb.Format, kind: Any) -> None:
    p = program(fmt, kind)
    assert type(p.decoder) is decoder
    words, stored = random_words(p, 0), parameters(p, 1)
    got = staged(p, [in_memory(words)], *stored.values())
    assert got.dtype == HALVES[kind]
    np.testing.assert_array_equal(got.astype(np.float64), half(oracle(p, words, stored), kind))


@pytest.mark.parametrize(("decoder", "fmt"), CASES)
def test_a_wrong_bit_is_one_wrong_weight(decoder: type, fmt: lb.Format) -> None:
    p = program(fmt, "f16")
    words, stored = random_words(p, 2), parameters(p, 3)
    right = staged(p, [in_memory(words)], *stored.values())
    # Where each bit of a tile's words belongs, as the decoder states it; a bit for every word of the second tile.
    bits = p.decoder.bits
    term = p.decoder.codes()
    at = bit_positions(term, bits).transpose([list(term.dims).index("n"), list(term.dims).index("k"), 2])
    for word in range(bits):
        lane, bit = (37 * word + 11) % LANES, (13 * word + 5) % 32
        wrong = words.copy()
        wrong[bits + word, lane] ^= np.uint32(1 << bit)
        got = staged(p, [in_memory(wrong)], *stored.values())
        n, k, _ = np.argwhere(at == (word * LANES + lane) * 32 + bit)[0]
        assert np.argwhere(got != right).tolist() == [[n, COLUMNS + k]]


# ---------------------------------------------------------------- registers


def places(of: Any, shape: tuple[int, ...], *index: Array) -> tuple[Array, Array, Array]:
    """Register, lane (that of the first copy) and element of an array's entries, from a layout's own tiling."""
    tiled = np.array([np.broadcast_to(i, shape) for i in of.tiling.tile_indices(index)])
    sizes, end = of.tiling.tile_shape(shape), len(tiled)
    lane, held = np.zeros(shape, np.int64), {end + of.vector_dim}
    for dim in (*of.warp_dims, *of.lane_dims):
        if isinstance(dim, int):
            lane = lane * sizes[end + dim] + tiled[end + dim]
            held.add(end + dim)
        else:
            lane = lane * dim.times
    rest = [d for d in range(end) if d not in held]
    register = np.ravel_multi_index([tiled[d] for d in rest], [sizes[d] for d in rest])
    return register, lane, tiled[end + of.vector_dim]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_weights_lie_where_wgmma_reads_its_operand(kind: Any) -> None:
    fragments = plgpu.Layout.WGMMA.to_mgpu()
    row, column = np.arange(ROWS)[:, None], np.arange(STAGE)[None]
    register, lane, element = places(fragments, (ROWS, STAGE), row, column)
    count = prod(fragments.registers_shape((ROWS, STAGE)))
    registers = np.random.default_rng(0).integers(0, 1 << 32, (count, LANES), dtype=np.uint32)
    want = registers[register, lane] >> (16 * element).astype(np.uint32) & 0xFFFF
    np.testing.assert_array_equal(from_registers(registers, kind).view(np.uint16), want)
    p = program(lb.bcq(2, group=128), kind)
    inputs = [[list(random_words(p, 0))], *map(row_registers, parameters(p, 0).values())]
    assert len(p(NumpyAlu(), *inputs)) == count


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4"])
def test_a_value_for_each_row_lies_with_the_rows(dtype: str) -> None:
    rows = ROW.to_mgpu()
    stored = np.arange(ROWS).astype(dtype)
    registers = np.stack(row_registers(stored))
    assert len(registers) == prod(rows.registers_shape((ROWS,)))
    register, lane, element = places(rows, (ROWS,), np.arange(ROWS))
    assert not element.any()
    raw = stored.view(f"u{stored.itemsize}")
    for copy in range(4):
        np.testing.assert_array_equal(registers[register, lane + copy], raw)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 16])
def test_words_come_in_vectors_of_a_lane(count: int) -> None:
    vectors = WORDS[count].to_mgpu()
    words = np.arange(count * LANES, dtype=np.uint32).reshape(count, LANES)
    flat, size = in_memory(words).reshape(-1), vectors.vec_size
    assert vectors.registers_shape((count, LANES)) == (count // size,)
    for register in range(count // size):
        for i in range(size):  # a vector of a lane, vectors lane by lane
            held = flat[(register * LANES + np.arange(LANES)) * size + i]
            np.testing.assert_array_equal(held, words[register * size + i])


# ---------------------------------------------------------------- operations

RAW = np.random.default_rng(5).integers(0, 1 << 32, (3, LANES), dtype=np.uint32)


def by_lane(f: Any, *registers: Any) -> Array:
    """A function of Python's integers, lane by lane."""
    lanes = np.broadcast_arrays(*(np.asarray(r, np.int64) for r in registers))
    return np.array([f(*map(int, lane)) for lane in np.stack(lanes, -1)], np.uint32)


def permuted(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    out = b""
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = source[nibble % 8]
        out += bytes([255 * (byte >= 128) if nibble >= 8 else byte])
    return int.from_bytes(out, "little")


@pytest.mark.parametrize("selector", [0x3210, 0x5140, 0x7362, 0xBB99, 0xBA98, 0xFEDC, 0x0123, RAW[2]])
def test_prmt(selector: Any) -> None:
    got = NumpyAlu().prmt(RAW[0], RAW[1], selector)
    np.testing.assert_array_equal(got, by_lane(permuted, RAW[0], RAW[1], selector))
    np.testing.assert_array_equal(NumpyAlu().prmt(RAW[0], 0, selector), by_lane(permuted, RAW[0], 0, selector))


@pytest.mark.parametrize("table", range(0, 256, 5))
def test_lop3(table: int) -> None:
    def bitwise(a: int, b: int, c: int) -> int:
        return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))

    few = RAW[:, :8]
    np.testing.assert_array_equal(np.broadcast_to(NumpyAlu().lop3(*few, table), 8), by_lane(bitwise, *few))


def test_the_named_truth_tables() -> None:
    a, b, c = RAW
    for table, want in {
        alu.AND: a & b, alu.OR: a | b, alu.XOR: a ^ b, alu.AND_OR: a & b | c, alu.AND_XOR: (a & b) ^ c,
        alu.SELECT: a & b | ~a & c,
    }.items():  # fmt: skip
        np.testing.assert_array_equal(NumpyAlu().lop3(a, b, c, table), want)


def test_shifts_and_products() -> None:
    a, lanes = RAW[0], NumpyAlu()
    for n in (0, 1, 17, 31):
        np.testing.assert_array_equal(lanes.shl(a, n), by_lane(lambda v, n=n: v << n & 0xFFFFFFFF, a))
        np.testing.assert_array_equal(lanes.shr(a, n), by_lane(lambda v, n=n: v >> n, a))
    np.testing.assert_array_equal(lanes.mul_shr(a, 16), by_lane(lambda v: v * 65536 >> 32, a))
    np.testing.assert_array_equal(lanes.mul_shr(a, 3), by_lane(lambda v: v >> 3, a))
    want = by_lane(lambda v: (v * 0x11 + 0x40404040) & 0xFFFFFFFF, a)
    np.testing.assert_array_equal(lanes.mad(a, 0x11, 0x40404040), want)


def pairs(kind: Any, low: Array, high: Array) -> Array:
    low, high = (v.astype(HALVES[kind]).view(np.uint16).astype(np.uint32) for v in (low, high))
    return low | high << np.uint32(16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_arithmetic_of_halves_rounds_once(kind: Any) -> None:
    bits = ml_dtypes.finfo(HALVES[kind]).nmant
    rng = np.random.default_rng(6)
    # Exact in halves, unlike their sums and products.
    x, y, p, q = (rng.integers(-(2 << bits), 2 << bits, LANES).astype(np.float64) for _ in range(4))
    a, b = pairs(kind, x, p), pairs(kind, y, q)
    np.testing.assert_array_equal(NumpyAlu().half2("add", kind, a, b), pairs(kind, *_single(x + y, p + q)))
    small, scale = pairs(kind, x / 2.0**8, p / 2.0**8), pairs(kind, y / 2.0**8, q / 2.0**8)
    product = _single(x * y / 2.0**16, p * q / 2.0**16)
    np.testing.assert_array_equal(NumpyAlu().half2("mul", kind, small, scale), pairs(kind, *product))


def _single(*values: Array) -> list[Array]:
    """In float32, which holds them: from there every half is rounded the same way."""
    out = [v.astype(np.float32) for v in values]
    assert all((a == v).all() for a, v in zip(out, values, strict=True))
    return out


def test_a_code_of_sixteenths_is_brought_down_exactly() -> None:
    code, zero = np.arange(LANES) % 16, np.arange(LANES) * 2
    scaled = pairs("f16", 1024.0 + 16 * code, 1024.0 + 16 * (15 - code))
    less = pairs("f16", -64.0 - zero, -64.0 - zero)
    got = NumpyAlu().half2("fma", "f16", scaled, 0x2C002C00, less)
    np.testing.assert_array_equal(got, pairs("f16", (code - zero).astype("f4"), (15 - code - zero).astype("f4")))


def test_float32() -> None:
    a, b = np.random.default_rng(7).standard_normal((2, LANES)).astype(np.float32)
    lanes = NumpyAlu()
    for op, want in {"add": a + b, "sub": a - b, "mul": a * b}.items():
        got = lanes.f32(op, a.view(np.uint32), b.view(np.uint32))
        np.testing.assert_array_equal(got.view(np.float32), want)
    assert lanes.number(0.1).view(np.float32) == np.float32(0.1)
    for kind in ("f16", "bf16"):
        packed = lanes.pack2(kind, a.view(np.uint32), b.view(np.uint32))
        np.testing.assert_array_equal(packed, pairs(kind, a, b))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "u8", "u16"])
def test_stored_elements_widen_exactly(dtype: str) -> None:
    kinds = {"f32": jnp.float32, **HALVES, "u8": np.uint8, "u16": np.uint16}
    stored = np.linspace(0, 255, LANES).astype(kinds[dtype])
    raw = stored.view(f"u{stored.itemsize}").astype(np.uint32)
    np.testing.assert_array_equal(NumpyAlu().widen(raw, dtype).view(np.float32), stored.astype(np.float32))


# ---------------------------------------------------------------- the choice


def test_integers_are_scaled_only_where_halves_hold_them() -> None:
    codes, scale = cast(param("codes", "u8", (0, 15), n=ROWS, k=64), "i32"), param("scale", "f32", n=ROWS)
    assert isinstance(pick(pointwise(scale * codes)), ScaledIntegers)
    assert isinstance(pick(pointwise(scale * (codes - 8))), ScaledIntegers)
    assert isinstance(pick(pointwise(scale * (codes + LARGEST_ZERO))), ScaledIntegers)
    assert isinstance(pick(pointwise(scale * (codes + (LARGEST_ZERO + 1)))), Eights)
    assert isinstance(pick(pointwise(scale * (codes - 7) * 0.5)), Eights)  # the factor is part of every number
    assert isinstance(pick(pointwise(scale * (codes * 2 - 15))), SignedTable)
    with pytest.raises(UnsuitableError, match=r"^parameters 'zero' are -128 to 127, and kernels take 0 to 65535$"):
        pick(pointwise(scale * (codes + param("zero", "i8", n=ROWS))))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("zero", [LARGEST_ZERO, -LARGEST_ZERO])
def test_the_largest_zero_is_still_exact(zero: int, kind: Any) -> None:
    codes = cast(param("codes", "u8", (0, 15), n=ROWS, k=STAGE), "i32")
    p = layout(param("scale", "f32", n=ROWS) * (codes + zero)).program(kind)
    assert isinstance(p.decoder, ScaledIntegers)
    words, stored = random_words(p, 0), parameters(p, 1)
    got = staged(p, [in_memory(words)], *stored.values())
    np.testing.assert_array_equal(got.astype(np.float64), half(oracle(p, words, stored), kind))
