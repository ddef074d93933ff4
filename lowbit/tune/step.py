"""The compiled parts of a training run: gradients of a batch, an update, a loss.

What trains is held in float32 whatever it is stored as, and the model always computes with what would be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lowbit.nn.kernel import Code, Frozen, Stats, Width, joined
from lowbit.nn.reached import Inputs
from lowbit.nn.rules import Rule, assign
from lowbit.nn.switch import Choice

Loss = Callable[[Any, Any], tuple[Any, Any]]
"""loss(model, batch) -> the sum of losses, and their number or weight."""
CHANGING = nnx.Not(nnx.Any(nnx.Param, Code, Frozen, Stats, Width, Choice, nnx.Intermediate))
"""What a call of a model may change: counts of random keys, running means."""


@dataclass(frozen=True)
class How:
    """How a model computes its loss; static in what is compiled."""

    loss: Loss
    graph: Any
    wrt: Any

    def value(self, trained: Any, changing: Any, rest: Any, batch: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        """The sum of losses; their number, and what has changed."""
        model = nnx.merge(self.graph, trained, changing, rest, copy=True)  # of this level of tracing
        out = self.loss(model, batch)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"loss(model, batch) must return the sum of losses and their number, not {out!r}")
        _, _, changed, _ = parts(model, self.wrt)
        return jnp.asarray(out[0], jnp.float32), (jnp.asarray(out[1], jnp.float32), changed)


@partial(jax.jit, static_argnums=0)
def added(
    how: How, masters: Any, stored: Any, changing: Any, rest: Any, sums: Any, batch: Any
) -> tuple[Any, Any]:  # fmt: skip
    """Sums of losses, of their number and of gradients with those of one more batch; and what has changed.

    `stored` has the dtypes that the model computes with.
    """

    def value(masters: Any) -> Any:
        return how.value(like(masters, stored), changing, rest, batch)

    (total, (count, changed)), gradients = jax.value_and_grad(value, has_aux=True)(masters)
    return jax.tree.map(jnp.add, sums, (total, count, gradients)), changed


@partial(jax.jit, static_argnums=0)
def updated(
    tx: optax.GradientTransformation, masters: Any, moments: Any, sums: Any
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """What trains after one step, the optimizer's state, the mean loss, and the norm of the update."""
    total, count, gradients = sums
    updates, moments = tx.update(jax.tree.map(lambda g: g / count, gradients), moments, masters)
    return optax.apply_updates(masters, updates), moments, total / count, optax.tree.norm(updates)


@partial(jax.jit, static_argnums=0)
def evaluated(
    how: How, masters: Any, stored: Any, changing: Any, rest: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The sum of losses of a batch and their number."""
    total, (count, _) = how.value(like(masters, stored), changing, rest, batch)
    return total, count


def parts(model: nnx.Module, wrt: Any) -> tuple[Any, Any, Any, Any]:
    """The graph, what trains, what a call may change, and the rest."""
    split: tuple[Any, ...] = nnx.split(model, wrt, CHANGING, ...)
    graph, trained, changing, rest = split
    return graph, trained, changing, rest


def expect_floats(trained: Iterable[Any], wrt: Any) -> None:
    """Raises ValueError where `wrt` selects arrays of integers."""
    if wrong := {str(a.dtype) for a in trained if not jnp.issubdtype(a.dtype, jnp.floating)}:
        raise ValueError(f"wrt={wrt!r} selects {', '.join(sorted(wrong))}: only floats can be trained")


def zeros(masters: Any) -> Any:
    """Sums of nothing."""
    return jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, masters)


def like(masters: Any, stored: Any) -> Any:
    return jax.tree.map(lambda a, p: a.astype(p.dtype), masters, stored)


def computing(model: nnx.Module, dtype: Any, remat: Sequence[str]) -> nnx.Module:
    """A copy whose layers compute in `dtype`, if given, and whose blocks that `remat` names forget what is within them.

    Raises ValueError for a pattern without modules, and for a dtype where no layer has one.
    """
    out = nnx.clone(model)
    modules = {joined(path): m for path, m in nnx.iter_modules(out) if path}
    if dtype is not None:
        told = [m for m in (out, *modules.values()) if "dtype" in vars(m)]
        if not told:
            raise ValueError(f"no layer of {type(model).__name__} has a dtype to compute in: leave out compute_dtype")
        for module in told:
            setattr(module, "dtype", jnp.dtype(dtype))  # noqa: B010, a module of any class
    rules = tuple(Rule(p, None) for p in remat)
    for path in assign(rules, list(modules), {}, "modules of the model"):
        object.__setattr__(modules[path], "__class__", _recomputed(type(modules[path])))
    return out


@lru_cache(maxsize=256)
def _recomputed(cls: Any) -> Any:
    """A class of modules that are computed again where gradients need what was within them (Chen et al. 2016).

    A subclass and no wrapper: the paths of parameters stay, and so does whatever the model asks its blocks for.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.remat(lambda block, inputs: inputs.call(partial(cls.__call__, block)))(self, Inputs.of(args, kwargs))

    return type(f"Recomputed{cls.__name__}", (cls,), {"__call__": call})
