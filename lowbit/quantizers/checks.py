"""What quantizers are given and what comes out: refused where it could not be used."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowbit.array import QuantArray


class IneligibleError(ValueError):
    """A weight that a format cannot hold: `lb.quantize` leaves its layer dense, and says why."""


def positive(importance: jax.Array, dims: tuple[str, str], shape: tuple[int, ...], name: str) -> jax.Array:
    """[*stack, k] or [*stack, n, k]. No weight counts for nothing: it would be anything."""
    check_importance(importance, f"the importance of {name}")
    stack, k = shape[:-2], shape[dims.index("k") - 2]
    of_inputs = importance.shape[-1:] == (k,) and importance.ndim <= len(stack) + 1
    ends = zip(importance.shape[:-1][::-1], stack[::-1], strict=False)
    if importance.shape != shape and not (of_inputs and all(own in (1, size) for own, size in ends)):
        raise ValueError(
            f"{name} has {k} inputs and the shape {shape}, but the importance has shape {importance.shape}"
        )
    f = importance.mT if importance.shape == shape and dims[0] == "k" else importance
    least = 1e-4 * f.mean(axis=-1, keepdims=True) + jnp.finfo(jnp.float32).tiny
    each = jnp.maximum(f, least)
    return each if importance.shape == shape else jnp.broadcast_to(each, (*stack, k))


def check_importance(importance: jax.Array, what: str) -> None:
    """Raises ValueError for NaN, inf and negative numbers, which can weigh no error; traced ones are not seen."""
    bad = (~(jnp.isfinite(importance) & (importance >= 0))).sum()
    if not isinstance(bad, jax.core.Tracer) and bad:  # traced, also of known arrays, wherever jax.jit traces
        raise ValueError(
            f"{what} has {bad} NaN, inf or negative numbers among its {importance.size}: measure it on data for which "
            "all values of the model are finite"
        )


def check_weight(w: jax.Array, name: str) -> None:
    """Raises TypeError or ValueError for what no quantizer takes; traced values are not seen."""
    dense = "or leave it dense, in a model by a rule with the format None"
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name} is {w.dtype}{list(w.shape)}: cast it to a floating type, {dense}")
    if w.ndim < 2 or w.size == 0:
        raise ValueError(f"{name} has shape {w.shape}: give a matrix with at least one entry, {dense}")
    bad = (~jnp.isfinite(w)).sum()
    if not isinstance(bad, jax.core.Tracer) and bad:
        raise ValueError(f"{name} has {bad} NaN or inf among its {w.size} entries: repair it, {dense}")


def check_range(array: QuantArray, w: jax.Array, name: str) -> None:
    """Raises ValueError when the scales do not fit their dtype.

    They may not overflow, and the largest must be a normal number. A smaller one may then be subnormal: its absolute
    error is below the rounding error of the largest.
    """
    scales = {f: v for f, v in array.fields.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if any(isinstance(v, jax.core.Tracer) for v in (*scales.values(), w)):
        return
    option = next((o for o, _ in array.type.format.options if o.endswith("_dtype")), "scale_dtype")
    for stored, v in scales.items():
        if bool(jnp.isnan(v).any()):
            raise ValueError(f"{name}: {stored!r} holds NaN, as a division by zero gives: repair the quantizer")
        if not bool(jnp.isfinite(v).all()):
            raise ValueError(f"{name}: {stored!r} overflows {v.dtype}; use {option}='float32' or 'bfloat16'")
    normal = {f: bool(jnp.abs(v).max() >= jnp.finfo(v.dtype).smallest_normal) for f, v in scales.items()}
    if scales and not any(normal.values()) and bool(w.any()):
        stored, v = next(iter(scales.items()))
        raise ValueError(f"{name}: {stored!r} underflows {v.dtype}; use {option}='float32' or scale the weights up")
