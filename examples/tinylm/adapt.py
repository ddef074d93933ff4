"""Fine-tuning the tinylm to another text: all parameters of the float model, or the scales of a quantized one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.tinylm.batches import Windows
from examples.tinylm.model import TinyLM

__all__ = ["STEPS", "fit"]

STEPS = 50
BATCH = 6


@nnx.jit(static_argnames="wrt")
def _step(model: TinyLM, optimizer: nnx.Optimizer[TinyLM], tokens: jax.Array, wrt: type) -> jax.Array:
    def loss(model: TinyLM) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, gradients)
    return value


def schedule(rate: float, steps: int = STEPS) -> optax.Schedule:
    """A short warm-up to `rate`, then cosine decay to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)


def fit(model: TinyLM, optimizer: nnx.Optimizer[TinyLM], text: bytes, *, wrt: type, steps: int = STEPS) -> list[float]:
    """Trains the `wrt` Variables of `model` in place on random windows of `text`; returns the losses in bits a byte.

    The windows are the same for every call with the same text, so two ways of tuning see the same data.
    """
    windows = Windows(np.frombuffer(text, np.uint8), model.config.context, 0)
    losses = []
    for i in range(steps):
        tokens = jnp.asarray(windows.batch(i, BATCH).astype(np.int32))
        losses.append(float(_step(model, optimizer, tokens, wrt)) / float(np.log(2)))
    return losses
