"""A layer that keeps count of what it is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.around import Around
from lowbit.nn.kernel import joined
from lowbit.nn.kinds import KINDS, statistic_shape, weight

SIDE = {
    "second_moment": "k", "largest": "k", "magnitude": "k", "gram": "kk", "output_gradient": "n", "guided_gram": "ckk",
    "hessian_trace": "",
}  # fmt: skip
"""The dims of a statistic: a number for each input, pair of inputs, output, pair of inputs in each chunk of outputs, or
matrix. The others have the weight's shape."""
TAPPED = ("output_gradient", "guided_gram")
"""Sums over the rows of what depends on dL/dy."""
Sinks = dict[str, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tap(y: jax.Array, x: jax.Array, sinks: Sinks, rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """y itself, of the product of rows x [*stack, rows, k]. The gradients of `sinks`, by name, are the sums over rows,
    in float32, that `LayerStats` has the means of; `rows` makes dy [*stack, rows, n]."""
    return y


def _tap_bwd(
    rows: Callable[[jax.Array], jax.Array], saved: tuple[jax.Array, Sinks], dy: jax.Array
) -> tuple[jax.Array, jax.Array, Sinks]:
    x, sinks = saved
    each, out = rows(dy).astype(jnp.float32), {}
    if "output_gradient" in sinks:
        out["output_gradient"] = jnp.square(each).sum(-2)
    if "guided_gram" in sinks:
        chunks = sinks["guided_gram"].shape[-3]
        costs = jnp.square(1e3 * each).reshape(*each.shape[:-1], chunks, each.shape[-1] // chunks).mean(-1)
        weighed = x.mT[..., None, :, :] * costs.mT[..., None, :]
        out["guided_gram"] = jnp.matmul(weighed, x[..., None, :, :], precision=jax.lax.Precision.HIGHEST)
    return dy, jnp.zeros_like(x), out


tap.defvjp(lambda y, x, sinks, rows: (y, (x, sinks)), _tap_bwd)


class Seen(nnx.Variable[jax.Array]):
    """A running statistic of a probed layer."""


class Sink(nnx.Variable[Any]):
    """What `tap` is differentiated by: zeros, but where a step puts what it differentiates by."""


class Probe(Around):
    """A layer that keeps count of what it is multiplied with."""

    def __init__(self, layer: Any, wanted: frozenset[str], chunks: int) -> None:
        super().__init__(layer)
        self.kind = KINDS[type(layer)]
        self.wanted = wanted
        view = self.kind.view(layer)
        lead = view.lead(self.weight.get_value())
        self.stack = () if self.kind.shares else view.sizes(view.stack)
        self.rows = Seen(jnp.zeros(lead, jnp.float32))
        for name, dims in SIDE.items():
            shape = statistic_shape(layer, dims, chunks) if name in wanted else (*lead, 0)
            setattr(self, name, Seen(jnp.zeros(shape, jnp.float32)))
        self.sinks = Sink({name: getattr(self, name).get_value() for name in TAPPED if name in wanted})

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self._run("__call__", *args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self._run("attend", *args, **kwargs)

    def _run(self, method: str, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        outputs: jax.Array = getattr(self.layer, method)(inputs, *args, **kwargs)
        return self.see(inputs, outputs) if method == self.kind.method else outputs

    def see(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Moves the statistics towards those of the product's rows [*stack, rows, k]; gives y, whose gradient is
        watched."""
        rows = self._flat(self.kind.rows(self.layer, x)).astype(jnp.float32)
        count = rows.shape[-2]
        if "second_moment" in self.wanted:
            self.move(self.second_moment, (rows**2).sum(-2), count, self.rows.get_value())
        if "largest" in self.wanted:
            self.largest.set_value(jnp.maximum(self.largest.get_value(), jnp.abs(rows).max(-2, initial=0.0)))
        if "magnitude" in self.wanted:
            self.move(self.magnitude, jnp.abs(rows).sum(-2), count, self.rows.get_value())
        if "gram" in self.wanted:
            products = jnp.matmul(rows.mT, rows, precision=jax.lax.Precision.HIGHEST)
            self.move(self.gram, products, count, self.rows.get_value())
        self.rows.set_value(self.rows.get_value() + count)
        if self.wanted.isdisjoint(TAPPED):
            return y
        return tap(y, rows, self.sinks.get_value(), lambda dy: self._flat(self.kind.outputs(self.layer, dy)))

    def _flat(self, rows: jax.Array) -> jax.Array:
        """[*stack, ..., size] as [*stack, rows, size]."""
        return rows.reshape(*self.stack, -1, rows.shape[-1])

    @staticmethod
    def move(mean: Seen, total: jax.Array, rows: Any, before: jax.Array) -> None:
        """Moves a running mean towards that of new rows: no sum grows until it swallows its terms."""
        old = mean.get_value()
        rows, before = (jnp.expand_dims(v, tuple(range(jnp.ndim(v), old.ndim))) for v in (rows, before))
        share = rows / jnp.maximum(before + rows, 1)
        mean.set_value(old + (total / jnp.maximum(rows, 1) - old) * share)

    @property
    def weight(self) -> nnx.Variable[jax.Array]:
        return weight(self.layer)


def probes(model: Any) -> dict[str, Probe]:
    """The probed layers of a model by path, each once."""
    return {joined(path): m for path, m in nnx.iter_modules(model) if isinstance(m, Probe)}


def owners(watched: Mapping[str, Probe]) -> dict[str, str]:
    """For each probed layer the first one with the same weight, whose gradient is that of both."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(p.weight), path) for path, p in watched.items()}
