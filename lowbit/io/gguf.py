"""GGUF, the files of llama.cpp: its tensors as arrays and quantized arrays, one at a time, and back.

Headers are read by `lowbit.io.gguf_header` and written by the `gguf` package; what the blocks of a type hold is in
`lowbit.io.gguf_blocks`. A file's tensors keep their names and their order of rows: llama.cpp permutes those of q and k
for its rotary embedding when it converts a Llama, which is not undone here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lowbit.array import QuantArray, own
from lowbit.io.atomic import replacing
from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.gguf_blocks import BLOCKS, Block
from lowbit.io.gguf_header import DENSE, VALUES, File, Path, Tensor
from lowbit.io.header import check_name
from lowbit.io.tensors import Array, to_host
from lowbit.ir.dtypes import numpy_dtype
from lowbit.quant_type import QuantType

DENSE_TYPES = {dtype.name: kind for kind, dtype in DENSE.items()}
NAME = 64
"""Bytes that ggml has for the name of a tensor and the zero that ends it."""
SCRATCH = 1 << 19
"""Bytes of blocks that are taken apart at a time: what bounds the memory beside the fields."""


def tensors(path: Path) -> Iterator[tuple[str, QuantArray | Array]]:
    """The tensors of a GGUF file, by name in its order, each made when it is asked for: the file is mapped.

    Quantized ones, of the types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K, come as float32[k n] arrays that decode
    to what ggml decodes, with axes before those two as a stack: `uniform(bits, group=32, scale_dtype="float16")` for
    Q4_0, Q5_0 and Q8_0, and `k_quant` for the others. Dense ones come as numpy arrays, views of the file, in the order
    [outputs, inputs] of torch, which is that of numpy here: GGUF itself lists dims from the last.

    Raises CheckpointError for a file that is damaged, for a type that no format holds, naming the tensor, for scales
    that are NaN or inf, and for one file of several; OSError when it cannot be opened.

    >>> import os, tempfile
    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.ones((256, 8)), lb.k_quant(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "w.gguf")
    ...     lb.export_gguf({"blk.0.ffn_up.weight": w}, path, {"general.architecture": "llama"})
    ...     print([(name, str(array.type)) for name, array in lb.read_checkpoint(path)])
    [('blk.0.ffn_up.weight', 'f32[k=256 n=8] as k_quant(bits=4)')]
    """
    file = File(path)
    if (parts := file.metadata.get("split.count", 0)) not in (0, 1):
        raise CheckpointError(f"{path} is one of {parts} files of a model: join them with llama-gguf-split --merge")
    return _values(path, file)


def _values(path: Path, file: File) -> Iterator[tuple[str, QuantArray | Array]]:
    for tensor in file.tensors:
        data = file.array(tensor)
        yield tensor.name, _quantized(tensor, data, path) if tensor.kind in BLOCKS else data
        file.forget()


def gguf_metadata(path: Path) -> dict[str, Any]:
    """What a GGUF file says beside its tensors, by key: strings, numpy scalars of the types that are stored, and lists
    of strings or arrays of numbers. `export_gguf` takes it back. Raises as `tensors` does."""
    return dict(File(path).metadata)


def export_gguf(entries: Mapping[str, Any], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write arrays and quantized arrays to a GGUF file, each made when its turn comes; the file appears whole or not.

    A quantized array is stored as it is, without rounding: one of `uniform(4, group=32, scale_dtype="float16")` as
    Q4_0, of 5 or 8 bits as Q5_0 or Q8_0, where every zero point is half the range; of `k_quant(4)` as Q4_K, and so on
    for the formats that `tensors` gives. Dense arrays are stored as they are, so give them as [outputs, inputs].

    Args:
      entries: by ggml's names, such as "blk.0.attn_q.weight".
      path: the file; its folder must exist.
      metadata: by key, with "general.architecture": strings, bools, numpy scalars, ints (stored as uint32, the type of
        llama.cpp's sizes), floats (as float32), and lists or arrays of one of them.

    Raises ValueError for a quantized array that GGUF cannot hold exactly, with the reason, for a scale that is NaN or
    inf, and for metadata without an architecture; TypeError for what is no array and metadata of no type; ImportError
    without the `gguf` package.
    """
    gguf = _package()
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError('a GGUF file names its model: give metadata={"general.architecture": "llama", ...}')
    types = {name: _type(_checked(name), value) for name, value in entries.items()}  # before the first is made
    with replacing(path) as file:
        writer = gguf.GGUFWriter(None, str(metadata["general.architecture"]))
        for key, value in {"general.quantization_version": gguf.GGML_QUANT_VERSION, **metadata}.items():
            if key != "general.architecture":
                _say(writer, key, value)
        for name, kind in types.items():
            shape = _bytes_shape(entries[name], kind)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), gguf.GGMLQuantizationType[kind])
        writer.fout = [file]  # ours, which appears whole or not at all
        writer.state = gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in types.items():
            writer.write_tensor_data(_bytes(name, entries[name], kind))


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as err:
        raise ImportError("writing GGUF needs the gguf package: pip install 'lowbit[gguf]'") from err


# ---------------------------------------------------------------- from blocks


def _quantized(tensor: Tensor, data: Array, path: Path) -> QuantArray:
    block, (*stack, n, width) = BLOCKS[tensor.kind], data.shape
    of = QuantType((("k", width // block.size * block.weights), ("n", n)), "f32", block.format)
    fields = {f: np.empty((*stack, *p.dims.values()), numpy_dtype(p.dtype)) for f, p in of.fields.items()}
    for at in np.ndindex(*stack):
        for some in _some_rows(n, width):
            for name, part in block.unpack(data[at][some]).items():
                fields[name][at][_rows(name, some)] = part
    for name in block.halves:
        if bad := int((~np.isfinite(fields[name])).sum()):
            where = f"{path}: tensor {tensor.name!r}"
            raise CheckpointError(f"{where} has {bad} NaN or inf among the {fields[name].size} of {name!r}: {AGAIN}")
    return QuantArray.of(fields, of)


def _packed(block: Block, fields: Mapping[str, Array], width: int) -> Array:
    out = np.empty((len(fields["scale"]), width), np.uint8)
    for some in _some_rows(*out.shape):
        out[some] = block.pack({name: a[_rows(name, some)] for name, a in fields.items()})
    return out


def _rows(field: str, some: slice) -> tuple[slice, ...]:
    """An index of some rows of a field."""
    return (slice(None), some) if field == "planes" else (some,)


def _some_rows(n: int, width: int) -> Iterator[slice]:
    at_once = max(1, SCRATCH // width)
    return (slice(at, at + at_once) for at in range(0, n, at_once))


# ---------------------------------------------------------------- to blocks


def _checked(name: Any) -> str:
    check_name(name)
    if len(name.encode()) >= NAME:
        raise ValueError(
            f"{name!r} has {len(name.encode())} bytes, and ggml reads names of up to {NAME - 1}: shorten it"
        )
    return str(name)


def _type(name: str, value: Any) -> str:
    """ggml's type of an entry. Raises for what it cannot hold exactly."""
    if not isinstance(value, QuantArray):
        array = to_host(name, value)
        if array.dtype.name not in DENSE_TYPES or not 1 <= array.ndim <= 4:
            given = f"{array.dtype}{list(array.shape)}"
            raise TypeError(
                f"{name!r} is {given}; GGUF holds 1 to 4 dims of {', '.join(DENSE_TYPES)}: cast or reshape it"
            )
        return DENSE_TYPES[array.dtype.name]
    of, sizes = value.type, dict(value.type.dims)
    if of.splits or of.adapter is not None or of.numerics != "float":
        raise ValueError(
            f"{name!r} is {of.encoding}; GGUF has no adapters, parts that train or products in int8: fold or drop them"
        )
    if len(value.stack) > 2:
        raise ValueError(
            f"{name!r} is a stack {list(value.stack)} of matrices, and GGUF has 4 dims at most: export slices"
        )
    kind = next((kind for kind, block in BLOCKS.items() if block.format == of.format), None)
    if kind is None:
        known = ", ".join(f"{block.format} ({kind})" for kind, block in BLOCKS.items())
        raise ValueError(f"{name!r} is {of.format}, for which GGUF has no type: quantize it to one of {known}")
    block = BLOCKS[kind]
    if sizes["k"] % block.weights:
        raise ValueError(
            f"{name!r} has {sizes['k']} inputs, and {kind} has blocks of {block.weights}: quantize it to a format with "
            "groups that divide them, or leave it dense"
        )
    fields = own(value).fields  # what kernels read is padded
    for field in block.halves:
        if not np.isfinite(np.asarray(fields[field])).all():
            raise ValueError(f"{name!r} has NaN or inf in {field!r}: quantize the weight again")
    if block.zero is not None and bool((zero := np.asarray(fields["zero"]) != block.zero).any()):
        raise ValueError(
            f"{name!r} has {int(zero.sum())} of {zero.size} zero points that are not {block.zero}, and {kind} has that "
            f"one for all: quantize it to {BLOCKS['Q4_1'].format} (Q4_1) or {BLOCKS['Q4_K'].format} (Q4_K)"
        )
    return kind


def _bytes_shape(value: Any, kind: str) -> tuple[int, ...]:
    """Of an entry as bytes."""
    if not isinstance(value, QuantArray):
        return (*value.shape[:-1], value.shape[-1] * value.dtype.itemsize)
    block, sizes = BLOCKS[kind], dict(value.type.dims)
    return (*value.stack, sizes["n"], sizes["k"] // block.weights * block.size)


def _bytes(name: str, value: Any, kind: str) -> Array:
    if not isinstance(value, QuantArray):
        return to_host(name, value).reshape(-1).view(np.uint8)
    fields = {field: np.asarray(a) for field, a in own(value).fields.items()}
    *stack, _, width = _bytes_shape(value, kind)
    return np.concatenate(
        [_packed(BLOCKS[kind], {field: a[at] for field, a in fields.items()}, width) for at in np.ndindex(*stack)]
    )


# ---------------------------------------------------------------- metadata


def _say(writer: Any, key: str, value: Any) -> None:
    if key == "general.alignment":
        if value not in (1 << i for i in range(32)):
            raise ValueError(f"metadata {key!r} is {value!r}: give a power of two")
        writer.data_alignment = int(value)
    several = isinstance(value, list | np.ndarray)
    if several and not len(value):
        return  # which the package does not write either
    kinds = {_kind(key, each) for each in value} if several else {_kind(key, value)}
    if len(kinds) > 1:
        raise TypeError(f"metadata {key!r} is a list of {' and '.join(sorted(kinds))}: give one type")
    kind = getattr(_package().GGUFValueType, kinds.pop())
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    writer.add_key_value(key, plain, _package().GGUFValueType.ARRAY if several else kind, kind if several else None)


def _kind(key: str, value: Any) -> str:
    match value:
        case np.generic() if value.dtype.name.upper() in VALUES:
            return str(value.dtype.name.upper())
        case str():
            return "STRING"
        case bool():
            return "BOOL"
        case int() if 0 <= value < 1 << 32:
            return "UINT32"
        case float():
            return "FLOAT32"
    raise TypeError(f"metadata {key!r} is {value!r}: give strings, numpy scalars, bools, ints below 2**32 or floats")
