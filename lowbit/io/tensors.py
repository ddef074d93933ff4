"""Arrays in a safetensors file, bit for bit.

The numpy side of the safetensors library reads the dtypes in NATIVE. The others (float8, int4, complex, ...) are stored
as their bytes, u8 of shape [*shape, itemsize], and our header has their dtype. (Up to 0.8 the library writes a float8
but cannot read it back.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NATIVE = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16",
}  # fmt: skip
"""Numpy's name to that of safetensors."""
FOREIGN = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""The same, for dtypes that other projects' files hold and ours store as bytes."""
RAW = (
    "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "complex64", "complex128",
)  # fmt: skip
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in (*NATIVE, *RAW)}
"""Every dtype that can be stored, by its name in the header."""
LINE = 64
"""Bytes that jax wants an array on a CPU to be aligned to, or copies it."""


def to_host(name: str, value: Any) -> Array:
    """A value as a numpy array in C order and native byte order. Raises TypeError for what is not a storable array."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name!r} is traced: write files outside of jax.jit and other transformations")
    if not isinstance(value, np.ndarray | jax.Array) or isinstance(value, np.ma.MaskedArray):
        kind = type(value).__name__
        raise TypeError(f"{name!r} is a {kind}; only numpy or jax arrays and QuantArrays can be stored")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name!r} holds random keys ({value.dtype}); store jax.random.key_data(key) instead")
    array = np.asarray(value, order="C")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if DTYPES.get(array.dtype.name) != array.dtype:
        raise TypeError(f"{name!r} has dtype {array.dtype}; what can be stored is {', '.join(DTYPES)}")
    return array


def to_jax(array: Array) -> jax.Array | Array:
    """The array on the default device, or as it is where jax would narrow it: 64-bit types without jax_enable_x64.

    `device_put`, unlike `jnp.asarray`, takes aligned memory on a CPU as it is.
    """
    return jax.device_put(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array


def encode(array: Array) -> Array:
    """The array that is stored: the same, or its bytes."""
    return array if array.dtype.name in NATIVE else array.reshape(*array.shape, 1).view(np.uint8)


def encoded_as(dtype: str, shape: Sequence[int]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and shape of `encode(array)` for an array of this dtype and shape."""
    if dtype in NATIVE:
        return DTYPES[dtype], tuple(shape)
    return np.dtype(np.uint8), (*shape, DTYPES[dtype].itemsize)


def decode(stored: Array, dtype: str, shape: Sequence[int]) -> Array:
    """The inverse of `encode`."""
    return stored if dtype in NATIVE else stored.view(DTYPES[dtype]).reshape(tuple(shape))


def sha256(array: Array) -> str:
    """The checksum of an array's bytes, in C order."""
    return hashlib.sha256(as_bytes(array)).hexdigest()


def as_bytes(array: Array) -> memoryview:
    """An array's bytes, in C order."""
    return array.reshape(-1).view(np.uint8).data


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file of encoded arrays, piece by piece and without copying them.

    Equal tensors and metadata give equal bytes. The library's own `save_file` (0.8) is not used: it writes metadata in
    random order, and a temporary file of its own, which only its owner may read.
    """
    head, places = arranged({name: (a.dtype, a.shape) for name, a in tensors.items()}, metadata)
    yield head
    for name in places:
        yield as_bytes(tensors[name])


Spec = tuple[np.dtype[Any], tuple[int, ...]]
"""Dtype and shape of a tensor that is yet to be made."""


def arranged(tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where each tensor follows in the whole, in the order of the file."""

    def size(name: str) -> int:
        dtype, shape = tensors[name]
        return prod(shape) * dtype.itemsize

    # Whole lines first, then the widest: all are aligned, and the large ones can be used where they are mapped.
    order = sorted(tensors, key=lambda name: (size(name) % LINE != 0, -tensors[name][0].itemsize, name))
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        (dtype, shape), starts[name] = tensors[name], end
        end += size(name)
        short = (NATIVE | FOREIGN)[dtype.name]
        described[name] = {"dtype": short, "shape": shape, "data_offsets": [starts[name], end]}
    packed = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-(8 + len(packed)) % LINE)
    head = len(packed).to_bytes(8, "little") + packed
    return head, {name: len(head) + start for name, start in starts.items()}
