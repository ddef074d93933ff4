"""Continuous batching: sequences join and leave a batch that keeps running."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowbit.models.cache import CacheKind, DenseKV
from lowbit.models.decoder import Cache, Decoder
from lowbit.models.finite import not_finite
from lowbit.models.prompts import Prompt, checked_length, checked_prompt, checked_seeds, checked_tokens, expect_count
from lowbit.models.sampling import Sampling
from lowbit.models.steps import Runner
from lowbit.nn.reading import at_width


class NewToken(NamedTuple):
    """What a step gave one request: its next token, None for a stop token; and whether that was the last one."""

    request: int
    token: int | None
    done: bool


@dataclass
class _Sequence:
    """A request. Of its prompt, `read` tokens are in `cache`, and then in the batch's, which it has `joined`; the last
    one takes the first step. `text` is the prompt and what is new."""

    request: int
    prompt: np.ndarray
    n: int
    ends: np.ndarray
    seed: int
    text: list[int]
    read: int = 0
    cache: Cache = ()
    joined: bool = False

    @property
    def unread(self) -> int:
        return len(self.prompt) - 1 - self.read


class Batcher:
    """A batch of a fixed number of rows, each for one sequence at a time.

    Requests wait until a row is free, the first one first. Each step reads prompts into rows of their own, at most
    `budget` tokens of them, and then takes one token of every sequence whose prompt has been read. What is compiled is
    as many programs as there are buckets of prompt lengths up to the budget, one that puts a sequence into a row, and
    one step. Nothing depends on time: the same calls give the same tokens.

    Args:
      model: quantized or not.
      rows: sequences at once.
      slots: tokens of each that the cache has room for.
      sampling: how tokens are drawn.
      cache: how keys and values are stored.
      budget: prompt tokens that a step reads. More of them fill a batch sooner, and make the step longer for the
        sequences that run already.
      width: from the tokens that a step has scheduled, those of prompts that it reads and one for each sequence that
        runs, to the width that its weights are read at (see `lb.at_width`); None for a model of one width. One program
        is compiled for all widths.

    Raises ValueError for rows, slots or a budget below 1, TypeError for ones that are no integers or a model that is no
    `Decoder`.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> config = lb.models.Config(
    ...     vocab=32, width=16, layers=1, heads=4, kv_heads=2, head=4, hidden=32, context=64,
    ...     ropes=(lb.models.Rope(10_000.0, 4),),
    ... )
    >>> batcher = lb.models.Batcher(lb.models.Decoder(config, rngs=nnx.Rngs(0)), rows=2, slots=32)
    >>> requests = [batcher.add([1, 2, 3], n=2), batcher.add([4], n=1), batcher.add([5, 6], n=1)]
    >>> while batcher.busy:
    ...     print([(new.request, new.done) for new in batcher.step()])
    [(0, False), (1, True)]
    [(0, True), (2, True)]
    """

    def __init__(
        self,
        model: Decoder,
        rows: int,
        slots: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        cache: CacheKind = DenseKV(),  # noqa: B008
        budget: int = 512,
        width: Callable[[int], int] | None = None,
    ) -> None:
        for name, size in {"rows": rows, "slots": slots, "budget": budget}.items():
            expect_count(name, size)
        self.runner = Runner(model, cache, sampling)
        self.slots, self.budget, self.width = slots, budget, width
        self.cache = self.runner.empty(rows, slots)
        self.rows: list[_Sequence | None] = [None] * rows
        self.waiting: deque[_Sequence] = deque()
        self.found: list[NewToken] = []
        self.failed: deque[FloatingPointError] = deque()
        self.count = 0

    def add(self, prompt: Prompt, n: int, *, stop: Sequence[int] = (), seed: int = 0) -> int:
        """Queue a request for up to n tokens after a prompt; the number that `step` calls it by, counted from 0.

        Raises as `stream` does.
        """
        config, what = self.runner.model.config, f"request {self.count}"
        tokens = checked_prompt(prompt, config, what)
        checked_length(len(tokens), n, config, self.slots, what)
        ends, seeds = checked_tokens(stop, config, "stop"), checked_seeds(seed, 1)
        self.waiting.append(_Sequence(self.count, tokens, n, ends, int(seeds[0]), tokens.tolist()))
        self.count += 1
        return self.count - 1

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or a step has something left to tell."""
        return bool(self.waiting or self.found or self.failed) or any(self.rows)

    def step(self) -> list[NewToken]:
        """One step for all: what is new, by row.

        Raises FloatingPointError for a request whose logits are not finite. That request has ended; what the step gave
        the others comes with the next one.
        """
        if not self.failed:
            self.found += self._stepped()
        if self.failed:
            raise self.failed.popleft()
        found, self.found = self.found, []
        return found

    def _stepped(self) -> list[NewToken]:
        for row, held in enumerate(self.rows):
            if held is None and self.waiting:
                self.rows[row] = self.waiting.popleft()
        pieces = self._pieces()
        joining = {row for row, size in pieces.items() if self._at(row).unread == size}
        run = [row for row, s in enumerate(self.rows) if s and (s.joined or row in joining)]
        width = None if self.width is None else np.int32(self.width(sum(pieces.values()) + len(run)))
        for row, size in pieces.items():
            self._read(row, size, width)
        return self._next(run, width) if run else []

    def _at(self, row: int) -> _Sequence:
        sequence = self.rows[row]
        assert sequence is not None
        return sequence

    def _pieces(self) -> dict[int, int]:
        """Of each row whose prompt is read now, those that came first first, how many tokens of it."""
        left, out = self.budget, {}
        new = [row for row, s in enumerate(self.rows) if s and not s.joined]
        for row in sorted(new, key=lambda row: self._at(row).request):
            size = min(unread := self._at(row).unread, left)
            if size or not unread:
                out[row] = size
            left -= size
        return out

    def _read(self, row: int, size: int, width: np.int32 | None) -> None:
        """Read a piece of a prompt, into a cache of its own until all is there: other rows are not computed for it."""
        s = self._at(row)
        s.cache = s.cache or self.runner.empty(1, self.slots)
        if size:
            s.cache = self.runner.store(s.cache, [s.prompt], s.read, s.read + size, width)
            s.read += size
        if not s.unread:
            self.cache = self.runner.program.join(self.cache, s.cache, np.int32(row))
            s.cache, s.joined = (), True

    def _next(self, run: list[int], width: np.int32 | None) -> list[NewToken]:
        """One token of the sequences in these rows."""
        tokens, positions = np.zeros(len(self.rows), np.int32), np.full(len(self.rows), -1, np.int32)
        seeds = np.zeros(len(self.rows), np.uint32)
        for row in run:
            s = self._at(row)
            tokens[row], positions[row], seeds[row] = s.text[-1], len(s.text) - 1, s.seed
        out, self.cache, _ = self.runner.step(self.cache, tokens, positions, seeds, width)
        found = []
        for row in run:
            s, token = self._at(row), int(out[row])
            if token < 0:
                model = self.runner.model if width is None else at_width(self.runner.model, int(width))
                self.failed.append(not_finite(model, s.text, f"request {s.request}"))
                self.rows[row] = None
                continue
            stopped = token in s.ends
            if not stopped:
                s.text.append(token)
            done = stopped or len(s.text) == len(s.prompt) + s.n
            found.append(NewToken(s.request, None if stopped else token, done))
            if done:
                self.rows[row] = None
        return found
