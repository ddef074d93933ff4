"""`lb.calibrate`: what the inputs of each layer look like, measured while a model runs on sample data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import expect_module
from lowbit.nn.linen import opened


@dataclass(frozen=True)
class LayerStats:
    """The inputs of one layer's product, over every row that it was given.

    Attributes:
      second_moment: float32 [k], the mean of x squared for each input: how much an error in its weights costs.
      largest: float32 [k], the largest |x| of each input.
      rows: how many rows were seen.
    """

    second_moment: jax.Array
    largest: jax.Array
    rows: int


class Seen(nnx.Variable[jax.Array]):
    """A running statistic of a probed layer."""


class Probe(nnx.Module):
    """A layer that keeps count of what it is multiplied with, and otherwise behaves like the one inside."""

    def __init__(self, layer: nnx.Linear | nnx.Embed, inputs: int) -> None:
        self.layer = layer
        self.rows = Seen(jnp.zeros((), jnp.float32))
        self.second_moment = Seen(jnp.zeros(inputs, jnp.float32))
        self.largest = Seen(jnp.zeros(inputs, jnp.float32))

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if isinstance(self.layer, nnx.Linear):
            self.see(inputs)
        return self.layer(inputs, *args, **kwargs)

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        assert isinstance(self.layer, nnx.Embed)
        self.see(query)
        return self.layer.attend(query, *args, **kwargs)

    def see(self, x: jax.Array) -> None:
        """Moves the running means towards those of the rows [..., k]: no sum grows until it swallows its terms."""
        flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        rows, mean = self.rows.get_value(), self.second_moment.get_value()
        total = rows + flat.shape[0]
        share = flat.shape[0] / jnp.maximum(total, 1)
        self.second_moment.set_value(mean + ((flat**2).sum(0) / max(1, flat.shape[0]) - mean) * share)
        largest = self.largest.get_value()
        self.largest.set_value(jnp.maximum(largest, jnp.abs(flat).max(0, initial=0.0)))
        self.rows.set_value(total)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "layer" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["layer"], name)


def calibrate(
    model: nnx.Module, batches: Iterable[Any], call: Callable[[Any, Any], Any] | None = None
) -> dict[str, LayerStats]:
    """Run a model on sample data and measure the inputs of every layer that `lb.quantize` could quantize.

    Args:
      model: left as it is; its weights are shared, not copied.
      batches: what `call` takes, one at a time: only one is held.
      call: `call(model, batch)`, compiled; `model(batch)` by default.

    Returns the statistics by layer path, as in rules. Layers that never ran, and embeddings that are only looked up,
    have none: they are left out.

    Raises ValueError when there are no batches or no layers, TypeError for what is no module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
    >>> stats = lb.calibrate(model, [jnp.ones((2, 8)), jnp.zeros((2, 8))])
    >>> stats["layers/0"].rows, stats["layers/0"].second_moment.tolist()[0]
    (4, 0.5)
    """
    expect_module(model, "calibrate")
    model = opened(model)
    if not any(type(m) in (nnx.Linear, nnx.Embed) for _, m in nnx.iter_modules(model)):
        raise ValueError(f"{type(model).__name__} holds no nnx.Linear or nnx.Embed: there is nothing to calibrate")
    found: dict[str, Probe] = {}

    def probe(path: tuple[Any, ...], node: Any) -> Any:
        if type(node) not in (nnx.Linear, nnx.Embed):
            return node
        inputs = node.in_features if isinstance(node, nnx.Linear) else node.features
        return found.setdefault("/".join(map(str, path)), Probe(node, inputs))

    probed = nnx.recursive_map(probe, nnx.clone(model))
    run = nnx.jit(call or (lambda m, batch: m(batch)))
    count = 0
    for batch in batches:
        run(probed, batch)
        count += 1
    if not count:
        raise ValueError("no batches were given: nothing was measured")
    out = {path: _stats(p) for path, p in found.items()}
    return {path: s for path, s in out.items() if s.rows}


def _stats(p: Probe) -> LayerStats:
    return LayerStats(p.second_moment.get_value(), p.largest.get_value(), int(p.rows.get_value()))
