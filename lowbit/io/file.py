"""Write and read one safetensors file of dense and quantized arrays, checked bit by bit.

The tensors are plain safetensors, `<entry>` or `<entry>/<field>`, so other tools can list and read them. What makes a
quantized array of them is our header (`lowbit.io.header`). Nothing is pickled and nothing in a file is executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from lowbit.array import QuantArray
from lowbit.io.atomic import replacing
from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.header import Header, describe, pack, tensors_of, unpack
from lowbit.io.mapped import Mapped
from lowbit.io.tensors import Array, decode, encoded_as, safetensors_bytes, sha256, to_jax
from lowbit.io.types import stored_type
from lowbit.quant_type import QuantType

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

    The file is mapped, not copied. On a CPU the arrays are its pages: there is no second copy at any time, and the
    processes that load one file share the memory. (A tensor that does not begin on a multiple of 64 bytes is copied;
    `write` aligns all but those whose size is no multiple of 64 bytes.) Replacing the file, as `write` does, or
    deleting it leaves the arrays as they are. Overwriting or truncating it *in place* changes them or ends the process:
    `jnp.copy` them first. On other devices the arrays are copies.

    Raises CheckpointError for a file that is damaged, not lowbit's, of a newer version, or that holds a format which is
    not registered or not the same here; OSError when it cannot be opened.
    """
    file, header = _opened(path)
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
    return _opened(path)[1]


def _opened(path: Path) -> tuple[Mapped, Header]:
    file = Mapped(path)
    return file, unpack(str(path), file.metadata, file.names)


def _entry(path: Path, file: Mapped, header: Header, name: str, type_: QuantType | None) -> Value:
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


def _tensor(path: Path, file: Mapped, header: Header, name: str, tensor: str) -> jax.Array | Array:
    """One tensor, its dtype, shape and checksum verified."""
    spec = header["tensors"][tensor]
    where = f"{path}: tensor {tensor!r} of layer {name!r}"
    try:
        stored = file.array(tensor)
    except ValueError as err:
        raise CheckpointError(f"{where} cannot be read ({err}): {AGAIN}") from err
    dtype, shape = encoded_as(spec["dtype"], spec["shape"])
    if stored.dtype != dtype or stored.shape != shape:
        found = f"{stored.dtype}{list(stored.shape)}"
        raise CheckpointError(f"{where} is {found}, but was saved as {dtype}{list(shape)}: {AGAIN}")
    if (digest := sha256(stored)) != spec["sha256"]:
        raise CheckpointError(
            f"{where} is damaged, the sha256 of its bytes is {digest[:16]}..., but was {spec['sha256'][:16]}... when "
            f"it was saved: {AGAIN}"
        )
    return to_jax(decode(stored, spec["dtype"], spec["shape"]))
