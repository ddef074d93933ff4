"""`lb.calibrate`: what the inputs of each layer look like, measured while a model runs on sample data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import expect_module
from lowbit.nn.kinds import KINDS, NAMES, refusal, weight
from lowbit.nn.linen import opened


@dataclass(frozen=True)
class LayerStats:
    """The inputs of one layer's product, over every row that it was given.

    Of a stack of matrices each slice has its own, with its axes before k; k runs as in the quantized layer.

    Attributes:
      second_moment: float32 [k], the mean of x squared for each input: how much an error in its weights costs.
      largest: float32 [k], the largest |x| of each input.
      rows: how many rows were seen, by each slice.
    """

    second_moment: jax.Array
    largest: jax.Array
    rows: int


class Seen(nnx.Variable[jax.Array]):
    """A running statistic of a probed layer."""


class Probe(nnx.Module):
    """A layer that keeps count of what it is multiplied with, and otherwise behaves like the one inside."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        kind = KINDS[type(layer)]
        view = kind.view(layer)
        lead, stack = view.lead(weight(layer).get_value()), () if kind.shares else view.sizes(view.stack)
        inputs = (*lead, *stack, prod(view.sizes(view.summed)))
        self.rows = Seen(jnp.zeros(lead, jnp.float32))
        self.second_moment = Seen(jnp.zeros(inputs, jnp.float32))
        self.largest = Seen(jnp.zeros(inputs, jnp.float32))

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if not isinstance(self.layer, nnx.Embed):
            self.see(KINDS[type(self.layer)].rows(self.layer, inputs))
        return self.layer(inputs, *args, **kwargs)

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        assert isinstance(self.layer, nnx.Embed)
        self.see(query)
        return self.layer.attend(query, *args, **kwargs)

    def see(self, x: jax.Array) -> None:
        """Moves the running means towards those of x [*stack, ..., k]: no sum grows until it swallows its terms."""
        rows, mean = self.rows.get_value(), self.second_moment.get_value()
        flat = x.astype(jnp.float32).reshape(*mean.shape[:-1], -1, mean.shape[-1])
        count = flat.shape[-2]
        total = rows + count
        share = count / jnp.maximum(total, 1)
        self.second_moment.set_value(mean + ((flat**2).sum(-2) / max(1, count) - mean) * share)
        largest = self.largest.get_value()
        self.largest.set_value(jnp.maximum(largest, jnp.abs(flat).max(-2, initial=0.0)))
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
    if not any(type(m) in KINDS for _, m in nnx.iter_modules(model)):
        raise ValueError(f"{type(model).__name__} holds no {NAMES}: there is nothing to calibrate")
    found: dict[str, Probe] = {}

    def probe(path: tuple[Any, ...], node: Any) -> Any:
        if type(node) not in KINDS or refusal(node):
            return node
        return found.setdefault("/".join(map(str, path)), Probe(node))

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
    return LayerStats(p.second_moment.get_value(), p.largest.get_value(), int(p.rows.get_value().max()))
