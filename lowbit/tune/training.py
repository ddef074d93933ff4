"""One block: Adam on its floats, and the error of what it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx

from lowbit.nn.reached import Inputs
from lowbit.tune.alpha import every_float, fold


@dataclass(frozen=True)
class Training:
    """How each block is trained: see `reconstruct`."""

    held_out: int
    epochs: int
    rate: float
    patience: int
    quantized_inputs: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("held_out", "epochs", "patience"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be an int, 1 or more, not {value!r}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, not {self.rate!r}")
        if not 0 <= self.quantized_inputs <= 1:
            raise ValueError(f"quantized_inputs is a share, from 0 to 1, not {self.quantized_inputs!r}")

    def optimizer(self, batches: int) -> optax.GradientTransformation:
        """For so many batches to train on."""
        return _adam(self.rate, self.epochs * batches)


@lru_cache(maxsize=16)
def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    """One object for all blocks, and all runs alike: what is compiled depends on it."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


@dataclass(frozen=True)
class Examples:
    """What a block is called with for each batch, in the quantized model and in the dense one, and what it should
    return. Those held out are the last."""

    inputs: list[Inputs]
    of_dense: list[Inputs]
    targets: list[Any]


def tuned(
    block: nnx.Module,
    path: str,
    wrt: Any,
    examples: Examples,
    training: Training,
    optimizer: optax.GradientTransformation,
) -> Any:
    """The state of what trains in a block, as it is stored, with the least error on what is held out."""
    graph, params, *rest = nnx.split(every_float(block), wrt, ...)
    masters = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    moments = optimizer.init(masters)
    best, start, since, step = nnx.state(block, wrt), _error(block, examples, training.held_out), 0, 0
    if not isfinite(start):
        raise ValueError(f"block {path!r} returns NaN or inf: repair the quantized model, or give other batches")
    least = start
    order = np.random.default_rng(training.seed)
    for _ in range(training.epochs):
        for at in order.permutation(len(examples.targets) - training.held_out):
            given = examples.inputs[at]
            if training.quantized_inputs < 1:
                key = jax.random.fold_in(jax.random.key(training.seed), step)
                given = _mixed(key, training.quantized_inputs, given, examples.of_dense[at])
            masters, moments = _step(optimizer, graph, masters, moments, params, rest, given, examples.targets[at])
            step += 1
        made = fold(nnx.merge(graph, _like(masters, params), *rest, copy=True))
        error, since = _error(made, examples, training.held_out), since + 1
        if error < least:
            best, least, since = nnx.state(made, wrt), error, 0
        if since == training.patience:
            break
    logging.info("lowbit: block %r: mean squared error %.4g -> %.4g in %d steps", path, start, least, step)
    return best


def returned(block: nnx.Module, inputs: Inputs) -> Any:
    """What a block returns, held by the host."""
    return jax.device_get(_call(*nnx.split(block), inputs))


def _error(block: nnx.Module, examples: Examples, held_out: int) -> float:
    """Over the examples held out."""
    graph, state = nnx.split(block)
    pairs = zip(examples.inputs[-held_out:], examples.targets[-held_out:], strict=True)
    return sum(float(_squares(_call(graph, state, given), target)) for given, target in pairs) / held_out


@partial(jax.jit, static_argnums=0)
def _call(graph: Any, state: Any, inputs: Inputs) -> Any:
    return inputs.call(nnx.merge(graph, state))


@jax.jit
def _squares(outputs: Any, targets: Any) -> jax.Array:
    """The mean squared difference, of floats."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(targets), strict=True)
    floats = [(a, b) for a, b in pairs if jnp.issubdtype(b.dtype, jnp.floating)]
    squares = [jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum() for a, b in floats]
    return sum(squares, jnp.zeros(())) / sum(b.size for _, b in floats)


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    optimizer: optax.GradientTransformation, graph: Any, masters: Any, moments: Any, params: Any, rest: Any,
    inputs: Inputs, targets: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """One step of what trains, in float32 whatever the dtypes of `params`, the state at the start."""

    def loss(masters: Any) -> jax.Array:
        return _squares(inputs.call(nnx.merge(graph, _like(masters, params), *rest)), targets)

    updates, moments = optimizer.update(jax.grad(loss)(masters), moments)
    return optax.apply_updates(masters, updates), moments


def _like(masters: Any, params: Any) -> Any:
    return jax.tree.map(lambda a, p: a.astype(p.dtype), masters, params)


@jax.jit
def _mixed(key: jax.Array, share: float, own: Inputs, dense: Inputs) -> Inputs:
    """Each float of a block's inputs from the quantized model with a probability of `share`, or from the dense one."""
    arrays = [
        jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), share, jnp.shape(a)), a, b)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else a
        for i, (a, b) in enumerate(zip(own.arrays, dense.arrays, strict=True))
    ]
    return replace(own, arrays=arrays)
