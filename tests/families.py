"""What tests of model families share: a model filled from a checkpoint's arrays, and steps with a cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.models import Decoder, DenseCache, Encoder
from lowbit.models.decoder import positions
from lowbit.models.families import family, value

GOLDEN = Path(__file__).parent / "golden/models"
TOLERANCE = 2e-5
"""Relative to the largest logit. Sums of float32 in another order, at most 48 long, through 2 layers of some 20
roundings that each may be off by half a unit, 6e-8: 2 * 20 * 48 ** 0.5 * 6e-8. A wrong epsilon is off by more."""
PREFILLED = 5


def filled(j: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """The model of a config, with every parameter from the checkpoint."""
    chosen = family(j)
    config = chosen.config(j)
    model = nnx.eval_shape(lambda: chosen.model(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    renamed = {chosen.rename(name): array for name, array in tensors.items()}
    used = set()
    for path, where in chosen.places(config):
        given = value(where, renamed.__getitem__)
        assert given.shape == flat[path].get_value().shape, path
        flat.pop(path).set_value(jnp.asarray(given))
        used.update(where.tensors)
    assert not flat, "parameters without a place"
    assert not [name for name in renamed.keys() - used if not name.endswith(chosen.unused)]
    return nnx.merge(graph, state)


def error(got: Any, want: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference where there are tokens, as a part of the largest value."""
    return float(np.abs(np.asarray(got) - want)[mask].max() / np.abs(want[mask]).max())


def stepwise(model: Decoder, tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
    """Logits through a cache: of the first tokens at once, then of one after the other."""
    c, given, at = model.config, jnp.asarray(tokens), positions(jnp.asarray(tokens), jnp.asarray(mask))
    caches = (DenseCache.empty(*given.shape, c.kv_heads, c.head, jnp.float32),) * c.layers
    first = jnp.arange(given.shape[1])[None] < PREFILLED  # of as many places as the full pass: less to compile
    hidden, caches = model.hidden(given, jnp.where(first, at, -1), caches)
    parts = [model.logits(hidden)[:, :PREFILLED]]
    for i in range(PREFILLED, given.shape[1]):
        hidden, caches = model.hidden(given[:, i : i + 1], at[:, i : i + 1], caches)
        parts.append(model.logits(hidden))
    return jnp.concatenate(parts, axis=1)


def assert_same_encoder(model: Encoder, want: Mapping[str, np.ndarray]) -> None:
    mask = want["mask"]
    hidden = model(*(jnp.asarray(want[key]) for key in ("tokens", "mask", "types")))
    assert error(hidden, want["hidden"], mask) < TOLERANCE
    assert error(model.logits(hidden), want["logits"], mask) < TOLERANCE
    if "pooled" in want:
        assert error(model.pooled(hidden), want["pooled"], mask[:, 0]) < TOLERANCE
