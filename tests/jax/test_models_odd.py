"""Odd sizes and shapes: computed where they mean something, refused by name where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit.models import Config, Decoder, DenseKV, Encoder, Rope, Sampling
from lowbit.models.attention import BLOCK, Dense, How
from lowbit.models.rope import Linear
from lowbit.models.steps import Runner

CONFIG = Config(vocab=8, width=8, layers=1, heads=2, kv_heads=1, head=4, hidden=8, context=6, ropes=(Rope(1e4, 4),))
LEARNED = replace(CONFIG, ropes=None)
TOKENS = jnp.zeros((2, 7), jnp.int32)


def decoder(config: Config = CONFIG) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("experts", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(0, 3), pytest.param((2, 0), marks=pytest.mark.slow)])
def test_no_sequences_and_no_tokens_have_no_logits(experts: int, shape: tuple[int, int]) -> None:
    model = decoder(replace(CONFIG, experts=experts, experts_per_token=experts))
    assert model(jnp.zeros(shape, jnp.int32)).shape == (*shape, 8)


def test_long_prompts_take_the_memory_of_a_block_of_queries() -> None:
    """XLA is free to work on several blocks at once, unless one waits for the other."""
    graph, state = nnx.split(decoder())
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    compiled = run.lower(state, jax.ShapeDtypeStruct((1, 2048), jnp.int32)).compile().memory_analysis()
    assert compiled.temp_size_in_bytes < 3 * 4 * 2 * BLOCK * 2048  # scores, their softmax, and little else


@pytest.mark.parametrize("tokens", [BLOCK + 1, pytest.param(2 * BLOCK, marks=pytest.mark.slow)])
def test_blocks_of_queries_are_the_whole(tokens: int) -> None:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, tokens, 1, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, tokens, 1, 4)), jnp.float32) for _ in range(2))
    at = jnp.asarray(np.arange(tokens)[None] - np.array([[0], [3]]), jnp.int32)
    how, parts = How(0.5, window=7), [Dense(k, v, at[:, None])]
    whole = how._block(q, at, parts)
    assert how.attend(q, at, parts).shape == q.shape
    # Entries are below 5, so either way scores are off by up to 0.5 * 4 * 4 * 5^2 / 2^24, and weights, relatively, by
    # twice that and some 20 roundings.
    off = 2 * (2 * 0.5 * 4 * 4 * 25 + 20) * 2**-24
    np.testing.assert_allclose(how.attend(q, at, parts), whole, rtol=0, atol=5 * off)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokens have shape \(7,\): give both as \[B, T\]"):
        decoder()(TOKENS[0])
    with pytest.raises(ValueError, match=r"^tokens have shape \(2, 7\) and mask \(2, 6\): give both as \[B, T\]"):
        decoder()(TOKENS, jnp.ones((2, 6), bool))


@pytest.mark.slow
def test_padding_may_be_any_number() -> None:
    encoder = Encoder(replace(LEARNED, token_types=1, pre_norm=False, post_norm=True), rngs=nnx.Rngs(0))
    mask = jnp.asarray(np.arange(6) < np.array([[4], [6]]))
    for model in (decoder(), encoder):
        out = model(jnp.where(mask, 3, 8), mask)
        np.testing.assert_array_equal(out[:, :4], model(jnp.where(mask, 3, 0), mask)[:, :4])
        assert jnp.isfinite(out).all()


@pytest.mark.slow
def test_learned_positions_end() -> None:
    encoder = Encoder(replace(LEARNED, token_types=1, pre_norm=False, post_norm=True), rngs=nnx.Rngs(0))
    for model in (decoder(LEARNED), encoder):
        with pytest.raises(ValueError, match=r"^7 tokens for a model that has learned 6 positions: give it less"):
            model(TOKENS)
        assert jnp.isfinite(model(TOKENS, jnp.asarray(np.arange(7) < np.array([[6], [0]])))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": "8"}, "heads = '8': it must be an integer of at least 1"),
        ({"width": 8.0}, r"width = 8\.0: it must be an integer of at least 1"),
        ({"eps": None}, "eps = None: it must be a number, not negative"),
        ({"windows": (0,)}, "a window of 0 positions: it must be an integer of at least 1, or None for all"),
        ({"ropes": (Rope(1e4, 6),)}, "6 entries of a head of 4 cannot rotate"),
    ],
)
def test_a_config_of_no_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ((1e4, 3), "3 entries of a head cannot rotate in pairs: their number must be even"),
        (("1e4", 4), "base = '1e4' of a rotation: it must be a number above 0"),
        ((1e4, 4, Linear(0)), "factor = 0 of a rotation: it must be a number above 0"),
    ],
)
def test_a_rotation_that_is_none_is_refused(rope: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Rope(*rope)


def test_an_encoder_without_token_types_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^token_types = 0: an encoder has at least one"):
        Encoder(LEARNED, rngs=nnx.Rngs(0))


def test_a_cache_that_is_made_outside_of_jit_can_be_given_away() -> None:
    runner = Runner(decoder(), DenseKV(), Sampling())
    cache = DenseKV().empty(CONFIG, 1, 16, jnp.float32)
    assert runner.store(cache, [np.array([1, 2, 3])], 0, 3)[0].length.tolist() == [3]
