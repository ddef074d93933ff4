"""Every family computes what `transformers` does, with and without a cache (tests/golden/models/make.py)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lowbit as lb
from lowbit.io.error import CheckpointError
from lowbit.models import DenseCache, Decoder, Encoder
from lowbit.models.decoder import positions
from lowbit.models.families import FAMILIES, family, value

GOLDEN = Path(__file__).parents[1] / "golden/models"
TOLERANCE = 1e-4
"""Relative to the largest logit: 2 layers of float32 in another order; a wrong term is off by far more than 1e-2."""


def golden_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_cases", GOLDEN / "cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = golden_cases()
DECODERS = [name for name in cases.CASES if name != "bert"]


def stated(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())


def filled(j: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Decoder | Encoder:
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
    assert all(path.startswith("rngs") for path in flat), f"no place for {set(flat)}"
    assert all(name.endswith(chosen.unused) for name in renamed.keys() - used) or not renamed.keys() - used
    return nnx.merge(graph, state)


@cache
def model_of(name: str) -> Any:
    return filled(stated(name), load_file(GOLDEN / cases.SHARED.get(name, name) / "model.safetensors"))


def error(got: Any, want: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference where there are tokens, as a part of the largest value."""
    return float(np.abs(np.asarray(got) - want)[mask].max() / np.abs(want[mask]).max())


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(name):
    model, want = model_of(name), load_file(GOLDEN / name / "expected.safetensors")
    got = model(jnp.asarray(want["tokens"]), jnp.asarray(want["mask"]))
    assert error(got, want["logits"], want["mask"]) < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_cached_steps_are_the_full_pass(name):
    model, want = model_of(name), load_file(GOLDEN / name / "expected.safetensors")
    c, tokens, at = model.config, jnp.asarray(want["tokens"]), positions(want["tokens"], jnp.asarray(want["mask"]))
    caches = (DenseCache.empty(*tokens.shape, c.kv_heads, c.head, jnp.float32),) * c.layers
    parts, ends = [], [5, *range(6, tokens.shape[1] + 1)]
    for start, end in zip([0, *ends], ends):
        hidden, caches = model.hidden(tokens[:, start:end], at[:, start:end], caches)
        parts.append(model.logits(hidden))
    assert error(jnp.concatenate(parts, axis=1), want["logits"], want["mask"]) < TOLERANCE
