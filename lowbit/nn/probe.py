"""A layer that keeps count of what it is multiplied with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kinds import KINDS, lead_of, measured_shapes, weight


@jax.custom_vjp
def tap(y: jax.Array, sink: jax.Array) -> jax.Array:
    """y [..., n] itself. The gradient of `sink` [n] is the sum of dL/dy squared over all rows, in float32."""
    return y


def _tap_bwd(_: None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy, jnp.square(dy.astype(jnp.float32).reshape(-1, dy.shape[-1])).sum(0)


tap.defvjp(lambda y, sink: (y, None), _tap_bwd)


class Seen(nnx.Variable[jax.Array]):
    """A running statistic of a probed layer."""


class Probe(nnx.Module):
    """A layer that keeps count of what it is multiplied with, and otherwise behaves like the one inside."""

    def __init__(self, layer: Any, wanted: frozenset[str]) -> None:
        self.layer = layer
        self.wanted = wanted
        shapes, lead = measured_shapes(layer), lead_of(layer)
        self.rows = Seen(jnp.zeros(lead, jnp.float32))
        for name in ("second_moment", "largest", "output_gradient"):
            setattr(self, name, Seen(jnp.zeros(shapes[name] if name in wanted else (*lead, 0), jnp.float32)))
        self.sink = Seen(jnp.zeros_like(self.output_gradient.get_value()))

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        outputs: jax.Array = self.layer(inputs, *args, **kwargs)
        if isinstance(self.layer, nnx.Embed):
            return outputs
        return self.see(KINDS[type(self.layer)].rows(self.layer, inputs), outputs)

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        assert isinstance(self.layer, nnx.Embed)
        return self.see(query, self.layer.attend(query, *args, **kwargs))

    def see(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Moves the statistics towards those of the rows [*stack, ..., k]; gives y, whose gradient is watched."""
        stack = x.shape[: len(measured_shapes(self.layer)["second_moment"]) - len(lead_of(self.layer)) - 1]
        flat = x.astype(jnp.float32).reshape(*stack, -1, x.shape[-1])
        count = flat.shape[-2]
        if "second_moment" in self.wanted:
            self.move(self.second_moment, (flat**2).sum(-2), count, self.rows.get_value())
        if "largest" in self.wanted:
            self.largest.set_value(jnp.maximum(self.largest.get_value(), jnp.abs(flat).max(-2, initial=0.0)))
        self.rows.set_value(self.rows.get_value() + count)
        return tap(y, self.sink.get_value()) if "output_gradient" in self.wanted else y

    @staticmethod
    def move(mean: Seen, total: jax.Array, rows: Any, before: jax.Array) -> None:
        """Moves a running mean towards that of new rows: no sum grows until it swallows its terms."""
        new, old = (jnp.asarray(n).reshape(*jnp.shape(n), *(1,) * (total.ndim - jnp.ndim(n))) for n in (rows, before))
        share = new / jnp.maximum(old + new, 1)
        mean.set_value(mean.get_value() + (total / jnp.maximum(new, 1) - mean.get_value()) * share)

    @property
    def weight(self) -> nnx.Variable[jax.Array]:
        return weight(self.layer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "layer" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["layer"], name)


def probes(model: Any) -> dict[str, Probe]:
    """The probed layers of a model by path, each once."""
    return {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Probe)}
