"""AWQ checkpoints of the version GEMM, as AutoAWQ writes them: integers packed along the outputs.

qweight int32 [k, n / 8]    4-bit codes of 8 outputs, in the order 0 2 4 6 1 3 5 7
qzeros  int32 [g, n / 8]    zero points, alike
scales  float [g, n]

weight[n, k] = scales[g, n] (code[k, n] - zero[g, n])
"""

from __future__ import annotations

import numpy as np

from lowbit.array import QuantArray
from lowbit.io.error import CheckpointError
from lowbit.io.layout import COMPARE, FLOATS, Layout, Options, Tensors, choice, expect, group_option, matrix
from lowbit.io.packing import Codes, affine_array, unpack
from lowbit.io.tensors import Array

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 outputs is at each place of a word, least significant first."""


def read(tensors: Tensors, options: Options, where: str) -> QuantArray:
    """The weight of a layer. Raises CheckpointError for tensors or options that do not fit."""
    bits = choice(where, options, "bits", (4,))
    version = options.get("version", options.get("checkpoint_format", "gemm"))
    choice(where, {"version": str(version).lower()}, "version", ("gemm",))
    choice(where, options, "zero_point", (True,), True)
    k, columns = matrix(where, "qweight", tensors["qweight"], "int32")
    n, group = columns * len(ORDER), group_option(where, options, k)
    if k % group:
        raise CheckpointError(f"{where}: groups of {group} do not divide its {k} inputs: {COMPARE}")
    why = f"{k} inputs and {n} outputs in groups of {group}"
    expect(where, "qzeros", tensors["qzeros"], "int32", (k // group, columns), why)
    expect(where, "scales", tensors["scales"], FLOATS, (k // group, n), why)

    def of_rows(some: slice) -> Array:
        return _in_order(unpack(tensors["qweight"][:, some.start // 8 : some.stop // 8], bits, some.stop - some.start))

    codes, zero = Codes((n, k), of_rows), _in_order(unpack(tensors["qzeros"], bits, n))
    return affine_array(where, codes, tensors["scales"].T, zero, bits, group)


def _in_order(fields: Array) -> Array:
    """[n, rows] of fields [rows, n] in the order of words."""
    out = np.empty((fields.shape[1], fields.shape[0]), np.uint8)
    for at, output in enumerate(ORDER):
        out[output :: len(ORDER)] = fields[:, at :: len(ORDER)].T
    return out


LAYOUT = Layout("AWQ", read, frozenset({"qweight", "qzeros", "scales"}))
