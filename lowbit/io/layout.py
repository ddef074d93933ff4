"""What the layers of another project's checkpoint look like, and checks that readers of them share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lowbit.array import QuantArray
from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.tensors import Array

Tensors = Mapping[str, Array]
"""The arrays of one layer by the last part of their names: "qweight", "scales", ..."""
Options = Mapping[str, Any]
"""What config.json says of the quantization."""
CONFIG = "quantization_config in config.json"
COMPARE = f"compare {CONFIG}, or get the file again"

BESIDE = frozenset({"bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point"})
"""Tensors that a quantized layer may have beside its weight, of which they are no part."""


def _same(layer: str, options: Options, where: str) -> Options:
    return options


@dataclass(frozen=True)
class Layout:
    """How a project stores the weight of one quantized layer.

    Attributes:
      name: of the project or of its format, for messages.
      read: `read(tensors, options, where)`, the weight with the dims ("k", inputs), ("n", outputs); `where` begins the
        messages of what it raises, the file and the layer.
      required: the last part of the names of tensors that every layer has.
      optional: of those that it may have; `*` stands for any letters.
      select: `select(layer, options, where)`, the options of one layer among those of all.
    """

    name: str
    read: Callable[[Tensors, Options, str], QuantArray]
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    select: Callable[[str, Options, str], Options] = _same

    def missing(self, keys: Collection[str]) -> list[str]:
        return sorted(self.required.difference(keys))

    def unknown(self, keys: Collection[str]) -> list[str]:
        known = (*self.required, *self.optional, *BESIDE)
        return sorted(key for key in keys if not any(fnmatchcase(key, pattern) for pattern in known))

    def marks(self, key: str) -> bool:
        """Whether a tensor of that name is one of a quantized layer."""
        return key != "weight" and any(fnmatchcase(key, pattern) for pattern in (*self.required, *self.optional))


def expect(where: str, name: str, array: Array, dtypes: str | Sequence[str], shape: Sequence[int], why: str) -> None:
    """Raises CheckpointError for a tensor of another dtype or shape, or floats that are NaN or inf.

    `why` says what dtype and shape follow from.
    """
    allowed = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    if array.dtype.name not in allowed or array.shape != tuple(shape):
        found, wanted = f"{array.dtype.name}{list(array.shape)}", f"{' or '.join(allowed)}{list(shape)}"
        raise CheckpointError(f"{where}: {name!r} is {found}, not {wanted}, as {why} has it: {COMPARE}")
    if array.dtype.name in FLOATS and (bad := int((~np.isfinite(array)).sum())):
        raise CheckpointError(f"{where}: {name!r} has {bad} NaN or inf among its {array.size} numbers: {AGAIN}")


FLOATS = ("float16", "bfloat16", "float32")
"""What scales are stored in."""


def matrix(where: str, name: str, array: Array, dtype: str) -> tuple[int, int]:
    """The shape of a tensor with two axes. Raises CheckpointError for another one, or another dtype."""
    if array.ndim != 2 or array.dtype.name != dtype or 0 in array.shape:
        found = f"{array.dtype.name}{list(array.shape)}"
        raise CheckpointError(f"{where}: {name!r} is {found}, not a matrix of {dtype}: {COMPARE}")
    rows, columns = array.shape
    return rows, columns


def choice(where: str, options: Options, name: str, allowed: Collection[Any], default: Any = None) -> Any:
    """An option, which must be one of those; `default` where it is not given, or null."""
    value = default if options.get(name) is None else options[name]
    if not any(value == other and type(value) is type(other) for other in allowed):
        known = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(repr, allowed))
        raise CheckpointError(
            f"{where}: {CONFIG} states {name} = {value!r}, and this reader knows {known}: convert the checkpoint to "
            "one of these with the tool that made it"
        )
    return value


def group_option(where: str, options: Options, inputs: int) -> int:
    """The option group_size, -1 for one group a row. Raises CheckpointError for what is none."""
    group = options.get("group_size")
    if type(group) is not int or (group < 1 and group != -1):
        raise CheckpointError(f"{where}: {CONFIG} states group_size = {group!r}, not a size or -1: repair it")
    return inputs if group == -1 else group
