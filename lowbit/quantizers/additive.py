"""Additive codebooks under the second moments of the inputs, as AQLM finds them (Egiazarian et al., ICML 2024).

With D the error of the weight [n, k] and H = E[x x^T] [k, k], the expected squared error of the layer's output is

    tr(D H D^T).

After residual k-means two steps take turns: Adam on codebooks and scales, with the codes as they are, and a beam search
over the codes. The search visits the vectors of a row one after the other, all rows at once. With J the inputs of a
vector, E = D H[:, J], and c the scale times what another vector of the codebook has more than the one selected, selecting
the other one changes the error of the row by

    2 <c, E> + c H[J, J] c^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowbit.formats.format import Format
from lowbit.quantizers.codebook import CodebookCode, ResidualKMeans, expect_codebook, smallest, solve, stored
from lowbit.quantizers.quantizer import Fields

# Steps of Adam in a round, and their size: groups have the root mean square 1. Errors of candidates held at a time.
_STEPS, _RATE = 100, 1e-2
_BLOCK = 1 << 20
_ENOUGH = 0.01
"""A round that takes away a smaller share of the error is the last one."""


class _Target(NamedTuple):
    """Rows `w [n, k]` whose largest scale is 1, the share `mass [n, 1]` of each in the error, and H, `gram [k, k]`."""

    w: jax.Array
    mass: jax.Array
    gram: jax.Array


class _Beam(NamedTuple):
    """The best hypotheses B of each row, the best first: D, codes, and the change of the error since the start."""

    error: jax.Array  # [n, B, k]
    codes: jax.Array  # [n, B, b, vectors]
    change: jax.Array  # [n, B]


@dataclass(frozen=True)
class AdditiveCodebooks:
    """Adam and beam search in turns. Make one with `lb.additive_codebooks`."""

    rounds: int = 100
    beam: int = 1
    takes_gram: ClassVar[bool] = True

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; with `importance` [k, k], E[x x^T], the error is that of the output, else of the weight."""
        expect_codebook(fmt, self)
        gram = jnp.eye(w.shape[1]) if importance is None else importance
        return stored(_solve(w.astype(jnp.float32), gram, fmt, self.beam, self.rounds), fmt)


def additive_codebooks(rounds: int = 100, beam: int = 1) -> AdditiveCodebooks:
    return AdditiveCodebooks(rounds, beam)


@partial(jax.jit, static_argnums=(2, 3))
def _solve(w: jax.Array, gram: jax.Array, fmt: Format, beam: int, rounds: int) -> CodebookCode:
    code = solve(w, gram.diagonal()[None], fmt, ResidualKMeans().rounds)
    row = code.scale.max(1, keepdims=True)
    unit = jnp.where(row > 0, row, 1.0)
    padding = code.codes.shape[2] * code.codes.shape[3] * fmt["vec"] - w.shape[1]
    target = _Target(
        jnp.pad(jnp.where(row > 0, w / unit, 0.0), ((0, 0), (0, padding))),
        jnp.square(row / jnp.maximum(row.max(), 1e-30)),
        jnp.pad(gram / gram.diagonal().mean(), (0, padding)),
    )
    code = code._replace(scale=code.scale / unit)

    def turn(state):
        i, code, loss, _ = state
        tuned, least = _tune(target, code)
        found = _search(target, tuned, jax.random.fold_in(jax.random.key(0), i), beam)
        after = _value_and_gradient(target, found)[0]
        best = jax.tree.map(lambda new, old: jnp.where(after < least, new, old), found, tuned)
        jax.debug.print("{} {} {} {}", i, loss, least, after)
        return i + 1, best, jnp.minimum(after, least), loss

    def goes_on(state):
        i, _, loss, before = state
        return (i < rounds) & (loss <= (1 - _ENOUGH) * before)

    _, code, _, _ = lax.while_loop(goes_on, turn, (0, code, _value_and_gradient(target, code)[0], jnp.inf))
    return code._replace(scale=code.scale * unit)


def _decoded(codes: jax.Array, books: jax.Array, scale: jax.Array) -> jax.Array:
    """Weights [n, k]."""
    sums = jax.vmap(lambda book, code: book[code])(books, codes).sum(0)
    return (scale[..., None, None] * sums).reshape(len(scale), -1)


def _value_and_gradient(target: _Target, code: CodebookCode) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """tr(D H D^T), and its gradients by codebooks and by scales."""
    decoded, pull = jax.vjp(partial(_decoded, code.codes), code.books, code.scale)
    error = decoded - target.w
    product = target.mass * jnp.matmul(error, target.gram, precision=lax.Precision.HIGHEST)
    return (error * product).sum(), pull(2 * product)


def _tune(target: _Target, code: CodebookCode) -> tuple[CodebookCode, jax.Array]:
    """Codebooks and scales after some steps of Adam, the best ones met, and their error."""
    optimizer = optax.amsgrad(optax.linear_schedule(_RATE, 0.0, _STEPS), b1=0.0, b2=0.95)

    def step(state, _):
        books, change, opt, best, least = state
        now = code._replace(books=books, scale=code.scale * change)
        loss, (of_books, of_scale) = _value_and_gradient(target, now)
        best = jax.tree.map(lambda new, old: jnp.where(loss < least, new, old), now, best)
        updates, opt = optimizer.update((of_books, of_scale * code.scale), opt)
        books, change = optax.apply_updates((books, change), updates)
        return (books, change, opt, best, jnp.minimum(loss, least)), None

    change = jnp.ones_like(code.scale)
    state = code.books, change, optimizer.init((code.books, change)), code, jnp.inf
    (_, _, _, best, least), _ = lax.scan(step, state, None, _STEPS)
    return best, least


def _search(target: _Target, code: CodebookCode, key: jax.Array, beam: int) -> CodebookCode:
    """Better codes."""
    m, n, g, j = code.codes.shape
    vec = code.books.shape[2]
    of_vector, of_books = jax.random.split(key)
    order = jax.random.permutation(of_vector, g * j)
    books = jax.vmap(lambda key: jax.random.permutation(key, m))(jax.random.split(of_books, g * j))
    codes = code.codes.reshape(m, n, g * j).transpose(1, 0, 2)
    error = _decoded(*code) - target.w
    start = _Beam(
        jnp.broadcast_to(error[:, None], (n, beam, error.shape[1])),
        jnp.broadcast_to(codes[:, None], (n, beam, m, g * j)),
        jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, jnp.inf), (n, beam)),
    )

    def visit(state: _Beam, at) -> tuple[_Beam, None]:
        i, turns = at
        scale = lax.dynamic_index_in_dim(code.scale, i // j, 1, keepdims=False)
        columns = lax.dynamic_slice_in_dim(target.gram, i * vec, vec, 1)
        square = lax.dynamic_slice_in_dim(columns, i * vec, vec, 0)
        own = lax.dynamic_index_in_dim(state.codes, i, 3, keepdims=False)
        e = jnp.matmul(state.error, columns, precision=lax.Precision.HIGHEST)

        def select(inner, b):
            own, e, change, source = inner
            book = code.books[b]
            quadratic = (book @ square * book).sum(1)
            old = book[own[:, :, b]]
            s = scale[:, None, None]
            without = e - s * (old @ square)
            change, picked = _best(without, scale, own[:, :, b], change, book, quadratic)
            new, frm = picked % len(book), picked // len(book)
            if beam > 1:
                own, without, source = (_from(a, frm) for a in (own, without, source))
            own = own.at[:, :, b].set(new)
            return (own, without + s * (book[new] @ square), change, source), None

        source = jnp.broadcast_to(jnp.arange(beam), (n, beam))
        (own, e, change, source), _ = lax.scan(select, (own, e, state.change, source), turns)
        error, codes = state.error, state.codes
        if beam > 1:
            error, codes = (_from(a, source) for a in (error, codes))
        sums = sum(code.books[b][own[:, :, b]] for b in range(m))
        own_w = lax.dynamic_slice_in_dim(target.w, i * vec, vec, 1)
        error = lax.dynamic_update_slice_in_dim(error, scale[:, None, None] * sums - own_w[:, None], i * vec, 2)
        codes = lax.dynamic_update_index_in_dim(codes, own, i, 3)
        return _Beam(error, codes, change), None

    end, _ = lax.scan(visit, start, (order, books))
    return code._replace(codes=end.codes[:, 0].transpose(1, 0, 2).reshape(code.codes.shape))


def _from(a, source):
    return jnp.take_along_axis(a, source.reshape(*source.shape, *(1,) * (a.ndim - 2)), 1)


def _best(without, scale, own, change, book, quadratic):
    beam, count = own.shape[1], len(book)

    def of_row(row):
        without, s, own, change = row
        scores = s * s * quadratic + 2 * s * jnp.matmul(without, book.T, precision=lax.Precision.HIGHEST)
        total = change[:, None] + scores - jnp.take_along_axis(scores, own[:, None], 1)
        flat = total.reshape(-1)
        if beam == 1:
            at = smallest(flat)[None]
            return flat[at], at
        least, at = lax.top_k(-flat, beam)
        return -least, at

    return lax.map(of_row, (without, scale, own, change), batch_size=max(1, _BLOCK // (beam * count)))
