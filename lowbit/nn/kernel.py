"""The quantized weight of a layer: a small module whose Variables are the stored arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray, dequantize


class Code(nnx.Variable[jax.Array]):
    """Integer codes: never differentiated, never trained."""


class Scale(nnx.Param[jax.Array]):
    """Scale factors and offsets: `nnx.Optimizer(model, tx, wrt=lb.Scale)` trains these and nothing else."""


class Codebook(nnx.Param[jax.Array]):
    """Tables that codes select from."""


class Threshold(nnx.Param[jax.Array]):
    """float32 []: where a layer of several widths lies between its least and its largest, as a logit.
    `lb.tune.blended` makes them, and `wrt=lb.Threshold` trains them."""


class Frozen(nnx.Variable[jax.Array]):
    """Floats of a quantized weight that are not being trained."""


class Stats(nnx.Variable[jax.Array]):
    """float32 [*stack, 2]: the squared error of quantization and the squared norm of the weight, in units of its
    largest magnitude, summed over each slice when it was made. NaN once `lb.at_width` reads it at another width. Not
    counted in reports."""


class Width(nnx.Variable[jax.Array]):
    """int [*stack]: the width that a weight of several is read at, where `lb.at_width` was given an array."""


VARIABLES: Mapping[str, type[nnx.Variable[Any]]] = {
    "code": Code,
    "scale": Scale,
    "codebook": Codebook,
    "frozen": Frozen,
    "adapter": nnx.LoRAParam,
}
"""The Variable class of each role a stored array can have."""


class Kernel(nnx.Module):
    """A quantized weight in place of an `nnx.Param`.

    Each field of the array is an attribute of its own, in a Variable of its role's class, so that `nnx.grad` and
    filters tell scales from codes. `type` is static. `.array` is the QuantArray, `.shape` and `.dtype` are those of
    the dense matrices it stands for, [*stack, k, n]. `.width` is None unless products read it at a width that may
    change, whatever that of its type. `.reader` is None unless a module makes the products, `reader(x, array)`, as of a
    layer that chooses its width by its input.
    """

    width: Width | None = None
    reader: Any = None

    def __init__(self, array: QuantArray, stats: jax.Array, frozen: frozenset[str] = frozenset()) -> None:
        self.type = array.type
        for name, value in array.fields.items():
            if name in ("type", "stats") or hasattr(Kernel, name):
                raise ValueError(
                    f"format {array.type.format} stores {name!r}, an attribute of Kernel: rename the field"
                )
            role = "frozen" if name in frozen else array.type.role(name)
            setattr(self, name, VARIABLES[role](value))
        self.stats = Stats(stats)

    @property
    def array(self) -> QuantArray:
        return QuantArray({name: getattr(self, name).get_value() for name in self.type.fields}, self.type)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def read_as(self, other: Kernel) -> Kernel:
        """This kernel, whose products are made as those of another one."""
        if other.width is not None:
            self.width = other.width
        if other.reader is not None:
            self.reader = other.reader
        return self

    @property
    def value(self) -> NoReturn:
        raise AttributeError(self._explanation())

    def get_value(self) -> NoReturn:
        raise TypeError(self._explanation())

    def __getitem__(self, _: Any) -> NoReturn:
        raise TypeError(self._explanation())

    def _explanation(self) -> str:
        return (
            f"this kernel is quantized ({self.type.format}) and holds no dense array: use lb.dequantize(kernel.array) "
            f"for the {self.type.dtype}{list(self.shape)} weight, or kernel.{next(iter(self.type.fields))}[...] "
            "for a field"
        )


_AT_ONCE = 1 << 22
"""Weights whose errors are summed at once: XLA on a CPU makes float32 copies of them."""


def error_stats(w: jax.Array, array: QuantArray) -> jax.Array:
    """(sum (w - decoded)^2, sum w^2) in float32 for each slice, in units of the largest |w|, so that squares stay in
    range. One slice is decoded at a time."""
    if array.stack or w.size <= _AT_ONCE or isinstance(w, jax.core.Tracer):
        return _error_stats(w, array)
    unit, decoded, rows = _unit(w), dequantize(array), max(1, _AT_ONCE // w.shape[1])
    parts = [slice(at, at + rows) for at in range(0, len(w), rows)]
    return jnp.sum(jnp.stack([jax.block_until_ready(_sums(w[part], decoded[part], unit)) for part in parts]), axis=0)


@jax.jit
def _error_stats(w: jax.Array, array: QuantArray) -> jax.Array:
    unit = _unit(w)

    def one(pair: tuple[jax.Array, QuantArray]) -> jax.Array:
        return _sums(pair[0], dequantize(pair[1]), unit)

    for _ in array.stack:
        one = partial(jax.lax.map, one)
    return one((w, array))


def _unit(w: jax.Array) -> jax.Array:
    largest = jnp.maximum(w.max(), -w.min()).astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0)


@jax.jit
def _sums(w: jax.Array, decoded: jax.Array, unit: jax.Array) -> jax.Array:
    dense, decoded = (a.astype(jnp.float32) / unit for a in (w, decoded))
    return jnp.stack([jnp.sum((dense - decoded) ** 2), jnp.sum(dense**2)])


def expect_module(model: Any, what: str) -> None:
    """Raises TypeError unless `model` is an NNX module, not a class of one or a state."""
    if not isinstance(model, nnx.Module):
        name = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"cannot {what} {name}: give an nnx.Module")


def expect_arrays(model: nnx.Module, what: str) -> None:
    """Raises ValueError when a quantized weight of the model is abstract."""
    for path, kernel in kernels(model).items():
        if any(isinstance(field, jax.ShapeDtypeStruct) for field in kernel.array.fields.values()):
            raise ValueError(
                f"cannot {what} an abstract model, as {path!r} is: load or quantize it first, or do this within "
                "nnx.eval_shape for an abstract result"
            )


def joined(path: Iterable[Any]) -> str:
    """The keys of a path as rules, reports and files write it."""
    return "/".join(map(str, path))


def kernels(model: Any) -> dict[str, Kernel]:
    """The quantized weights of a model by path, each once."""
    return {joined(path): m for path, m in nnx.iter_modules(model) if isinstance(m, Kernel)}


def layer_kernels(model: Any) -> dict[str, Kernel]:
    """The quantized weights of a model by the path of their layer."""
    return {path.rpartition("/")[0]: kernel for path, kernel in kernels(model).items()}
