"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: integers packed along the inputs.

    qweight int32 [k bits / 32, n]   codes, 32 of an output in `bits` words
    qzeros  int32 [g, n bits / 32]   zero points, packed along the outputs; less one in the first version of the format
    scales  float [g, n]
    g_idx   int32 [k]                the group of each input

    weight[n, k] = scales[g_idx[k], n] (code[k, n] - zero[g_idx[k], n])

In the first version a zero point of 0 is stored as -1, all ones, so one is added modulo 2**bits. (Some of AutoGPTQ's
fallbacks make 2**bits of it, a zero point that no quantizer gives; its kernels of 4 bits do not.)
"""

from __future__ import annotations

import re

import numpy as np

from lowbit.array import QuantArray
from lowbit.io.error import CheckpointError
from lowbit.io.layout import COMPARE, FLOATS, Layout, Options, Tensors, choice, expect, group_option, matrix
from lowbit.io.packing import Codes, affine_array, unpack, words

BITS = (2, 3, 4, 8)


def read(tensors: Tensors, options: Options, where: str) -> QuantArray:
    """The weight of a layer. Raises CheckpointError for tensors or options that do not fit."""
    bits = choice(where, options, "bits", BITS)
    version = choice(where, options, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    choice(where, options, "is_marlin_format", (False,), False)
    choice(where, options, "pack_dtype", ("int32",), "int32")
    rows, n = matrix(where, "qweight", tensors["qweight"], "int32")
    g_idx = tensors.get("g_idx")
    k = rows * 32 // bits if g_idx is None else g_idx.size
    if g_idx is None and options.get("desc_act"):
        raise CheckpointError(f"{where}: the config states desc_act, but the layer has no 'g_idx': {COMPARE}")
    group = group_option(where, options, k)
    why = f"{k} inputs and {n} outputs at {bits} bits in groups of {group}"
    count = -(-k // group)
    expect(where, "qweight", tensors["qweight"], "int32", (words(k, bits), n), why)
    expect(where, "qzeros", tensors["qzeros"], "int32", (count, words(n, bits)), why)
    expect(where, "scales", tensors["scales"], FLOATS, (count, n), why)
    if g_idx is not None:
        expect(where, "g_idx", g_idx, ("int32", "int64"), (k,), why)
    zero = unpack(tensors["qzeros"], bits, n).T
    if version == "gptq":
        zero = (zero + np.uint8(1)) & np.uint8((1 << bits) - 1)
    codes = Codes((n, k), lambda some: unpack(tensors["qweight"].T[some], bits, k))
    return affine_array(where, codes, tensors["scales"].T, zero, bits, group, g_idx)


def select(layer: str, options: Options, where: str) -> Options:
    """The options with what `dynamic` says of a layer: patterns to options that differ, or with "-:" to no layer."""
    for pattern, other in (options.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), layer):
            if pattern.startswith("-:"):
                raise CheckpointError(
                    f"{where}: it is quantized, but {pattern!r} under `dynamic` says that it is not: {COMPARE}"
                )
            return {**options, **other}
    return options


LAYOUT = Layout("GPTQ", read, frozenset({"qweight", "qzeros", "scales"}), frozenset({"g_idx"}), select)
