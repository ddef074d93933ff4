"""What is compiled to generate: prompts into caches, and one more token of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.models.attention import LayerCache
from lowbit.models.cache import CacheKind
from lowbit.models.decoder import Cache, Decoder
from lowbit.models.sampling import Sampling
from lowbit.nn.reading import at_width
from lowbit.nn.switch import By, EffectiveBits, effective_bits, switching

LEAST = 16
"""The smallest bucket."""


def bucket(size: int) -> int:
    """The size that is compiled for one: the next power of two."""
    return max(LEAST, 1 << (size - 1).bit_length())


@dataclass(frozen=True, eq=False)
class Program:
    """The jitted functions for models of one structure.

    A sequence is one row of each array, and of each array of the cache. They take the model as the list of its arrays:
    to flatten a state anew would take longer than a small model's step.
    """

    graph: Any
    tree: Any

    def model(self, leaves: list[jax.Array], width: jax.Array | None, by: By = "most") -> Decoder:
        model: Decoder = nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))
        return switching(model, by) if width is None else at_width(model, width)

    @cached_property
    def empty(self) -> Any:
        """(leaves, kind, batch, slots) -> an empty cache."""

        def empty(leaves: list[jax.Array], kind: CacheKind, batch: int, slots: int) -> tuple[LayerCache, ...]:
            model, one = self.model(leaves, None), jnp.zeros((1, 1), jnp.int32)
            dtype = jax.eval_shape(lambda: model.hidden(one, one)[0]).dtype
            return kind.empty(model.config, batch, slots, dtype)

        return jax.jit(empty, static_argnums=(1, 2, 3))

    @cached_property
    def store(self) -> Any:
        """(leaves, cache, tokens int32 [B, T], positions int32 [B, T], width) -> the cache with these tokens."""

        def store(
            leaves: list[jax.Array], cache: Cache, tokens: jax.Array, positions: jax.Array, width: jax.Array | None
        ) -> Cache:
            return self.model(leaves, width).hidden(tokens, positions, cache)[1]

        return jax.jit(store, donate_argnums=1)

    @cached_property
    def step(self) -> Any:
        """(leaves, cache, sampling, tokens int32 [B], positions int32 [B], seeds uint32 [B], width, bits) -> the next
        tokens int32 [B], -1 where logits are not finite, the cache with those that were given, and with `bits` the
        widths that were chosen."""

        def step(
            leaves: list[jax.Array],
            cache: Cache,
            sampling: Sampling,
            tokens: jax.Array,
            positions: jax.Array,
            seeds: jax.Array,
            width: jax.Array | None,
            bits: bool,
        ) -> tuple[jax.Array, Cache, EffectiveBits | None]:
            def run(model: Decoder) -> tuple[jax.Array, Cache]:
                hidden, new = model.hidden(tokens[:, None], positions[:, None], cache)
                return model.logits(hidden[:, 0], positions), new

            model = self.model(leaves, width, "call")
            (logits, new), chosen = effective_bits(run, model) if bits else (run(model), None)
            # Of its own seed and place alone: a sequence is the same whatever else is in the batch.
            keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds, positions)
            return jnp.where(jnp.isfinite(logits).all(axis=-1), sampling(logits, keys), -1), new, chosen

        return jax.jit(step, donate_argnums=1, static_argnums=(2, 7))

    @cached_property
    def join(self) -> Any:
        """(cache of B sequences, cache of one, row) -> the first with the second as that row."""

        def join(cache: Cache, one: Cache, row: jax.Array) -> Cache:
            return jax.tree.map(lambda whole, new: whole.at[row].set(new[0]), cache, one)

        return jax.jit(join, donate_argnums=0)


program = lru_cache(maxsize=32)(Program)
"""The program of a structure: made once, so compiled once."""


class Runner:
    """A model ready to generate: its arrays, and what is compiled for it."""

    def __init__(self, model: Decoder, kind: CacheKind, sampling: Sampling) -> None:
        if not isinstance(model, Decoder):
            raise TypeError(f"cannot generate with a {type(model).__name__}: give an lb.models.Decoder")
        graph, state = nnx.split(model)
        self.leaves, tree = jax.tree.flatten(state)
        self.model, self.kind, self.sampling = model, kind, sampling
        self.program = program(graph, tree)

    def empty(self, batch: int, slots: int) -> Cache:
        cache: Cache = self.program.empty(self.leaves, self.kind, batch, slots)
        return cache

    def store(
        self,
        cache: Cache,
        prompts: Sequence[np.ndarray],
        start: int,
        stop: int,
        width: Any = None,
        past: Sequence[int] | None = None,
    ) -> Cache:
        """The cache with tokens `start` to `stop` of each prompt, of those that have them. `past` is how many tokens
        came before each prompt: none, if None."""
        size = bucket(stop - start)
        tokens, positions = np.zeros((len(prompts), size), np.int32), np.full((len(prompts), size), -1, np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start:stop]
            tokens[row, : len(piece)] = piece
            positions[row, : len(piece)] = (past[row] if past else 0) + start + np.arange(len(piece))
        new: Cache = self.program.store(self.leaves, cache, tokens, positions, width)
        return new

    def step(
        self,
        cache: Cache,
        tokens: np.ndarray,
        positions: np.ndarray,
        seeds: np.ndarray,
        width: Any = None,
        bits: bool = False,
    ) -> tuple[np.ndarray, Cache, EffectiveBits | None]:
        take = self.program.step
        out, cache, chosen = take(self.leaves, cache, self.sampling, tokens, positions, seeds, width, bits)
        return np.asarray(out), cache, chosen
