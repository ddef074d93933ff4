"""x @ w for a quantized w: one term, its cheapest form, and the gradients of that same term."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lowbit.array import QuantArray, expect_array, in_numerics, over_stack, own
from lowbit.autotuning.lookup import chosen
from lowbit.backward import cotangents
from lowbit.by_kernel import by_fp8, by_mma, by_sums, dense
from lowbit.by_term import emit_in_order
from lowbit.devices import runs_kernels
from lowbit.dispatch import by_platform
from lowbit.ir.build import param
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.ir.expr import Const
from lowbit.ir.walk import topo
from lowbit.kernels.decoders import ROWS
from lowbit.passes.choose import Form
from lowbit.passes.in_int8 import Numerics
from lowbit.passes.lower_xla import align, emit
from lowbit.passes.tile import Tiles, keeps
from lowbit.planning import (
    FORCED_BACK,
    WATCH,
    Lowering,
    check_last_dim,
    forced,
    planned,
)
from lowbit.quant_type import QuantType, kernel_layout
from lowbit.widths import at_width

Mode = Literal["vjp", "jvp"]
_MODE = jax.make_user_context("vjp")


@contextmanager
def differentiable(mode: Mode) -> Iterator[None]:
    """Within it, products that do not say otherwise are differentiable in that mode (see `matmul`): in whole models.

    >>> import jax, jax.numpy as jnp, lowbit as lb, lowbit.ops
    >>> from flax import nnx
    >>> small = lb.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), lb.bcq(2))
    >>> with lb.ops.differentiable("jvp"):
    ...     y, dy = jax.jvp(small, (jnp.ones((2, 8)),), (jnp.ones((2, 8)),))
    """
    with _MODE(_checked(mode)):
        yield


def _checked(mode: str) -> str:
    if mode not in get_args(Mode):
        raise ValueError(f"differentiable must be 'vjp' or 'jvp', not {mode!r}")
    return mode


def matmul(
    x: jax.Array,
    w: QuantArray,
    *,
    width: int | jax.Array | None = None,
    differentiable: Mode | None = None,
    lowering: Lowering = None,
    numerics: Numerics | None = None,
) -> jax.Array:
    """`x @ w` for x [..., k] and a quantized w with dims k and n: [..., n], accumulated in float32.

    The result has x's dtype. Gradients reach x and every float field of `w`; codes have none. A format may round
    activations too, such as `lb.nested_fp(8)`: their gradients go straight through. A batch of symbolic size,
    as in `jax.export`, is computed as rows, each in the form chosen for one row.

    With a stack of weights, x [*stack, ..., k] gives [*stack, ..., n]: each slice multiplies its own rows. x begins
    with exactly the axes of the stack; nothing is broadcast, and [*stack, k] is one row a slice.

    Args:
      width: for a format that is read at several, such as `lb.any_precision`; that of w's type if None. An integer in
        an array may change from call to call of one compiled function, which computes only what that width needs;
        one that there is not is the nearest of them. Under `jax.vmap` it may not be batched.
      differentiable: "vjp", the default, for reverse mode (`jax.grad`): gradients are terms of their own and never hold
        a dense weight. "jvp" for forward mode too (`jax.jvp`, `jax.hessian`): JAX differentiates the product's program,
        in reverse mode with whatever memory that takes.
      lowering: the name of the form or kernel to run whatever it costs, or several of which the first that can is
        taken. "mma_dx" and "xla_dx" say so of the gradient of x, "mma_dw" and "xla_dw" of those of w's fields,
        "mma_db" and "xla_db" of those that are tables which all rows share. `lb.explain` lists them all.
      numerics: "float"; or 8-bit integers, one for each activation ("int8") or two ("int8x2"), their products summed
        exactly: docs/int8.md bounds the rounding. Gradients are those in floats. If None w's own, see `lb.Rule`.

    Raises TypeError for an x that is not floating, a w that is no QuantArray, or forward mode through a "vjp" product,
    ValueError when x's last dim is not w's k or its first ones are not w's stack (both sizes are named), for another
    mode or numerics that w lacks, and LoweringError, with the table of what can run, for another `lowering`.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.bcq(2, group=8))
    >>> lb.matmul(jnp.ones((3, 8)), w).shape
    (3, 4)
    """
    w = in_numerics(expect_array(w, "matmul"), numerics)
    if width is not None:
        return at_width(partial(matmul, differentiable=differentiable, lowering=lowering), x, w, width)
    x = jnp.asarray(x)
    sizes = dict(w.type.dims)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x is {x.dtype}[{', '.join(map(str, x.shape))}]; matmul takes floating activations: cast it")
    _check_stack(x.shape, w)
    check_last_dim(x.shape, w.type)
    if (seen := WATCH.get()) is not None:
        seen(x, w)
    if w.stack:
        y: jax.Array = over_stack(lambda one, x: matmul(x, one, differentiable=differentiable, lowering=lowering), w, x)
        return y
    batch, rows = x.shape[:-1], prod(x.shape[:-1])
    if rows == 0:
        return jnp.zeros((*batch, sizes["n"]), x.dtype)
    flat = x.reshape(rows, sizes["k"])
    reverse = _checked(differentiable or _MODE.value) == "vjp"
    with explained(), forced(lowering):
        product = partial(_matmul, FORCED_BACK.value) if reverse else _differentiable
        if isinstance(rows, int):
            out = product(w.type, flat, w.fields)
        else:
            out = jax.vmap(lambda row: product(w.type, row[None], w.fields)[0])(flat)
    return out.reshape(*batch, sizes["n"])


def _check_stack(shape: Sequence[int], w: QuantArray) -> None:
    stack = w.stack
    if stack and (len(shape) <= len(stack) or shape[: len(stack)] != stack):
        raise ValueError(
            f"x has shape {shape}, but w is a stack {list(stack)} of {w.type}: x must begin with the axes of the stack "
            f"and end with k = {dict(w.type.dims)['k']}; jnp.broadcast_to gives every slice the same x"
        )


@contextmanager
def explained() -> Iterator[None]:
    """JAX's error for forward mode, with what to do."""
    try:
        yield
    except TypeError as err:
        if "forward-mode" not in str(err):
            raise
        raise TypeError(
            "lb.matmul is differentiated in forward mode, but its gradients are for reverse mode: pass "
            'differentiable="jvp", or for a whole model run it within lb.ops.differentiable("jvp")'
        ) from err


def take(w: QuantArray, ids: jax.Array) -> jax.Array:
    """Rows of a quantized table with dims n and k: ids [...] to [..., k] in w's dtype.

    Only those rows are decoded, unless the format makes a row of others.

    Raises TypeError for ids that are not integers or a w that is no QuantArray, ValueError for a stack of tables. As in
    `jnp.take`, negative ids count from the end and an id out of range gives NaN.

    >>> import jax.numpy as jnp, lowbit as lb, lowbit.ops
    >>> table = lb.quantize_array(jnp.ones((8, 4)), lb.uniform(4), dims=("n", "k"))
    >>> lb.ops.take(table, jnp.array([[0, 7], [3, 3]])).shape
    (2, 2, 4)
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids are {ids.dtype}[{', '.join(map(str, ids.shape))}]; rows are taken by integer ids")
    sizes = dict(expect_array(w, "take").type.dims)
    if w.stack:
        raise ValueError(f"w is a stack {list(w.stack)} of {w.type}: take rows of one table, or use jax.vmap or scan")
    if ids.size == 0:
        return jnp.zeros((*ids.shape, sizes["k"]), w.dtype)
    flat = ids.reshape(-1)
    if jnp.iinfo(flat.dtype).max < sizes["n"]:
        flat = flat.astype(jnp.int32)  # or comparing with n, and adding it, would wrap
    flat = jnp.where(flat < 0, flat + sizes["n"], flat)
    inside = (flat >= 0) & (flat < sizes["n"])
    rows = _rows(w, flat) if isinstance(ids.size, int) else jax.vmap(lambda i: _rows(w, i[None])[0])(flat)
    return jnp.where(inside[:, None], rows.astype(w.dtype), jnp.nan).reshape(*ids.shape, sizes["k"])


def _rows(w: QuantArray, ids: jax.Array) -> jax.Array:
    """Rows [ids, k] of the decode; ids out of range give any row."""
    if w.type.layout != "own":
        return jax.vmap(partial(_row_of_tile, w))(ids)
    decode = w.type.decode
    if not all(keeps(e, "n") and not (isinstance(e, Const) and "n" in e.dims) for e in topo(decode)):
        whole = align(emit(decode, w.fields), decode.dims, {d: decode.dims[d] for d in ("n", "k")})
        return jnp.take(whole, ids, axis=0, mode="clip")  # a row is made of others, or depends on where it stands
    few = Tiles("n", 1, False, {}, decode).part(ids.size)
    fields = {
        name: w.fields[name] if "n" not in leaf.dims
        else jnp.take(w.fields[name], ids, axis=list(leaf.dims).index("n"), mode="clip")
        for name, leaf in w.type.fields.items()
    }  # fmt: skip
    return align(emit(few, fields), few.dims, {"n": ids.size, "k": few.dims["k"]})


def _row_of_tile(w: QuantArray, row: jax.Array) -> jax.Array:
    """A row [k] of an array in the kernels' layout: its tile alone is brought back."""
    books = kernel_layout(w.type).books
    tile = {
        name: a if name in books else jax.lax.dynamic_index_in_dim(a, row // ROWS, keepdims=True)
        for name, a in w.fields.items()
    }
    size = min(ROWS, dict(w.type.dims)["n"])
    return _rows(own(QuantArray(tile, w.type.resized(n=size))), (row % ROWS)[None])[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(asked: Lowering, t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """`asked`: how gradients are made."""
    if t.layout == "own":
        return _forward(t, x, fields)
    return _laid_out(t, x, fields)


@partial(jax.jit, static_argnums=(0, 3))
def _forward(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], plain: bool = False) -> jax.Array:
    """As XLA compiles it, in whatever layout the fields are."""
    how = x.shape[0], t, short(x.dtype), jax.default_backend(), plain
    choice, _ = chosen(*how)
    if choice.name == "dense":
        return dense(t, x, fields)
    term = choice.term if isinstance(choice, Form) else planned(*how).term
    return emit_in_order(term, {**own(QuantArray(fields, t)).fields, "x": x}, ("m", "n"), x.dtype)


def _differentiable(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """The product as a program to be differentiated: straight through the rounding of activations."""
    if t.numerics != "float":
        y = _forward(replace(t, numerics="float"), x, fields)
        return _forward(t, *jax.lax.stop_gradient((x, fields))) + (y - jax.lax.stop_gradient(y))
    leaf = param("x", short(x.dtype), None, m=x.shape[0], k=x.shape[1])
    if (encoded := t.format.activations(leaf)) is leaf:
        return _forward(t, x, fields)
    rounded = jax.lax.stop_gradient(emit_in_order(encoded, {"x": x}, ("m", "k"), numpy_dtype(encoded.dtype)))
    return _forward(t, rounded + (x - jax.lax.stop_gradient(x)), fields, True).astype(x.dtype)


@partial(jax.jit, static_argnums=0)
def _laid_out(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """On a GPU with kernels as planned there, elsewhere by the term: in one program for all platforms."""
    here = jax.default_backend()
    if here == "gpu" and not runs_kernels(jax.devices()[0]):
        return _forward(t, x, fields)
    product = x.shape[0], t, short(x.dtype)
    choice, schedule = chosen(*product, here)  # raises for a lowering that it lacks
    if here != "gpu":
        choice, schedule = planned(*product, "gpu").choice(), None
    by_term = partial(_forward, t)
    if isinstance(choice, Form):
        return by_term(x, fields)
    with_schedule = {"mma": by_mma, "fp8": by_fp8}
    if choice.name in with_schedule:
        cuda = partial(with_schedule[choice.name], t, schedule=schedule)
    else:
        cuda = partial({"sums": by_sums, "dense": dense}[choice.name], t)
    return by_platform(cuda, by_term, x, fields)


Residuals = tuple[jax.Array, dict[str, jax.Array]]


def _matmul_fwd(
    asked: Lowering, t: QuantType, x: jax.Array, fields: dict[str, jax.Array]
) -> tuple[jax.Array, Residuals]:
    return _matmul(asked, t, x, fields), (x, fields)


def _matmul_bwd(asked: Lowering, t: QuantType, saved: Residuals, dy: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    x, fields = saved
    return cotangents(replace(t, numerics="float"), x, fields, dy, asked)  # straight through all rounding


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
