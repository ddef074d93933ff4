"""The prompts of KVzip, which ask a model to repeat its context part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowbit.models.prompts import expect_count

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Repeat:
    """A prompt that asks for a part of the context, and the part as the answer.

    Attributes:
      tokens: int [B, T].
      mask: bool [B, T], False where a sequence has no token.
      start, stop: the positions of the part.
    """

    tokens: Array
    mask: Array
    start: int
    stop: int


def repeats(
    context: Any,
    mask: Any = None,
    *,
    first: Sequence[int],
    later: Sequence[int],
    suffix: Sequence[int] = (),
    chunk: int = 2000,
    sink: int = 0,
    overlap: int = 8,
) -> list[Repeat]:
    """The prompts that repeat a context in parts of `chunk` tokens.

    Args:
      context: int [B, N], what the cache holds after the sink.
      mask: bool [B, N], False at the right of shorter contexts; all tokens if None.
      first: asks for the start of the context.
      later: asks for what follows a quotation, which comes next: the last `overlap` tokens before the part.
      suffix: what a chat template puts between the request and the answer.
      sink: tokens before the context.

    Raises ValueError for a context that is not [B, N], a mask of another shape, or no tokens a part.

    >>> from lowbit.models import kvzip
    >>> a, b = kvzip.repeats([[5, 6, 7, 8, 9]], first=[1], later=[2], suffix=[3], chunk=3, overlap=2)
    >>> a.tokens.tolist(), b.tokens.tolist(), (b.start, b.stop)
    ([[1, 3, 5, 6, 7, 0]], [[2, 6, 7, 3, 8, 9]], (3, 5))
    """
    context = np.asarray(context)
    mask = np.ones(context.shape, bool) if mask is None else np.asarray(mask)
    if context.ndim != 2 or mask.shape != context.shape:
        raise ValueError(f"context has shape {context.shape} and mask {mask.shape}: give both as [B, N]")
    expect_count("chunk", chunk, "a part has at least 1 token")
    prompts = []
    for at in range(0, context.shape[1], chunk):
        quoted, part = slice(max(at - overlap, 0), at), slice(at, at + chunk)
        asked, end = (
            np.tile(np.asarray(ids, context.dtype), (len(context), 1)) for ids in (later if at else first, suffix)
        )
        tokens = np.concatenate([asked, context[:, quoted], end, context[:, part]], axis=1)
        there = [np.ones(asked.shape, bool), mask[:, quoted], np.ones(end.shape, bool), mask[:, part]]
        stop = min(at + chunk, context.shape[1])
        prompts.append(Repeat(tokens, np.concatenate(there, axis=1), sink + at, sink + stop))
    width = max((p.tokens.shape[1] for p in prompts), default=0)
    return [replace(p, tokens=_widened(p.tokens, width), mask=_widened(p.mask, width)) for p in prompts]


def _widened(a: Array, width: int) -> Array:
    return np.pad(a, ((0, 0), (0, width - a.shape[1])))
