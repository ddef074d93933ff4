"""Checkpoints of compressed-tensors, as llm-compressor writes and vLLM reads them.

Integers packed along the inputs ("pack-quantized"), code = q + 2**(bits - 1) for signed q:

    weight_packed     int32 [n, k bits / 32]    codes
    weight_scale      float [n, g], [n, 1] or [1]
    weight_zero_point int32 [n bits / 32, g]    packed along the outputs, likewise signed; without it all are zero
    weight_shape      int64 [2]                 n, k
    weight_g_idx      int32 [k]                 the group of each input, where they are not consecutive

Stored as they are ("float-quantized", "int-quantized", "naive-quantized"): `weight` as e4m3 or int8 [n, k], with a
scale for the weight [1], for each output [n, 1], group [n, g] or block [a, g].

Which options a layer has is said by `config_groups`: of the groups with a target that fits the layer, the one whose
target is its name, else a pattern of its name ("re:..."), else the class "Linear".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.array import QuantArray
from lowbit.formats import Format, scaled_fp8
from lowbit.io.error import CheckpointError
from lowbit.io.layout import COMPARE, CONFIG, FLOATS, Layout, Options, Tensors, choice, expect, group_option, matrix
from lowbit.io.packing import Codes, affine_array, unpack, words
from lowbit.io.tensors import Array
from lowbit.ir.dtypes import short
from lowbit.quant_type import QuantType

PACKED, PLAIN = ("pack-quantized",), ("float-quantized", "int-quantized", "naive-quantized")
BITS = (2, 4, 8)
"""Of packed integers: other widths are packed in a way that depends on the version of the library."""


def read_packed(tensors: Tensors, options: Options, where: str) -> QuantArray:
    """The weight of a layer of packed integers. Raises CheckpointError for tensors or options that do not fit."""
    choice(where, options, "format", PACKED)
    weights = options["weights"]
    choice(where, weights, "type", ("int",))
    bits = choice(where, weights, "num_bits", BITS)
    n, _ = matrix(where, "weight_packed", tensors["weight_packed"], "int32")
    shape = tensors["weight_shape"]
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape[0] != n or shape[1] < 1:
        raise CheckpointError(f"{where}: 'weight_shape' is {shape.tolist()} of {n} outputs: {COMPARE}")
    k = int(shape[1])
    expect(where, "weight_packed", tensors["weight_packed"], "int32", (n, words(k, bits)), f"{k} inputs at {bits} bits")
    codes = Codes((n, k), lambda some: unpack(tensors["weight_packed"][some], bits, k))
    return _affine(tensors, weights, where, codes, packed_zero=True)


def read_plain(tensors: Tensors, options: Options, where: str) -> QuantArray:
    """The weight of a layer stored as e4m3 or int8. Raises CheckpointError for tensors or options that do not fit."""
    choice(where, options, "format", PLAIN)
    weights = options["weights"]
    if choice(where, weights, "type", ("int", "float")) == "float":
        return _float(tensors, weights, where)
    bits = choice(where, weights, "num_bits", range(2, 9))
    matrix(where, "weight", tensors["weight"], "int8")
    return _affine(tensors, weights, where, _codes(where, "weight", tensors["weight"], bits), packed_zero=False)


def _affine(tensors: Tensors, weights: Options, where: str, codes: Array | Codes, packed_zero: bool) -> QuantArray:
    (n, k), bits = codes.shape, weights["num_bits"]
    strategy = choice(where, weights, "strategy", ("group", "channel", "tensor"))
    group = group_option(where, weights, k) if strategy == "group" else k
    scale = _scale(tensors, where, (1, 1) if strategy == "tensor" else (n, -(-k // group)), f"strategy {strategy}")
    scale = np.broadcast_to(scale, (n, scale.shape[1]))
    zero = np.full(scale.shape, 1 << bits - 1, np.uint8)
    if "weight_zero_point" in tensors:
        zero = _zero(tensors["weight_zero_point"], where, strategy, zero.shape, bits, packed_zero)
    elif not choice(where, weights, "symmetric", (True, False), True):
        raise CheckpointError(
            f"{where}: {CONFIG} states symmetric = False, but it has no 'weight_zero_point': {COMPARE}"
        )
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None:
        expect(where, "weight_g_idx", g_idx, ("int32", "int64"), (k,), f"{k} inputs")
    elif weights.get("actorder") in ("group", "dynamic"):
        raise CheckpointError(f"{where}: {CONFIG} states actorder, but the layer has no 'weight_g_idx': {COMPARE}")
    return affine_array(where, codes, scale, zero, bits, group, g_idx)


def _zero(stored: Array, where: str, strategy: str, shape: tuple[int, ...], bits: int, packed: bool) -> Array:
    """Zero points among the codes, u8 [n, g]."""
    n, g = shape
    if packed and strategy != "tensor":
        why = f"{n} outputs with {g} groups at {bits} bits"
        expect(where, "weight_zero_point", stored, "int32", (words(n, bits), g), why)
        return np.ascontiguousarray(unpack(stored.T, bits, n).T)
    expect(where, "weight_zero_point", stored, "int8", (1,) if strategy == "tensor" else shape, f"strategy {strategy}")
    return np.ascontiguousarray(np.broadcast_to(_codes(where, "weight_zero_point", stored, bits), shape))


def _codes(where: str, name: str, signed: Array, bits: int) -> Array:
    """Signed integers from 0 up."""
    half = 1 << bits - 1
    if signed.min() < -half or signed.max() >= half:
        raise CheckpointError(
            f"{where}: {name!r} holds {signed.min()}..{signed.max()}, and {bits} bits hold {-half}..{half - 1}: "
            f"{COMPARE}"
        )
    return (signed.view(np.uint8) + np.uint8(half)).astype(np.uint8)


def _float(tensors: Tensors, weights: Options, where: str) -> QuantArray:
    choice(where, weights, "num_bits", (8,))
    choice(where, weights, "symmetric", (True,), True)
    n, k = matrix(where, "weight", tensors["weight"], "float8_e4m3fn")
    fmt = _float_format(where, weights, tensors["weight_scale"].dtype.name, k)
    t = QuantType((("k", k), ("n", n)), short(tensors["weight_scale"].dtype), fmt)
    rows, group = fmt["rows"] or n, fmt["group"] or k
    scale = _scale(tensors, where, (-(-n // rows), -(-k // group)), f"strategy {weights['strategy']}")
    shape = list(t.fields["scale"].dims.values())
    return QuantArray.of({"code": tensors["weight"].view(np.uint8), "scale": scale.reshape(shape)}, t)


def _float_format(where: str, weights: Options, scale_dtype: str, k: int) -> Format:
    if scale_dtype not in FLOATS:
        raise CheckpointError(f"{where}: 'weight_scale' is {scale_dtype}, not {' or '.join(FLOATS)}: {COMPARE}")
    rows: int | None = 1
    group: int | None = None
    match choice(where, weights, "strategy", ("tensor", "channel", "group", "block")):
        case "tensor":
            rows = None
        case "group":
            group = group_option(where, weights, k)
        case "block":
            block = weights.get("block_structure")
            if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
                raise CheckpointError(f"{where}: {CONFIG} states block_structure = {block!r}, not two sizes: repair it")
            rows, group = block
    return scaled_fp8(rows, group, scale_dtype)


def _scale(tensors: Tensors, where: str, shape: tuple[int, int], why: str) -> Array:
    """The scales [rows, groups]. That of a whole weight may have any number of axes of size 1."""
    scale = tensors["weight_scale"]
    if shape == (1, 1) and scale.size == 1:
        scale = scale.reshape(1, 1)
    expect(where, "weight_scale", scale, FLOATS, shape, why)
    return scale


# ---------------------------------------------------------------- which options a layer has


def select(layer: str, options: Options, where: str) -> Options:
    """{"format": ..., "weights": ...} of a layer. Raises CheckpointError where no group, or `ignore`, names it."""
    if (sparsity := options.get("sparsity_config")) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: it is sparse, {sparsity['format']!r}: only dense weights can be read")
    if options.get("transform_config"):
        raise CheckpointError(f"{where}: {CONFIG} has a transform_config, so weights are rotated: it cannot be read")
    if any(_rank(layer, target) < 2 for target in options.get("ignore") or ()):
        raise CheckpointError(f"{where}: it is quantized, but `ignore` names it: {COMPARE}")
    ranked: dict[int, Mapping[str, Any]] = {}
    for group in options.get("config_groups", {}).values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise CheckpointError(
                f"{where}: a group of {CONFIG} does not say how weights are quantized: {group!r:.200}"
            )
        for target in group["targets"]:
            ranked.setdefault(_rank(layer, target), group)
    best = min(ranked, default=NO_MATCH)
    if best == NO_MATCH:
        raise CheckpointError(f"{where}: it is quantized, but no target of a group in {CONFIG} fits it: {COMPARE}")
    group = ranked[best]
    return {"format": group.get("format") or options.get("format"), "weights": group["weights"]}


NO_MATCH = 3


def _rank(layer: str, target: str) -> int:
    """How closely a target fits a layer: 0 by name, 1 by a pattern, 2 by its class, of which "Linear" is known."""
    if target.startswith("re:"):
        return 1 if re.match(target.removeprefix("re:"), layer) else NO_MATCH
    return 0 if target == layer else 2 if target == "Linear" else NO_MATCH


LAYOUTS = (
    Layout(
        "compressed-tensors (packed)",
        read_packed,
        frozenset({"weight_packed", "weight_scale", "weight_shape"}),
        frozenset({"weight_zero_point", "weight_g_idx"}),
        select,
    ),
    Layout(
        "compressed-tensors (plain)",
        read_plain,
        frozenset({"weight", "weight_scale"}),
        frozenset({"weight_zero_point", "weight_g_idx"}),
        select,
    ),
)
