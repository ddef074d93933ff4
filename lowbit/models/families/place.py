"""Where the parameters of a model lie in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.models.config import Config
from lowbit.models.decoder import Decoder
from lowbit.models.encoder import Encoder


@dataclass(frozen=True)
class Where:
    """Where the value of one of the model's parameters lies in a checkpoint.

    Attributes:
      tensors: their names; several are stacked along a new first axis, as the experts of a mixture are.
      rows: of the outputs, which ones of a tensor that holds several parameters; all if None.
      transposed: whether a tensor [outputs, inputs] holds a kernel [inputs, outputs].
      plus: that is added in float32, for norms that store their scale less 1.
    """

    tensors: tuple[str, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    plus: float = 0.0


Places = Iterator[tuple[str, Where]]


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are to be read.

    Attributes:
      config: from what config.json holds to what a model is made of. Raises CheckpointError, naming the key, for one
        that is missing and for a value that asks for a computation this library does not have.
      places: from a config to each parameter, by path as in "layers/0/attn/q/kernel", and where its value lies.
      unused: endings of names of tensors that no model needs, such as tables that follow from config.json.
      rename: from a tensor's name in any file to the one that `places` uses: older files leave out a prefix.
      model: what is built from a config.
    """

    config: Callable[[Mapping[str, Any]], Config]
    places: Callable[[Config], Places]
    unused: tuple[str, ...] = ()
    rename: Callable[[str], str] = str
    model: type[Decoder] | type[Encoder] = Decoder


def value(where: Where, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter that lies there, given how a tensor is read by name."""
    parts = [_part(where, read(name)) for name in where.tensors]
    array = parts[0] if len(parts) == 1 else np.stack(parts)
    return array.astype(np.float32) + np.float32(where.plus) if where.plus else array


def _part(where: Where, array: np.ndarray) -> np.ndarray:
    array = array.T if where.transposed else array
    return array if where.rows is None else array[..., slice(*where.rows)]  # outputs are last, of kernels and biases


def linear(path: str, tensor: str, bias: bool, rows: tuple[int, int] | None = None, transposed: bool = True) -> Places:
    """A linear layer; in GPT-2's files kernels lie as they are."""
    yield f"{path}/kernel", Where((f"{tensor}.weight",), rows, transposed)
    if bias:
        yield f"{path}/bias", Where((f"{tensor}.bias",), rows)


def layer_norm(path: str, tensor: str) -> Places:
    yield f"{path}/scale", Where((f"{tensor}.weight",))
    yield f"{path}/bias", Where((f"{tensor}.bias",))
