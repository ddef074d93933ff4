"""What layers multiply in a model, seen in compiled passes over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from lowbit.array import QuantArray, dequantize, own
from lowbit.nn.kernel import Kernel
from lowbit.nn.reached import Call, Inputs, noted
from lowbit.nn.statistics import STATISTICS, Statistic, norm
from lowbit.nn.switch import changed

Array = jax.Array | np.ndarray[Any, Any]


class Measured(NamedTuple):
    """Of all rows x that a layer multiplies: ||x|| and ||y_h - y_l||, or another statistic of x in place of that,
    float32 [rows], and whether x is finite."""

    norms: Array
    errors: Array
    is_finite: Array


class Passes:
    """Compiled passes of a dense model over batches.

    Args:
      dense: the model.
      call: `call(model, batch)`, which jax can trace.
      batches: they are held; what in them is no array is a constant of what is compiled.
      pairs: of the layers that are looked at, by path, the widths l and h.
      held: the quantized weights of these layers.
      statistic: what is measured of x; what the widths change in products if None.
    """

    def __init__(
        self,
        dense: nnx.Module,
        call: Call,
        batches: Sequence[Any],
        pairs: Mapping[str, tuple[int, int]],
        held: Mapping[str, Kernel],
        statistic: Statistic | None = None,
    ) -> None:
        self.graph, self.state = nnx.split(dense)
        self.call, self.pairs, self.statistic = call, dict(pairs), statistic
        self.arrays = {path: held[path].array for path in pairs}
        self.given = [Inputs.of([batch], {}) for batch in batches]

    def measured(self) -> dict[str, Measured]:
        """Of every layer, by one pass a batch."""
        static = self.graph, self.call, tuple(self.pairs.items()), self.statistic
        parts = [jax.device_get(_measured(*static, self.state, self.arrays, given)) for given in self.given]
        return {
            path: Measured(*map(np.concatenate, zip(*(part[path] for part in parts), strict=True)))
            for path in self.pairs
        }

    def inputs(self, path: str) -> jax.Array:
        """float32 [rows, k], all that one layer multiplies. The same program gives those of any other."""
        sizes = {path: array.shape[0] for path, array in self.arrays.items()}
        static, at = (self.graph, self.call, tuple(sizes.items())), list(sizes).index(path)
        return jnp.concatenate([_chosen(*static, self.state, at, given)[sizes[path]] for given in self.given])

    def difference(self, path: str) -> jax.Array:
        """W_h - W_l of a layer, float32 [k, n]."""
        return _difference(self.arrays[path], *self.pairs[path])


def _difference(array: QuantArray, low: int, high: int) -> jax.Array:
    high_w, low_w = (dequantize(QuantArray(array.fields, array.type.at(b))).astype(jnp.float32) for b in (high, low))
    return high_w - low_w


@partial(jax.jit, static_argnums=(2, 3))
def exact(x: jax.Array, array: QuantArray, low: int, high: int) -> jax.Array:
    """||y_h - y_l|| of each row, in as many bits as the platform has."""
    with jax.default_matmul_precision("highest"):
        return changed(x, own(array), low, high)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _measured(
    graph: Any,
    call: Call,
    pairs: tuple[tuple[str, tuple[int, int]], ...],
    statistic: Statistic | None,
    state: Any,
    arrays: Mapping[str, QuantArray],
    given: Inputs,
) -> dict[str, Measured]:
    widths, seen = dict(pairs), {path: list[Any]() for path, _ in pairs}

    def see(path: str, x: jax.Array) -> None:
        errors = STATISTICS[statistic](x) if statistic else exact(x, arrays[path], *widths[path])
        seen[path].append(Measured(norm(x), errors, jnp.isfinite(x).all()[None]))

    _run(nnx.merge(graph, state), call, {path: array.shape[0] for path, array in arrays.items()}, given, see)
    return {path: Measured(*map(jnp.concatenate, zip(*found, strict=True))) for path, found in seen.items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _chosen(
    graph: Any, call: Call, sizes: tuple[tuple[str, int], ...], state: Any, at: jax.Array, given: Inputs
) -> dict[int, jax.Array]:
    """By their number of columns, rows of the layer `at`. Under a number that it does not have stand other ones."""
    seen = {path: list[jax.Array]() for path, _ in sizes}
    _run(nnx.merge(graph, state), call, dict(sizes), given, lambda path, x: seen[path].append(x))
    out: dict[int, jax.Array] = {}
    for i, (path, size) in enumerate(sizes):
        x = jnp.concatenate(seen[path])
        # A branch, not a selection that XLA could put off and hold the inputs of all layers for.
        out[size] = jax.lax.cond(at == i, lambda x, _: x, lambda _, y: y, x, out[size]) if size in out else x
    return out


def _run(
    model: nnx.Module, call: Call, sizes: Mapping[str, int], given: Inputs, see: Callable[[str, jax.Array], None]
) -> None:
    """Calls `see` with float32 [rows, k] for each time that one of the layers runs.

    Raises ValueError for a layer that has other inputs than these sizes, runs within another transformation, or does
    not run.
    """
    trace, ran = get_opaque_trace_state(convention="nnx"), set[str]()

    def note(path: str, inputs: Inputs) -> None:
        if get_opaque_trace_state(convention="nnx") != trace:
            raise ValueError(f"layer {path!r} runs within jax.jit, nnx.scan or the like: no values are seen there")
        x = inputs.arrays[0]
        if x.shape[-1] != sizes[path]:
            raise ValueError(
                f"layer {path!r} multiplies {sizes[path]} inputs and in the dense model {x.shape[-1]}: give the model "
                "that it was made from"
            )
        ran.add(path)
        see(path, jnp.asarray(x, jnp.float32).reshape(-1, sizes[path]))

    given.call(lambda batch: call(noted(model, set(sizes), note), batch))
    if missing := sorted(sizes.keys() - ran):
        raise ValueError(f"layer {missing[0]!r} never runs on a batch that was given: leave that out")
