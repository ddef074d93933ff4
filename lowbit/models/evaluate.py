"""How well a language model predicts a text."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.models.decoder import Decoder
from lowbit.nn.switch import effective_bits, switches

LONGEST = 2048
"""Of a window whose length is not given."""


@dataclass(frozen=True)
class Score:
    """What a text costs a model.

    Attributes:
      tokens: that were predicted: all but the first.
      nats: of each, on average.
      perplexity: e to the power of that.
      bits_per_byte: of the text, whose size the caller gave; of a byte level model, bits a token.
      effective_bits: of a model whose layers choose their widths, their mean over all weights and the tokens of all
        windows; None of others.
    """

    tokens: int
    nats: float
    perplexity: float
    bits_per_byte: float
    effective_bits: float | None = None


def evaluate(model: Decoder, ids: Any, *, length: int | None = None, batch: int = 8, size: int | None = None) -> Score:
    """The mean negative log likelihood of a text, each token predicted once.

    Windows start half a window apart and the later half of each counts (of the first one all), so that tokens are
    predicted from at least half a window, or from all there is.

    Args:
      model: dense or quantized. One whose layers choose their widths (`lb.tune.switched`) chooses as it says
        (`lb.nn.switching`): at first for each token, as if it were decoded alone.
      ids: int [tokens], at least two.
      length: of a window; the model's context, at most 2048, if None.
      batch: windows that run at once.
      size: bytes of the text; as many as there are tokens if None.

    Raises ValueError for a text of fewer than two tokens, tokens that the model does not have, or a window longer than
    the model's context where positions are learned.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> sizes = {"vocab": 8, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head": 4, "hidden": 8, "context": 16}
    >>> model = lb.models.Decoder(lb.models.Config(**sizes), rngs=nnx.Rngs(0))
    >>> lb.models.evaluate(model, [1, 2, 3, 4, 5]).tokens
    4
    """
    ids = np.asarray(ids, np.int32)
    length = min(model.config.context, LONGEST) if length is None else length
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: at least 2 are needed, one to predict another from")
    if ids.min() < 0 or ids.max() >= model.config.vocab:
        odd = int(ids.max() if ids.min() >= 0 else ids.min())
        raise ValueError(f"the text has the token {odd}, and the model has {model.config.vocab}: use its tokenizer")
    if length < 2 or (model.config.ropes is None and length > model.config.context):
        raise ValueError(f"length = {length}: it must be from 2 to the model's {model.config.context}")
    length = min(length + length % 2, len(ids) - 1 + (len(ids) - 1) % 2)
    inputs, targets, counts = windows(ids, length)
    there = np.arange(len(inputs))[:, None] * (length // 2) + np.arange(length) < len(ids) - 1
    padded = [np.pad(a, ((0, -len(a) % batch), (0, 0))) for a in (inputs, targets, counts, there)]
    # Summed in float64 here: a running float32 sum over all batches would lose the digits that are shown.
    totals = np.zeros(2)
    for i in range(0, len(padded[0]), batch):
        totals += np.asarray(_sums(model, *(jnp.asarray(a[i : i + batch]) for a in padded)), np.float64)
    nats = float(totals[0]) / (len(ids) - 1)
    per_byte = float(totals[0]) / log(2) / (len(ids) if size is None else size)
    bits = float(totals[1] / there.sum()) if switches(model) else None
    return Score(len(ids) - 1, nats, exp(nats), per_byte, bits)


def windows(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets int32 [W, length], and which targets count, bool [W, length]: each token once."""
    half, count = length // 2, len(ids) - 1
    index = np.arange(0, max(count - half, 1), half)[:, None] + np.arange(length)
    counts = index < count
    counts[1:, :half] = False
    padded = np.concatenate([ids, np.zeros(length, ids.dtype)])
    return padded[index], padded[index + 1], counts


@nnx.jit
def _sums(model: Decoder, inputs: jax.Array, targets: jax.Array, counts: jax.Array, there: jax.Array) -> jax.Array:
    """float32 [2]: the nats of targets that count, and the effective bits of tokens that there are, if any layer
    switches."""
    bits = jnp.float32(0)
    if switches(model):
        logits, chosen = effective_bits(lambda model: model(inputs, there), model)
        bits = chosen.mean * there.sum()
    else:
        logits = model(inputs)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.stack([-jnp.sum(picked, where=counts), bits])
