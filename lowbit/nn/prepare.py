"""`lb.prepare`: a model's quantized weights in the layout of a device's kernels."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from absl import logging
from flax import nnx

from lowbit.array import laid_out
from lowbit.devices import runs_kernels
from lowbit.nn.kernel import Frozen, Kernel, expect_arrays, expect_module, joined
from lowbit.passes.pointwise import UnsuitableError

M = TypeVar("M", bound=nnx.Module)


def prepare(model: M, device: Any = None) -> M:
    """The model with its quantized weights laid out as the kernels of `device` read them, once and for all.

    On a GPU of compute capability 9.0, or from jax 0.12 on 8.0, 8.6 or 8.9, products then run as Pallas kernels; every
    result, gradient and saved file is that of the model as it was, but for bits that pad a group, which become zeros.
    The layout is the same for all of them. Weights of formats that the kernels
    cannot decode stay as they are, and one log line names them with the reasons. For a device without kernels the model
    comes back unchanged. `model` keeps its own arrays: drop it to free them.

    Args:
      device: a `jax.Device`; the default one if None. "hopper" stands for a GPU that is not here, for export.

    Raises TypeError for what is no model or no device, ValueError for an abstract model.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> small = lb.quantize(nnx.Linear(256, 128, rngs=nnx.Rngs(0)), lb.bcq(3, group=128))
    >>> {name: leaf.type.dims for name, leaf in lb.prepare(small, "hopper").kernel.type.fields.items()}["words"]
    {'t': 2, 's': 1, 'w': 12, 'l': 128}
    """
    expect_module(model, "prepare")
    expect_arrays(model, "prepare")
    if device != "hopper":
        if device is not None and not isinstance(device, jax.Device):
            raise TypeError(f"device is {device!r}: give a jax.Device, None for the default one, or 'hopper'")
        if not runs_kernels(jax.devices()[0] if device is None else device):
            return model
    refused: dict[str, str] = {}

    def arranged(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, Kernel):
            return node
        try:
            new = laid_out(node.array)
        except UnsuitableError as err:
            refused[joined(path)] = str(err)
            return node
        frozen = frozenset(name for name in new.fields if isinstance(getattr(node, name, None), Frozen))
        return Kernel(new, node.stats.get_value(), frozen).read_as(node)

    out: M = nnx.recursive_map(arranged, nnx.clone(model))
    if refused:
        logging.warning("no kernel decodes %s", "; ".join(f"{path} ({why})" for path, why in refused.items()))
    return out
