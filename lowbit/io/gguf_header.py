"""What a GGUF file says of itself: its metadata, and where its tensors are.

    "GGUF", version u32, tensors u64, keys u64
    for each key:     name, type u32, value
    for each tensor:  name, dims u32, their sizes u64 from the last one on, type u32, offset u64
    the tensors, from the next multiple of `general.alignment` on

A string is its length u64 and UTF-8, an array the type u32 and the count u64 of what it holds. The `gguf` package is
not used here: it makes objects of each token, 0.6 GB for a vocabulary of 128,256.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.gguf_blocks import BLOCKS
from lowbit.io.tensors import Array

Path = str | os.PathLike[str]
DENSE = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64), "I8": np.dtype(np.int8), "I16": np.dtype(np.int16), "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}  # fmt: skip
"""ggml's types of plain numbers."""
TYPES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 "
    "IQ4_NL_8_8 MXFP4"
).split()
"""ggml's types of tensors, by their numbers."""
STRING, ARRAY = 8, 9
VALUES = (
    "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "", "", "UINT64", "INT64", "FLOAT64",
)  # fmt: skip
"""The types of metadata that are numbers, by theirs; in small letters they are numpy's."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its shape as numpy has it, the sizes from the last on being ggml's, and its first byte."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        *rows, inputs = self.shape
        if self.kind in DENSE:
            return (*rows, inputs * DENSE[self.kind].itemsize)
        return (*rows, inputs // BLOCKS[self.kind].weights * BLOCKS[self.kind].size)


class File:
    """A mapped GGUF file.

    Raises CheckpointError for one that is damaged or has a tensor of a type that lowbit lacks, OSError for one that
    cannot be opened.

    Attributes:
      metadata: strings, numpy scalars, and lists of strings or arrays of numbers, by key.
      tensors: in the order of the file.
    """

    metadata: Mapping[str, Any]
    tensors: list[Tensor]

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise CheckpointError(f"{path} is empty: {AGAIN}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._map)
        try:
            self.metadata, self.tensors, self._start = _parsed(cursor)
        except (
            ValueError,
            TypeError,
            RecursionError,
        ) as err:  # also of what is not UTF-8, or an array of arrays of ...
            raise CheckpointError(f"{path} is no whole GGUF file ({err}): {AGAIN}") from err
        for tensor in self.tensors:
            _check(tensor, f"{path}: tensor {tensor.name!r}")
            end = self._start + tensor.start + prod(tensor.bytes_shape)
            if end > size:
                raise CheckpointError(
                    f"{path} is truncated: it has {size} bytes, and tensor {tensor.name!r} ends after {end}: {AGAIN}"
                )

    def array(self, tensor: Tensor) -> Array:
        """A view of a dense tensor, or of the bytes [..., rows, bytes] of a quantized one."""
        dtype = DENSE.get(tensor.kind, np.dtype(np.uint8))
        at = self._start + tensor.start
        stored = np.frombuffer(self._map, np.uint8, prod(tensor.bytes_shape), at).reshape(tensor.bytes_shape)
        return stored.view(dtype)

    def forget(self) -> None:
        """Gives back the memory of pages that were read; they are read again when used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _check(tensor: Tensor, where: str) -> None:
    if tensor.kind in DENSE:
        return
    if tensor.kind not in BLOCKS:
        known = ", ".join([*DENSE, *BLOCKS])
        raise CheckpointError(f"{where} is {tensor.kind}, and lowbit reads {known}: quantize the model to one of these")
    weights = BLOCKS[tensor.kind].weights
    if len(tensor.shape) < 2 or 0 in tensor.shape or tensor.shape[-1] % weights:
        raise CheckpointError(
            f"{where} is {tensor.kind}{list(tensor.shape)}: what is quantized has rows of whole blocks of {weights}, "
            f"and 2 dims or more, none of them 0: {AGAIN}"
        )


def _parsed(cursor: _Cursor) -> tuple[dict[str, Any], list[Tensor], int]:
    """Metadata, tensors, and where these begin. Raises ValueError for what is no header."""
    if (magic := bytes(cursor.take(4))) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    version, count, keys = cursor.number("UINT32"), cursor.number("UINT64"), cursor.number("UINT64")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are read; {3 << 24} is the other order of bytes")
    metadata = {cursor.string(): cursor.value(int(cursor.number("UINT32"))) for _ in range(keys)}
    tensors = [_tensor(cursor) for _ in range(count)]
    if len({t.name for t in tensors}) < count or len(metadata) < keys:
        raise ValueError("two of its tensors or keys have one name")
    for key in ("general.alignment", "split.count"):
        if not isinstance(metadata.get(key, 1), int | np.integer):
            raise ValueError(f"its {key} is {metadata[key]!r}")
    alignment = int(metadata.get("general.alignment", 32))
    if alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    return metadata, tensors, -(-cursor.at // alignment) * alignment


def _tensor(cursor: _Cursor) -> Tensor:
    name, dims = cursor.string(), int(cursor.number("UINT32"))
    if not 1 <= dims <= 4:
        raise ValueError(f"{name!r} has {dims} dims")
    sizes = [int(cursor.number("UINT64")) for _ in range(dims)]
    kind = int(cursor.number("UINT32"))
    named = TYPES[kind] if kind < len(TYPES) else f"type {kind} of ggml"
    return Tensor(name, named, tuple(reversed(sizes)), int(cursor.number("UINT64")))


class _Cursor:
    """A place in the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it ends within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, kind: str, count: int) -> Array:
        dtype = np.dtype(kind.lower())
        return np.frombuffer(self.take(dtype.itemsize * count), dtype)

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        size = int.from_bytes(self.take(8), "little")
        return str(self.take(size), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(_numbers(kind))
        inner, count = int(self.number("UINT32")), int(self.number("UINT64"))
        if inner in (STRING, ARRAY):
            return [self.value(inner) for _ in range(count)]
        return self.numbers(_numbers(inner), count)


def _numbers(kind: int) -> str:
    if kind >= len(VALUES):
        raise ValueError(f"it has a value of type {kind}")
    return VALUES[kind]
