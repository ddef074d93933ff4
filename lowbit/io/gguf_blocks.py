"""The blocks of GGUF's quantized tensors: which stored bit is which bit of a code.

A block is some bytes for 32 or 256 weights of a row: float16 scales, and bits of codes in an order of ggml's own. Such
an order is a permutation of the block's bits, so one table of positions says how a block is read and how it is written.
Positions count bits, byte by byte, the least significant first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lowbit.formats.format import Format
from lowbit.formats.k_quant import k_quant
from lowbit.formats.uniform import uniform
from lowbit.io.tensors import Array

Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Block:
    """A type of block.

    Attributes:
      size: its bytes.
      format: whose fields its tensors have.
      planes: [bits, weights], the position of each bit of each code.
      halves: the fields of float16, one a block, and the bytes where they begin.
      integers: the fields of bytes, one a group, and the positions of their bits [bits, groups].
      signed: the field, of 8 bits, whose top bit is a sign and so the other way round in the format.
      negated: halves that ggml adds where the format subtracts.
    """

    size: int
    format: Format
    planes: Positions
    halves: Mapping[str, int]
    integers: Mapping[str, Positions] = field(default_factory=dict)
    signed: str | None = None
    negated: str | None = None

    @property
    def weights(self) -> int:
        return self.planes.shape[1]

    @property
    def zero(self) -> int | None:
        """The zero point of every group, where the format stores one."""
        return 1 << len(self.planes) - 1 if self.format.name == "uniform" else None

    def unpack(self, rows: Array) -> dict[str, Array]:
        """The fields of rows u8 [n, bytes], as the format stores them."""
        n, blocks = len(rows), rows.reshape(-1, self.size)
        every = np.concatenate([blocks, _turned(np.take(blocks, self._windows, axis=1))], axis=1)
        shape = n, -1, len(self.planes), self.weights // self._group, self._group // 8
        codes = np.take(every, self._sources, axis=1).reshape(shape).transpose(2, 0, 1, 3, 4)
        fields: dict[str, Array] = {"planes": codes.reshape(len(self.planes), n, -1, self._group // 8)}
        for name, at in self.integers.items():
            low, high = _span(at)
            bits = np.unpackbits(blocks[:, low:high], axis=1, bitorder="little")
            integers = np.packbits(np.take(bits, at - 8 * low, axis=1), axis=1, bitorder="little")
            fields[name] = integers.reshape(n, -1)
        for name, byte in self.halves.items():
            half = np.ascontiguousarray(blocks[:, byte : byte + 2]).view("<f2").reshape(n, -1)
            fields[name] = -half if name == self.negated else half
        if self.zero is not None:
            fields["zero"] = np.full(fields["scale"].shape, self.zero, np.uint8)
        return self._signs(fields)

    def pack(self, fields: Mapping[str, Array]) -> Array:
        """The inverse: rows u8 [n, bytes]. The zero point is that of the block, and is not looked at."""
        fields = self._signs({**fields, "planes": fields["planes"].copy()})
        n, count = fields["scale"].shape
        shape = len(self.planes), n, count, self.weights // self._group, self._group // 8
        codes = fields["planes"].reshape(shape).transpose(1, 2, 0, 3, 4).reshape(n * count, -1)
        every = np.zeros((n * count, self.size + self._windows.size), np.uint8)
        every[:, self._sources.ravel()] = codes
        blocks = every[:, : self.size].copy()
        blocks[:, self._windows.ravel()] |= _turned(every[:, self.size :].reshape(n * count, -1, 8))
        for name, at in self.integers.items():
            low, high = _span(at)
            bits = np.zeros((n * count, 8 * (high - low)), np.uint8)
            each = fields[name].reshape(n * count, 1, -1)
            bits[:, at - 8 * low] = np.unpackbits(each, axis=1, count=len(at), bitorder="little")
            blocks[:, low:high] |= np.packbits(bits, axis=1, bitorder="little")
        for name, byte in self.halves.items():
            half = -fields[name] if name == self.negated else fields[name]
            blocks[:, byte : byte + 2] = np.ascontiguousarray(half, "<f2").reshape(-1, 1).view(np.uint8)
        return blocks.reshape(n, -1)

    @property
    def _group(self) -> int:
        return int(self.format["group"])

    @cached_property
    def _windows(self) -> Positions:
        """[windows, 8]: runs of 8 bytes that hold one bit of 8 weights each, so that they are to be turned."""
        first, step = self._eights
        return np.unique(first[step == 8] // 8)[:, None] + np.arange(8)

    @cached_property
    def _sources(self) -> Positions:
        """Where each byte of planes is: among the bytes of a block, which the turned windows follow."""
        first, step = self._eights
        turned = self.size + 8 * np.searchsorted(self._windows[:, 0], first // 8) + first % 8
        return np.where(step == 8, turned, first // 8)

    @property
    def _eights(self) -> tuple[Positions, Positions]:
        """[bits, weights / 8]: the first position of 8 weights, and how far apart they are: 8 or, within a byte, 1."""
        return self.planes[:, ::8], self.planes[:, 1::8] - self.planes[:, ::8]

    def _signs(self, fields: dict[str, Array]) -> dict[str, Array]:
        """Signed bytes, which count from -128, as codes, which count from 0; and back."""
        if self.signed == "planes":
            fields["planes"][-1] ^= 0xFF
        elif self.signed is not None:
            fields[self.signed] = fields[self.signed] ^ 0x80
        return fields


def _turned(windows: Array) -> Array:
    """Bytes [m, windows * 8] of which bit i of byte j is bit j of byte i of [m, windows, 8]."""
    x = np.ascontiguousarray(windows).view("<u8")[..., 0]
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swapped = (x ^ x >> np.uint64(shift)) & np.uint64(mask)
        x = x ^ swapped ^ swapped << np.uint64(shift)
    return x.view(np.uint8).reshape(len(windows), -1)


def _span(at: Positions) -> tuple[int, int]:
    """The bytes that bits lie in."""
    return int(at.min()) // 8, int(at.max()) // 8 + 1


def _run(first: Array, count: int) -> Positions:
    """[count, *first.shape]: bits that follow each other, from the first."""
    return first[None] + np.arange(count).reshape(-1, *[1] * first.ndim)


def _both(*parts: Array) -> Positions:
    """Bits from several places, the least significant first."""
    return np.concatenate(parts)


def _of_32(bits: int, offset: bool) -> Block:
    """32 weights under one scale: bytes; or nibbles, after the fifth bits if there are such."""
    t, fifth = np.arange(32), 4 if offset else 2
    if bits == 8:
        planes = _run(8 * (2 + t), 8)
    else:
        nibbles = fifth + 4 * (bits == 5)
        planes = _run(8 * (nibbles + t % 16) + t // 16 * 4, 4)
        if bits == 5:
            planes = _both(planes, (8 * fifth + t)[None])
    size = fifth + 4 * bits
    if offset:
        fmt = k_quant(bits, group=32, super_group=32, scale_bits=0)
        return Block(size, fmt, planes, {"scale": 0, "min": 2}, negated="min")
    fmt = uniform(bits, group=32, scale_dtype="float16")
    return Block(size, fmt, planes, {"scale": 0}, signed="planes" if bits == 8 else None)


def _of_256() -> dict[str, Block]:
    """256 weights under scales of two levels."""
    t, g = np.arange(256), np.arange(16)
    nibbles = 8 * (t // 64 * 32 + t % 32) + t // 32 % 2 * 4  # 32 bytes are 64 weights, the first 32 in the low nibbles
    pairs = 8 * (t // 128 * 32 + t % 32) + t // 32 % 4 * 2  # 32 bytes are 128 weights, 32 in each pair of bits
    singles = 8 * (t % 32) + t // 32
    q3_scales = _both(_run(8 * (96 + g % 8) + g // 8 * 4, 4), _run(8 * (104 + g % 4) + g // 4 * 2, 2))
    q6_planes = _both(_run(8 * (t // 128 * 64 + t % 64) + t // 64 % 2 * 4, 4), _run(8 * 128 + pairs, 2))
    q2, q3 = k_quant(2, group=16, scale_bits=4), k_quant(3, group=16, offset=False)
    q6 = k_quant(6, group=16, scale_bits=8, offset=False)
    nibble = {"group_scale": _run(8 * g, 4), "group_min": _run(8 * g + 4, 4)}
    byte = {"group_scale": _run(8 * (192 + g), 8)}
    first = {"scale": 0, "min": 2}
    return {
        "Q2_K": Block(84, q2, _run(8 * 16 + pairs, 2), {"scale": 80, "min": 82}, nibble),
        "Q3_K": Block(
            110, q3, _both(_run(8 * 32 + pairs, 2), singles[None]), {"scale": 108}, {"group_scale": q3_scales}
        ),
        "Q4_K": Block(144, k_quant(4), _run(8 * 16 + nibbles, 4), first, _six_bits(4)),
        "Q5_K": Block(176, k_quant(5), _both(_run(8 * 48 + nibbles, 4), (8 * 16 + singles)[None]), first, _six_bits(4)),
        "Q6_K": Block(210, q6, q6_planes, {"scale": 208}, byte, signed="group_scale"),
    }


def _six_bits(at: int) -> dict[str, Positions]:
    """8 scales and 8 offsets in 12 bytes. The first four of each have the low bits of a byte; the others have a nibble
    of the last four bytes and, above it, the two bits that the first have left."""
    g = np.arange(4)
    early = {"group_scale": 8 * (at + g), "group_min": 8 * (at + 4 + g)}
    late = {"group_scale": 8 * (at + 8 + g), "group_min": 8 * (at + 8 + g) + 4}
    return {
        name: np.concatenate([_run(early[name], 6), _both(_run(late[name], 4), _run(early[name] + 6, 2))], axis=1)
        for name in early
    }


BLOCKS: dict[str, Block] = {
    "Q4_0": _of_32(4, offset=False),
    "Q4_1": _of_32(4, offset=True),
    "Q5_0": _of_32(5, offset=False),
    "Q5_1": _of_32(5, offset=True),
    "Q8_0": _of_32(8, offset=False),
    **_of_256(),
}
"""By ggml's name."""
