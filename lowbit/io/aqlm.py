"""AQLM checkpoints: additive codebooks, as its `convert_to_hf.py` and transformers store them.

    codes      int8 or int16 [n, k / v, m]   in two's complement of `nbits_per_codebook` bits
    codebooks  float [m, 2**bits, 1, v]
    scales     float [n, 1, 1, 1]

    weight[n, v j + i] = scales[n] sum_b codebooks[b, codes[n, j, b], 0, i]

A code that stands for several outputs, `out_group_size` above 1, has no counterpart: vectors run along the inputs here.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray
from lowbit.formats.codebook import codebook, pack_codes
from lowbit.io.error import CheckpointError
from lowbit.io.layout import CONFIG, FLOATS, Layout, Options, Tensors, choice, expect
from lowbit.io.tensors import Array
from lowbit.ir.dtypes import short
from lowbit.quant_type import QuantType


def read(tensors: Tensors, options: Options, where: str) -> QuantArray:
    """The weight of a layer. Raises CheckpointError for tensors or options that do not fit, and ValueError for sizes
    that `lb.codebook` does not have."""
    if (outputs := options.get("out_group_size")) != 1:
        raise CheckpointError(
            f"{where}: {CONFIG} states out_group_size = {outputs!r}, and lowbit's codes stand for inputs of one output "
            "each: quantize the model with out_group_size = 1"
        )
    bits = choice(where, options, "nbits_per_codebook", range(1, 17))
    m, vec = (choice(where, options, name, range(1, 1 << 16)) for name in ("num_codebooks", "in_group_size"))
    codes, books, scales = (tensors[name] for name in ("codes", "codebooks", "scales"))
    n, count = (codes.shape[0], codes.shape[1]) if codes.ndim == 3 else (0, 0)
    why = f"{m} codebooks of {bits} bits for {vec} inputs"
    expect(where, "codes", codes, "int8" if bits <= 8 else "int16", (n, count, m), why)
    expect(where, "codebooks", books, FLOATS, (m, 1 << bits, 1, vec), why)
    expect(where, "scales", scales, books.dtype.name, (n, 1, 1, 1), f"a layer of {n} outputs")
    fmt = codebook(m, bits, vec, scale_dtype=books.dtype.name)
    fields = {
        "codebooks": books[:, :, 0],
        "scale": scales[:, 0, 0],
        **pack_codes(jnp.asarray(_unsigned(where, codes, bits).transpose(2, 0, 1)[:, :, None]), bits),
    }
    return QuantArray.of(fields, QuantType((("k", count * vec), ("n", n)), short(books.dtype), fmt))


def _unsigned(where: str, codes: Array, bits: int) -> Array:
    """Codes from 0 to 2**bits - 1."""
    low, high = int(codes.min()), int(codes.max())
    if low < -1 << bits - 1 or high >= 1 << bits:
        raise CheckpointError(
            f"{where}: 'codes' holds {low}..{high}, and a codebook of {bits} bits has the entries {-1 << bits - 1}.."
            f"{(1 << bits) - 1}, negative ones counted from its end: get the file again"
        )
    return (codes.view(f"u{codes.itemsize}") & ((1 << bits) - 1)).astype(np.uint16)


LAYOUT = Layout("AQLM", read, frozenset({"codes", "codebooks", "scales"}))
