"""Contexts that are read once: what follows them is what follows context and prompt together."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit.models import Config, Context, Decoder, DenseCache, Kivi, Rope, generate, kvzip, read
from lowbit.models.kv import QuantCache
from lowbit.testing.tolerance import assert_within, gamma

CONFIG = Config(
    vocab=48, width=32, layers=1, heads=4, kv_heads=2, head=8, hidden=32, context=32, ropes=(Rope(10_000.0, 8),)
)
PAST = [list(range(20, 40)), [3, 1, 4, 1, 5, 9, 2, 6, 5], list(range(14))]
NEW = [[5, 6, 7], [1], [8, 9, 10, 11, 12]]
KIVI = Kivi(2, group=4, residual=8)


@cache
def tiny() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@cache
def dense() -> Context:
    return read(tiny(), PAST, spare=20, chunk=32)


def after(context: Context, prompts: Sequence[Sequence[int]] = NEW, n: int = 6, **options: Any) -> list[list[int]]:
    return generate(tiny(), prompts, n, context=context, **options)


@pytest.mark.slow
def test_what_follows_is_what_follows_context_and_prompt_together() -> None:
    """More than once: the context is not changed."""
    whole = [[*past, *new] for past, new in zip(PAST, NEW, strict=True)]
    want = generate(tiny(), whole, 6, slots=64, chunk=32)
    assert len({token for tokens in want for token in tokens}) > 4
    assert after(dense()) == want and after(dense()) == want


def test_one_context_serves_all_prompts() -> None:
    whole = [[*PAST[0], *new] for new in NEW]
    context = read(tiny(), PAST[:1], spare=20, chunk=32)
    assert after(context) == generate(tiny(), whole, 6, slots=64, chunk=32)


@pytest.mark.slow
def test_a_quantized_context_is_what_one_read_in_the_same_pieces_is() -> None:
    past = [tokens[:8] for tokens in PAST]  # as many as are read at once, so that pieces end alike
    whole = [[*before, *new] for before, new in zip(past, NEW, strict=True)]
    context = read(tiny(), past, spare=24, cache=KIVI, chunk=8)
    assert isinstance(context.cache[0], QuantCache) and context.spare == 24
    want = generate(tiny(), whole, 6, cache=KIVI, slots=32, chunk=8)
    assert after(context) == want and after(context) == want


def compressed(ratio: float, spare: int = 20, **options: Any) -> Context:
    asked: dict[str, Any] = {"spare": spare, "first": [40, 41], "later": [42], "suffix": [43], "chunk": 8, "overlap": 2}
    return kvzip.compress(tiny(), dense(), ratio, **asked, **options)


@cache
def third() -> Context:
    return compressed(0.3, sink=2)


@cache
def masked() -> Context:
    """The dense context, where the slots of what `third` has left out are marked as empty."""
    (whole,), (left,) = dense().cache, third().cache
    assert isinstance(whole, DenseCache) and isinstance(left, DenseCache)
    held = np.broadcast_to(np.asarray(whole.positions), (3, CONFIG.kv_heads, whole.k.shape[1])).copy()
    for row, head in np.ndindex(held.shape[:2]):
        held[row, head, ~np.isin(held[row, head], left.positions[row, head])] = -1
    return replace(dense(), cache=(replace(whole, positions=jnp.asarray(held)),))


@pytest.mark.slow
def test_all_of_a_context_is_as_good_as_the_context() -> None:
    assert after(compressed(1, spare=44)) == after(dense())


def test_what_is_left_of_a_context_takes_new_tokens() -> None:
    """As the whole cache does where what was left out is masked: the logits of all at once, and so the tokens."""
    there = np.array([len(past) for past in PAST])
    held = np.asarray((masked().cache[0].positions >= 0).sum(-1))  # type: ignore[attr-defined]
    assert (
        np.array_equal(held.sum(-1), 2 * 2 + (0.3 * 2 * (there - 2)).astype(int) - 1)
        and (held[:, 0] != held[:, 1]).any()
    )
    new = after(third())
    assert new != after(dense())
    size = max(map(len, NEW)) + 6
    texts = [[*prompt, *tokens] for prompt, tokens in zip(NEW, new, strict=True)]
    ids = np.array([[*text, *[0] * (size - len(text))] for text in texts])
    real = np.arange(size) < np.array([[len(text)] for text in texts])
    at = np.where(real, there[:, None] + np.arange(size), -1)
    logits = nnx.jit(lambda model, cache: model.logits(model.hidden(ids, at, cache)[0]))
    got, want = (np.asarray(logits(tiny(), context.cache))[real] for context in (third(), masked()))
    # The same sums in another order, in attention, MLP and head.
    assert_within(got, want, 16 * gamma(8 * CONFIG.width + 64, "f32") * float(np.abs(want).max()) * 4, "logits")
    best = iter(want.argmax(-1).tolist())
    likeliest = [[next(best) for _ in text] for text in texts]
    assert [row[len(prompt) - 1 : -1] for row, prompt in zip(likeliest, NEW, strict=True)] == new


@pytest.mark.slow
def test_what_is_left_of_a_context_is_quantized() -> None:
    context = compressed(0.3, sink=2, kind=KIVI)
    (layer,) = context.cache
    assert isinstance(layer, QuantCache) and layer.length.shape == (3, 2)
    assert layer.slots == int(layer.length.max()) + context.spare
    whole = KIVI.of(masked().cache, layer.slots)  # type: ignore[arg-type]
    assert after(context) == after(replace(context, cache=whole))
    with pytest.raises(TypeError, match=r"^layer 0 has a QuantCache: fill a dense cache"):
        kvzip.compress(tiny(), context, 0.5, spare=1, first=[], later=[])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: read(tiny(), [], spare=1), "there are no contexts: give at least one"),
        (lambda: read(tiny(), [[1], []], spare=1), "context 1 is empty: give at least one token"),
        (lambda: read(tiny(), [[1]], spare=0), "spare = 0: leave room for at least 1 token"),
        (lambda: read(tiny(), [[1]], spare=1, chunk=0), "chunk = 0: read at least 1 token at once"),
        (lambda: after(dense(), NEW[:2]), "the context has 3 sequences for 2 prompts: give one prompt for each, or a"),
        (lambda: after(dense(), [*NEW, []]), "prompt 3 is empty"),
        (
            lambda: after(dense(), [[1], [1] * 40, [1]]),
            r"prompt 1 has 40 tokens, and with n = 6 new ones takes 45 slots after a context with 44 to .* spare=45",
        ),
        (lambda: after(dense(), slots=64), "a context has a cache of its own: give `cache` to what makes it"),
        (lambda: after(dense(), cache=KIVI), "a context has a cache of its own"),
        (
            lambda: generate(other(layers=2, ropes=CONFIG.ropes * 2, kv_heads=4), NEW, 6, context=dense()),
            r"the context was read by a model with layers = 1, not 2, and kv_heads = 2, not 4, and ropes = .*: read it",
        ),
        (lambda: compressed(0.5, sink=9), "sink = 9 of a context of 9 tokens: leave some of them to score"),
        (lambda: compressed(1.5), "ratio = 1.5: the part that stays is from 0 to 1"),
        (
            lambda: kvzip.compress(tiny(), dense(), 0.5, spare=0, first=[], later=[]),
            "spare = 0: leave room for at least 1 token",
        ),
        (
            lambda: kvzip.compress(tiny(), dense(), 0.5, spare=1, first=[48], later=[]),
            "first has token 48 at place 0, and the model knows 48",
        ),
        (
            lambda: kvzip.compress(other(heads=2), dense(), 0.5, spare=1, first=[], later=[]),
            "the context was read by a model with heads = 4, not 2: read it by the one that goes on",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def other(**changes: Any) -> Decoder:
    return Decoder(replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def test_learned_positions_end() -> None:
    model = other(ropes=None)
    with pytest.raises(ValueError, match=r"^a context has 33 tokens, and the model has learned 32 positions"):
        read(model, [[1] * 33], spare=1)
    context = read(model, [[1] * 30], spare=8)
    message = (
        "^prompt 0 has 2 tokens, and with n = 2 new ones takes 3 positions after 30 of its context of a model that has "
        "learned 32: give it less of both"
    )
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], 2, context=context)


def test_logits_that_are_not_finite_are_those_of_context_and_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.clone(tiny())
    down = model.layers[0].mlp.down.kernel
    down.set_value(down.get_value().at[3, 3].set(jnp.nan))
    told = lambda model, tokens, what: FloatingPointError(f"{what}: {tokens}")  # noqa: E731
    monkeypatch.setattr(sys.modules[generate.__module__], "not_finite", told)
    with pytest.raises(FloatingPointError, match=re.escape(f"prompt 0: {PAST[0] + NEW[0]}")):
        generate(model, NEW, 6, context=dense())
