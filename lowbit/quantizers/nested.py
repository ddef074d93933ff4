"""Nested codes by splitting clusters: the quantizer of `any_precision`, and its tables for codes that are given.

Any-Precision LLM (Park et al., ICML 2024): the clusters of the least width are those of SqueezeLLM (Kim et al., ICML
2024), weighted k-means of each row, and every cluster is split in two for the next width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, expect_array
from lowbit.formats.format import Format
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.quantizers.checks import check_range, check_weight, damped, positive
from lowbit.quantizers.chunks import in_chunks
from lowbit.quantizers.kmeans import nested_kmeans_rows
from lowbit.quantizers.quantizer import Fields, expect_format, set_default_quantizer
from lowbit.quantizers.tables import refitted


@dataclass(frozen=True)
class NestedKMeans:
    """k-means of each row at the least width, then splits of its clusters. Make one with `lb.nested_kmeans`."""

    weighs_by: tuple[str, ...] = field(default=("second_moment",), repr=False)
    takes_importance: ClassVar[bool] = True

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; with `importance` [k] or [n, k], nonnegative, squared errors count that much."""
        expect_format(fmt, "any_precision", self)
        given = [a.astype(jnp.float32) for a in (w, importance) if a is not None]
        if not any(isinstance(a, jax.core.Tracer) for a in given):
            return {name: jnp.asarray(a) for name, a in _solve(fmt, *given).items()}
        n, k = w.shape
        shapes = {"planes": jax.ShapeDtypeStruct((fmt["hi"], n, 1, -(-k // 8)), jnp.uint8)}
        for b in fmt.widths:
            shapes[f"table{b}"] = jax.ShapeDtypeStruct((n, 1 << b), _dtype(fmt))
        return jax.pure_callback(partial(_solve, fmt), shapes, *given, vmap_method="sequential")


def nested_kmeans(weighs_by: tuple[str, ...] = ("second_moment",)) -> NestedKMeans:
    """k-means and splits, the default for `any_precision`: the tables of every width are made for its own error.

    At the least width b a row's weights are clustered into 2**b by greedy k-means++ and at most 50 rounds of Lloyd's
    algorithm. For each further width every cluster is split in two, where the midpoint of the means of both sides lies
    between them. Tables hold the means, in ascending order. Deterministic. Runs on the host, on up to 8 cores, where
    the model may be; in a function that is compiled, as a callback.

    Where `lb.quantize` is given `stats`, errors are weighed as by `lb.alternating`. The published models weigh by the
    diagonal of the Fisher information, `weighs_by=("gradient_square",)`, and leave out weights that are zero; here
    these count like any other.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = jnp.array([[4.0], [-4.0], [6.0], [-6.0]])
    >>> q = lb.quantize_array(w, lb.any_precision(1, 2), lb.nested_kmeans())
    >>> q.fields["table1"].tolist(), lb.dequantize(q)[:, 0].tolist()
    ([[-5.0, 5.0]], [4.0, -4.0, 6.0, -6.0])
    """
    return NestedKMeans(weighs_by)


def by_moments(w: jax.Array, fmt: Format, gram: jax.Array | None) -> tuple[jax.Array, Fields]:
    """The products of inputs [k, k] or [c, k, k], the identity if None, and the k-means that their diagonal weighs."""
    gram = jnp.eye(w.shape[1]) if gram is None else gram
    return gram, NestedKMeans()(w, fmt, in_chunks(gram.diagonal(axis1=-2, axis2=-1), len(w)))


@dataclass(frozen=True)
class RefittedKMeans:
    """Nested codes by k-means, and then tables by least squares. Make one with `lb.refitted_kmeans`."""

    weighs_by: tuple[str, ...] = field(default=("gram",), repr=False)
    takes_gram: ClassVar[bool] = True

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; `importance` [k, k] or, for chunks of the outputs, [c, k, k]; else the identity."""
        expect_format(fmt, "any_precision", self)
        gram, start = by_moments(w, fmt, importance)
        return {**start, **refitted(gram, w, start, fmt.widths)}


def refitted_kmeans(weighs_by: tuple[str, ...] = ("gram",)) -> RefittedKMeans:
    """Nested codes whose tables make the error of the layer's output small, at every width of `any_precision`.

    The codes are those of `lb.nested_kmeans`, weighed by second moments. For them the tables of each width are the best
    under the products of each two inputs, by the least squares of `lb.lnq`, which chooses codes too but for one width;
    a row that this does not make better keeps the means. `lowbit.quantizers.refit_tables` does it for given codes.

    Args:
      weighs_by: ("gram",) or ("guided_gram",), as `lb.lnq` has it.

    >>> import jax, lowbit as lb
    >>> x = jax.random.normal(jax.random.key(0), (256, 8)) @ jax.random.normal(jax.random.key(1), (8, 32))
    >>> w, fmt = jax.random.normal(jax.random.key(2), (32, 64)), lb.any_precision(2, 3)
    >>> means, fitted = (lb.quantize_array(w, fmt, q, importance=given) for q, given in (
    ...     (lb.nested_kmeans(), (x**2).mean(0)), (lb.refitted_kmeans(), x.T @ x / 256)))
    >>> bool((x @ (lb.dequantize(fitted) - w)).std() < (x @ (lb.dequantize(means) - w)).std())
    True
    """
    return RefittedKMeans(weighs_by)


def refit_tables(
    array: QuantArray, w: Any, importance: jax.Array | None = None, *, gram: Any = None, name: str = "the weight"
) -> QuantArray:
    """The same codes with the tables that are best for a weight: at every width, the mean of what each code stands for.

    This minimizes sum_k f_k (w_k - table_b[code_k >> (hi - b)])^2 over each table_b, or with `gram` the error of the
    layer's output, and a row that is not better then keeps its tables. Use it for codes that were not made from w:
    after w was tuned, or by a method that chooses codes alone. It runs on the host, outside of `jax.jit`.

    Args:
      array: of the format `any_precision`; its own tables are kept where no weight has the code.
      w: the weight, of the array's shape and order of dims; a stack for a stack.
      importance: f, as `lb.quantize_array` takes it; None counts every weight alike.
      gram: instead, the mean of the products of each two inputs [k, k], or for chunks of the outputs [c, k, k], before
        them the axes of a stack or 1, as `lb.lnq` takes it.
      name: what errors call the weight.

    Raises TypeError for an array of another format or a weight that is not floating, ValueError for a weight of another
    shape, NaN or inf, means that the tables' dtype cannot hold, an importance or a gram that does not fit, and both.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = jnp.array([[4.0], [-4.0], [6.0], [-6.0]])
    >>> q = refit_tables(lb.quantize_array(w, lb.any_precision(1, 2)), w + 1)
    >>> q.fields["table1"].tolist(), lb.dequantize(q)[:, 0].tolist()
    ([[-4.0, 6.0]], [5.0, -3.0, 7.0, -5.0])
    """
    t, w = expect_array(array, "refit_tables").type, jnp.asarray(w)
    if t.format.name != "any_precision":
        raise TypeError(f"refit_tables takes any_precision arrays; this one is {t.format}")
    if w.shape != array.shape:
        raise ValueError(f"{name} has shape {w.shape}, but the array has {array.shape}: give the weight it stands for")
    check_weight(w, name)
    dims = (t.dims[0][0], t.dims[1][0])
    if gram is not None:
        if importance is not None:
            raise ValueError(f"{name}: both importance and gram were given; the diagonal of gram is one: leave it out")
        tables = _least_squares(array, w if dims[0] == "n" else w.mT, damped(jnp.asarray(gram), dims, w.shape, name))
        return _refitted(array, tables, w, name)
    f = jnp.ones(w.shape[-2:][dims.index("k")]) if importance is None else positive(importance, dims, w.shape, name)
    rows = np.asarray(w if dims[0] == "n" else w.mT, np.float32)
    weights = np.broadcast_to(f if f.ndim == w.ndim else f[..., None, :], rows.shape)
    return _refitted(array, _means(array, rows, weights), w, name)


def _refitted(array: QuantArray, tables: Fields, w: jax.Array, name: str) -> QuantArray:
    made = QuantArray.of({**array.fields, **tables}, array.type)
    check_range(made, w, name)
    return made


def _least_squares(array: QuantArray, rows: jax.Array, gram: jax.Array) -> Fields:
    """The table of every width, for weights rows [*stack, n, k] and gram [*stack or 1, ..., k, k]."""
    stack, made = rows.shape[:-2], []
    for at in np.ndindex(stack):
        own = gram[tuple(i % size for i, size in zip(at, gram.shape, strict=False))]
        fields = {name: a[at] for name, a in array.fields.items()}
        made.append(refitted(own, rows[at], fields, array.type.format.widths))
    return jax.tree.map(lambda *tables: jnp.stack(tables).reshape(*stack, *tables[0].shape), *made)


def _means(array: QuantArray, rows: np.ndarray, f: np.ndarray) -> Fields:
    """The table of every width, for weights rows [*stack, n, k] and their importance."""
    fmt, (*lead, k) = array.type.format, rows.shape
    planes = np.asarray(array.fields["planes"])[..., 0, :]
    bits = np.unpackbits(np.moveaxis(planes, -3, 0), axis=-1, bitorder="little", count=k)
    size = 1 << fmt["hi"]
    at = np.arange(math.prod(lead)).reshape(*lead, 1) * size
    for bit in bits:  # the most significant first
        size >>= 1
        at = at + bit * size
    each = (f, f * rows.astype(np.float64))
    sums = [np.bincount(at.ravel(), a.ravel(), math.prod(lead) << fmt["hi"]) for a in each]
    tables = {}
    for b in fmt.widths:
        mass, moment = (a.reshape(*lead, 1 << b, -1).sum(-1) for a in sums)
        mean = moment / np.where(mass > 0, mass, 1.0)
        tables[f"table{b}"] = jnp.where(mass > 0, _stored(mean, fmt), array.fields[f"table{b}"])
    return tables


def _solve(fmt: Format, w: jax.Array, importance: jax.Array | None = None) -> dict[str, np.ndarray]:
    """The stored arrays, on the host."""
    lo, hi = fmt["lo"], fmt["hi"]
    codes, tables = nested_kmeans_rows(np.asarray(w), None if importance is None else np.asarray(importance), lo, hi)
    planes = [np.packbits((codes & (1 << p)) != 0, axis=1, bitorder="little")[:, None] for p in reversed(range(hi))]
    return {"planes": np.stack(planes), **{f"table{b}": _stored(table, fmt) for b, table in tables.items()}}


def _stored(table: np.ndarray, fmt: Format) -> np.ndarray:
    with np.errstate(over="ignore"):  # inf is refused later, by the name of the weight
        return table.astype(_dtype(fmt))


def _dtype(fmt: Format) -> np.dtype:
    return np.dtype(numpy_dtype(short(fmt["table_dtype"])))


set_default_quantizer("any_precision", NestedKMeans())
