"""Text from a language model: `generate`, `stream` for one token after the other, and `read` for what comes before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import numpy as np

from lowbit.models.cache import CacheKind, DenseKV
from lowbit.models.config import Config
from lowbit.models.context import Context
from lowbit.models.decoder import Cache, Decoder
from lowbit.models.finite import not_finite
from lowbit.models.prompts import Prompt, checked_length, checked_prompts, checked_seeds, checked_tokens, expect_count
from lowbit.models.sampling import Sampling
from lowbit.models.steps import Runner, bucket
from lowbit.nn.switch import EffectiveBits, expect_switches


class Step(NamedTuple):
    """One step of `stream` with `bits=True`.

    Attributes:
      tokens: int32 [prompts], the next token of each, -1 for a sequence that has ended.
      bits: the widths that were chosen for them: arrays on the device, which nothing has waited for.
    """

    tokens: np.ndarray
    bits: EffectiveBits


class Generation(NamedTuple):
    """What `generate` returns with `bits=True`.

    Attributes:
      tokens: the new ones of each prompt.
      bits: of each step, as `Step` has them.
    """

    tokens: list[list[int]]
    bits: list[EffectiveBits]


@overload
def generate(
    model: Decoder, prompts: Sequence[Prompt], n: int, *, context: Context | None = None, sampling: Sampling = ...,
    stop: Sequence[int] = (), seed: int | Sequence[int] = 0, cache: CacheKind = ..., slots: int | None = None,
    chunk: int = 512, bits: Literal[False] = False,
) -> list[list[int]]: ...  # fmt: skip
@overload
def generate(
    model: Decoder, prompts: Sequence[Prompt], n: int, *, context: Context | None = None, sampling: Sampling = ...,
    stop: Sequence[int] = (), seed: int | Sequence[int] = 0, cache: CacheKind = ..., slots: int | None = None,
    chunk: int = 512, bits: Literal[True],
) -> Generation: ...  # fmt: skip
def generate(
    model: Decoder,
    prompts: Sequence[Prompt],
    n: int,
    *,
    context: Context | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    cache: CacheKind = DenseKV(),  # noqa: B008
    slots: int | None = None,
    chunk: int = 512,
    bits: bool = False,
) -> list[list[int]] | Generation:
    """Continuations of prompts, all at once.

    Takes what `stream` takes and raises what it raises. Returns the new tokens of each prompt, up to its first stop
    token, which is left out; with `bits` as a `Generation`, which has the effective bits of each step too.

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
    chosen: list[EffectiveBits] = []
    for tokens, widths in _steps(model, prompts, n, context, sampling, stop, seed, cache, slots, chunk, bits):
        chosen.append(widths)
        for new, token in zip(out, tokens.tolist(), strict=True):
            if token >= 0:
                new.append(token)
    return Generation(out, chosen) if bits else out


@overload
def stream(
    model: Decoder, prompts: Sequence[Prompt], n: int, *, context: Context | None = None, sampling: Sampling = ...,
    stop: Sequence[int] = (), seed: int | Sequence[int] = 0, cache: CacheKind = ..., slots: int | None = None,
    chunk: int = 512, bits: Literal[False] = False,
) -> Iterator[np.ndarray]: ...  # fmt: skip
@overload
def stream(
    model: Decoder, prompts: Sequence[Prompt], n: int, *, context: Context | None = None, sampling: Sampling = ...,
    stop: Sequence[int] = (), seed: int | Sequence[int] = 0, cache: CacheKind = ..., slots: int | None = None,
    chunk: int = 512, bits: Literal[True],
) -> Iterator[Step]: ...  # fmt: skip
def stream(
    model: Decoder,
    prompts: Sequence[Prompt],
    n: int,
    *,
    context: Context | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    cache: CacheKind = DenseKV(),  # noqa: B008
    slots: int | None = None,
    chunk: int = 512,
    bits: bool = False,
) -> Iterator[np.ndarray] | Iterator[Step]:
    """`generate`, token by token, as they come.

    Two programs are compiled, one that reads prompts and one that takes a step, for each number of prompts, `sampling`,
    kind of cache and power of two that lengths are rounded up to; none for a length or a step. Other models of the same
    structure run in the same programs.

    Args:
      model: quantized or not.
      prompts: the tokens of each, of any lengths.
      n: the most tokens to add to each.
      context: what `read` made, which the prompts go on from, row by row, or all of them from its one sequence. It
        stays as it is.
      sampling: how tokens are drawn; the likeliest one by default.
      stop: tokens that end a sequence.
      seed: one for each prompt, from 0 to 2**32 - 1, or that of the first, and the next ones count on. A sequence
        follows from its prompt and seed, whatever else is in the batch.
      cache: how keys and values are stored. A context has a cache of its own.
      slots: tokens a sequence that the cache has room for; as many as needed if None.
      chunk: tokens of each prompt that are read at once. It bounds the memory that long prompts take.
      bits: of a model whose layers choose their widths (`lb.tune.switched`), yield what they have chosen too, a `Step`.
        That is another program of a step. The step which finds that all sequences have ended is not told.

    Yields int32 [prompts], the next token of each, -1 for a sequence that has ended; it ends when all have, or after n.

    Raises ValueError for no or empty prompts, tokens that the model does not know, n < 1, sequences too long for the
    cache or for learned positions, or a context of another model, of other than one sequence or one for each prompt, or
    beside a cache or slots, and `bits` of a model whose layers choose no widths; TypeError for tokens, sizes or seeds
    that are no integers or a model that is no `Decoder`; FloatingPointError, which names the layer, where logits are
    not finite.

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
    steps = _steps(model, prompts, n, context, sampling, stop, seed, cache, slots, chunk, bits)
    return steps if bits else (step.tokens for step in steps)


def _steps(
    model: Decoder, prompts: Sequence[Prompt], n: int, context: Context | None, sampling: Sampling, stop: Sequence[int],
    seed: int | Sequence[int], cache: CacheKind, slots: int | None, chunk: int, bits: bool,
) -> Iterator[Step]:  # fmt: skip
    """What `stream` takes, checked before the first step."""
    runner = Runner(model, cache, sampling)
    given = checked_prompts(prompts, model.config, "prompt")
    expect_count("chunk", chunk, "read at least 1 token at once")
    if context is None:
        start = _empty(runner, given, n, slots)
    elif slots is not None or cache != DenseKV():
        raise ValueError("a context has a cache of its own: give `cache` to what makes it, and room as its `spare`")
    else:
        start = _continued(context, model.config, given, n)
    seeds = checked_seeds(seed, len(given))
    ends = checked_tokens(stop, model.config, "stop")
    if bits:
        expect_switches(model)
    return _stream(runner, start, given, n, ends, seeds, chunk, bits)


def read(
    model: Decoder,
    prompts: Sequence[Prompt],
    *,
    spare: int,
    cache: CacheKind = DenseKV(),  # noqa: B008
    chunk: int = 512,
) -> Context:
    """Contexts, read once: `stream` and `generate` go on from them, as often as wanted, with `context=`.

    The tokens that follow are those of context and prompt together. A cache that quantizes gives the same where `chunk`
    splits both alike: what is read at once is seen as it is, what came before it quantized.

    Args:
      model: quantized or not.
      prompts: the tokens of each context, of any lengths.
      spare: tokens to leave room for after each, of a prompt and all but the last of what is generated. Slots are
        rounded up to a power of two, and what that adds is room too.
      cache: how keys and values are stored.
      chunk: tokens of each that are read at once.

    Raises ValueError for no or empty contexts, tokens that the model does not know, spare or chunk < 1, or contexts
    longer than learned positions; TypeError as `stream` does.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=2, head=4, hidden=32, context=64,
    ...     ropes=(lb.models.Rope(10_000.0, 4),),
    ... )
    >>> model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    >>> context = lb.models.read(model, [[1, 2, 3]], spare=8)
    >>> new = lb.models.generate(model, [[4], [5, 6]], 5, context=context)
    >>> new == lb.models.generate(model, [[1, 2, 3, 4], [1, 2, 3, 5, 6]], 5)
    True
    """
    runner, config = Runner(model, cache, Sampling()), model.config
    given = checked_prompts(prompts, config, "context")
    expect_count("chunk", chunk, "read at least 1 token at once")
    expect_count("spare", spare, "leave room for at least 1 token")
    longest = max(map(len, given))
    if config.ropes is None and longest > config.context:
        raise ValueError(f"a context has {longest} tokens, and the model has learned {config.context} positions")
    slots = bucket(longest + spare)
    filled = _stored(runner, runner.empty(len(given), slots), given, [0] * len(given), chunk)
    return Context(config, tuple(given), filled, slots - longest)


def _empty(runner: Runner, prompts: list[np.ndarray], n: int, slots: int | None) -> Context:
    """Contexts of no tokens, with room for these prompts and n tokens."""
    if slots is not None:
        expect_count("slots", slots)
    sizes = enumerate(map(len, prompts))
    needed = max(checked_length(size, n, runner.model.config, slots, f"prompt {i}") for i, size in sizes)
    spare = slots or bucket(needed)
    nothing = (np.zeros(0, np.int32),) * len(prompts)
    return Context(runner.model.config, nothing, runner.empty(len(prompts), spare), spare)


def _continued(context: Context, config: Config, prompts: list[np.ndarray], n: int) -> Context:
    """A copy for these prompts, which has room for them and n tokens."""
    context.expect(config)
    start = context.rows(len(prompts))
    for i, (past, prompt) in enumerate(zip(start.tokens, prompts, strict=True)):
        needed = checked_length(len(prompt), n, config, None, f"prompt {i}", len(past))
        if needed > context.spare:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and with n = {n} new ones takes {needed} slots after a context "
                f"with {context.spare} to spare: make it with spare={needed}, or give less of both"
            )
    return start


def _stored(runner: Runner, cache: Cache, texts: list[np.ndarray], past: list[int], chunk: int) -> Cache:
    """The cache with these texts after the `past` tokens that it has read of each sequence."""
    longest = max(map(len, texts))
    for at in range(0, longest, chunk):
        cache = runner.store(cache, texts, at, min(at + chunk, longest), past=past)
    return cache


def _stream(
    runner: Runner, context: Context, prompts: list[np.ndarray], n: int, ends: np.ndarray, seeds: np.ndarray,
    chunk: int, bits: bool,
) -> Iterator[Step]:  # fmt: skip
    past = [len(tokens) for tokens in context.tokens]
    # The last token of a prompt takes the first step: so reading needs no logits, and rows may end anywhere.
    cache = _stored(runner, context.cache, [prompt[:-1] for prompt in prompts], past, chunk)
    written = [[*before.tolist(), *prompt.tolist()] for before, prompt in zip(context.tokens, prompts, strict=True)]
    positions = np.array([len(text) - 1 for text in written], np.int32)
    tokens = np.array([prompt[-1] for prompt in prompts], np.int32)
    for _ in range(n):
        out, cache, chosen = runner.step(cache, tokens, positions, seeds, bits=bits)
        running = positions >= 0
        for row in np.flatnonzero(running & (out < 0)):
            raise not_finite(runner.model, written[row], f"prompt {row}")
        out = np.where(running & ~np.isin(out, ends), out, -1)
        going = np.flatnonzero(out >= 0)
        if not going.size:
            return
        for row in going:
            written[row].append(int(out[row]))
        yield Step(out, chosen)  # type: ignore[arg-type]  # None without `bits`, and then dropped
        positions = np.where(out >= 0, positions + 1, -1)
        tokens = np.maximum(out, 0)
