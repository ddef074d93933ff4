"""Checkpoints of any-precision-llm: nested codes with a table for each width.

    qweight   int32 [hi, n, k / 32]   bit planes of the codes, the most significant first
    lut<b>    float16 [n, 2**b]       for each width b from lo to hi

    weight[n, k] = lut<b>[n, code[n, k] >> (hi - b)]

Words are in the order in which the 32 lanes of its kernel read them. Of each 1024 inputs, or of what is left of them at
the end of a row, word l has 8 from 8 l on in its most significant byte, and 8 further inputs for each lane in the next;
the first input of a byte is its most significant bit.

The project writes `pytorch_model.bin`, a pickle; what is read is the same state dict as a safetensors file.
"""

from __future__ import annotations

import numpy as np

from lowbit.array import QuantArray
from lowbit.formats.any_precision import any_precision
from lowbit.io.error import CheckpointError
from lowbit.io.layout import COMPARE, Layout, Options, Tensors, choice, expect
from lowbit.io.tensors import Array
from lowbit.quant_type import QuantType

LANES = 32
LUTS = {f"lut{bits}": bits for bits in range(1, 9)}


def read(tensors: Tensors, options: Options, where: str) -> QuantArray:
    """The weight of a layer, at the widths that it has tables for.

    Raises CheckpointError for tensors or options that do not fit.
    """
    choice(where, options, "group_count", (1,), 1)
    found = {bits: key for key, bits in LUTS.items() if key in tensors}
    seed, parent = (choice(where, options, name, range(1, 9)) for name in ("seed_precision", "parent_precision"))
    if not found or min(found) < seed or max(found) > parent or len(found) != max(found) - min(found) + 1:
        raise CheckpointError(
            f"{where} has tables of {sorted(found)} bits, and the config states {seed} to {parent}: keep those of all "
            f"widths from one to another; {COMPARE}"
        )
    lo, hi = min(found), max(found)
    words = tensors["qweight"]
    planes, n, width = words.shape if words.ndim == 3 else (0, 0, 0)
    why = f"{n} outputs and {LANES * width} inputs at up to {parent} bits"
    expect(where, "qweight", words, "int32", (max(hi, min(planes, parent)), n, width), why)
    for bits, key in found.items():
        expect(where, key, tensors[key], "float16", (n, 1 << bits), why)
    fields = {"planes": _in_order(words[:hi]), **{f"table{b}": tensors[key] for b, key in found.items()}}
    fmt = any_precision(lo, hi, table_dtype="float16")
    return QuantArray.of(fields, QuantType((("k", LANES * width), ("n", n)), "f16", fmt))


def _in_order(words: Array) -> Array:
    """Planes u8 [bits, n, 1, bytes], the first input the least significant bit of the first byte."""
    stored = np.ascontiguousarray(words, ">i4").view(np.uint8)  # the most significant byte of a word first
    *rows, size = stored.shape
    whole = size - size % (4 * LANES)
    parts = []
    for part, lanes in ((stored[..., :whole], LANES), (stored[..., whole:], size % (4 * LANES) // 4)):
        if part.size:
            parts.append(part.reshape(*rows, -1, lanes, 4).swapaxes(-1, -2).reshape(*rows, -1))
    ordered = np.concatenate(parts, axis=-1)
    return _REVERSED[ordered][:, :, None]


_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little")[:, 0]
"""Bytes by their bits from the other end."""

LAYOUT = Layout("any-precision-llm", read, frozenset({"qweight"}), frozenset(LUTS))
