"""`lb.export_checkpoint`: to checkpoints of compressed-tensors, which vLLM and transformers read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowbit.array import QuantArray, own
from lowbit.formats.planes import group_size
from lowbit.io.atomic import replacing
from lowbit.io.header import check_name
from lowbit.io.packing import from_planes, pack, words
from lowbit.io.shards import INDEX, SINGLE
from lowbit.io.tensors import FOREIGN, NATIVE, Array, Spec, arranged, as_bytes, to_host

Scheme = dict[str, Any]
"""How a layer is quantized: "format" and "weights", as in a group of `config_groups`."""
Parts = dict[str, tuple[Spec, Callable[[], Array]]]
"""The tensors of a layer by the last part of their names: dtype and shape, and how they are made."""
SUFFIX = ".weight"


def export_checkpoint(
    entries: Mapping[str, QuantArray | jax.Array | Array],
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of compressed-tensors: model.safetensors, and config.json that says how it is quantized.

    What has a counterpart there: `uniform` of 4 and 8 bits (pack-quantized; symmetric where every zero point is half of
    the range), and `scaled_fp8` (float-quantized). `lb.read_checkpoint` gives the same arrays back.

    Args:
      entries: weights by the names that they are to have, as `lb.read_checkpoint` and `lb.load` give them: a QuantArray
        "up.weight" becomes "up.weight_packed" and so on; dense arrays are written as they are, so [outputs, inputs] if
        torch is to read them.
      folder: which must exist; the two files in it are replaced, each as a whole.
      config: the rest of config.json, as the model's family wants it.

    One tensor at a time is made. Raises ValueError, before anything is written, for a format that compressed-tensors
    lacks, with the reason, for entries of which none is quantized, and for a folder with the index of another
    checkpoint, which readers would follow; TypeError for what is no array; OSError when the folder cannot be written.

    >>> import os, tempfile
    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.ones((256, 64)), lb.uniform(4, group=128))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lb.export_checkpoint({"up.weight": w}, folder)
    ...     print(sorted(os.listdir(folder)), dict(lb.read_checkpoint(folder))["up.weight"].type == w.type)
    ['config.json', 'model.safetensors'] True
    """
    specs: dict[str, Spec] = {}
    make: dict[str, Callable[[], Array]] = {}
    schemes: dict[str, Scheme] = {}
    for name, value in entries.items():
        check_name(name)
        if isinstance(value, QuantArray):
            layer, value = _layer(name), own(value)
            schemes[layer], parts = _counterpart(name, value)
            tensors = {f"{layer}.{key}": part for key, part in parts.items()}
        else:
            tensors = {name: _dense(name, value)}
        if clash := sorted(tensors.keys() & specs.keys()):
            raise ValueError(f"two entries would be stored as the tensor {clash[0]!r}: rename one of them")
        specs |= {tensor: spec for tensor, (spec, _) in tensors.items()}
        make |= {tensor: making for tensor, (_, making) in tensors.items()}
    if not schemes:
        raise ValueError("none of the entries is quantized: write dense arrays with safetensors.numpy.save_file")
    if (index := Path(folder) / INDEX).exists():
        raise ValueError(f"{str(index)!r} lists the files of another checkpoint: choose an empty folder, or delete it")
    head, starts = arranged(specs, {"format": "pt"})
    written = json.dumps({**(config or {}), "quantization_config": _config(schemes)}, indent=2) + "\n"
    with replacing(Path(folder) / SINGLE) as file, replacing(Path(folder) / "config.json") as described:
        file.write(head)
        for tensor in starts:
            file.write(as_bytes(make[tensor]()))
        described.write(written.encode())


def _layer(name: str) -> str:
    if not name.endswith(SUFFIX):
        raise ValueError(
            f"{name!r} is quantized, and its name does not end in {SUFFIX!r}: rename it, as torch names it"
        )
    return name.removesuffix(SUFFIX)


def _dense(name: str, value: Any) -> tuple[Spec, Callable[[], Array]]:
    if not isinstance(value, np.ndarray | jax.Array):
        raise TypeError(f"{name!r} is a {type(value).__name__}; only arrays and QuantArrays can be written")
    if value.dtype.name not in NATIVE | FOREIGN:
        raise TypeError(f"{name!r} is {value.dtype}; safetensors holds {', '.join(NATIVE | FOREIGN)}: cast it")
    return (np.dtype(value.dtype), value.shape), lambda: to_host(name, value)


def _counterpart(name: str, w: QuantArray) -> tuple[Scheme, Parts]:
    """What compressed-tensors makes of an array. Raises ValueError where it has nothing alike, with the reason."""
    t, fmt = w.type, w.type.format
    what = f"{name!r} ({t.encoding}) cannot be exported to compressed-tensors"
    if w.stack:
        raise ValueError(f"{what}: it is a stack {list(w.stack)}; export each slice under a name of its own")
    if t.adapter is not None or t.splits or t.numerics != "float":
        raise ValueError(f"{what}: it has an adapter, parts that train or products in int8; fold or drop them first")
    if "scale" in w.fields and not np.isfinite(np.asarray(w.fields["scale"])).all():
        raise ValueError(f"{what}: a scale is NaN or inf; quantize the weight again")
    if fmt.name == "scaled_fp8":
        return _float(w)
    if fmt.name == "act_order":
        raise ValueError(f"{what}: version 0.20 has no groups of inputs in another order; quantize with lb.uniform")
    if fmt.name != "uniform":
        raise ValueError(
            f"{what}: it has no such format; quantize the weight as lb.uniform(4) or (8), or lb.scaled_fp8()"
        )
    if fmt["bits"] not in (4, 8):
        raise ValueError(f"{what}: integers have 4 or 8 bits there; quantize the weight with that many")
    if (k := dict(t.dims)["k"]) % (group := group_size(k, fmt["group"])):
        raise ValueError(f"{what}: groups of {group} do not divide its {k} inputs; quantize it with a group that does")
    if int(np.asarray(w.fields["zero"]).max()) >= 1 << fmt["bits"]:
        raise ValueError(f"{what}: a zero point is no code of {fmt['bits']} bits; quantize the weight again")
    return _integers(w)


def _weights(bits: int, kind: str, strategy: str, **more: Any) -> Scheme:
    said = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    return {**said, "group_size": None, **more}


def _strategy(k: int, group: int) -> Scheme:
    """Scales of groups of the inputs of each output."""
    return {"strategy": "channel"} if group == k else {"strategy": "group", "group_size": group}


def _integers(w: QuantArray) -> tuple[Scheme, Parts]:
    sizes, fmt, fields = dict(w.type.dims), w.type.format, w.fields
    n, k, bits = sizes["n"], sizes["k"], fmt["bits"]
    group = group_size(k, fmt["group"])
    scale, zero = np.asarray(fields["scale"]), np.asarray(fields["zero"])
    parts: Parts = {
        "weight_packed": (
            (np.dtype(np.int32), (n, words(k, bits))),
            lambda: pack(from_planes(fields["planes"], k, group), bits),
        ),
        "weight_scale": ((scale.dtype, scale.shape), lambda: scale),
        "weight_shape": ((np.dtype(np.int64), (2,)), lambda: np.array([n, k], np.int64)),
    }
    weights = _weights(bits, "int", **_strategy(k, group))
    if (zero != 1 << bits - 1).any():
        weights["symmetric"] = False
        spec = (np.dtype(np.int32), (words(n, bits), zero.shape[1]))
        parts["weight_zero_point"] = spec, lambda: np.ascontiguousarray(pack(zero.T, bits).T)
    return {"format": "pack-quantized", "weights": weights}, parts


def _float(w: QuantArray) -> tuple[Scheme, Parts]:
    sizes, fmt = dict(w.type.dims), w.type.format
    n, k = sizes["n"], sizes["k"]
    rows, group = group_size(n, fmt["rows"]), group_size(k, fmt["group"])
    shape: tuple[int, ...] = (-(-n // rows), -(-k // group))
    if rows == 1:
        strategy = _strategy(k, group)
    elif (rows, group) == (n, k):
        strategy, shape = {"strategy": "tensor"}, (1,)
    else:
        strategy = {"strategy": "block", "block_structure": [rows, group]}
    code, scale = w.fields["code"], np.asarray(w.fields["scale"]).reshape(shape)
    e4m3 = np.dtype(jax.numpy.float8_e4m3fn)
    parts: Parts = {
        "weight": ((e4m3, (n, k)), lambda: np.asarray(code).view(e4m3)),
        "weight_scale": ((scale.dtype, shape), lambda: scale),
    }
    return {"format": "float-quantized", "weights": _weights(8, "float", **strategy)}, parts


def _config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """`quantization_config`: one group for all layers that are quantized alike, which are named."""
    groups: dict[str, dict[str, Any]] = {}
    for layer, scheme in schemes.items():
        alike = groups.setdefault(json.dumps(scheme, sort_keys=True), {"targets": [], **scheme})
        alike["targets"].append(layer)
    formats = sorted({scheme["format"] for scheme in schemes.values()})
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": [],
    }
