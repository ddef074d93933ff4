"""Sequences that are in a cache already, for generation to go on from, as often as wanted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.models.config import Config
from lowbit.models.decoder import Cache


@dataclass(frozen=True, eq=False)
class Context:
    """What `lowbit.models.read` makes: nothing changes it, so it serves any number of calls.

    Attributes:
      config: of the model that has read it.
      tokens: int32 [tokens], of each sequence. The next one's position is their number, whatever the cache still holds.
      cache: of all layers.
      spare: slots that the fullest sequence has left: new tokens that fit.
    """

    config: Config
    tokens: tuple[np.ndarray, ...]
    cache: Cache
    spare: int

    def expect(self, config: Config) -> None:
        """Raises ValueError, naming what differs, for a model that is made of something else."""
        pairs = [(f.name, getattr(self.config, f.name), getattr(config, f.name)) for f in fields(Config)]
        if other := [f"{name} = {mine!r}, not {its!r}" for name, mine, its in pairs if mine != its]:
            raise ValueError(
                f"the context was read by a model with {', and '.join(other)}: read it by the one that goes on"
            )

    def rows(self, count: int) -> Context:
        """A copy for so many prompts, whose cache may be donated; one sequence serves all of them.

        Raises ValueError for another number of sequences.
        """
        if len(self.tokens) not in (1, count):
            raise ValueError(
                f"the context has {len(self.tokens)} sequences for {count} prompts: give one prompt for each, or a "
                "context of one sequence for all"
            )

        def copied(a: jax.Array) -> jax.Array:
            return jnp.copy(a) if len(a) == count else jnp.repeat(a, count, axis=0)

        repeated = self.tokens * (count // len(self.tokens))
        return replace(self, tokens=repeated, cache=jax.tree.map(copied, self.cache))
