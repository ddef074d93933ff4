"""`lb.nn.lora`: a low-rank adapter on each quantized weight, trained while the weight stays frozen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isfinite
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray, own
from lowbit.formats.low_rank import LORA_A, LORA_B, LowRank
from lowbit.nn.kernel import Kernel, expect_arrays, expect_module, joined, kernels
from lowbit.nn.kinds import layers
from lowbit.nn.quantize import others
from lowbit.nn.rules import Rule, assign

M = TypeVar("M", bound=nnx.Module)


def lora(model: M, rank: int = 8, alpha: float = 16.0, rules: str | Iterable[str] = "**", *, rngs: nnx.Rngs) -> M:
    """A copy of a quantized model with a low-rank adapter on the layers that rules name; its arrays are shared.

    The weight becomes w + alpha / rank * A B, with A [in, rank] from He's uniform distribution and B [rank, out] zero,
    so that the model starts as it was (LoRA, Hu et al. 2021; on a quantized base, QLoRA, Dettmers et al. 2023). The sum
    is part of the weight's decode term: products run as x w + (x A) B, `lb.dequantize` gives the merged weight,
    `lb.report` counts the adapter and `lb.save` stores it. A and B are float32 in Variables of the class
    `nnx.LoRAParam`; the scales of the weight become `lb.nn.Frozen`.

    Args:
      model: quantized by `lb.quantize`; left as it is. Scales that `lb.tune` trained are frozen as they are.
      rank: of the adapters, at least 1.
      alpha: the adapter is multiplied by alpha / rank.
      rules: a pattern over layer paths, or several, as in `lb.quantize`: "layers/*/mlp/**".
      rngs: for A, its stream `params`.

    The adapter alone is `nnx.state(model, nnx.LoRAParam)`, to be kept with orbax, say, and put back with `nnx.update`.

    Raises ValueError for a model without quantized layers, a pattern that matches none of them, a layer that has an
    adapter, an abstract model, or a rank or alpha that is none; TypeError for what is no module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb, optax
    >>> small = lb.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), lb.uniform(4))
    >>> model = lb.nn.lora(small, rank=2, alpha=4.0, rngs=nnx.Rngs(1))
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    >>> @nnx.jit
    ... def step(model, optimizer, x):
    ...     loss = lambda m: ((m(x) - 1) ** 2).mean()
    ...     value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    ...     optimizer.update(model, gradients)
    ...     return value
    >>> losses = [float(step(model, optimizer, jnp.ones((1, 64)))) for _ in range(3)]
    >>> losses[2] < losses[0]
    True
    """
    expect_module(model, "put adapters on")
    expect_arrays(model, "put adapters on")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an int of at least 1, not {rank!r}")
    if not isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, not {alpha!r}")
    chosen = _chosen(model, [rules] if isinstance(rules, str) else list(rules))

    def adapt(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, Kernel) or joined(path) not in chosen:
            return node
        return _adapted(node, LowRank(rank, float(alpha)), rngs)

    out: M = nnx.recursive_map(adapt, nnx.clone(model))
    return out


def _chosen(model: nnx.Module, patterns: list[str]) -> set[str]:
    """The paths of the kernels that the patterns name."""
    held = kernels(model)
    found = {path.rpartition("/")[0]: path for path in held}
    if not found:
        raise ValueError(f"{type(model).__name__} has no quantized layer to put an adapter on: lb.quantize it first")
    dense = {path: "is dense: quantize it first" for path in layers(model) | others(model)}
    assigned = assign(tuple(Rule(p, None) for p in patterns), list(found), dense, "quantized layers")
    for path in assigned:
        if (adapter := held[found[path]].type.adapter) is not None:
            raise ValueError(f"layer {path!r} has the adapter {adapter} already: start from the model without it")
    return {found[path] for path in assigned}


def _adapted(kernel: Kernel, adapter: LowRank, rngs: nnx.Rngs) -> Kernel:
    new = replace(kernel.type, adapter=adapter, layout="own")
    a, b = ((*kernel.array.stack, *new.fields[name].dims.values()) for name in (LORA_A, LORA_B))
    batch = range(len(kernel.array.stack))
    start = nnx.initializers.he_uniform(batch_axis=tuple(batch))(rngs.params(), a, jnp.float32)
    fields = {**own(kernel.array).fields, LORA_A: start, LORA_B: jnp.zeros(b, jnp.float32)}
    return Kernel(QuantArray.of(fields, new), kernel.stats.get_value()).read_as(kernel)
