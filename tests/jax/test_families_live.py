"""Models that `transformers` makes in this process compute the same here: sizes and weights no golden has."""

from __future__ import annotations

import importlib
import json

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from tests.families import TOLERANCE, assert_same_encoder, error, filled, stepwise
from tests.golden.models.cases import CASES, ENCODERS

pytestmark = pytest.mark.slow

HOW = "pip install torch==2.13.0 transformers==5.23.0, of which torch has no wheel for every Python"
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
OTHER = {"gpt2": {"n_embd": 48, "n_head": 6}, "opt": {"hidden_size": 48, "word_embed_proj_dim": 48}}


@pytest.fixture
def make():
    """The script that made the goldens."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: {HOW}")
    return importlib.import_module("tests.golden.models.make")


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_model_is_that_of_transformers(name, make, tmp_path):
    import torch

    stated = CASES[name]
    theirs = make.model(name, seed=100, **OTHER.get(stated["model_type"], SIZES))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        want = {key: array.numpy() for key, array in make.expected(theirs).items()}
    model = filled(json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors"))
    tokens, mask = want["tokens"], want["mask"]
    if name in ENCODERS:
        assert_same_encoder(model, want)
    else:
        assert error(model(jnp.asarray(tokens), jnp.asarray(mask)), want["logits"], mask) < TOLERANCE
        assert error(stepwise(model, tokens, mask), want["logits"], mask) < TOLERANCE
