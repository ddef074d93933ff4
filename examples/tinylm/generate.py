"""Greedy or sampled continuation of a prompt, one byte at a time through the KV cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.tinylm.model import Cache, TinyLM

__all__ = ["generate"]


Carry = tuple[Cache, jax.Array, jax.Array]


@nnx.jit
def _continue(model: TinyLM, given: jax.Array, known: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
    """Bytes 1..L of a stream whose first `known` bytes are those of `given`, int32 [L] -> int32 [L]."""

    def step(carry: Carry, pos: jax.Array) -> tuple[Carry, jax.Array]:
        cache, last, key = carry
        token = jnp.where(pos < known, given[pos], last)
        logits, cache = model.decode_step(cache, token[None], pos)
        key, now = jax.random.split(key)
        # Gumbel-max: the argmax of logits + temperature * noise is a sample, and at temperature 0 plain greedy.
        chosen = jnp.argmax(logits[0] + temperature * jax.random.gumbel(now, logits[0].shape)).astype(jnp.int32)
        return (cache, chosen, key), chosen

    return jax.lax.scan(step, (model.init_cache(1), given[0], key), jnp.arange(given.shape[0]))[1]


def generate(model: TinyLM, prompt: bytes, n: int, *, temperature: float = 0.0, seed: int = 0) -> bytes:
    """Continues `prompt` by `n` bytes.

    The whole run, prompt included, is one jitted scan over `TinyLM.decode_step`; it is compiled once for each
    ``len(prompt) + n``. Past ``model.config.context`` bytes the cache forgets the oldest.

    Args:
        model: the model, quantized or not.
        prompt: at least one byte.
        n: bytes to add, at least one.
        temperature: 0 takes the likeliest byte; above 0 samples from the logits divided by it.
        seed: of the sampling.

    Returns:
        The `n` new bytes.

    Raises:
        ValueError: the prompt is empty, `n` is below 1 or the temperature below 0.

    Example:
        >>> from examples.tinylm.model import Config
        >>> model = TinyLM(Config(layers=1, width=128, hidden=128, context=16), rngs=nnx.Rngs(0))
        >>> len(generate(model, b"def ", 3))
        3
    """
    if not prompt:
        raise ValueError("generate needs a prompt of at least one byte; b'\\n' starts a line")
    if n < 1 or temperature < 0:
        raise ValueError(f"generate needs n >= 1 and temperature >= 0, got n={n} and temperature={temperature}")
    given = np.zeros(len(prompt) + n - 1, np.int32)
    given[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    new = _continue(model, jnp.asarray(given), jnp.int32(len(prompt)), jnp.float32(temperature), jax.random.key(seed))
    return np.asarray(new)[len(prompt) - 1 :].astype(np.uint8).tobytes()
