"""What a file says about itself: JSON in the metadata of the safetensors header, beside its own checksum.

    {"version": 1,
     "metadata": {...},                                           what the caller gave, strings
     "entries": {"bias":   {"kind": "dense", "tensor": "bias"},
                 "kernel": {"kind": "quantized",
                            "type": {dims, dtype, format, version, options, splits[, adapter][, numerics]},
                            "decode": "%0 = param alpha ...",     the text of the decode term
                            "tensors": {"alpha": "kernel/alpha", ...}}},
     "tensors": {"kernel/alpha": {"dtype": "float32", "shape": [3, 64, 1], "sha256": "..."}, ...}}

Every version of the file keeps the two metadata keys, KEY and DIGEST, and "version": so that an old library can tell a
newer file from a damaged one. A field that is not listed here is refused wherever it stands, for it may say that the
arrays mean something else. Other tools may leave metadata of their own beside ours, under names that do not begin with
"lowbit".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from lowbit.array import QuantArray, own
from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.tensors import DTYPES, Array, encode, sha256, to_host
from lowbit.ir.parse import parse
from lowbit.ir.text import text
from lowbit.quant_type import type_from_json, type_to_json

VERSION = 1
KEY = "lowbit"
DIGEST = "lowbit.sha256"
FIELDS = {
    "header": {"version", "metadata", "entries", "tensors"},
    "dense": {"kind", "tensor"},
    "quantized": {"kind", "type", "decode", "tensors"},
    "type": {"dims", "dtype", "format", "version", "options", "splits", "adapter", "numerics"},
    "tensor": {"dtype", "shape", "sha256"},
}
"""What each part of a header holds; the entries by their kind."""
Header = dict[str, Any]


def describe(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Header, dict[str, Array]]:
    """The header of a file with these entries, and its tensors as safetensors is given them.

    Raises TypeError for what is not an array, ValueError for a name or a quantized array that could not be read back.
    """
    for key, kept in metadata.items():
        if not isinstance(key, str) or not isinstance(kept, str):
            raise TypeError(f"metadata must map strings to strings, not {key!r} to {kept!r}")
    arrays: dict[str, Array] = {}
    described: dict[str, Header] = {}
    for name, value in entries.items():
        check_name(name)
        parts = _fields(name, value) if isinstance(value, QuantArray) else {name: to_host(name, value)}
        if isinstance(value, QuantArray) and value.type.layout != "own":  # moved only after it was checked
            value = own(value)
            parts = _fields(name, value)
        if clash := sorted(parts.keys() & arrays.keys()):
            raise ValueError(
                f"entry {name!r} is stored as the tensor {clash[0]!r}, as another one is: rename one of them"
            )
        arrays |= parts
        dense = {"kind": "dense", "tensor": name}
        described[name] = _quantized(name, value) if isinstance(value, QuantArray) else dense
    stored = {tensor: encode(a) for tensor, a in arrays.items()}
    tensors = {
        tensor: {"dtype": a.dtype.name, "shape": list(a.shape), "sha256": sha256(stored[tensor])}
        for tensor, a in arrays.items()
    }
    return {"version": VERSION, "metadata": dict(metadata), "entries": described, "tensors": tensors}, stored


def check_name(name: Any) -> None:
    """Raises TypeError or ValueError for what cannot name an entry."""
    if not isinstance(name, str):
        raise TypeError(f"an entry's name must be a string, not {name!r}")
    if name == "__metadata__":
        raise ValueError("an entry cannot be named '__metadata__', safetensors keeps that name for itself: rename it")
    try:
        name.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"an entry cannot be named {name!r}, it is not Unicode ({err.reason}): rename it") from err


def _tensor_name(entry: str, field: str) -> str:
    return f"{entry}/{field}"


def _fields(name: str, w: QuantArray) -> dict[str, Array]:
    """The checked fields of an entry by tensor name."""
    host = {field: to_host(_tensor_name(name, field), value) for field, value in w.fields.items()}
    try:
        QuantArray.of(w.fields, w.type)
    except ValueError as err:
        raise ValueError(f"{name!r} is not a valid QuantArray: {err}") from err
    return {_tensor_name(name, field): array for field, array in host.items()}


def _quantized(name: str, w: QuantArray) -> Header:
    """An entry's description, refused if a reader could not make the same type of it."""
    entry = {
        "kind": "quantized",
        "type": type_to_json(w.type),
        "decode": text(w.type.decode),
        "tensors": {field: _tensor_name(name, field) for field in w.type.fields},
    }
    try:
        back = json.loads(json.dumps(entry))
        same = type_from_json(back["type"]) == w.type and parse(back["decode"]) is w.type.decode
    except (ValueError, TypeError) as err:
        raise ValueError(f"{name!r} ({w.type}) could not be read back from a file: {err}") from err
    if not same:
        raise ValueError(f"{name!r} ({w.type}) would not be the same type when read back: use options that JSON keeps")
    return entry


def pack(header: Header) -> dict[str, str]:
    """The header as safetensors metadata."""
    packed = json.dumps(header, separators=(",", ":"))
    return {KEY: packed, DIGEST: hashlib.sha256(packed.encode()).hexdigest()}


def unpack(path: str, metadata: Mapping[str, str] | None, names: Collection[str]) -> Header:
    """The header from a file's safetensors metadata, checked against the `names` of the tensors that the file holds."""
    if metadata is None or KEY not in metadata:
        some = ", ".join(repr(n) for n in sorted(names)[:3]) or "none"
        raise CheckpointError(
            f"{path} is a safetensors file that lowbit did not write (its metadata has no {KEY!r}; it holds "
            f"{len(names)} tensors: {some}{', ...' if len(names) > 3 else ''}): only what lowbit saved can be loaded"
        )
    packed, want = metadata[KEY], metadata.get(DIGEST)
    found = hashlib.sha256(packed.encode()).hexdigest()
    if want != found:
        raise CheckpointError(
            f"{path}: the header is damaged, its sha256 is {found[:16]}... but the file states "
            f"{f'{want[:16]}...' if want else 'none'}: {AGAIN}"
        )
    try:
        header = json.loads(packed)
        version = header["version"]
        if type(version) is not int:
            raise TypeError(f"version {version!r}")
        if version <= VERSION:
            _refuse_unknown(f"{path}: the metadata", [k for k in metadata if k.startswith(KEY)], (KEY, DIGEST))
            _check(str(path), header, set(names))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        why = f"no {err}" if isinstance(err, KeyError) else err
        raise CheckpointError(f"{path}: the header is not one that lowbit writes ({why}): save it again") from err
    if version > VERSION:
        raise CheckpointError(
            f"{path} was written by a newer lowbit: file version {version}, this library reads up to {VERSION}; "
            "upgrade lowbit"
        )
    return dict(header)


def _refuse_unknown(where: str, fields: Collection[str], known: Collection[str]) -> None:
    if unknown := sorted(set(fields) - set(known)):
        raise CheckpointError(
            f"{where} has {unknown[0]!r}, which this library does not know: upgrade lowbit to the release that wrote it"
        )


def _check(path: str, header: Header, names: set[str]) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError unless the header is as the module's docstring shows."""
    _refuse_unknown(f"{path}: the header", header.keys(), FIELDS["header"])
    for name, entry in header["entries"].items():
        _refuse_unknown(f"{path}: the kind of entry {name!r}", [entry["kind"]], ("dense", "quantized"))
        _refuse_unknown(f"{path}: entry {name!r}", entry.keys(), FIELDS[entry["kind"]])
        if entry["kind"] == "quantized":
            _refuse_unknown(f"{path}: the type of entry {name!r}", entry["type"].keys(), FIELDS["type"])
    if header["version"] < 1:
        raise ValueError(f"version {header['version']}")
    for key, value in header["metadata"].items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key!r} is {value!r}")
    for tensor, spec in header["tensors"].items():
        _refuse_unknown(f"{path}: tensor {tensor!r}", spec.keys(), FIELDS["tensor"])
        if spec["dtype"] not in DTYPES:
            raise ValueError(f"tensor {tensor!r} has the unknown dtype {spec['dtype']!r}")
        if not isinstance(spec["sha256"], str) or not all(type(n) is int and n >= 0 for n in spec["shape"]):
            raise ValueError(f"tensor {tensor!r} is described as {str(spec)[:200]}")
    used = [tensor for entry in header["entries"].values() for tensor in tensors_of(entry).values()]
    if not len(used) == len(set(used)) or not set(used) == header["tensors"].keys() == names:
        odd = sorted((set(used) ^ header["tensors"].keys()) | (set(used) ^ names))[:3]
        raise ValueError(f"tensors that are missing, unused or used twice: {', '.join(map(repr, odd)) or len(used)}")


def tensors_of(entry: Header) -> dict[str, str]:
    """The tensors of an entry by field; a dense one has the single field ""."""
    if entry["kind"] == "dense":
        return {"": entry["tensor"]}
    if not isinstance(entry["decode"], str):
        raise TypeError(f"a quantized entry is described as {str(entry)[:200]}")
    return dict(entry["tensors"])
