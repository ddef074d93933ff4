"""Prompts, tokens and seeds as they are given, checked."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import numpy as np

from lowbit.models.config import Config

Prompt = Sequence[int] | np.ndarray


def checked_prompts(prompts: Sequence[Prompt], config: Config, what: str) -> list[np.ndarray]:
    """Each as `checked_prompt` gives it: at least one."""
    if not len(prompts):
        raise ValueError(f"there are no {what}s: give at least one")
    return [checked_prompt(prompt, config, f"{what} {i}") for i, prompt in enumerate(prompts)]


def checked_prompt(prompt: Prompt, config: Config, what: str) -> np.ndarray:
    """int32 [tokens], at least one."""
    tokens = checked_tokens(prompt, config, what)
    if not tokens.size:
        raise ValueError(f"{what} is empty: give at least one token, such as the one that begins a text")
    return tokens


def checked_tokens(tokens: Prompt, config: Config, what: str) -> np.ndarray:
    """int32 [tokens], all of which the model knows."""
    found = np.asarray(tokens)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise TypeError(f"{what} is {found.dtype}{list(found.shape)}: give a sequence of integers, the tokens")
    if (bad := np.flatnonzero((found < 0) | (found >= config.vocab))).size:
        raise ValueError(
            f"{what} has token {found[bad[0]]} at place {bad[0]}, and the model knows {config.vocab}, from 0 to "
            f"{config.vocab - 1}: use the tokenizer that belongs to it"
        )
    return found.astype(np.int32)


def expect_count(name: str, given: int, need: str = "it must be at least 1") -> None:
    """Raises TypeError for what is no integer, ValueError for one below 1."""
    if _integer(name, given) < 1:
        raise ValueError(f"{name} = {given}: {need}")


def checked_length(size: int, n: int, config: Config, slots: int | None, what: str, past: int = 0) -> int:
    """The slots that a prompt of this size and n tokens take, after `past` tokens: the last one is never read again."""
    expect_count("n", n, "generate at least 1 token")
    needed = size + n - 1
    told = f"{what} has {size} tokens, and with n = {n} new ones"
    if slots is not None and needed > slots:
        raise ValueError(
            f"{told} takes {needed} slots of a cache that has {slots}: give slots={needed}, or less of both"
        )
    if config.ropes is None and past + needed > config.context:
        after = f" after {past} of its context" if past else ""
        raise ValueError(
            f"{told} takes {needed} positions{after} of a model that has learned {config.context}: give it less of both"
        )
    return needed


def checked_seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """uint32 [count]."""
    given = seed if isinstance(seed, Sequence) else range(first := _integer("seed", seed), first + count)
    seeds = [_integer("seed", s) for s in given]
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} numbers for {count} prompts: give one for each, or one integer")
    if bad := [s for s in seeds if not 0 <= s < 2**32]:
        raise ValueError(f"seed = {bad[0]}: it must be from 0 to {2**32 - 1}")
    return np.array(seeds, np.uint32)


def _integer(name: str, given: int) -> int:
    try:
        return index(given)
    except TypeError:
        raise TypeError(f"{name} = {given!r}: give an integer") from None
