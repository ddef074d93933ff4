"""Write and read one safetensors file of dense and quantized arrays, checked bit by bit.

The tensors are plain safetensors, `<entry>` or `<entry>/<field>`, so other tools can list and read them. What makes a
quantized array of them is our header (`lowbit.io.header`). Nothing is pickled and nothing in a file is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from safetensors import safe_open

from lowbit.array import QuantArray, QuantType
from lowbit.io.atomic import replacing
from lowbit.io.error import CheckpointError
from lowbit.io.header import Header, describe, pack, tensors_of, unpack
from lowbit.io.tensors import Array, decode, encoded_as, safetensors_bytes, sha256, to_jax
from lowbit.io.types import stored_type

Path = str | os.PathLike[str]
Value = jax.Array | Array | QuantArray


def write(path: Path, entries: Mapping[str, Value], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays and quantized arrays, by name, to one safetensors file.

    The file appears whole or not at all: it is written beside `path`, synced and renamed, so a save that fails or is
    killed leaves the old file.

    Args:
      path: the file; its folder must exist.
      entries: arrays of any shape, in any dtype that jax computes with; names are any strings but "__metadata__".
      metadata: strings to keep with them, which `read_header` gives back.

    Raises TypeError for an entry that is not an array, ValueError for two entries that would be stored under one name
    and for a QuantArray that breaks its invariants, OSError when the path cannot be written.

    >>> import os, tempfile
    >>> import jax.numpy as jnp, lowbit as lb, lowbit.io
    >>> w = lb.quantize_array(jnp.ones((8, 4)), lb.uniform(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lb.io.write(os.path.join(folder, "w.safetensors"), {"up/kernel": w, "up/bias": jnp.zeros(4)})
    ...     lb.io.read(os.path.join(folder, "w.safetensors"))["up/kernel"].type == w.type
    True
    """
    header, tensors = describe(entries, metadata or {})
    with replacing(path) as file:
        for chunk in safetensors_bytes(tensors, pack(header)):
            file.write(chunk)


def read(path: Path) -> dict[str, Value]:
    """What `write` wrote, by name in the order written, after checking everything.

    Dense entries come as jax arrays, those of 64 bits as numpy arrays unless jax_enable_x64 is on: nothing is narrowed.
    One tensor at a time is read, so the peak is the arrays themselves and one more.

    Raises CheckpointError for a file that is damaged, not lowbit's, of a newer version, or that holds a format which is
    not registered or not the same here; OSError when it cannot be opened.
    """
    with _opened(path) as (file, header):
        entries: Mapping[str, Header] = header["entries"]
        # All types before any data: what is wrong with a format is said at once.
        types = {
            name: stored_type(f"{path}: layer {name!r}", entry)
            for name, entry in entries.items()
            if entry["kind"] == "quantized"
        }
        return {name: _entry(path, file, header, name, types.get(name)) for name in entries}


def read_header(path: Path) -> Header:
    """The header of a file, its own checksum verified: see `lowbit.io.header` for what is in it.

    Reads no tensor and needs no format to be registered. Raises as `read` does for what it checks.
    """
    with _opened(path) as (_, header):
        return header


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Header]]:
    with open(path, "rb") as start:
        size = os.fstat(start.fileno()).st_size
        head = start.read(9)
    try:
        file = safe_open(path, framework="np")
    except Exception as err:  # whatever the parser makes of arbitrary bytes
        raise CheckpointError(f"{path} {_ailment(path, head, size)} ({err})") from err
    with file:
        yield file, unpack(str(path), file.metadata(), file.keys())


def _ailment(path: Path, head: bytes, size: int) -> str:
    """Why a file that safetensors refuses is one, from its length and its first bytes."""
    again = "get the file again or restore a copy"
    if size == 0:
        return f"is empty: {again}"
    length = int.from_bytes(head[:8], "little")
    if head[8:] != b"{":
        return f"is not a safetensors file ({size} bytes, beginning {head[:8]!r}): name the file that lowbit saved"
    if 8 + length > size:
        return f"is truncated or damaged: it has {size} bytes, and states a header of {length}: {again}"
    try:
        with open(path, "rb") as f:
            described = json.loads(f.read(8 + length)[8:])
        ends = [spec["data_offsets"][1] for name, spec in described.items() if name != "__metadata__"]
        stated = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"has a damaged header: {again}"
    if stated > size:
        return f"is truncated: it has {size} bytes, and its header describes {stated}: {again}"
    return f"is damaged: it has {size} bytes, and its header describes {stated}: {again}"


def _entry(path: Path, file: Any, header: Header, name: str, type_: QuantType | None) -> Value:
    tensors = tensors_of(header["entries"][name])
    arrays = {field: _tensor(path, file, header, name, tensor) for field, tensor in tensors.items()}
    if type_ is None:
        return arrays[""]
    for field, array in arrays.items():
        if not isinstance(array, jax.Array):
            raise CheckpointError(
                f"{path}: {tensors[field]!r} of layer {name!r} is {array.dtype}, which jax narrows: set jax_enable_x64"
            )
    try:
        return QuantArray.of(arrays, type_)
    except ValueError as err:
        raise CheckpointError(f"{path}: layer {name!r} is not what its type says ({err}): save it again") from err


def _tensor(path: Path, file: Any, header: Header, name: str, tensor: str) -> jax.Array | Array:
    """One tensor, its dtype, shape and checksum verified."""
    spec = header["tensors"][tensor]
    where = f"{path}: tensor {tensor!r} of layer {name!r}"
    again = "get the file again or restore a copy"
    try:
        stored = file.get_tensor(tensor)
    except Exception as err:  # a dtype that was flipped into one that numpy lacks, a file that shrank
        raise CheckpointError(f"{where} cannot be read ({err}): {again}") from err
    dtype, shape = encoded_as(spec["dtype"], spec["shape"])
    if stored.dtype != dtype or stored.shape != shape:
        found = f"{stored.dtype}{list(stored.shape)}"
        raise CheckpointError(f"{where} is {found}, but was saved as {dtype}{list(shape)}: {again}")
    if (digest := sha256(stored)) != spec["sha256"]:
        raise CheckpointError(
            f"{where} is damaged, the sha256 of its bytes is {digest[:16]}..., but was {spec['sha256'][:16]}... when "
            f"it was saved: {again}"
        )
    return to_jax(decode(stored, spec["dtype"], spec["shape"]))
