"""`lb.read_checkpoint` and `lb.convert`: other projects' checkpoints, a layer at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.array import QuantArray
from lowbit.io import any_precision_llm, aqlm, awq, compressed_tensors, gguf, gptq
from lowbit.io.atomic import replacing
from lowbit.io.error import CheckpointError
from lowbit.io.header import describe, pack
from lowbit.io.layout import BESIDE, CONFIG, Layout, Options
from lowbit.io.shards import PICKLES, Shards, pickled
from lowbit.io.tensors import Array, Spec, arranged, as_bytes

Named = tuple[str, QuantArray | Array]

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "gptq": (gptq.LAYOUT,),
    "awq": (awq.LAYOUT,),
    "compressed-tensors": compressed_tensors.LAYOUTS,
    "aqlm": (aqlm.LAYOUT,),
    "anyprec": (any_precision_llm.LAYOUT,),
}
"""By what config.json calls them: `quantization_config.quant_method`, or a key of its own."""

FILES: Mapping[str, Callable[[Path], Iterator[Named]]] = {".gguf": gguf.tensors}
"""Readers of other kinds of files, by the end of their names."""


def read_checkpoint(path: str | os.PathLike[str]) -> Iterator[Named]:
    """The weights of a checkpoint that another project wrote, by name, one layer at a time.

    A quantized layer comes as one QuantArray with the dims ("k", inputs), ("n", outputs), under the name that its dense
    weight would have: `lb.matmul(x, w)` is x @ weight.T of torch's weight [outputs, inputs]. Everything else comes as
    the arrays that are stored, views of the file that cannot be written to. What a layer decodes to is what the project
    that wrote it makes of it, bit by bit.

    Args:
      path: a folder with config.json and safetensors files, or one such file; config.json beside it counts. Layouts are
        GPTQ (both versions; 2, 3, 4 and 8 bits; any order of inputs), AWQ (GEMM), compressed-tensors (integers of 2, 4
        and 8 bits, int8 and e4m3), AQLM and any-precision-llm. Or a GGUF file: see `lowbit.io.gguf.tensors`.

    Files are mapped: beside what is given out, a layer at most is in memory. All names are checked before the first
    layer is read. Raises CheckpointError for a layout that is unknown or mixed, with the keys that do not fit, and for
    a file that is damaged or missing, naming the file, the layer, the tensor and both shapes; OSError for one that
    cannot be opened.

    >>> import json, os, tempfile
    >>> import numpy as np, lowbit as lb
    >>> from safetensors.numpy import save_file
    >>> layer = {"qweight": np.full((4, 8), 0x76543210), "qzeros": np.zeros((1, 1)), "scales": np.ones((1, 8))}
    >>> tensors = {f"up.{key}": array.astype("f2" if key == "scales" else "i4") for key, array in layer.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({**tensors, "up.bias": np.zeros(8, "f2")}, os.path.join(folder, "model.safetensors"))
    ...     options = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    ...     with open(os.path.join(folder, "config.json"), "w") as file:
    ...         json.dump({"quantization_config": options}, file)
    ...     for name, weight in lb.read_checkpoint(folder):
    ...         print(name, weight.shape, weight.type.format if name == "up.weight" else "dense")
    up.weight (32, 8) uniform(bits=4, scale_dtype=float16)
    up.bias (8,) dense
    """
    where = Path(path)
    where.stat()  # FileNotFoundError, PermissionError
    if where.suffix in FILES:
        return FILES[where.suffix](where)
    if where.suffix in PICKLES:
        raise pickled(where)
    if not where.is_dir() and where.suffix != ".safetensors":
        known = ", ".join((".safetensors", *FILES))
        raise CheckpointError(f"{path} is neither a folder nor one of the files that can be read: {known}; name one")
    return Weights(where).entries()


class Weights:
    """The weights of a checkpoint, each read when it is asked for. All names are checked at once.

    Attributes:
      shards: the tensors as they are stored.
      quantized: the layers that are, by the name that their dense weight would have.
      dense: the names of all other tensors.
    """

    def __init__(self, path: Path) -> None:
        """Raises as `read_checkpoint` does."""
        self.shards = Shards(path)
        self._layers = _layers(self.shards.file_of)
        method, self._options = _method(path, self.shards.config)
        self._layouts = {layer: _layout(self.shards, layer, keys, method) for layer, keys in self._layers.items()}
        if method is not None and path.is_dir() and not any(self._layouts.values()):
            raise CheckpointError(
                f"{path}: {CONFIG} states {method!r}, but no layer has its tensors: get the file again"
            )
        self.quantized = {_named(layer, "weight"): layer for layer, layout in self._layouts.items() if layout}
        self.dense = [_named(layer, key) for layer in self._layers for key in self._beside(layer)]

    def _beside(self, layer: str) -> list[str]:
        return [key for key in self._layers[layer] if self._layouts[layer] is None or key in BESIDE]

    def weight(self, layer: str) -> QuantArray:
        """The weight of a quantized layer."""
        layout = self._layouts[layer]
        assert layout is not None
        return _quantized(self.shards, layer, self._layers[layer], layout, self._options)

    def entries(self) -> Iterator[Named]:
        for layer, layout in self._layouts.items():
            if layout is not None:
                yield _named(layer, "weight"), self.weight(layer)
            for key in self._beside(layer):
                yield _named(layer, key), self.shards.array(_named(layer, key))
            self.shards.forget()


def _quantized(shards: Shards, layer: str, keys: Sequence[str], layout: Layout, options: Options) -> QuantArray:
    where = _where(shards, layer, keys)
    tensors = {key: shards.array(_named(layer, key)) for key in keys if key not in BESIDE}
    try:
        of_layer = layout.select(layer, options, where)
    except (AttributeError, KeyError, TypeError, re.error) as err:  # what walking through arbitrary JSON raises
        raise CheckpointError(f"{where}: {CONFIG} is none of {layout.name} ({err!r}): get config.json again") from err
    try:
        return layout.read(tensors, of_layer, where)
    except CheckpointError:
        raise
    except ValueError as err:
        raise CheckpointError(f"{where} is no {layout.name} layer that can be stored ({err})") from err


def _layers(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """The last parts of tensors' names by the rest, numbers in their order."""
    layers: dict[str, list[str]] = {}
    for name in sorted(
        tensors, key=lambda n: [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", n)]
    ):
        layer, _, key = name.rpartition(".")
        layers.setdefault(layer, []).append(key)
    return layers


def _named(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _where(shards: Shards, layer: str, keys: Sequence[str]) -> str:
    return f"{shards.file_of[_named(layer, keys[0])]}: layer {layer!r}"


def _method(path: Path, config: Mapping[str, Any]) -> tuple[str | None, Options]:
    """What config.json calls the layout, and its options; None for a checkpoint that is not quantized."""
    options = config.get("quantization_config")
    if options is None:
        own = next((key for key in LAYOUTS if isinstance(config.get(key), Mapping)), None)
        return own, config[own] if own else {}
    method = options.get("quant_method") if isinstance(options, Mapping) else None
    if not isinstance(method, str) or method not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise CheckpointError(
            f"{path}: {CONFIG} states quant_method = {method!r}, and this library reads {known}: convert the "
            "checkpoint to one of these with the tool that made it"
        )
    return method, options


def _layout(shards: Shards, layer: str, keys: Sequence[str], method: str | None) -> Layout | None:
    """Which layout a layer has, None if it is not quantized. Raises CheckpointError for one that does not fit."""
    every = [layout for group in LAYOUTS.values() for layout in group]
    marks = [key for key in keys if key not in BESIDE and any(layout.marks(key) for layout in every)]
    where = _where(shards, layer, keys)
    if not marks:
        if "weight" in keys and (dtype := shards.array(_named(layer, "weight")).dtype.name).startswith("float8"):
            raise CheckpointError(f"{where}: 'weight' is {dtype}, and it has no scale: get the file again")
        return None
    if method is None:
        raise CheckpointError(f"{where} has {_list(marks)}, but there is no {CONFIG}: get config.json too")
    for layout in LAYOUTS[method]:
        if not layout.missing(keys) and not layout.unknown(keys):
            return layout
    reasons = "; ".join(_misfit(layout, keys) for layout in LAYOUTS[method])
    raise CheckpointError(
        f"{where} has {_list(keys)}, which is no layer of {method!r}, as config.json states: {reasons}"
    )


def _misfit(layout: Layout, keys: Sequence[str]) -> str:
    """What of a layer does not fit a layout."""
    parts = [f"lacks {_list(missing)}"] if (missing := layout.missing(keys)) else []
    parts += [f"knows no {_list(unknown)}"] if (unknown := layout.unknown(keys)) else []
    return f"{layout.name} {' and '.join(parts)}"


def _list(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys))


# ---------------------------------------------------------------- to a file of lowbit


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a checkpoint that another project wrote as one file of lowbit, which `lb.load` reads.

    The source is read twice: first for the sizes and checksums, which the file begins with, then each layer is written
    as soon as it is read. So one layer at most is in memory. The file appears whole or not at all, and is that which
    `lb.io.write(target, dict(lb.read_checkpoint(source)))` writes.

    Args:
      source: see `read_checkpoint`.
      target: the file; its folder must exist.

    Raises CheckpointError as `read_checkpoint` does, also for a source that changes meanwhile, ValueError for names
    that clash, OSError when the target cannot be written.

    >>> import os, tempfile
    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.ones((256, 64)), lb.uniform(4, group=128))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lb.export_checkpoint({"up.weight": w}, folder)
    ...     lb.convert(folder, os.path.join(folder, "up.safetensors"))
    ...     print(lb.load(os.path.join(folder, "up.safetensors"))["up.weight"].type)
    f32[k=256 n=64] as uniform(bits=4, group=128)
    """
    header = describe({}, {})[0]
    specs: dict[str, Spec] = {}
    for name, value in read_checkpoint(source):
        described, tensors = describe({name: value}, {})
        if clash := sorted(tensors.keys() & specs.keys()):
            raise ValueError(f"{source}: two entries would be stored as the tensor {clash[0]!r}: rename one of them")
        header["entries"] |= described["entries"]
        header["tensors"] |= described["tensors"]
        specs |= {tensor: (array.dtype, array.shape) for tensor, array in tensors.items()}
        del value, tensors  # or they would be in memory beside the next layer
    head, starts = arranged(specs, pack(header))
    with replacing(target) as file:
        file.write(head)
        for name, value in read_checkpoint(source):
            described, tensors = describe({name: value}, {})
            if any(header["tensors"].get(tensor) != spec for tensor, spec in described["tensors"].items()):
                raise CheckpointError(
                    f"{source}: {name!r} changed while it was converted: convert it again, undisturbed"
                )
            for tensor in tensors:
                file.seek(starts.pop(tensor))
                file.write(as_bytes(tensors[tensor]))
            del value, tensors
        if starts:
            raise CheckpointError(f"{source}: {min(starts)!r} went away while it was converted: convert it again")
