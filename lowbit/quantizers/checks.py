"""What quantizers are given and what comes out: refused where it could not be used."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from absl import logging

from lowbit.array import QuantArray

_FINITE = "measure it on data for which all values of the model are finite"
_NEAR = 1e-2
"""How far a matrix of correlations may be from symmetric and positive semidefinite: rounding, and a wide margin."""


_LEAST = 1e-4
"""The least that an input's weights may count, of the mean over inputs."""


class IneligibleError(ValueError):
    """A weight that a format cannot hold: `lb.quantize` leaves its layer dense, and says why."""


def positive(importance: jax.Array, dims: tuple[str, str], shape: tuple[int, ...], name: str) -> jax.Array:
    """[*stack, k] or [*stack, n, k]. No weight counts for nothing: it would be anything. Where all do, for a row or for
    every row, they count alike."""
    check_importance(importance, f"the importance of {name}")
    stack, k = shape[:-2], shape[dims.index("k") - 2]
    of_inputs = importance.shape[-1:] == (k,) and importance.ndim <= len(stack) + 1
    ends = zip(importance.shape[:-1][::-1], stack[::-1], strict=False)
    if importance.shape != shape and not (of_inputs and all(own in (1, size) for own, size in ends)):
        raise ValueError(
            f"{name} has {k} inputs and the shape {shape}, but the importance has shape {importance.shape}"
        )
    f = importance.mT if importance.shape == shape and dims[0] == "k" else importance
    mean = f.mean(axis=-1, keepdims=True)
    each = jnp.where(mean > 0, jnp.maximum(f, _LEAST * mean + jnp.finfo(jnp.float32).tiny), 1.0)
    return each if importance.shape == shape else jnp.broadcast_to(each, (*stack, k))


def damped(gram: jax.Array, dims: tuple[str, str], shape: tuple[int, ...], name: str) -> jax.Array:
    """[*stack, k, k], or [*stack, c, k, k] of c chunks of the outputs, with 1 for axes of the stack that share it. As
    in `positive`, no weight counts for nothing.

    That is 1e-4 of the mean second moment more for each input, or ten times that until it is positive definite, as in
    LNQ's code (Kim et al., ICML 2025), which starts at 1e-5 and gives up above 1, as here. Traced ones are not seen.
    """
    stack, k = shape[:-2], shape[dims.index("k") - 2]
    own = gram.shape if gram.ndim > len(stack) + 2 else (1,) * (len(stack) + 2 - gram.ndim) + gram.shape
    fits = len(own) <= len(stack) + 3 and all(size in (1, of) for size, of in zip(own, stack, strict=False))
    if not fits or own[-2:] != (k, k):
        raise ValueError(
            f"{name} has {k} inputs and the shape {shape}, but the importance has shape {gram.shape}: this quantizer "
            f"takes the mean of the products of each two inputs, {[*stack, k, k]}, or that of each chunk of outputs"
        )
    check_gram(gram, f"the importance of {name}")
    gram = gram.reshape(own)
    mean = gram.diagonal(axis1=-2, axis2=-1).mean(axis=-1)[..., None, None]
    eye = jnp.eye(k).reshape((1,) * (len(own) - 2) + (k, k))
    for share in (_LEAST * 10**i for i in range(5)):
        made = gram + jnp.where(mean > 0, share * mean + jnp.finfo(jnp.float32).tiny, 1.0) * eye
        if isinstance(made, jax.core.Tracer) or jnp.isfinite(jnp.linalg.cholesky(made)).all():
            if share > _LEAST:
                said = f"{share:g} of the mean second moment is added to each"
                logging.warning("lowbit: %s: the products of inputs are not positive definite: %s", name, said)
            return made
    raise ValueError(
        f"{name}: the products of inputs are not positive definite, not even with the mean second moment added to "
        "each: calibrate on more rows"
    )


def check_gram(gram: jax.Array, what: str) -> None:
    """Raises ValueError unless [..., k, k] may be a mean of products of each two inputs; traced ones are not seen."""
    if isinstance(gram, jax.core.Tracer):
        return
    if bad := int((~jnp.isfinite(gram)).sum()):
        raise ValueError(f"{what} has {bad} NaN or inf among its {gram.size} numbers: {_FINITE}")
    moments = gram.diagonal(axis1=-2, axis2=-1)
    size = jnp.sqrt(jnp.where(moments == 0, 1.0, moments))
    correlation = gram / size[..., None] / size[..., None, :]
    symmetric = jnp.abs(correlation - correlation.mT).max() <= 2 * _NEAR
    eye = jnp.eye(gram.shape[-1]).reshape((1,) * (gram.ndim - 2) + gram.shape[-2:])
    if not (symmetric and jnp.isfinite(jnp.linalg.cholesky(correlation + _NEAR * eye)).all()):
        raise ValueError(
            f"{what} is not symmetric and positive semidefinite, as x.T @ x is for any x [rows, k]: give the mean over "
            "rows of the products of each two inputs"
        )


def check_importance(importance: jax.Array, what: str) -> None:
    """Raises ValueError for NaN, inf and negative numbers, which can weigh no error; traced ones are not seen."""
    bad = (~(jnp.isfinite(importance) & (importance >= 0))).sum()
    if not isinstance(bad, jax.core.Tracer) and bad:  # traced, also of known arrays, wherever jax.jit traces
        raise ValueError(f"{what} has {bad} NaN, inf or negative numbers among its {importance.size}: {_FINITE}")


def check_weight(w: jax.Array, name: str) -> None:
    """Raises TypeError or ValueError for what no quantizer takes; traced values are not seen."""
    dense = "or leave it dense, in a model by a rule with the format None"
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name} is {w.dtype}{list(w.shape)}: cast it to a floating type, {dense}")
    if w.ndim < 2 or w.size == 0:
        raise ValueError(f"{name} has shape {w.shape}: give a matrix with at least one entry, {dense}")
    finite = _all_finite(w)
    if not isinstance(finite, jax.core.Tracer) and not finite:  # counted only then: that takes more memory
        bad = (~jnp.isfinite(w)).sum()
        raise ValueError(f"{name} has {bad} NaN or inf among its {w.size} entries: repair it, {dense}")


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    return jnp.isfinite(w).all()


@jax.jit
def _facts(scales: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Of each, whether there is a NaN, whether all are finite, and whether the largest is a normal number. One program
    for all: a model has layers of many shapes, each of which is compiled for."""
    return {
        name: (jnp.isnan(v).any(), jnp.isfinite(v).all(), jnp.abs(v).max() >= jnp.finfo(v.dtype).smallest_normal)
        for name, v in scales.items()
    }


def check_range(array: QuantArray, w: jax.Array, name: str) -> None:
    """Raises ValueError when the scales do not fit their dtype.

    They may not overflow, and the largest must be a normal number. A smaller one may then be subnormal: its absolute
    error is below the rounding error of the largest.
    """
    scales = {f: v for f, v in array.fields.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if any(isinstance(v, jax.core.Tracer) for v in (*scales.values(), w)):
        return
    option = next((o for o, _ in array.type.format.options if o.endswith("_dtype")), "scale_dtype")
    facts = jax.device_get(_facts(scales)) if scales else {}
    for stored, v in scales.items():
        has_nan, is_finite, _ = facts[stored]
        if has_nan:
            raise ValueError(f"{name}: {stored!r} holds NaN, as a division by zero gives: repair the quantizer")
        if not is_finite:
            raise ValueError(f"{name}: {stored!r} overflows {v.dtype}; use {option}='float32' or 'bfloat16'")
    if scales and not any(is_normal for *_, is_normal in facts.values()) and bool(w.any()):
        stored, v = next(iter(scales.items()))
        raise ValueError(f"{name}: {stored!r} underflows {v.dtype}; use {option}='float32' or scale the weights up")
