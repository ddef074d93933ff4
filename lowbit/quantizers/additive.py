"""Additive codebooks under the second moments of the inputs, as AQLM finds them (Egiazarian et al., ICML 2024).

With D the error of the weight [n, k] and H = E[x x^T] [k, k], the expected squared error of the layer's output is

    tr(D H D^T).

After residual k-means two steps take turns: Adam on codebooks and scales, with the codes as they are, and a beam search
over the codes. The search visits the vectors of a row one after the other, all rows at once. With J the inputs of a
vector, E = D H[:, J], and c the scale times the difference between another entry of a codebook and the selected one,
selecting the other one changes the error of the row by

    2 <c, E> + c H[J, J] c^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowbit.formats.format import Format
from lowbit.quantizers.codebook import CodebookCode, ResidualKMeans, smallest, solve, stored
from lowbit.quantizers.groups import check_rounds
from lowbit.quantizers.quantizer import Fields, expect_format

# Steps of Adam in a round, and the first one's size: groups have the root mean square 1. Later ones shrink to nothing.
_STEPS, _RATE = 100, 1e-2
# Errors of candidates that are held at a time.
_BLOCK = 1 << 20
# A round that takes away a smaller share of the error is the last one.
_ENOUGH = 0.01


class _Target(NamedTuple):
    """Rows `w [n, k]` whose largest scale is 1, what an error in each counts, `mass [n, 1]`, and H, `gram [k, k]`."""

    w: jax.Array
    mass: jax.Array
    gram: jax.Array


class _Beam(NamedTuple):
    """The best hypotheses B of each row, the best one first.

    D is `error [n, B, k]`, the codes are `[n, B, b, vectors]`, and `change [n, B]` is that of the row's error so far.
    """

    error: jax.Array
    codes: jax.Array
    change: jax.Array


class _Vector(NamedTuple):
    """The same of one vector: its codes `[n, B, b]`, E `[n, B, v]`, and which hypotheses these come from, `source`."""

    codes: jax.Array
    e: jax.Array
    change: jax.Array
    source: jax.Array


@dataclass(frozen=True)
class AdditiveCodebooks:
    """Adam and beam search in turns. Make one with `lb.additive_codebooks`."""

    rounds: int = 100
    beam: int = 1
    takes_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        if type(self.beam) is not int or self.beam < 1:
            raise ValueError(f"beam must be a positive int, the hypotheses kept for each row, not {self.beam!r}")

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; `importance` [k, k] is the mean of the products of each two inputs, else identity."""
        expect_format(fmt, "codebook", self)
        gram = jnp.eye(w.shape[1]) if importance is None else importance
        if gram.ndim > 2:
            raise ValueError(
                f"{self} finds codebooks for all outputs at once: its importance is one [k, k], not {gram.shape}"
            )
        return stored(_solve(w.astype(jnp.float32), gram, fmt, self.beam, self.rounds), fmt)


def additive_codebooks(rounds: int = 100, beam: int = 1) -> AdditiveCodebooks:
    """AQLM's quantizer for `codebook`: the error of the layer's output, not of its weight, falls round by round.

    A round is 100 steps of Adam on codebooks and scales, and a beam search over the codes; the first round that takes
    away less than 1 % of the error is the last, and none raises it. Deterministic on a CPU: the start is that of
    `lb.residual_kmeans`, and orders are drawn with a fixed key. Memory: k x k numbers, and `beam` times the weight.

    Args:
      rounds: at most so many. With none it is residual k-means weighed by second moments.
      beam: hypotheses that the search keeps for each row. More find better codes and take as many times as long.

    The importance that `lb.quantize_array` hands on is the mean [k, k] of the products of each two inputs, which
    `lb.calibrate(..., statistics=["gram"])` measures, or `rules=` with this quantizer; without it the error is that of
    the weight.

    >>> import jax, lowbit as lb
    >>> x = jax.random.normal(jax.random.key(0), (256, 1)) + 0.1 * jax.random.normal(jax.random.key(1), (256, 32))
    >>> w = jax.random.normal(jax.random.key(2), (32, 64))
    >>> fmt, gram = lb.codebook(1, 4, vec=2), x.T @ x / 256
    >>> plain = lb.quantize_array(w, fmt)
    >>> for_these = lb.quantize_array(w, fmt, lb.additive_codebooks(), importance=gram)
    >>> bool((x @ (lb.dequantize(for_these) - w)).std() < 0.5 * (x @ (lb.dequantize(plain) - w)).std())
    True
    """
    return AdditiveCodebooks(rounds, beam)


@partial(jax.jit, static_argnums=(2, 3))
def _solve(w: jax.Array, gram: jax.Array, fmt: Format, beam: int, rounds: int) -> CodebookCode:
    """Additive codebooks of w [n, k]."""
    start = solve(w, gram.diagonal()[None], fmt, ResidualKMeans().rounds)
    row = start.scale.max(1, keepdims=True)
    unit = jnp.where(row > 0, row, 1.0)
    padding = start.codes.shape[2] * start.codes.shape[3] * fmt["vec"] - w.shape[1]
    target = _Target(
        jnp.pad(jnp.where(row > 0, w / unit, 0.0), ((0, 0), (0, padding))),
        jnp.square(row / jnp.maximum(row.max(), 1e-30)),
        jnp.pad(gram / gram.diagonal().mean(), (0, padding)),
    )

    def turn(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, code, loss, _ = state
        tuned, least = _tune(target, code)
        found = _search(target, tuned, jax.random.fold_in(jax.random.key(0), i), beam)
        after = _loss_and_gradient(target, found)[0]
        best = jax.tree.map(partial(jnp.where, after < least), found, tuned)
        return i + 1, best, jnp.minimum(after, least), loss

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        i, _, loss, before = state
        return (i < rounds) & (loss < (1 - _ENOUGH) * before)

    code = start._replace(scale=start.scale / unit)
    loss = _loss_and_gradient(target, code)[0]
    end: CodebookCode = lax.while_loop(goes_on, turn, (jnp.int32(0), code, loss, jnp.float32(jnp.inf)))[1]
    return end._replace(scale=end.scale * unit)


def _decoded(codes: jax.Array, books: jax.Array, scale: jax.Array) -> jax.Array:
    """Weights [n, k]."""
    sums = jax.vmap(lambda book, code: book[code])(books, codes).sum(0)
    return (scale[..., None, None] * sums).reshape(len(scale), -1)


def _loss_and_gradient(target: _Target, code: CodebookCode) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """tr(D H D^T), and its gradients by codebooks and by scales."""
    decoded, pull = jax.vjp(partial(_decoded, code.codes), code.books, code.scale)
    error = decoded - target.w
    product = target.mass * _times(error, target.gram)
    return (error * product).sum(), pull(2 * product)


def _tune(target: _Target, code: CodebookCode) -> tuple[CodebookCode, jax.Array]:
    """The best codebooks and scales that Adam meets, and their error. The codes stay."""
    optimizer = optax.amsgrad(optax.linear_schedule(_RATE, 0.0, _STEPS), b1=0.0, b2=0.95)

    def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        (books, change), moments, best, least = state
        now = code._replace(books=books, scale=code.scale * change)
        loss, (of_books, of_scale) = _loss_and_gradient(target, now)
        best = jax.tree.map(partial(jnp.where, loss < least), now, best)
        updates, moments = optimizer.update((of_books, of_scale * code.scale), moments)
        return (optax.apply_updates((books, change), updates), moments, best, jnp.minimum(loss, least)), None

    free = code.books, jnp.ones_like(code.scale)
    start = free, optimizer.init(free), code, jnp.float32(jnp.inf)
    (_, _, best, least), _ = lax.scan(step, start, None, _STEPS)
    return best, least


def _search(target: _Target, code: CodebookCode, key: jax.Array, beam: int) -> CodebookCode:
    """The codes that beam search finds from these."""
    m, n, g, j = code.codes.shape
    of_vectors, of_books = jax.random.split(key)
    order = jax.random.permutation(of_vectors, g * j)
    books = jax.random.permutation(of_books, jnp.tile(jnp.arange(m)[None], (g * j, 1)), axis=1, independent=True)
    codes = code.codes.reshape(m, n, g * j).transpose(1, 0, 2)
    error = _decoded(*code) - target.w
    start = _Beam(
        jnp.broadcast_to(error[:, None], (n, beam, error.shape[1])),
        jnp.broadcast_to(codes[:, None], (n, beam, m, g * j)),
        jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, jnp.inf)[None], (n, beam)),  # as yet there is one
    )
    end = lax.scan(partial(_visit, target, code), start, (order, books))[0]
    return code._replace(codes=end.codes[:, 0].transpose(1, 0, 2).reshape(code.codes.shape))


def _visit(target: _Target, code: CodebookCode, beam: _Beam, at: tuple[jax.Array, jax.Array]) -> tuple[_Beam, None]:
    """The codes of vector `at[0]` again, its codebooks in the order `at[1]`."""
    i, order = at
    m, _, vec = code.books.shape
    scale = lax.dynamic_index_in_dim(code.scale, i // code.codes.shape[3], 1, keepdims=False)
    columns = lax.dynamic_slice_in_dim(target.gram, i * vec, vec, 1)
    square = lax.dynamic_slice_in_dim(columns, i * vec, vec, 0)
    own = lax.dynamic_index_in_dim(beam.codes, i, 3, keepdims=False)
    source = jnp.broadcast_to(jnp.arange(own.shape[1])[None], own.shape[:2])
    start = _Vector(own, _times(beam.error, columns), beam.change, source)
    end = lax.scan(partial(_select, code.books, scale, square), start, order)[0]
    error, codes = _taken((beam.error, beam.codes), end.source)
    w = lax.dynamic_slice_in_dim(target.w, i * vec, vec, 1)
    sums = sum((code.books[b][end.codes[:, :, b]] for b in range(m)), jnp.zeros(()))
    error = lax.dynamic_update_slice_in_dim(error, scale[:, None, None] * sums - w[:, None], i * vec, 2)
    return _Beam(error, lax.dynamic_update_index_in_dim(codes, end.codes, i, 3), end.change), None


def _select(books: jax.Array, scale: jax.Array, square: jax.Array, now: _Vector, b: jax.Array) -> tuple[_Vector, None]:
    """The best codes of a vector in codebook b, `square` being H[J, J]."""
    book, own, s = books[b], now.codes[:, :, b], scale[:, None, None]
    without = now.e - s * _times(book[own], square)  # E of the vector less its share of this codebook
    norms = (_times(book, square) * book).sum(1)

    def of_row(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        without, scale, own, change = row
        errors = scale * scale * norms[None] + 2 * scale * _times(without, book.T)
        changes = change[:, None] + errors - jnp.take_along_axis(errors, own[:, None], 1)
        return _least(changes.reshape(-1), len(own))

    rows = max(1, _BLOCK // (own.shape[1] * len(book)))
    change, at = lax.map(of_row, (without, scale, own, now.change), batch_size=rows)
    source, new = at // len(book), at % len(book)
    codes, without, source = _taken((now.codes, without, now.source), source)
    return _Vector(codes.at[:, :, b].set(new), without + s * _times(book[new], square), change, source), None


def _least(a: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The smallest entries of a vector, the smallest first, and where they are."""
    if count == 1:
        at = smallest(a)[None]
        return a[at], at
    negative, at = lax.top_k(-a, count)
    return -negative, at


def _taken(arrays: tuple[jax.Array, ...], source: jax.Array) -> Iterator[jax.Array]:
    """Arrays [n, B, ...] of the hypotheses `source` [n, B] of each row."""
    if source.shape[1] == 1:
        yield from arrays
    else:
        yield from (jnp.take_along_axis(a, source.reshape(*source.shape, *(1,) * (a.ndim - 2)), 1) for a in arrays)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
