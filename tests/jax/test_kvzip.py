"""Eviction from a cache: scores by their definition, rules with known answers, and equal results of both forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.models import Config, DenseCache, DenseKV, Kivi, Rope, kvzip
from lowbit.models.attention import How
from lowbit.models.kv import QuantCache
from lowbit.testing.tolerance import assert_within, gamma

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).parents[2]
HEADS, SLOTS, HEAD, SPARE = 2, 14, 4, 4
CONFIG = Config(
    vocab=32,
    width=16,
    layers=2,
    heads=4,
    kv_heads=HEADS,
    head=HEAD,
    hidden=16,
    context=64,
    ropes=(Rope(1e4, HEAD),) * 2,
    windows=(3, None),
)
LENGTHS = np.array([12, 9])
PLACES = np.where(np.arange(SLOTS) < LENGTHS[:, None], np.arange(SLOTS), -1)
CONTEXT = np.random.default_rng(0).integers(0, 32, (2, SLOTS))
STEP = jnp.array([[12, 13, 14], [9, 10, -1]])
"""Positions of tokens that come after."""


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense() -> DenseCache:
    shape = (2, SLOTS, HEADS, HEAD)
    empty = DenseCache.empty(2, SLOTS + SPARE, HEADS, HEAD, jnp.float32)
    return empty.append(random(*shape), random(*shape, seed=1), jnp.asarray(PLACES))


def some(seed: int = 0) -> Array:
    """Slots that stay, of each sequence and head others and another number of them."""
    kept = np.random.default_rng(seed).random((2, HEADS, SLOTS + SPARE)) < 0.5
    kept[0, 0, :11] = True
    return kept


attend = jax.jit(lambda cache, *given: cache.attend(*given), static_argnums=5)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("block", [pytest.param(512, marks=pytest.mark.slow), 2])
def test_scores_are_the_largest_weights(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.models.attention.BLOCK", block)
    cache, how, start, stop = dense(), How(0.5), 4, 8
    q, k, v = random(2, 3, HEADS, 2, HEAD, seed=2), random(2, 3, HEADS, HEAD, seed=3), random(2, 3, HEADS, HEAD, seed=4)
    before = jnp.full((2, HEADS, SLOTS + SPARE), -1.0).at[0, 0, 5].set(0.99)
    scored = kvzip._Scored(cache, before, jnp.array([1, start, stop]))
    out, after = jax.jit(lambda c: c.attend(q, k, v, STEP, how))(scored)
    expected, chosen = np.array(before), [0, *range(start, stop)]
    for b, h, i, g in np.ndindex(2, HEADS, 3, 2):
        seen = [j for j in range(3) if 0 <= STEP[b, j] <= STEP[b, i]]
        keys = np.concatenate([np.asarray(cache.k)[b, chosen, h], np.asarray(k)[b, seen, h]]).astype(np.float64)
        weights = softmax(0.5 * keys @ np.asarray(q[b, i, h, g]))[1 : len(chosen)]
        if STEP[b, i] >= 0:
            expected[b, h, start:stop] = np.maximum(expected[b, h, start:stop], weights)
    # Relative errors of weights are absolute ones of scores, twice for their sum.
    largest = 0.5 * float(jnp.abs(q).sum(-1).max()) * float(jnp.maximum(jnp.abs(cache.k).max(), jnp.abs(k).max()))
    assert_within(after.scores, expected, 4 * gamma(HEAD + 24, "f32") * (1 + largest), "scores")
    # What queries get is from the whole cache.
    whole = attend(cache, q, k, v, STEP, how)[0]
    values = float(jnp.maximum(jnp.abs(cache.v).max(), jnp.abs(v).max()))
    bound = 8 * gamma(HEAD + SLOTS + 40, "f32") * (1 + largest) * values
    assert_within(out[STEP >= 0], whole[STEP >= 0], bound, "attention")


@pytest.mark.slow
def test_a_context_is_scored_part_by_part() -> None:
    """Of a model of two layers, of which the first sees a window only."""
    model = lb.models.Decoder(CONFIG, rngs=nnx.Rngs(0))
    empty = tuple(DenseCache.empty(2, SLOTS, HEADS, HEAD, jnp.float32) for _ in range(2))
    cache: Any = nnx.jit(lambda m: m.hidden(jnp.asarray(CONTEXT), jnp.asarray(PLACES), empty)[1])(model)
    before = jax.tree.map(np.asarray, cache)
    asked: Any = {"first": [1, 2], "later": [3], "suffix": [4], "chunk": 6, "sink": 2, "overlap": 2}
    prompts = kvzip.repeats(CONTEXT[:, 2:], PLACES[:, 2:] >= 0, **asked)
    assert [(p.start, p.stop) for p in prompts] == [(2, 8), (8, 14)] and len({p.tokens.shape for p in prompts}) == 1
    local, scores = kvzip.importance(model, cache, prompts, sink=2)
    assert local is None and scores is not None
    assert np.array_equal(np.asarray(scores[:, 0] >= 0), PLACES >= 2) and float(scores.max()) <= 1
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    alone = kvzip.importance(model, cache, prompts[1:], sink=2)[1]
    assert alone is not None and np.array_equal(np.asarray(alone)[..., 8:], np.asarray(scores)[..., 8:])
    assert (np.asarray(alone)[..., :8] == -1).all()
    forms = kvzip.evict(cache, kvzip.keep_pairs((None, scores), 0.5))
    ids = jnp.array([[5, 6, 7], [8, 9, 0]])
    step = nnx.jit(lambda m, cache: m.logits(m.hidden(ids, STEP, cache)[0]))
    room = kvzip.compact(forms, 3)
    assert room[0].k.shape[1] == 15 and room[1].k.shape[1] < SLOTS
    masked, compacted = step(model, (*room[:1], pad(forms[1], 3))), step(model, room)
    # The same sums in another order, in attention, MLP and head.
    bound = 16 * gamma(8 * CONFIG.width + SLOTS + 60, "f32") * float(jnp.abs(masked).max()) * 4
    assert_within(compacted[STEP >= 0], masked[STEP >= 0], bound, "logits")


def pad(cache: DenseCache, spare: int) -> DenseCache:
    """With more slots."""
    more = ((0, 0), (0, spare), (0, 0), (0, 0))
    positions = jnp.pad(cache.positions, more[:1] + more[:1] + more[1:2], constant_values=-1)
    return DenseCache(jnp.pad(cache.k, more), jnp.pad(cache.v, more), positions, cache.length)


def test_both_forms_attend_to_what_is_left() -> None:
    """And go on to take new tokens, which are kept for every head."""
    (masked,), how = kvzip.evict([dense()], (some(),)), How(1.0)
    (compacted,) = kvzip.compact([masked], SPARE)
    q, k, v = random(2, 3, HEADS, 2, HEAD, seed=2), random(2, 3, HEADS, HEAD, seed=3), random(2, 3, HEADS, HEAD, seed=4)
    held, more = np.asarray(masked.positions >= 0).sum(-1), np.array([[3], [2]])
    assert compacted.k.shape[1] == held.max() + SPARE < masked.k.shape[1]
    assert compacted.length.tolist() == held.max(1).tolist()
    (a, after_a), (b, after_b) = (attend(c, q, k, v, STEP, how) for c in (masked, compacted))
    exact = np.zeros(q.shape)
    for s, t, h, g in np.ndindex(2, 3, HEADS, 2):
        left = np.flatnonzero(some()[s, h] & (np.asarray(dense().positions[s, 0]) >= 0))
        seen = [j for j in range(3) if 0 <= STEP[s, j] <= STEP[s, t]]
        keys, values = (
            np.concatenate([np.asarray(old)[s, left, h], np.asarray(new)[s, seen, h]]).astype(np.float64)
            for old, new in ((dense().k, k), (dense().v, v))
        )
        if STEP[s, t] >= 0:
            exact[s, t, h, g] = softmax(keys @ np.asarray(q[s, t, h, g])) @ values
    largest = float(jnp.abs(q).sum(-1).max()) * 4
    for got in (a, b):
        bound = 4 * gamma(HEAD + SLOTS + 40, "f32") * (1 + largest) * 4
        assert_within(got[STEP >= 0], exact[np.asarray(STEP >= 0)], bound, "attention")
    assert np.array_equal((after_a.positions >= 0).sum(-1), held + more)
    assert np.array_equal((after_b.positions >= 0).sum(-1), held + more)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["masked", "compacted"])
def test_what_is_left_is_quantized_as_if_there_had_been_nothing_else(form: str) -> None:
    kind = Kivi(2, 2, 4)
    masked = kvzip.evict([dense()], (some(),))
    (cache,) = kind.of(masked if form == "masked" else kvzip.compact(masked, 0), 16)
    held, one = dense(), Config(vocab=1, width=1, layers=1, heads=1, kv_heads=1, head=HEAD, hidden=1, context=1)
    append = jax.jit(QuantCache.append)
    for b, h in np.ndindex(2, HEADS):
        left = np.flatnonzero(some()[b, h] & (np.asarray(held.positions[b, 0]) >= 0))
        place = np.pad(left, (0, SLOTS - len(left)), constant_values=-1)
        (alone,) = kind.empty(one, 1, 16, jnp.float32)
        alone = append(alone, held.k[b, place, h][None, :, None], held.v[b, place, h][None, :, None], place[None, None])
        assert cache.length[b, h] == len(left) and np.array_equal(cache.positions[b, h], alone.positions[0, 0])
        mine, other = ((c.keys, c.values) for c in (cache, alone))
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
            assert np.array_equal(x[b, h], y[0, 0])
    _, after = attend(cache, *(random(2, 3, HEADS, *s, HEAD) for s in ((1,), (), ())), STEP, How(1.0))
    assert np.array_equal(after.length, cache.length + jnp.array([[3], [2]]))


def layers(*scores: Any) -> kvzip.Scores:
    """Of one sequence and head each."""
    return tuple(jnp.array(s, jnp.float32)[None, None] for s in scores)


def flat(kept: kvzip.Kept) -> list[Any]:
    return [None if k is None else k.ravel().tolist() for k in kept]


TWO = layers([-1, 0.9, 0.1, 0.5, 0.4], [0.2, 0.8, 0.3, -1, 0.7])
"""Eight scores; two slots are not up for eviction."""


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        (0.5, [[1, 1, 0, 0, 0], [0, 1, 0, 1, 1]]),  # strictly above the fourth largest
        (0.63, [[1, 1, 0, 1, 0], [0, 1, 0, 1, 1]]),  # the fifth
        (0.01, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]),  # above the largest
        (0, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]),
        (0.99, [[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]),
    ],
)
def test_pairs_share_one_threshold(ratio: float, kept: list[list[int]]) -> None:
    assert flat(kvzip.keep_pairs(TWO, ratio)) == kept


def test_all_pairs_stay_at_a_ratio_of_1() -> None:
    assert kvzip.keep_pairs(TWO, 1) == (None, None)
    (same,) = kvzip.evict([dense()], (None,))
    assert np.array_equal(same.positions, dense().positions)


def test_sequences_have_thresholds_of_their_own() -> None:
    scores = jnp.array([[[0.1, 0.2, 0.3, 0.4]], [[0.9, 0.8, -1, -1]]])
    assert kvzip.keep_pairs((scores,), 0.75)[0].tolist() == [[[0, 0, 1, 1]], [[0, 0, 1, 1]]]  # type: ignore[union-attr]


def test_equal_scores_at_the_threshold_go() -> None:
    assert flat(kvzip.keep_pairs(layers([0.5, 0.5, 0.5, 0.9]), 0.75)) == [[0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.5, [[1, 1, 0, 1, 0], [0, 1, 0, 1, 1]]), (0.2, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]), (1, [[1] * 5] * 2)],
)
def test_heads_keep_as_many_each(ratio: float, kept: list[list[int]]) -> None:
    assert flat(kvzip.keep_per_head(TWO, ratio)) == kept


def test_heads_that_count_most_keep_everything() -> None:
    scores = random(2, HEADS, SLOTS + SPARE).at[1, 1].add(9)
    full = kvzip.full_heads((None, scores, scores - 20), 0.25)
    assert flat(full) == [None, [False, True], [False, False]]
    kept = kvzip.keep_heads([dense()] * 3, full, sink=2, recent=3)
    assert kept[0] is None
    last = [
        [p < 2 or (p >= n - 3) for p in row] for row, n in zip(dense().positions[:, 0].tolist(), LENGTHS, strict=True)
    ]
    there = np.asarray(dense().positions[:, 0] >= 0)
    assert kept[1][:, 1].all() and np.array_equal(kept[1][:, 0] & there, last & there)  # type: ignore[index]
    assert np.array_equal(kept[2][:, 0], kept[1][:, 0])  # type: ignore[index]
    assert flat(kvzip.full_heads(TWO, 1)) == [[True], [True]] and flat(kvzip.full_heads(TWO, 0.4)) == [[False], [False]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kvzip.keep_pairs(TWO, 1.5), "ratio = 1.5: the part that stays is from 0 to 1"),
        (lambda: kvzip.keep_per_head(TWO, -0.1), "ratio = -0.1"),
        (lambda: kvzip.keep_pairs((None, None), 0.5), "no layer attends to all positions"),
        (lambda: kvzip.keep_pairs((*TWO, jnp.full((1, 1, 5), jnp.nan)), 0.5), r"scores of the layers \[2\] hold NaN"),
        (lambda: kvzip.repeats([1, 2], first=[], later=[]), r"context has shape \(2,\) and mask \(2,\)"),
        (lambda: kvzip.repeats([[1]], [[True, True]], first=[], later=[]), r"\(1, 1\) and mask \(1, 2\)"),
        (lambda: kvzip.repeats([[1]], first=[], later=[], chunk=0), "chunk = 0: a part has at least 1 token"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_quantized_cache_is_not_evicted_from() -> None:
    cache: Any = Kivi(2, 2, 4).empty(CONFIG, 1, 8, jnp.float32)
    for use in (
        lambda: kvzip.importance(lb.models.Decoder(CONFIG, rngs=nnx.Rngs(0)), cache, []),
        lambda: kvzip.evict(cache, (None, None)),
        lambda: kvzip.compact(cache, 1),
        lambda: Kivi().of(cache, 8),
    ):
        with pytest.raises(TypeError, match="layer 0 has a QuantCache: fill a dense cache"):
            use()


def test_learned_positions_that_end_too_early() -> None:
    model = lb.models.Decoder(replace(CONFIG, ropes=None, context=16), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="repetition take 18 positions, but the model has learned 16 of them"):
        kvzip.importance(model, [dense()] * 2, kvzip.repeats(CONTEXT[:, :4], first=[1, 2], later=[]))


@pytest.mark.slow
def test_a_trained_model_does_without_what_counts_least() -> None:
    """With a third of the pairs it repeats its context, and goes on after it, as well as with all; not so at random."""
    model = lb.models.load(ROOT / "examples/tinylm/model", dtype=jnp.float32)
    text = (
        np.frombuffer((ROOT / "LICENSE").read_bytes()[1000 : 1000 + 8 * 256], np.uint8).astype(np.int32).reshape(8, 256)
    )
    size, positions = 128, jnp.broadcast_to(jnp.arange(256), (8, 256))
    step = nnx.jit(lambda m, ids, at, cache: (lambda x, after: (m.logits(x), after))(*m.hidden(ids, at, cache)))
    cache: Any = DenseKV().empty(model.config, 8, size, jnp.float32)
    _, cache = step(model, text[:, :size], positions[:, :size], cache)
    scores = kvzip.importance(model, cache, kvzip.repeats(text[:, :size], first=[10], later=[], chunk=size))
    guesses = tuple(random(8, 4, size, seed=i) ** 2 for i in range(model.config.layers))

    def loss(kept: kvzip.Kept, ids: Array) -> float:
        left = tuple(pad(entry, size) for entry in kvzip.evict(cache, kept))
        logits = step(model, ids, positions[:, size:], left)[0]
        return float(-jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(ids)[:, 1:, None], -1).mean())

    for ids in (text[:, :size], text[:, size:]):
        whole, chosen, guessed = (
            loss(kvzip.keep_pairs(s, r), ids) for s, r in ((scores, 1), (scores, 0.3), (guesses, 0.3))
        )
        assert chosen - whole < 0.1 * (guessed - whole), (whole, chosen, guessed)
