"""Quantizers: from a dense weight and a format to the format's stored arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, expect_array, own
from lowbit.formats.bcq import bcq
from lowbit.formats.format import Format
from lowbit.formats.planes import group_size, pack_planes
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.quant_type import QuantType, readings
from lowbit.quantizers.binary import BinaryCode, solve
from lowbit.quantizers.checks import check_range, check_weight, damped, positive
from lowbit.quantizers.groups import to_groups
from lowbit.quantizers.uniform import rtn, to_binary

Fields = dict[str, jax.Array]
Quantizer = Callable[[jax.Array, Format], Fields]
"""Takes a float weight [n, k] and a format; returns the format's stored arrays. It must trace under `jax.jit`.

One with `takes_importance = True` is given a third argument where there are statistics: positive weights of squared
errors, [k] or [n, k], the product of the fields of `LayerStats` that its `weighs_by` names, or else "second_moment".
One with `takes_gram = True` is given the field `gram`, [k, k].
One with a method `examine(w, name)` is shown the whole weight first, [*stack, k, n] or [*stack, n, k], which may be
traced: to raise IneligibleError for one that its format cannot hold, and to log what is lost.
"""

_AT_ONCE = 1 << 22  # weights that are rounded at once, which bounds the scratch memory


@dataclass(frozen=True)
class BinarySolver:
    """Least-squares signs and scales for binary-coding planes.

    `rounds=0` is greedy (sign of the residual, mean of its magnitude); more rounds alternate between least-squares
    scales and nearest-level signs, and never end worse (Xu et al., ICLR 2018; the solver of LUT-GEMM uses 15).
    """

    rounds: int = 15
    weighs_by: tuple[str, ...] = field(default=("second_moment",), repr=False)
    takes_importance: ClassVar[bool] = True

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; with `importance` [k] or [n, k], squared errors count that much, all positive."""
        expect_format(fmt, "bcq", self)
        values, weights, shape = grouped(w, fmt, importance)
        code = solve(values, fmt["bits"], rounds=self.rounds, offset=fmt["offset"], importance=weights)
        return _binary_fields(code, fmt, shape)


@dataclass(frozen=True)
class RoundToNearest:
    """Evenly spaced levels from the smallest to the largest weight of a group: the baseline of every comparison.

    For `bcq` formats the codes are converted exactly, which needs `offset=True`.
    """

    def __call__(self, w: jax.Array, fmt: Format) -> Fields:
        expect_format(fmt, ("uniform", "bcq"), self)
        if fmt.name == "bcq" and not fmt["offset"]:
            raise ValueError(f"{self} gives levels that are not symmetric about zero: use bcq(..., offset=True)")
        rows = max(1, _AT_ONCE // w.shape[1])
        if isinstance(w, jax.core.Tracer) or len(w) <= rows:
            return _rounded(w, fmt)
        # Each part is waited for, or all would take scratch memory at once. Planes have their rows second.
        parts = [jax.block_until_ready(_rounded(w[at : at + rows], fmt)) for at in range(0, len(w), rows)]
        return {name: jnp.concatenate([p[name] for p in parts], int(a.ndim > 2)) for name, a in parts[0].items()}


@partial(jax.jit, static_argnums=1)
def _rounded(w: jax.Array, fmt: Format) -> Fields:
    values, mask = _groups(w, fmt)
    code = rtn(values.reshape(-1, values.shape[2]), fmt["bits"], mask)
    binary = to_binary(code, fmt["bits"])
    if fmt.name == "bcq":
        return _binary_fields(binary, fmt, values.shape)
    n, g, _ = values.shape
    scale = _to_scale_dtype(code.scale, fmt)
    planes = pack(binary.bits, values.shape)
    return {"planes": planes, "scale": scale.reshape(n, g), "zero": code.zero.reshape(n, g)}


def greedy() -> BinarySolver:
    """The greedy solver, as in AlphaTuning: plane by plane, the sign of the residual and the mean of its magnitude.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> lb.dequantize(lb.quantize_array(jnp.array([[1.0], [-3.0]]), lb.bcq(1), lb.greedy())).tolist()
    [[2.0], [-2.0]]
    """
    return BinarySolver(rounds=0)


def alternating(rounds: int = 15, weighs_by: tuple[str, ...] = ("second_moment",)) -> BinarySolver:
    """The alternating solver, the default for `bcq`: at most `rounds` rounds after the greedy start, the best one kept.

    Where `lb.quantize` is given `stats`, the squared error of each weight counts as much as the product of these
    statistics: the second moment of its input, which is the expected error of the layer's output; ("gradient_square",),
    the expected change of the loss by SqueezeLLM's estimate; or others that a `LayerStats` has.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = jnp.array([[-3.0], [-1.0], [1.0], [3.0]])
    >>> bool(jnp.allclose(lb.dequantize(lb.quantize_array(w, lb.bcq(2), lb.alternating())), w))  # signs of 2 and 1
    True
    """
    return BinarySolver(rounds, weighs_by)


def round_to_nearest() -> RoundToNearest:
    """Round to nearest: the default for `uniform`.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = jnp.array([[-1.0], [0.0], [0.5], [2.0]])
    >>> lb.dequantize(lb.quantize_array(w, lb.uniform(2), lb.round_to_nearest())).tolist()
    [[-1.0], [0.0], [0.0], [2.0]]
    """
    return RoundToNearest()


_DEFAULTS: dict[str, Quantizer] = {"bcq": BinarySolver(), "uniform": RoundToNearest()}


def set_default_quantizer(format_name: str, quantizer: Quantizer) -> None:
    """Use `quantizer` for a format when a rule names none: how a format of your own joins `lb.quantize`.

    >>> import lowbit as lb
    >>> lb.set_default_quantizer("bcq", lb.alternating(15))  # the one it has
    """
    _DEFAULTS[format_name] = quantizer


def has_default(fmt: Format) -> bool:
    """Whether a format has a default quantizer."""
    return fmt.name in _DEFAULTS


def quantize_array(
    w: Any,
    fmt: Format,
    quantizer: Quantizer | None = None,
    *,
    dims: tuple[str, str] = ("k", "n"),
    name: str = "the weight",
    importance: jax.Array | None = None,
) -> QuantArray:
    """Quantize one matrix, or a stack of them, one after the other.

    Args:
      w: a float matrix, [k, n] as in a Flax kernel; with `dims=("n", "k")`, [n, k] as in an embedding. Axes before
        these two are a stack of matrices, each quantized on its own.
      fmt: the format, such as `lb.bcq(3, group=128)`.
      quantizer: how to find codes and scales; the format's default if None.
      dims: the order of w's last two dims: n outputs (or rows), k summed inputs.
      name: what errors call the weight.
      importance: nonnegative, how much the squared error of each input counts: [k], or for a stack what broadcasts to
        [*stack, k]; or of w's shape, that of each weight. For `lb.additive_codebooks`, and quantizers with
        `takes_gram = True`, the mean of the products of each two inputs instead, [k, k], or what broadcasts to
        [*stack, k, k]. A quantizer with neither this nor `takes_importance = True`, such as `lb.round_to_nearest`, is
        not given it.

    Raises TypeError for a weight that is not floating, ValueError for NaN or inf, one that is not a matrix, one that
    the format cannot hold (an IneligibleError), or an importance that is NaN, inf, negative, not positive semidefinite
    or of another shape.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> lb.quantize_array(jnp.ones((256, 4)), lb.bcq(3, group=128)).type
    QuantType(f32[k=256 n=4] as bcq(bits=3, group=128), 3.75 bits/weight)
    """
    if not isinstance(fmt, Format):
        raise TypeError(f"{fmt!r} is not a format such as lb.bcq(3, group=128)")
    w = jnp.asarray(w)
    check_weight(w, name)
    stack, shape = w.shape[:-2], w.shape[-2:]
    type_ = QuantType(tuple(zip(dims, shape, strict=True)), short(w.dtype), fmt)
    solver = quantizer or default_quantizer(fmt)
    readings(type_)  # raises for what the format cannot store, before it is solved for
    if hasattr(solver, "examine"):
        solver.examine(w, name)
    weights = None
    if importance is not None and (takes_gram(solver) or getattr(solver, "takes_importance", False)):
        weights = (damped if takes_gram(solver) else positive)(importance, dims, w.shape, name)

    def one(at: tuple[int, ...]) -> QuantArray:
        f = None if weights is None else weights[tuple(i % size for i, size in zip(at, weights.shape, strict=False))]
        return _quantize(w[at], type_, solver, f, f"{name}, slice {list(at)}," if at else name)

    slices = [one(at) for at in np.ndindex(stack)]
    return jax.tree.map(lambda *a: jnp.stack(a).reshape(*stack, *a[0].shape), *slices) if stack else slices[0]


def _quantize(w: jax.Array, t: QuantType, solver: Quantizer, importance: jax.Array | None, name: str) -> QuantArray:
    rows = w if t.dims[0][0] == "n" else w.T
    fields = solver(rows, t.format) if importance is None else solver(rows, t.format, importance)  # type: ignore[call-arg]
    if not isinstance(fields, Mapping):
        given = f"returned a {type(fields).__name__}, not the stored arrays by name"
        raise TypeError(f"{name}: the quantizer {given}: {t.format} stores {sorted(t.fields)}")
    array = QuantArray.of(fields, t)
    check_range(array, w, name)
    return array


def to_bcq(w: QuantArray) -> QuantArray:
    """A uniform array as binary-coding planes with an offset, exactly: the same planes under other scales.

    From q = sum_p 2^p b_p: alpha_p = scale 2^p / 2 and beta = scale ((2^bits - 1) / 2 - zero), stored in float32.

    Raises TypeError for an array of another format.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> lb.to_bcq(lb.quantize_array(jnp.ones((256, 4)), lb.uniform(4, group=128))).type
    QuantType(f32[k=256 n=4] as bcq(bits=4, group=128, offset=True), 5.25 bits/weight)
    """
    w = own(expect_array(w, "to_bcq"))
    fmt = w.type.format
    if fmt.name != "uniform":
        raise TypeError(f"to_bcq converts uniform arrays; this one is {fmt}")
    new = bcq(fmt["bits"], fmt["group"], offset=True, scale_dtype="float32")
    scale, zero = w.fields["scale"].astype(jnp.float32), w.fields["zero"].astype(jnp.float32)
    half = jnp.array([2.0 ** (p - 1) for p in range(fmt["bits"])], jnp.float32)[:, None, None]
    beta = scale * ((2 ** fmt["bits"] - 1) / 2 - zero)
    alpha = half.reshape((1,) * len(w.stack) + half.shape) * scale[..., None, :, :]
    fields = {"planes": w.fields["planes"], "alpha": alpha, "beta": beta}
    return QuantArray.of(fields, replace(w.type, format=new))


def default_quantizer(fmt: Format) -> Quantizer:
    """The quantizer of rules that name none. Raises ValueError if the format has none."""
    if fmt.name not in _DEFAULTS:
        raise ValueError(f"format {fmt.name!r} has no default quantizer: name one, or use lb.set_default_quantizer")
    return _DEFAULTS[fmt.name]


def expect_format(fmt: Format, names: str | tuple[str, ...], who: Any) -> None:
    if fmt.name not in (names if isinstance(names, tuple) else (names,)):
        raise TypeError(f"{who} makes {names if isinstance(names, str) else ' or '.join(names)}, not {fmt}")


def weighs_by(quantizer: Quantizer) -> tuple[str, ...]:
    """The statistics of a layer, fields of `LayerStats`, whose product a quantizer weighs errors by; none if it takes
    no importance."""
    if takes_gram(quantizer):
        return getattr(quantizer, "weighs_by", ("gram",))
    takes = getattr(quantizer, "takes_importance", False)
    return getattr(quantizer, "weighs_by", ("second_moment",)) if takes else ()


def takes_gram(quantizer: Quantizer) -> bool:
    """Whether the importance that a quantizer takes is that of each two inputs."""
    return getattr(quantizer, "takes_gram", False)


@partial(jax.jit, static_argnums=1)
def _groups(w: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    return to_groups(w, group_size(w.shape[1], fmt["group"]))


def grouped(
    w: jax.Array, fmt: Format, importance: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, tuple[int, int, int]]:
    """The groups [n g, t] of w, how much their squared errors count, None for all the same, and (n, g, t)."""
    values, mask = _groups(w, fmt)
    n, g, t = values.shape
    weights = mask if w.shape[1] % t else None
    if importance is not None:
        weights = (_groups(jnp.atleast_2d(importance), fmt)[0] * mask[None]).reshape(-1, t)
    return values.reshape(-1, t), weights, (n, g, t)


@partial(jax.jit, static_argnums=1)
def pack(bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Solver bits [n g, p, t] to stored planes [p, n, g, j]."""
    n, g, t = shape
    return pack_planes(bits.reshape(n, g, -1, t).transpose(2, 0, 1, 3))


def _to_scale_dtype(a: jax.Array, fmt: Format) -> jax.Array:
    return a.astype(numpy_dtype(short(fmt["scale_dtype"])))


def _binary_fields(code: BinaryCode, fmt: Format, shape: tuple[int, ...]) -> Fields:
    return {"planes": pack(code.bits, shape), **scale_fields(code.alpha, code.beta, fmt, shape)}


def scale_fields(
    alpha: jax.Array, beta: jax.Array | None, fmt: Format, shape: tuple[int, ...], width: int | str = ""
) -> Fields:
    """Solver scales [n g, p], and offsets [n g], as they are stored; of a width, under its names."""
    n, g, _ = shape
    out = {f"alpha{width}": _to_scale_dtype(alpha, fmt).reshape(n, g, -1).transpose(2, 0, 1)}
    if beta is not None:
        out[f"beta{width}"] = _to_scale_dtype(beta, fmt).reshape(n, g)
    return out
