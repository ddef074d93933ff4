"""Eviction from a dense cache of what a model does not need to repeat its context (KVzip, Kim et al., NeurIPS 2025).

The model is asked to repeat its context, part by part, with the part itself as the answer. A key and value count as
much as the largest attention they are given on the way:

    S[head, j] = max over queries i, and heads of queries that share the head, of softmax(q_i K')_j

where K' are the keys of the sink (the first tokens, a system prompt), of the part, and of the repetition up to i. What
counts least is evicted, once, and the cache then serves any prompt. Tokens keep their positions. `compress` is all of
that for a `lowbit.models.Context`. Its steps:

    scores = importance(model, cache, repeats(context, first=..., later=..., suffix=...))
    cache = compact(evict(cache, keep_pairs(scores, 0.3)), spare=256)

`lowbit.models.Kivi().of(cache, slots)` then quantizes what is left. Layers that see a window only are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.models.attention import Dense, How, blocks
from lowbit.models.cache import DenseCache
from lowbit.models.context import Context
from lowbit.models.decoder import Cache, Decoder
from lowbit.models.kv import QuantKV, expect_dense
from lowbit.models.prompts import checked_tokens, expect_count
from lowbit.models.repeats import Array, Repeat
from lowbit.models.repeats import repeats as repeats

Scores = tuple[jax.Array | None, ...]
"""Of each layer float32 [B, kv_heads, S], negative for slots that are not up for eviction; None if none of them is."""
Kept = tuple[Array | None, ...]
"""Of each layer bool [B, kv_heads, S], whether a slot stays; None if all do."""


def compress(
    model: Decoder,
    context: Context,
    ratio: float,
    *,
    spare: int,
    first: Sequence[int],
    later: Sequence[int],
    suffix: Sequence[int] = (),
    chunk: int = 2000,
    sink: int = 0,
    overlap: int = 8,
    kind: QuantKV | None = None,
) -> Context:
    """What is left of a context without the keys and values that count least, by `keep_pairs`.

    Args:
      model: what has read the context, of any number of sequences.
      context: in a dense cache. It stays as it is.
      ratio: the part of the keys and values that stays.
      spare: tokens to leave room for.
      first, later, suffix, chunk, overlap: see `repeats`.
      sink: the first tokens of each sequence, such as a system prompt, which stay.
      kind: how what is left is stored; as it is if None.

    A layer has as many slots as the fullest of its heads needs, so the first `generate` after it compiles.

    Raises ValueError for a sink that leaves none of a sequence, a spare < 1, tokens that the model does not know, a
    context of another model, or what the steps refuse; TypeError for a context whose cache is not dense.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=2, head=4, hidden=32, context=64,
    ...     ropes=(lb.models.Rope(10_000.0, 4),),
    ... )
    >>> model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    >>> context = lb.models.read(model, [range(8, 20)], spare=8)
    >>> half = lb.models.kvzip.compress(model, context, 0.5, spare=8, first=[1, 2], later=[3])
    >>> (half.cache[0].positions >= 0).sum().item(), "of", (context.cache[0].positions >= 0).sum().item() * 2
    (11, 'of', 24)
    """
    context.expect(model.config)
    cache = expect_dense(context.cache)
    expect_count("spare", spare, "leave room for at least 1 token")
    if not 0 <= sink < (shortest := min(map(len, context.tokens))):
        raise ValueError(f"sink = {sink} of a context of {shortest} tokens: leave some of them to score")
    for name, ids in (("first", first), ("later", later), ("suffix", suffix)):
        checked_tokens(ids, model.config, name)
    mask = np.arange(max(map(len, context.tokens)) - sink) < np.array([[len(t) - sink] for t in context.tokens])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([t[sink:] for t in context.tokens])
    prompts = repeats(tokens, mask, first=first, later=later, suffix=suffix, chunk=chunk, sink=sink, overlap=overlap)
    dense = compact(evict(cache, keep_pairs(importance(model, cache, prompts, sink=sink), ratio)), spare)
    left: Cache = dense if kind is None else tuple(kind.of([entry], entry.k.shape[1])[0] for entry in dense)
    return replace(context, cache=left, spare=spare)


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "scores", "span"], meta_fields=[])
@dataclass(frozen=True)
class _Scored:
    """A cache that repetitions attend to and leave as it is, and the largest weights so far.

    Attributes:
      scores: float32 [B, kv_heads, S].
      span: int32 [3], the number of sink tokens, and the first position of the part and the one after it.
    """

    cache: DenseCache
    scores: jax.Array
    span: jax.Array

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, how: How
    ) -> tuple[jax.Array, _Scored]:
        """See `lowbit.models.attention.LayerCache`."""
        old, new = Dense(self.cache.k, self.cache.v, self.cache.positions), Dense(k, v, positions[:, None])
        out = how.attend(q, positions, [old, new])
        if how.window is not None:
            return out, self
        at, (sink, start, stop) = old.positions, self.span
        part = (at >= start) & (at < stop)
        chosen = [replace(old, positions=jnp.where(part | (at < sink), at, -1)), new]

        def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, positions = block
            scores = [how.scores(q, positions, one) for one in chosen]
            weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)[..., : at.shape[-1]]
            return jnp.where((positions >= 0)[:, None, None, :, None], weights, -1).max(axis=(2, 3))

        largest = jax.lax.map(of_block, blocks(q, positions)).max(axis=0)
        return out, replace(self, scores=jnp.maximum(self.scores, jnp.where(part, largest, -1)))


@nnx.jit
def _forward(model: Decoder, tokens: jax.Array, positions: jax.Array, cache: tuple[_Scored, ...]) -> list[jax.Array]:
    after = cast(tuple[_Scored, ...], model.hidden(tokens, positions, cache)[1])
    return [entry.scores for entry in after]


def importance(model: Decoder, cache: Sequence[DenseCache], prompts: Iterable[Repeat], *, sink: int = 0) -> Scores:
    """How much each key and value of a cache counts when the model repeats its context, from 0 to 1.

    Args:
      model: what filled the cache.
      cache: of all layers, after the context. It is not changed.
      prompts: as `repeats` makes them; all of one shape are compiled once. What none of them asks for stays.
      sink: the first tokens, which every part is scored beside and which stay.

    Scores are float32, also where the model computes in fewer bits, and made for a block of queries at once. The
    work is about that of reading the context once more. Repetitions take the positions after the context.

    Raises TypeError for a cache that is not dense, ValueError where learned positions end before a repetition does.
    """
    following = 1 + expect_dense(cache)[0].positions.max(axis=(1, 2))[:, None]
    scores = [jnp.full(entry.k.shape[:3], -1, jnp.float32).swapaxes(1, 2) for entry in cache]
    for prompt in prompts:
        mask = jnp.asarray(prompt.mask)
        _check_positions(model, int((following + mask.sum(axis=1, keepdims=True)).max()))
        positions = jnp.where(mask, following + jnp.cumsum(mask, axis=1) - 1, -1)
        span = jnp.array([sink, prompt.start, prompt.stop])
        entries = tuple(_Scored(entry, s, span) for entry, s in zip(cache, scores, strict=True))
        scores = _forward(model, jnp.asarray(prompt.tokens), positions, entries)
    return tuple(s if model.config.window(i) is None else None for i, s in enumerate(scores))


def _check_positions(model: Decoder, needed: int) -> None:
    if model.config.ropes is None and needed > model.config.context:
        have = f"the model has learned {model.config.context} of them"
        raise ValueError(
            f"the context and its repetition take {needed} positions, but {have}: repeat in smaller chunks"
        )


def keep_pairs(scores: Scores, ratio: float) -> Kept:
    """Which keys and values stay where all layers and heads share one threshold, of each sequence its own.

    Of n scores in descending order it is that at max(int(ratio n) - 1, 0), and what is strictly larger stays: of
    distinct scores int(ratio n) - 1, as in the published code; all for a ratio of 1.

    Raises ValueError for a ratio that is not from 0 to 1, NaN scores, or where no layer has any.

    >>> import jax.numpy as jnp
    >>> from lowbit.models import kvzip
    >>> kvzip.keep_pairs((jnp.array([[[-1, 0.9, 0.1, 0.5]]]), jnp.array([[[-1, 0.2, 0.8, 0.3]]])), 0.5)[0].tolist()
    [[[True, True, False, False]]]
    """
    layers = _given(scores, ratio)
    if ratio == 1:
        return (None,) * len(scores)
    every = np.concatenate([s.reshape(len(s), -1) for s in layers if s is not None], axis=1)
    counts = (every >= 0).sum(axis=1)
    least = [-np.sort(-row)[max(int(ratio * n) - 1, 0)] for row, n in zip(every, counts, strict=True)]
    threshold = np.array(least)[:, None, None]
    return tuple(None if s is None else (s < 0) | (s > threshold) for s in layers)


def keep_per_head(scores: Scores, ratio: float) -> Kept:
    """Which keys and values stay where each head keeps as many: the int(ratio n) of its n that count most, earlier ones
    first. Raises as `keep_pairs` does."""

    def of(s: Array) -> Array:
        rank = np.argsort(np.argsort(-s, axis=-1, kind="stable"), axis=-1)
        return (s < 0) | (rank < (ratio * (s >= 0).sum(axis=-1, keepdims=True)).astype(int))

    return tuple(None if s is None else of(s) for s in _given(scores, ratio))


def full_heads(scores: Scores, ratio: float) -> Kept:
    """The heads that keep everything, bool [kv_heads] of each layer: the int(ratio n) of all n heads that count most,
    earlier ones first. A head counts as much as the largest of its scores, of any sequence.

    Heads are much the same for every context, so scores of one sample do. Raises as `keep_pairs` does.
    """
    layers = [None if s is None else s.max(axis=(0, 2)) for s in _given(scores, ratio)]
    every = np.concatenate([s for s in layers if s is not None])
    chosen = np.zeros(len(every), bool)
    chosen[np.argsort(-every, kind="stable")[: int(ratio * len(every))]] = True
    parts = iter(np.split(chosen, np.cumsum([len(s) for s in layers if s is not None])))
    return tuple(None if s is None else next(parts) for s in layers)


def keep_heads(cache: Sequence[DenseCache], full: Kept, *, sink: int, recent: int) -> Kept:
    """Which keys and values stay where heads other than `full` ones keep the first `sink` tokens and the last `recent`
    ones: bool [B, kv_heads, S] of each layer."""

    def of(positions: Array, heads: Array) -> Array:
        last = positions.max(axis=-1, keepdims=True)
        return heads[:, None] | (positions < sink) | (positions > last - recent)

    entries = zip(cache, full, strict=True)
    return tuple(None if heads is None else of(np.asarray(entry.positions), heads) for entry, heads in entries)


def _given(scores: Scores, ratio: float) -> list[Array | None]:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio = {ratio}: the part that stays is from 0 to 1")
    layers = [None if s is None else np.asarray(s) for s in scores]
    if all(s is None for s in layers):
        raise ValueError("no layer attends to all positions: there is nothing to evict")
    if bad := [i for i, s in enumerate(layers) if s is not None and np.isnan(s).any()]:
        raise ValueError(f"scores of the layers {bad} hold NaN: the model's keys or queries do")
    return layers


def evict(cache: Sequence[DenseCache], kept: Kept) -> tuple[DenseCache, ...]:
    """The same caches without what does not stay: its slots are marked as empty, for each head.

    Nothing moves and no memory is freed; `compact` does that, with the same results.
    """
    return tuple(
        entry if mask is None else replace(entry, positions=jnp.where(jnp.asarray(mask), entry.positions, -1))
        for entry, mask in zip(expect_dense(cache), kept, strict=True)
    )


def compact(cache: Sequence[DenseCache], spare: int) -> tuple[DenseCache, ...]:
    """The same caches with what each head holds moved together, and room for `spare` more tokens.

    A layer has as many slots as the fullest of its heads needs, so it waits for the numbers and is not for `jax.jit`.
    """
    out = []
    for entry in expect_dense(cache):
        held = entry.positions >= 0
        order = jnp.argsort(~held, axis=-1, stable=True)
        length = held.sum(axis=-1, dtype=jnp.int32).max(axis=1)
        order = order[:, :, : int(length.max())]
        slots = jnp.broadcast_to(order, (len(order), entry.k.shape[2], order.shape[2])).swapaxes(1, 2)
        k, v = (jnp.take_along_axis(a, slots[..., None], axis=1) for a in (entry.k, entry.v))
        positions = jnp.take_along_axis(entry.positions, order, axis=-1)
        more = ((0, 0), (0, spare), (0, 0), (0, 0))
        free = jnp.pad(positions, ((0, 0), (0, 0), (0, spare)), constant_values=-1)
        out.append(DenseCache(jnp.pad(k, more), jnp.pad(v, more), free, length))
    return tuple(out)
