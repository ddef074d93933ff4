"""`lb.awq`, `lb.lwc` and `lb.q_rater` on the tiny language model: each beats rounding to nearest at 3 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from examples.tinylm import corpus, weights
from examples.tinylm.batches import Windows
from lowbit.nn.kinds import layers

pytestmark = pytest.mark.slow
RULES = {"embed": None, "**": lb.uniform(3, group=128)}
FOLDS = (
    lb.Fold("layers/*/attn_norm", ["layers/*/attn/q", "layers/*/attn/k", "layers/*/attn/v"]),
    lb.Fold("layers/*/attn/v", "layers/*/attn/o"),
    lb.Fold("layers/*/mlp_norm", ["layers/*/mlp/gate", "layers/*/mlp/up"]),
    lb.Fold("layers/*/mlp/up", "layers/*/mlp/down"),
)


def windows(text: bytes, count: int) -> list[jax.Array]:
    cut = Windows(np.frombuffer(text, np.uint8), 128, 0)
    return [jnp.asarray(cut.batch(i, 8).astype(np.int32)) for i in range(count)]


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def awq(model: Any, batches: list[jax.Array]) -> Any:
    inputs = [b[:, :-1] for b in batches]
    stats = lb.calibrate(model, inputs, statistics=["magnitude", "gram"])
    return lb.awq(model, RULES, stats, folds=FOLDS, batch=inputs[0][:1])


def lwc(model: Any, batches: list[jax.Array]) -> Any:
    return lb.lwc(model, RULES, [b[:, :-1] for b in batches[:2]], blocks=["layers/*"], epochs=10, rate=0.1)


def q_rater(model: Any, batches: list[jax.Array]) -> Any:
    return lb.q_rater(model, RULES, batches[:2], loss, clips=(0.95, 0.9, 0.8, 0.7), shifts=(-0.1, 0.1))


@pytest.mark.parametrize("prepare", [awq, lwc, q_rater], ids=lambda f: f.__name__)
def test_text_that_was_held_out_loses_less(prepare: Callable[..., Any]) -> None:
    model = weights.load()
    held = windows(corpus.match_listed("code").text, 8)
    prepared = prepare(model, windows(b"".join(corpus.train_code().values()), 4))
    run = nnx.jit(loss)
    nearest, after = (np.mean([run(lb.quantize(m, RULES), b) for b in held]) for m in (model, prepared))
    assert after < nearest


@pytest.mark.slow
def test_scales_lower_the_error_of_the_layers_that_they_go_into() -> None:
    """Their own metric, here by a fifth: the loss of a model without a few large inputs need not follow."""
    model = weights.load()
    inputs = [b[:, :-1] for b in windows(b"".join(corpus.train_code().values()), 2)]
    stats = lb.calibrate(model, inputs, statistics=["magnitude", "gram"])
    scaled = lb.awq(model, RULES, stats, folds=FOLDS, batch=inputs[0][:1], clip=())
    assert errors(scaled, lb.calibrate(scaled, inputs, statistics=["gram"])) < errors(model, stats)


def errors(model: Any, stats: Any) -> float:
    total = 0.0
    for path in (p for p in stats if p != "embed"):
        w = layers(model)[path].kernel.get_value()
        d = np.asarray(lb.dequantize(lb.quantize_array(w, RULES["**"])) - w, np.float64)
        total += float((d * (np.asarray(stats[path].gram, np.float64) @ d)).sum())
    return total
