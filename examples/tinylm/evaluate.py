"""Held-out bits per byte of a tinylm on both domains, next to ``xz -9e`` on the same bytes."""

from __future__ import annotations

import argparse
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.tinylm import corpus, weights
from examples.tinylm.model import TinyLM
from lowbit.models.evaluate import windows as windows_of

__all__ = ["bits_per_byte", "windows"]


def windows(text: bytes, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a text into overlapping windows such that each byte is predicted exactly once.

    Windows start half a context apart and only the later half of each counts (all of the first), so every byte is
    predicted from at least the ``context // 2`` bytes before it, or all there are. A newline stands before the text,
    so that its first byte has something to be predicted from.

    Args:
        text: N bytes, at least one.
        context: window length; even.

    Returns:
        Inputs uint8 [W, context], targets uint8 [W, context], and the bool mask [W, context] of targets that count;
        the mask has N true entries.

    Example:
        >>> inputs, targets, counts = windows(b"abcdef", 4)
        >>> bytes(targets[counts])
        b'abcdef'
    """
    return windows_of(np.frombuffer(b"\n" + text, np.uint8), context)


@nnx.jit
def _nats(model: TinyLM, inputs: jax.Array, targets: jax.Array, counts: jax.Array) -> jax.Array:
    """Summed negative log-likelihood of the targets that count; [B, T] each -> scalar float32."""
    scores = jax.nn.log_softmax(model(inputs.astype(jnp.int32)))
    picked = jnp.take_along_axis(scores, targets.astype(jnp.int32)[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked, where=counts)


def bits_per_byte(model: TinyLM, text: bytes, *, every: int = 1, batch: int = 16) -> float:
    """Mean -log2 p(byte | the bytes before it) over `text`, in windows of the model's context (see `windows`).

    Args:
        model: anything that maps int [B, T] to logits [B, T, 256] and has `config.context`.
        text: at least one byte.
        every: reads only each `every`-th window: a sample spread over the whole text, each byte in its true context.
        batch: windows a call; the last batch is filled up with windows that do not count.

    Raises:
        ValueError: `text` is empty.
    """
    if not text:
        raise ValueError("bits_per_byte of an empty text is undefined; give at least one byte")
    parts = tuple(part[::every] for part in windows(text, model.config.context))
    missing = -len(parts[0]) % batch
    inputs, targets, counts = (np.concatenate([p, np.zeros((missing, p.shape[1]), p.dtype)]) for p in parts)
    # Summed in float64 here: a float32 running sum over all batches would lose the digits that get reported.
    total = 0.0
    for i in range(0, len(inputs), batch):
        total += float(_nats(model, *(jnp.asarray(part[i : i + batch]) for part in (inputs, targets, counts))))
    return total / math.log(2) / int(counts.sum())


def main() -> None:
    """Prints the held-out bits per byte of the model and of xz, on code (A) and on prose (B)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--weights", type=pathlib.Path, default=weights.MODEL)
    args = parser.parse_args()
    model = weights.load(args.weights)
    for label, domain in (("A (code)", "code"), ("B (prose)", "topics")):
        held = corpus.match_listed(domain)
        print(f"{label}: {held}", flush=True)
        print(f"  model   {bits_per_byte(model, held.text):.4f} bits/byte", flush=True)
        print(f"  xz -9e  {corpus.xz_bits(held.text):.4f} bits/byte", flush=True)


if __name__ == "__main__":
    main()
