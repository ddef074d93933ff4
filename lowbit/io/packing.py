"""Integers packed into 32-bit words, as other projects' checkpoints have them, and the planes that lowbit stores.

Words are read as one string of bits, least significant first: 32 codes of `bits` bits take `bits` words, and those of 3
bits straddle them. For 2, 4 and 8 bits a word holds whole codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from lowbit.array import QuantArray
from lowbit.formats import act_order, uniform
from lowbit.formats.planes import group_size
from lowbit.io.error import CheckpointError
from lowbit.io.tensors import Array
from lowbit.ir.dtypes import short
from lowbit.quant_type import QuantType

WORD = 32
AT_ONCE = 1 << 20
"""Codes that are unpacked at a time: what bounds the memory beside the planes."""


def words(count: int, bits: int) -> int:
    """Words that hold that many codes."""
    return -(-count * bits // WORD)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Codes u8 [..., count] of 32-bit words [..., words(count, bits)]."""
    packed = np.ascontiguousarray(packed).view(np.uint32)
    *rows, width = packed.shape
    blocks = -(-count // WORD)
    padded = np.pad(packed, [(0, 0)] * len(rows) + [(0, blocks * bits - width)]) if width < blocks * bits else packed
    by_block = padded.reshape(*rows, blocks, bits)
    codes = np.empty((*rows, blocks, WORD), np.uint8)
    for i, (at, shift, over) in enumerate(_places(bits)):
        field = by_block[..., at] >> np.uint32(shift)
        if over:
            field |= by_block[..., at + 1] << np.uint32(bits - over)
        codes[..., i] = field & np.uint32((1 << bits) - 1)
    return codes.reshape(*rows, blocks * WORD)[..., :count]


def pack(codes: Array, bits: int) -> Array:
    """The inverse of `unpack`: int32 [..., words(count, bits)] of codes u8 [..., count]."""
    *rows, count = codes.shape
    blocks = -(-count // WORD)
    padded = np.zeros((*rows, blocks * WORD), np.uint8)
    padded[..., :count] = codes
    by_block = padded.reshape(*rows, blocks, WORD)
    packed = np.zeros((*rows, blocks, bits), np.uint32)
    for i, (at, shift, over) in enumerate(_places(bits)):
        field = by_block[..., i].astype(np.uint32)
        packed[..., at] |= field << np.uint32(shift)
        if over:
            packed[..., at + 1] |= field >> np.uint32(bits - over)
    return packed.reshape(*rows, blocks * bits)[..., : words(count, bits)].view(np.int32)


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Of each of 32 codes: its word, its first bit there, and how many of its bits are in the next word."""
    for i in range(WORD):
        at, shift = divmod(i * bits, WORD)
        yield at, shift, max(0, shift + bits - WORD)


@dataclass(frozen=True)
class Codes:
    """Codes u8 [n, k] that are made when some rows of them, a multiple of 8 or the last ones, are asked for."""

    shape: tuple[int, int]
    of_rows: Callable[[slice], Array]

    def __getitem__(self, rows: slice) -> Array:
        return self.of_rows(rows)


def affine_array(
    where: str, codes: Array | Codes, scale: Array, zero: Array, bits: int, group: int, g_idx: Array | None = None
) -> QuantArray:
    """scale (code - zero) as `uniform`, or as `act_order` where the groups are not of consecutive inputs.

    Args:
      where: begins the messages: the file and the layer.
      codes: u8 [n, k], below 2**bits.
      scale: finite floats [n, g], of the dtype that they are to be stored in.
      zero: u8 [n, g].
      group: inputs in a group; k or more for one group a row.
      g_idx: integers [k], the group of each input; None for consecutive ones.
    """
    n, k = codes.shape
    place = None if g_idx is None else _places_of(where, g_idx, min(group, k))
    order = None if place is None else np.argsort(place)
    make = uniform if place is None else act_order
    fmt = make(bits, group=group if group < k else None, scale_dtype=scale.dtype.name)
    planes = np.empty((bits, n, -(-k // group), -(-min(group, k) // 8)), np.uint8)
    for at in range(0, n, step := 8 * max(1, AT_ONCE // (8 * k))):
        some = slice(at, min(at + step, n))
        planes[:, some] = to_planes(codes[some] if order is None else np.take(codes[some], order, axis=1), bits, group)
    fields = {"planes": planes, "scale": np.ascontiguousarray(scale), "zero": zero}
    if place is not None:
        fields["place"] = place.astype(np.uint16 if k <= 1 << 16 else np.uint32)
    return QuantArray.of(fields, QuantType((("k", k), ("n", n)), short(scale.dtype), fmt))


def _places_of(where: str, g_idx: Array, group: int) -> Array | None:
    """Where each input lies among all, sorted by groups; None if the groups are of consecutive inputs."""
    k = g_idx.size
    consecutive = np.arange(k) // group
    if np.array_equal(g_idx, consecutive):
        return None
    count = int(consecutive[-1]) + 1
    if (low := int(g_idx.min())) < 0 or (high := int(g_idx.max())) >= count:
        raise CheckpointError(
            f"{where}: 'g_idx' holds the group {low if low < 0 else high}, but {k} inputs in groups of {group} have "
            f"the groups 0 to {count - 1}: compare group_size in the config, or get the file again"
        )
    have, want = np.bincount(g_idx, minlength=count), np.bincount(consecutive)
    if odd := np.flatnonzero(have != want).tolist():
        raise CheckpointError(
            f"{where}: by 'g_idx' the group {odd[0]} has {have[odd[0]]} inputs, not {want[odd[0]]}: only groups of one "
            f"size, {group}, can be stored; quantize it again with whole groups"
        )
    place = np.empty(k, np.int64)
    place[np.argsort(g_idx, kind="stable")] = np.arange(k)
    return place


def to_planes(codes: Array, bits: int, group: int) -> Array:
    """Bit planes [bits, n, groups, bytes] of codes [n, k], as `uniform` stores them."""
    n, k = codes.shape
    size = group_size(k, group)
    count = -(-k // size)
    if count * size > k:
        codes = np.pad(codes, ((0, 0), (0, count * size - k)))
    grouped = codes.reshape(n, count, size)
    planes = np.empty((bits, n, count, -(-size // 8)), np.uint8)
    plane = np.empty_like(grouped)  # a byte a weight: the most that is made at a time
    for p in range(bits):
        np.right_shift(grouped, p, out=plane)
        plane &= 1
        planes[p] = np.packbits(plane, axis=-1, bitorder="little")
    return planes


def from_planes(planes: Array | jax.Array, k: int, group: int) -> Array:
    """The inverse of `to_planes`: codes u8 [n, k]."""
    stored = np.asarray(planes)
    bits, n, count, _ = stored.shape
    size = group_size(k, group)
    codes = np.zeros((n, count, size), np.uint8)
    for p in range(bits):
        codes |= np.unpackbits(stored[p], axis=-1, count=size, bitorder="little") << p
    return codes.reshape(n, count * size)[:, :k]
