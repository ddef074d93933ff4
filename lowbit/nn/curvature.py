"""Traces of a loss's Hessian with respect to the weights of probed layers, by Hutchinson's estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.gradients import checked_scalar
from lowbit.nn.kinds import KINDS
from lowbit.nn.probe import owners, probes
from lowbit.ops import differentiable


def curved(loss: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any, Any], None]:
    """A step that moves `hessian_trace` towards that of `loss(model, batch)`, after `count` batches.

    With z of random signs, a number for each weight of all these layers, embeddings too, z's part in a layer times the
    same part of H z is the trace of the layer's own Hessian plus terms whose mean over z is 0 (Hutchinson, 1990). Each
    batch has signs of its own. It is a forward derivative of gradients, which ragged products have and
    `jax.custom_vjp` has not.
    """

    def step(model: nnx.Module, batch: Any, count: Any) -> None:
        graph, state = nnx.split(model)
        watched = {path: p for path, p in probes(model).items() if "hessian_trace" in p.wanted}
        first = owners(watched)
        weights = {path: watched[path].weight.get_value() for path in sorted(set(first.values()))}
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(weights))
        signs = {p: jax.random.rademacher(k, w.shape, w.dtype) for k, (p, w) in zip(keys, weights.items(), strict=True)}

        def of(weights: dict[str, jax.Array]) -> jax.Array:
            inner = nnx.merge(graph, state, copy=True)  # what running it changes is left out: the other step runs it
            found = probes(inner)
            for p in found.values():
                p.wanted = frozenset()
            for path, w in weights.items():
                found[path].weight.set_value(w)
            return checked_scalar(loss(inner, batch))

        with differentiable("jvp"):  # what is quantized already
            _, products = jax.jvp(jax.grad(of), (weights,), (signs,))
        for path, p in watched.items():
            z, h = (a[first[path]].astype(jnp.float32) for a in (signs, products))
            p.move(p.hessian_trace, _mean(p, z * h), 1, count)

    return step


def _mean(p: Any, values: jax.Array) -> jax.Array:
    """Of numbers of the weight's shape, over each matrix of a stack; over a stack that shares its rows."""
    view = KINDS[type(p.layer)].view(p.layer)
    each = view.matrices(values).mean((-1, -2))
    return each.mean(tuple(range(-len(view.stack), 0))) if p.kind.shares else each
