"""Windows of tokens from texts, and the loss of a language model on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Encode = Callable[[str], Iterable[int]]
Source = str | PathLike[str] | Sequence[str | Mapping[str, str]]
Array = np.ndarray[Any, np.dtype[Any]]
Document = tuple[str, list[tuple[str, bool]]]
"""Where it is, and its parts, each with whether its tokens are targets."""


class TextBatches:
    """Batches of windows, by number: what a batch holds depends on the seed and its number alone.

    Each epoch of `len(self)` batches has every window once, in an order of its own. Batch i is number i % len(self) of
    epoch i // len(self), and there is no last one: `lb.tune.train` goes on from any number. A batch is a dict of
    `tokens`, int32 [batch, length + 1], and `mask`, bool of the same shape: which tokens are targets of the loss. The
    last batch of an epoch is filled with windows that have none.

    Attributes:
      tokens, mask: all windows, [windows, length + 1].
    """

    def __init__(self, tokens: Array, mask: Array, batch: int, seed: int) -> None:
        self.tokens, self.mask, self.batch, self.seed = tokens, mask, batch, seed
        self._shuffled: tuple[int, Array] = (-1, np.arange(0))

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch)

    def __getitem__(self, number: int) -> dict[str, Array]:
        if number < 0:
            raise IndexError(f"batches are counted from 0, and {number} was asked for")
        epoch, at = divmod(number, len(self))
        chosen = self._order(epoch)[at * self.batch : (at + 1) * self.batch]
        fill = ((0, self.batch - len(chosen)), (0, 0))
        return {"tokens": np.pad(self.tokens[chosen], fill), "mask": np.pad(self.mask[chosen], fill)}

    def _order(self, epoch: int) -> Array:
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.tokens))
        return self._shuffled[1]

    def split(self, share: float) -> tuple[TextBatches, TextBatches]:
        """Two parts: the windows to train on, and the last of the text, a `share` of all windows, to evaluate with.

        Raises ValueError when one of the two would have no window.
        """
        held = round(len(self.tokens) * share)
        if not 0 < held < len(self.tokens):
            raise ValueError(
                f"a share of {share} of {len(self.tokens)} windows is {held}: both parts need one at least; give more "
                "text, a smaller length, or another share"
            )
        first, last = slice(-held), slice(-held, None)
        parts = (TextBatches(self.tokens[at], self.mask[at], self.batch, self.seed) for at in (first, last))
        return next(parts), next(parts)


def text_batches(
    source: Source, encode: Encode, *, vocab: int, length: int, batch: int, seed: int = 0, end: int | None = None
) -> TextBatches:
    """Batches to train a language model on, from a file or from texts.

    All texts are joined to one stream of tokens, which is cut into windows of `length` + 1; each begins with the last
    token of the one before, so that every token but the first is a target once. The last window is filled up.

    Args:
      source: the path of a text, which is one document, or of a `.jsonl` file with an object a line; or such texts and
        objects themselves. An object has "text", or "prompt" and "completion", where only the tokens of the completion
        are targets.
      encode: from a text to its tokens, without special ones: `list(tokenizer.encode(text).ids)`, or `str.encode`.
      vocab: how many tokens the model knows.
      length: tokens that the model is given at once.
      batch: windows in a batch.
      seed: of the order of the windows.
      end: a token that ends each document, and is a target.

    Raises ValueError for a line that is no such object, tokens that the model does not know and too little text, with
    the place; OSError for a file that cannot be read.

    >>> import lowbit as lb
    >>> data = lb.tune.text_batches(["Alpha, beta, gamma."], str.encode, vocab=256, length=4, batch=2)
    >>> data.tokens.shape, len(data), bytes(data.tokens[0].tolist())
    ((5, 5), 3, b'Alpha')
    >>> train, held_out = data.split(0.2)
    >>> len(train), len(held_out), bytes(held_out.tokens[0][:3].tolist())
    (2, 1, b'ma.')
    """
    for name, value in (("vocab", vocab), ("length", length), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    stream: list[tuple[Array, bool]] = []
    for where, parts in _documents(source):
        stream += [(_checked(where, encode(text), vocab), is_target) for text, is_target in parts]
        if end is not None:
            stream.append((_checked("end", [end], vocab), True))
    tokens = np.concatenate([ids for ids, _ in stream] or [np.zeros(0, np.int32)])
    given = source if isinstance(source, str | PathLike) else "the text"
    if len(tokens) <= length:
        raise ValueError(
            f"{given} has {len(tokens)} tokens, but one window takes {length + 1}, length + 1: give more text, or a "
            "smaller length"
        )
    mask = np.concatenate([np.full(len(ids), is_target) for ids, is_target in stream])
    windows = [_windows(a, length) for a in (tokens, mask)]
    useful = windows[1][:, 1:].any(axis=1)
    if not useful.any():
        raise ValueError(f"{given} has no token to predict: no completion has any")
    return TextBatches(windows[0][useful], windows[1][useful], batch, seed)


def next_token_loss(model: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The cross entropy of each next token that is a target, in nats: their sum, and how many there are.

    Args:
      model: `model(tokens)` gives logits: int [B, T] -> [B, T, vocab].
      batch: of `text_batches`.
    """
    tokens, mask = jnp.asarray(batch["tokens"]), jnp.asarray(batch["mask"])[:, 1:]
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.where(mask, losses, 0).sum(), mask.sum()


def _windows(stream: Array, length: int) -> Array:
    """[N] -> [ceil((N - 1) / length), length + 1], the last one filled with zeros."""
    count = -(-(len(stream) - 1) // length)
    filled = np.pad(stream, (0, count * length + 1 - len(stream)))
    return np.lib.stride_tricks.sliding_window_view(filled, length + 1)[::length]


def _checked(where: str, tokens: Iterable[int], vocab: int) -> Array:
    ids = np.fromiter(tokens, np.int64)
    for token in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= token < vocab:
            raise ValueError(
                f"{where}: vocabulary mismatch: it has token {token}, but the model knows {vocab} tokens, from 0 to "
                f"{vocab - 1}: use the tokenizer that belongs to the model"
            )
    return ids.astype(np.int32)


def _documents(source: Source) -> Iterator[Document]:
    if not isinstance(source, str | PathLike):
        for i, given in enumerate(source):
            yield f"text {i}", _parts(f"text {i}", {"text": given} if isinstance(given, str) else given)
        return
    try:
        text = Path(source).read_text("utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"{source} is no UTF-8 text ({err}): convert it") from err
    if Path(source).suffix != ".jsonl":
        yield str(source), [(text, True)]
        return
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{source}:{number}"
        if line.strip():
            try:
                found = json.loads(line)
            except json.JSONDecodeError as err:
                raise ValueError(f"{where} is no JSON ({err}): each line must be one object") from err
            yield where, _parts(where, found)


def _parts(where: str, found: Any) -> list[tuple[str, bool]]:
    keys = sorted(found) if isinstance(found, Mapping) else []
    names = ("prompt", "completion") if "completion" in keys or "prompt" in keys else ("text",)
    if not keys or (missing := [name for name in names if name not in keys]):
        has = f"lacks {missing[0]!r} and has {', '.join(map(repr, keys))}" if keys else f"is {found!r}"
        raise ValueError(f'{where} {has}: give {{"text": ...}} or {{"prompt": ..., "completion": ...}}')
    for name in names:
        if not isinstance(found[name], str):
            raise ValueError(f"{where}: {name!r} is {found[name]!r}: it must be a string")
    if not found[names[-1]]:
        raise ValueError(f"{where}: {names[-1]!r} is empty: leave the line out")
    return [(found[name], name != "prompt") for name in names]
