"""Text from a language model: `generate`, and `stream` for one token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lowbit.models.cache import CacheKind, DenseKV
from lowbit.models.config import Config
from lowbit.models.decoder import Decoder
from lowbit.models.finite import not_finite
from lowbit.models.sampling import Sampling
from lowbit.models.steps import Runner, bucket

Prompt = Sequence[int] | np.ndarray


def generate(model: Decoder, prompts: Sequence[Prompt], n: int, **options: Any) -> list[list[int]]:
    """Continuations of prompts, all at once.

    Args:
      model: quantized or not.
      prompts: the tokens of each, of any lengths.
      n: the most tokens to add to each.
      options: those of `stream`.

    Returns the new tokens of each prompt, up to its first stop token, which is left out. Raises as `stream` does.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=2, head=4, hidden=32, context=64,
    ...     ropes=(lb.models.Rope(10_000.0, 4),),
    ... )
    >>> model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    >>> [len(new) for new in lb.models.generate(model, [[1, 2, 3], [4]], 5)]
    [5, 5]
    """
    out: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, n, **options):
        for new, token in zip(out, tokens.tolist(), strict=True):
            if token >= 0:
                new.append(token)
    return out


def stream(
    model: Decoder,
    prompts: Sequence[Prompt],
    n: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    cache: CacheKind = DenseKV(),  # noqa: B008
    slots: int | None = None,
    chunk: int = 512,
) -> Iterator[np.ndarray]:
    """`generate`, token by token, as they come.

    Two programs are compiled, one that reads prompts and one that takes a step, for each number of prompts, and each
    power of two that lengths are rounded up to; not for a length, nor for a step. Weights of other models of the same
    structure run in the same programs.

    Args:
      model, prompts, n: as in `generate`.
      sampling: how tokens are drawn; the likeliest one by default.
      stop: tokens that end a sequence.
      seed: one for each prompt, from 0 to 2**32 - 1, or that of the first, and the next ones count on. A sequence
        follows from its prompt and seed, whatever else is in the batch.
      cache: how keys and values are stored.
      slots: tokens a sequence that the cache has room for; as many as needed if None.
      chunk: tokens of each prompt that are read at once. It bounds the memory that long prompts take.

    Yields int32 [prompts], the next token of each, -1 for a sequence that has ended; it ends when all have, or after n.

    Raises ValueError for no or empty prompts, tokens that the model does not know, n < 1, or sequences too long for
    the cache or for learned positions; TypeError for tokens that are no integers or a model that is no `Decoder`;
    FloatingPointError, which names the layer, where logits are not finite.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=2, head=4, hidden=32, context=64,
    ...     ropes=(lb.models.Rope(10_000.0, 4),),
    ... )
    >>> model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    >>> for tokens in lb.models.stream(model, [[1, 2, 3], [4]], 2, sampling=lb.models.Sampling(temperature=0.7)):
    ...     print(tokens.shape)
    (2,)
    (2,)
    """
    runner = Runner(model, cache, sampling)
    given = [checked_prompt(prompt, model.config, f"prompt {i}") for i, prompt in enumerate(prompts)]
    if not given:
        raise ValueError("there are no prompts: give at least one")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: read at least 1 token at once")
    needed = max(checked_length(len(p), n, model.config, slots, f"prompt {i}") for i, p in enumerate(given))
    seeds = checked_seeds(seed, len(given))
    ends = checked_tokens(stop, model.config, "stop")
    return _stream(runner, given, n, ends, seeds, slots or bucket(needed), chunk)


def _stream(
    runner: Runner, prompts: list[np.ndarray], n: int, ends: np.ndarray, seeds: np.ndarray, slots: int, chunk: int
) -> Iterator[np.ndarray]:
    cache = runner.empty(len(prompts), slots)
    # The last token of a prompt takes the first step: so reading needs no logits, and rows may end anywhere.
    start = [prompt[:-1] for prompt in prompts]
    longest = max(map(len, start))
    for at in range(0, longest, chunk):
        cache = runner.store(cache, start, at, min(at + chunk, longest))
    positions = np.array([len(s) for s in start], np.int32)
    tokens = np.array([prompt[-1] for prompt in prompts], np.int32)
    written = [prompt.tolist() for prompt in prompts]
    for _ in range(n):
        out, cache = runner.step(cache, tokens, positions, seeds)
        running = positions >= 0
        for row in np.flatnonzero(running & (out < 0)):
            raise not_finite(runner.model, written[row], f"prompt {row}")
        out = np.where(running & ~np.isin(out, ends), out, -1)
        going = np.flatnonzero(out >= 0)
        if not going.size:
            return
        for row in going:
            written[row].append(int(out[row]))
        yield out
        positions = np.where(out >= 0, positions + 1, -1)
        tokens = np.maximum(out, 0)


def checked_prompt(prompt: Prompt, config: Config, what: str) -> np.ndarray:
    """int32 [tokens]."""
    if not len(prompt):
        raise ValueError(f"{what} is empty: give at least one token, such as the one that begins a text")
    return checked_tokens(prompt, config, what)


def checked_tokens(tokens: Prompt, config: Config, what: str) -> np.ndarray:
    """int32 [tokens], all of which the model knows."""
    found = np.asarray(tokens, None if len(tokens) else np.int32)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"{what} is {found.dtype}{list(found.shape)}: give a sequence of integers, the tokens")
    if (bad := np.flatnonzero((found < 0) | (found >= config.vocab))).size:
        raise ValueError(
            f"{what} has token {found[bad[0]]} at place {bad[0]}, and the model knows {config.vocab}, from 0 to "
            f"{config.vocab - 1}: use the tokenizer that belongs to it"
        )
    return found.astype(np.int32)


def checked_length(size: int, n: int, config: Config, slots: int | None, what: str) -> int:
    """The slots that a prompt of this size and n tokens take: the last one is never read again."""
    if n < 1:
        raise ValueError(f"n = {n}: generate at least 1 token")
    needed = size + n - 1
    told = f"{what} has {size} tokens, and with n = {n} new ones"
    if slots is not None and needed > slots:
        raise ValueError(
            f"{told} takes {needed} slots of a cache that has {slots}: give slots={needed}, or less of both"
        )
    if config.ropes is None and needed > config.context:
        raise ValueError(
            f"{told} takes {needed} positions of a model that has learned {config.context}: give it less of both"
        )
    return needed


def checked_seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """uint32 [count]."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} numbers for {count} prompts: give one for each, or one integer")
    if bad := [s for s in seeds if not 0 <= s < 2**32]:
        raise ValueError(f"seed = {bad[0]}: it must be from 0 to {2**32 - 1}")
    return np.array(seeds, np.uint32)
