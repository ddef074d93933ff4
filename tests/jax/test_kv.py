"""Quantized caches: what is stored, in what order tokens come, and attention over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.models import Config, DenseCache, Fp8KV, Int8KV, Kivi, Rope
from lowbit.models.attention import Dense, How
from lowbit.models.kv import QuantCache, QuantKV
from lowbit.models.kv_store import Encoding, Store
from lowbit.quantizers import MinMax
from lowbit.testing.tolerance import assert_within, gamma, unit

Array = np.ndarray[Any, Any]
CONFIG = Config(vocab=32, width=24, layers=1, heads=4, kv_heads=2, head=6, hidden=32, context=64, ropes=(Rope(1e4, 6),))
LENGTHS = np.array([0, 5, 8, 16, 21, 24])
"""Of the sequences of a batch: none, fewer than the residual, as many, twice that, odd, more than there are slots."""
SLOTS, RESIDUAL, GROUP, CHUNK = 22, 8, 4, 24
STORED = np.minimum(LENGTHS, SLOTS)
PLACES = np.where(np.arange(CHUNK) < LENGTHS[:, None], np.arange(CHUNK), -1)
KIVI = Kivi(2, GROUP, RESIDUAL)  # whose last group of channels is smaller
KINDS: list[QuantKV] = [KIVI, Kivi(8, 8, 8, "float32"), Fp8KV(), Int8KV()]


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


KEYS = random(len(LENGTHS), CHUNK, CONFIG.kv_heads, CONFIG.head)
VALUES = random(*KEYS.shape, seed=1) + 3


@jax.jit
def append(cache: QuantCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> QuantCache:
    return cache.append(k, v, positions[:, None])


def empty(kind: QuantKV) -> QuantCache:
    return kind.empty(CONFIG, len(LENGTHS), SLOTS, jnp.float32)[0]


def filled(kind: QuantKV, k: jax.Array = KEYS, v: jax.Array = VALUES, positions: Array = PLACES) -> QuantCache:
    """A cache of one layer after one chunk with sequences of different lengths."""
    return append(empty(kind), k, v, jnp.asarray(positions))


def assert_same(a: Any, b: Any) -> None:
    """The same structure, and every array the same bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def decoded(store: Store) -> list[Array]:
    """Of each sequence the tokens it holds, [heads, length, D]: quantized ones as they decode."""
    dense, tail = np.asarray(lb.dequantize(store.codes)), np.asarray(store.tail)
    dense = dense.swapaxes(2, 3) if store.encoding.token == "k" else dense  # matrices come as n by k
    old = np.asarray(store.encoding.settled(jnp.asarray(STORED)))
    return [np.concatenate([dense[b, :, :n], tail[b, :, : STORED[b] - n]], axis=1) for b, n in enumerate(old)]


@pytest.mark.parametrize(("kind", "width"), [*((kind, 1) for kind in KINDS), (KIVI, 7)], ids=str)
def test_streaming_gives_what_one_chunk_does(kind: QuantKV, width: int) -> None:
    cache, more = empty(kind), ((0, 0), (0, 4), (0, 0), (0, 0))
    for at in range(0, CHUNK, width):
        place = np.arange(at, at + width)
        positions = jnp.asarray(np.where(place < LENGTHS[:, None], place, -1))
        cache = append(cache, *(jnp.pad(a, more)[:, at : at + width] for a in (KEYS, VALUES)), positions)
    assert_same(cache, filled(kind))
    assert cache.length[:, 0].tolist() == STORED.tolist()
    assert np.array_equal(np.asarray(cache.positions)[:, 0, :SLOTS], PLACES[:, :SLOTS])


def test_padding_may_lie_anywhere_in_a_chunk() -> None:
    place = np.full_like(PLACES, -1)
    for b, count in enumerate(LENGTHS):
        place[b, np.sort(np.random.default_rng(b).permutation(CHUNK)[:count])] = np.arange(count)
    row = np.arange(len(LENGTHS))[:, None]
    assert_same(filled(KIVI, KEYS[row, place], VALUES[row, place], place), filled(KIVI))


def test_what_is_quantized_and_what_is_not() -> None:
    cache = filled(KIVI)
    keys, values = decoded(cache.keys), decoded(cache.values)
    for b, count in enumerate(STORED):
        exact_k, exact_v = (np.asarray(a[b, :count]).swapaxes(0, 1) for a in (KEYS, VALUES))
        old_k, old_v = count // RESIDUAL * RESIDUAL, max(count - RESIDUAL, 0)
        assert np.array_equal(keys[b][:, old_k:], exact_k[:, old_k:])
        assert np.array_equal(values[b][:, old_v:], exact_v[:, old_v:])
        assert not cache.keys.tail[b, :, count - old_k :].any() and not cache.values.tail[b, :, count - old_v :].any()
        check_groups(keys[b][:, :old_k].swapaxes(1, 2), exact_k[:, :old_k].swapaxes(1, 2))
        check_groups(values[b][:, :old_v], exact_v[:, :old_v])


def check_groups(got: Array, exact: Array) -> None:
    """The error of each entry, in groups along the last axis, is within what the formula allows."""
    for at in range(0, exact.shape[-1], GROUP):
        made, group = got[..., at : at + GROUP], exact[..., at : at + GROUP]
        lo, hi = group.min(-1, keepdims=True), group.max(-1, keepdims=True)
        step, ends, u = (hi - lo) / 3, 2 * np.abs(lo) + np.abs(hi), unit("float16")
        # Half a step, or the cut where the stored minimum and scale were rounded, and the roundings in float32.
        bound = np.maximum(step * (1 + u) / 2, u * ends) + gamma(8, "f32") * ends
        assert_within(made, group, np.broadcast_to(bound, made.shape), "groups")


@pytest.mark.parametrize(
    ("kind", "bits"), [(Kivi(2), 3), (Kivi(4), 5), (Kivi(8, 64), 8.5), (Kivi(4, 32, 64, "float32"), 6)], ids=str
)
def test_bits_are_counted(kind: Kivi, bits: float) -> None:
    config = Config(vocab=32, width=64, layers=1, heads=1, kv_heads=1, head=64, hidden=32, context=64)
    (cache,) = kind.empty(config, 3, 1024 + kind.residual, jnp.bfloat16)
    stored = sum(a.nbytes for a in jax.tree.leaves((cache.keys.codes, cache.values.codes)))
    assert stored == (1024 + kind.residual + 1024) * 3 * 64 * bits / 8  # the newest values are never quantized
    assert cache.keys.tail.nbytes + cache.values.tail.nbytes == (2 * kind.residual - 1) * 3 * 64 * 2


@pytest.mark.parametrize(("kind", "size"), [(Fp8KV(), 6 + 4), (Int8KV(), 8 + 5)], ids=str)
def test_bytes_of_a_token_in_8_bits(kind: QuantKV, size: int) -> None:
    """Of integers, planes are whole bytes: 6 channels take the room of 8."""
    (cache,) = kind.empty(CONFIG, 1, 16, jnp.float32)
    assert sum(a.nbytes for a in jax.tree.leaves(cache.keys)) == 16 * CONFIG.kv_heads * size


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_are_those_with_what_is_stored(kind: QuantKV) -> None:
    cache = filled(kind)
    slots = cache.positions.shape[-1]
    q = random(len(LENGTHS), 3, 2, 2, CONFIG.head, seed=2)
    weights = jnp.abs(random(len(LENGTHS), 2, 2, 3, slots, seed=3)) * (cache.positions >= 0)[:, :, None, None]
    scores, mixed = jax.jit(lambda c: (c.scores(q), c.mixed(weights)))(cache)
    for b, (keys, values) in enumerate(zip(decoded(cache.keys), decoded(cache.values), strict=True)):
        x, w = (np.asarray(a).astype(np.float64) for a in (q[b].transpose(1, 2, 0, 3), weights[b, ..., : STORED[b]]))
        exact_scores, exact_mixed = x @ keys[:, None].swapaxes(-1, -2), w @ values[:, None]
        # Codes, scales and minima come in apart: no part of an entry is more than thrice the largest.
        largest = [3 * np.abs(a).max(initial=0) for a in (keys, values)]
        near = largest[0] * gamma(CONFIG.head + 12, "f32") * np.abs(x).sum(-1, keepdims=True)
        assert_within(scores[b, ..., : STORED[b]], exact_scores, np.broadcast_to(near, exact_scores.shape), "q K")
        near = largest[1] * gamma(slots + 12, "f32") * w.sum(-1, keepdims=True)
        assert_within(mixed[b].transpose(1, 2, 0, 3), exact_mixed, np.broadcast_to(near, exact_mixed.shape), "p V")


@pytest.mark.slow
def test_new_tokens_are_seen_as_they_are() -> None:
    """A prompt in one chunk is attended to exactly, whatever of it is then quantized."""
    q, how, positions = random(len(LENGTHS), CHUNK, 2, 1, CONFIG.head, seed=2), How(1.0), jnp.asarray(PLACES)
    out, cache = jax.jit(QuantCache.attend, static_argnums=5)(empty(KIVI), q, KEYS, VALUES, positions, how)
    dense = jax.jit(lambda: how.attend(q, positions, [Dense(KEYS, VALUES, positions[:, None])]))()
    # Relative errors of weights are absolute ones of scores, twice for their sum; then come the sums over tokens.
    score = float(jnp.abs(q).sum(-1).max() * jnp.abs(KEYS).max())
    relative = 4 * gamma(CONFIG.head + 4, "f32") * score + gamma(2 * CHUNK + 60, "f32")
    assert_within(out[PLACES >= 0], dense[PLACES >= 0], 2 * relative * float(jnp.abs(VALUES).max()), "attention")
    assert_same(cache, filled(KIVI))


@pytest.mark.slow
def test_a_decoder_with_all_tokens_in_the_residual_is_the_dense_one() -> None:
    model = lb.models.Decoder(CONFIG, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 8)))
    positions = jnp.array([[-1, -1, 0, 1, 2, 3, 4, -1], [0, 1, 2, 3, 4, 5, 6, -1]])
    step = nnx.jit(lambda model, ids, positions, cache: model.hidden(ids, positions, cache))
    quant: Any = Kivi(2, 8, 16).empty(CONFIG, 2, 24, jnp.float32)
    dense: Any = (DenseCache.empty(2, 24, 2, 6, jnp.float32),)
    for at in (slice(0, 4), slice(4, 8)):
        x, quant = step(model, ids[:, at], positions[:, at], quant)
        y, dense = step(model, ids[:, at], positions[:, at], dense)
        seen = np.asarray(positions[:, at] >= 0)
        # The same sums in another order, in attention and then through the MLP.
        bound = 8 * gamma(4 * CONFIG.width + CONFIG.hidden, "f32") * float(jnp.abs(y).max())
        assert_within(x[seen], y[seen], bound, "hidden")


def test_a_step_keeps_every_shape_and_type() -> None:
    (cache,) = KIVI.empty(CONFIG, 2, SLOTS, jnp.bfloat16)
    given = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 3, 2, 2, 6), (2, 3, 2, 6), (2, 3, 2, 6)))
    positions = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    out, after = jax.eval_shape(lambda *given: cache.attend(*given, How(1.0)), *given, positions)
    assert out.dtype == jnp.bfloat16 and cache.keys.tail.dtype == jnp.bfloat16
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    before = [(a.shape, a.dtype) for a in jax.tree.leaves(cache)]
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(after)] == before


def test_a_chunk_without_tokens_changes_nothing() -> None:
    before = filled(KIVI)
    assert_same(append(before, KEYS * jnp.nan, VALUES, jnp.full_like(PLACES, -1)), before)


def test_constant_groups() -> None:
    value = np.array([0.0, -7.3, 1e-9, 0.0, -7.3, 1e-9], np.float32)
    same = jnp.broadcast_to(value[:, None, None, None], KEYS.shape)
    cache = filled(KIVI, same, same)
    for b in (3, 4, 5):
        keys, values = decoded(cache.keys)[b][:, :16], decoded(cache.values)[b][:, : STORED[b] - RESIDUAL]
        assert (np.concatenate([keys, values], axis=1) == np.float16(value[b])).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_where_it_is(bad: float) -> None:
    cache = filled(KIVI, KEYS.at[5, 6, 0, 2].set(bad), VALUES.at[5, 6, 0, 2].set(bad))
    keys, values = (~np.isfinite(decoded(s)[5]) for s in (cache.keys, cache.values))
    assert keys[0, 4:8, 2].all() and keys.sum() == 4, "a group of four tokens of one channel"
    assert values[0, 6, :4].all() and values.sum() == 4, "a group of four channels of one token"
    assert_same(*(jax.tree.map(lambda a: a[:5], c.keys.codes) for c in (cache, filled(KIVI))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kivi(3), "bits must be 2, 4 or 8, not 3"),
        (lambda: Kivi(True), "bits must be 2, 4 or 8, not True"),
        (lambda: Kivi(2, 0), "group must be a positive int, not 0"),
        (lambda: Kivi(2, 32, 100), "residual = 100 tokens are not whole groups of 32: make it a positive multiple"),
        (lambda: Kivi(2, 32, 0), "residual = 0 tokens"),
        (lambda: Kivi(2, scale_dtype="int8"), "scale_dtype must be"),
        (lambda: MinMax()(jnp.ones((2, 8)), lb.k_quant(4)), "makes a float scale and minimum a group"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_format_whose_tokens_share_an_array_is_refused() -> None:
    shared = Encoding(lb.codebook(1, 4, 2), lb.quantizers.residual_kmeans(), "channels", unit=64)
    with pytest.raises(ValueError, match=r"codebook.* stores '\w+' for all tokens at once"):
        Store.empty(shared, 1, 128, 2, 8, jnp.float32)
