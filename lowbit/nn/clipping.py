"""Ranges of the groups of a weight: what passes before a quantizer clip to, and what round to nearest makes of it.

With lo = min(w, 0) and hi = max(w, 0) over a group, a clipped weight is clip(w, c lo, d hi), c and d from 0 to 1. It is
dense again: round to nearest spends its levels on the smaller range, and so does every quantizer that starts there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.formats import Format
from lowbit.formats.planes import group_size
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.nn.kernel import expect_module
from lowbit.nn.kinds import KINDS, NAMES, dense_matrices, layers, refusal, weight
from lowbit.nn.rules import Rules, as_rules, assign
from lowbit.quantizers.checks import check_weight
from lowbit.quantizers.groups import to_groups


def uniform_layers(model: nnx.Module, rules: Rules, who: str) -> dict[str, tuple[Any, Format]]:
    """The layers that rules give a uniform format, with it, by path; of layers that share a weight the first.

    Raises ValueError for another format, for layers that cannot be quantized, for weights with NaN or inf, and for
    rules without effect; TypeError for what is no module.
    """
    expect_module(model, "quantize")
    found = layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} holds no {NAMES}: there is nothing for {who} to do")
    out: dict[str, tuple[Any, Format]] = {}
    seen: set[int] = set()
    for path, rule in assign(as_rules(rules), list(found), {}).items():
        if rule.format is None or id(weight(found[path])) in seen:
            continue
        if rule.format.name != "uniform":
            raise ValueError(
                f"layer {path!r} gets {rule.format}: {who} looks for what rounding to a uniform format loses least by; "
                "give it lb.uniform(...), or None to leave it as it is"
            )
        if reason := refusal(found[path]):
            raise ValueError(f"layer {path!r} cannot be quantized: {reason}")
        check_weight(dense_matrices(found[path]), f"layer {path!r}")
        seen.add(id(weight(found[path])))
        out[path] = found[path], rule.format
    if not out:
        raise ValueError(f"the rules leave every layer dense: there is nothing for {who} to do")
    return out


def rows_of(layer: Any) -> jax.Array:
    """A dense layer's weight, float32 [r, k]: a row for each output, of each matrix of a stack."""
    m = dense_matrices(layer).astype(jnp.float32)
    m = m.mT if _dims(layer)[0] == "k" else m
    return m.reshape(-1, m.shape[-1])


def with_rows(layer: Any, rows: jax.Array) -> jax.Array:
    """The same rows as a value for the layer's weight, in its shape and dtype."""
    stack, n, k = _sizes(layer)
    m = rows.reshape(*stack, n, k)
    view = KINDS[type(layer)].view(layer)
    return view.kernel(m.mT if _dims(layer)[0] == "k" else m).astype(weight(layer).dtype)


def set_rows(layer: Any, rows: jax.Array) -> None:
    weight(layer).set_value(with_rows(layer, rows))


def _sizes(layer: Any) -> tuple[tuple[int, ...], int, int]:
    *stack, a, b = dense_matrices(layer).shape
    return tuple(stack), *((b, a) if _dims(layer)[0] == "k" else (a, b))


def _dims(layer: Any) -> tuple[str, str]:
    return KINDS[type(layer)].view(layer).dims


def grouped(rows: jax.Array, fmt: Format) -> jax.Array:
    """Rows [r, k] in the groups of a format, [r, g, t]; zeros fill the last one."""
    return to_groups(rows, group_size(rows.shape[1], fmt["group"]))[0]


def ungrouped(values: jax.Array, k: int) -> jax.Array:
    """The inverse of `grouped`."""
    return values.reshape(len(values), -1)[:, :k]


def span(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """lo and hi of each group, [r, g, 1]."""
    return jnp.minimum(values.min(-1, keepdims=True), 0.0), jnp.maximum(values.max(-1, keepdims=True), 0.0)


def nearest(values: jax.Array, fmt: Format) -> jax.Array:
    """What `lb.round_to_nearest` stores of groups [r, g, t] of a uniform format, decoded.

    Its gradient takes rounding for the identity, so that clipped groups have one with respect to their bounds.
    """
    top = 2 ** fmt["bits"] - 1
    lo, hi = span(values)
    scale = (hi - lo) / top
    degenerate = scale < jnp.finfo(jnp.float32).tiny
    scale, lo = jnp.where(degenerate, 2.0 / top, scale), jnp.where(degenerate, -1.0, lo)
    zero = jnp.clip(_round(-lo / scale), 0, top)
    codes = jnp.clip(_round(values / scale) + zero, 0, top)
    stored = scale.astype(numpy_dtype(short(fmt["scale_dtype"]))).astype(jnp.float32)
    return stored * (codes - zero)


@partial(jax.jit, static_argnums=1)
def rounded(rows: jax.Array, fmt: Format) -> jax.Array:
    """The same of rows [r, k]."""
    return ungrouped(nearest(grouped(rows, fmt), fmt), rows.shape[1])


def _round(x: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)
