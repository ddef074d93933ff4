"""x @ w for a quantized w: one term, its cheapest form, and the gradients of that same term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, QuantType, expect_array
from lowbit.ir.build import contract, param
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.ir.expr import Const, Expr, Param
from lowbit.ir.transpose import transpose
from lowbit.ir.walk import params, topo
from lowbit.passes.choose import Form, Machine, forms
from lowbit.passes.lower_xla import align, emit
from lowbit.passes.pipeline import PIPELINES
from lowbit.passes.style import Style
from lowbit.passes.tile import Tiles, keeps

_WATCH: ContextVar[Callable[[jax.Array, QuantArray], None] | None] = ContextVar("_WATCH", default=None)
_FORCED = jax.make_user_context(None)
"""The form that `lowering` asks for: part of every jit cache key, also of functions that were traced before."""

# name, byte, dot, pointwise, moved, field, lookup, far_lookup, scatter, cache, style
MACHINES = {
    "cpu": Machine("cpu", 0.05, 0.0075, 0.03, 2.5, 0.03, 0.3, 1.2, 20, 1 << 20, Style(1 << 22, sums_as_dots=True)),
    "gpu": Machine("gpu", 4e-4, 3e-6, 5e-5, 2e-3, 5e-5, 2e-3, 2e-2, 0.05, 1 << 15, Style(vectors_as_loops=True)),
    "tpu": Machine("tpu", 6e-4, 5e-6, 2e-4, 2e-3, 2e-4, 0.5, 5, 5, 1 << 15, Style(vectors_as_loops=True)),
}
"""Coarse costs by platform: for a CPU fitted to times on 2 cores, for the others estimates, not yet measured."""


@dataclass(frozen=True)
class Plan:
    """Every way to compute one product, cheapest first (what ties goes by simplicity); the first is what runs."""

    what: str
    machine: str
    forms: tuple[Form, ...]

    @property
    def term(self) -> Expr:
        return self.forms[0].term

    def form(self, name: str | None) -> Form:
        """The form of that name, or the cheapest. Raises LoweringError for one that is not among them."""
        found = next((f for f in self.forms if name in (None, f.name)), None)
        if found is None:
            raise LoweringError(f"lowering {name!r} is no form of its own for {self.what}: {_options(self.names)}")
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.forms)

    def __str__(self) -> str:
        columns = f"{'form':8} {'predicted':>12} {'bytes read':>12} {'fma':>14} {'look-ups':>12}"
        rows = [
            f"{f.name:8} {f.nanoseconds / 1e3:>9.1f} us {f.cost.bytes:>12,} {f.cost.fma:>14,} {f.cost.lookups:>12,}"
            for f in self.forms
        ]
        return "\n".join([f"{self.what} on {self.machine}", columns, *rows])


class LoweringError(ValueError):
    """A lowering that does not exist, or that a product does not have; the message lists those that it has."""


def _options(names: Iterable[str]) -> str:
    return f"use one of {', '.join(names)}"


@contextmanager
def lowering(name: str) -> Iterator[None]:
    """Within it, `lb.matmul` and every quantized layer run the product in the form of that name, whatever it costs.

    Functions compiled before are compiled again. Gradients are made in the forms chosen as ever. `lb.explain` lists
    the forms of a product; those that come out the same as another go by one name.

    Raises LoweringError for a name that does not exist, and then in `lb.matmul` for one that a product does not have.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.bcq(2, group=8))
    >>> with lb.testing.lowering("table"):
    ...     lb.matmul(jnp.ones((3, 8)), w).shape
    (3, 4)
    """
    if name not in PIPELINES:
        raise LoweringError(f"there is no lowering {name!r}: {_options(PIPELINES)}")
    with _FORCED(name):
        yield


@contextmanager
def watching(seen: Callable[[jax.Array, QuantArray], None]) -> Iterator[None]:
    """Within it, `seen(x, w)` is called with the operands of every product; tracers where it is being compiled."""
    before = _WATCH.set(seen)
    try:
        yield
    finally:
        _WATCH.reset(before)


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


def matmul(x: jax.Array, w: QuantArray, *, differentiable: Mode | None = None) -> jax.Array:
    """`x @ w` for x [..., k] and a quantized w with dims k and n: [..., n], accumulated in float32.

    The result has x's dtype. Gradients reach x and every float field of `w`; codes have none. A batch of symbolic size,
    as in `jax.export`, is computed as rows, each in the form chosen for one row.

    Args:
      differentiable: "vjp", the default, for reverse mode (`jax.grad`): gradients are terms of their own and never hold
        a dense weight. "jvp" for forward mode too (`jax.jvp`, `jax.hessian`): JAX differentiates the product's program,
        in reverse mode with whatever memory that takes.

    Raises TypeError for an x that is not floating, a w that is no QuantArray, or forward mode through a "vjp" product,
    ValueError when x's last dim is not w's k (both sizes are named) or for another mode.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.bcq(2, group=8))
    >>> lb.matmul(jnp.ones((3, 8)), w).shape
    (3, 4)
    """
    x = jnp.asarray(x)
    sizes = dict(expect_array(w, "matmul").type.dims)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x is {x.dtype}[{', '.join(map(str, x.shape))}]; matmul takes floating activations: cast it")
    _check_last_dim(x.shape, w.type)
    if (seen := _WATCH.get()) is not None:
        seen(x, w)
    batch, rows = x.shape[:-1], prod(x.shape[:-1])
    if rows == 0:
        return jnp.zeros((*batch, sizes["n"]), x.dtype)
    flat = x.reshape(rows, sizes["k"])
    product = _matmul if _checked(differentiable or _MODE.value) == "vjp" else _forward
    with _explained():
        if isinstance(rows, int):
            y = product(w.type, flat, w.fields)
        else:
            y = jax.vmap(lambda row: product(w.type, row[None], w.fields)[0])(flat)
    return y.reshape(*batch, sizes["n"])


@contextmanager
def _explained() -> Iterator[None]:
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


def _check_last_dim(shape: Sequence[int], t: QuantType) -> None:
    k = dict(t.dims)["k"]
    if not shape or shape[-1] != k:
        raise ValueError(f"x has shape {tuple(shape)}, but w is {t}: x's last dim must be k = {k}")


def take(w: QuantArray, ids: jax.Array) -> jax.Array:
    """Rows of a quantized table with dims n and k: ids [...] to [..., k] in w's dtype.

    Only those rows are decoded, unless the format makes a row of others.

    Raises TypeError for ids that are not integers or a w that is no QuantArray. As in `jnp.take`, negative ids count
    from the end and an id out of range gives NaN.

    >>> import jax.numpy as jnp, lowbit as lb, lowbit.ops
    >>> table = lb.quantize_array(jnp.ones((8, 4)), lb.uniform(4), dims=("n", "k"))
    >>> lb.ops.take(table, jnp.array([[0, 7], [3, 3]])).shape
    (2, 2, 4)
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids are {ids.dtype}[{', '.join(map(str, ids.shape))}]; rows are taken by integer ids")
    sizes = dict(expect_array(w, "take").type.dims)
    if ids.size == 0:
        return jnp.zeros((*ids.shape, sizes["k"]), w.dtype)
    flat = ids.reshape(-1)
    if jnp.iinfo(flat.dtype).max < sizes["n"]:
        flat = flat.astype(jnp.int32)  # or comparing with n, and adding it, would wrap
    flat = jnp.where(flat < 0, flat + sizes["n"], flat)
    inside = (flat >= 0) & (flat < sizes["n"])
    return jnp.where(inside[:, None], _rows(w, flat).astype(w.dtype), jnp.nan).reshape(*ids.shape, sizes["k"])


def _rows(w: QuantArray, ids: jax.Array) -> jax.Array:
    """Rows [ids, k] of the decode; ids out of range give any row."""
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


def plan(x_shape: Sequence[int], t: QuantType, platform: str | None = None, dtype: Any = "float32") -> Plan:
    """The candidate forms of x @ w, cheapest first.

    Args:
      x_shape: of the activations, [..., k]; at least one row.
      t: the type of w.
      platform: "cpu", "gpu" (also "cuda", "rocm") or "tpu"; the default backend's if None.
      dtype: of the activations.

    Raises ValueError for a shape that does not fit, no rows, or an unknown platform.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.bcq(2, group=8))
    >>> lb.plan((1, 8), w.type, "cpu").forms[0].cost.bytes  # x, 2 planes of 4 bytes, 2 scales for each of 4 outputs
    72
    """
    _check_last_dim(x_shape, t)
    rows = prod(x_shape[:-1])
    if rows < 1:
        raise ValueError(f"x has shape {tuple(x_shape)}: a plan needs at least one row")
    name = {"cuda": "gpu", "rocm": "gpu"}.get(str(platform), platform)
    if name is not None and name not in MACHINES:
        raise ValueError(f"platform {platform!r} has no costs here: use one of {', '.join(MACHINES)}")
    return _plan(rows, t, short(dtype), name or jax.default_backend())


@lru_cache(maxsize=4096)
def _plan(m: int, t: QuantType, dtype: Any, platform: str) -> Plan:
    machine = MACHINES.get(platform, MACHINES["gpu"])
    return Plan(f"x[{m}, k] @ {t}", machine.name, forms(_product(m, t, dtype), machine))


def _product(m: int, t: QuantType, dtype: Any) -> Expr:
    x = param("x", dtype, None, m=m, k=dict(t.dims)["k"])
    return contract((x, t.decode), ("k",))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    return _forward(t, x, fields)


@partial(jax.jit, static_argnums=0)
def _forward(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    term = _plan(x.shape[0], t, short(x.dtype), jax.default_backend()).form(_FORCED.value).term
    return _emit_in_order(term, {**fields, "x": x}, ("m", "n"), x.dtype)


def _emit_in_order(
    term: Expr, env: dict[str, jax.Array], order: Sequence[str], dtype: Any, share: int = 1
) -> jax.Array:
    style = MACHINES.get(jax.default_backend(), MACHINES["gpu"]).style
    value = emit(term, env, replace(style, part=style.part / share))
    return align(value, term.dims, {d: term.dims[d] for d in order}).astype(dtype)


Residuals = tuple[jax.Array, dict[str, jax.Array]]


def _matmul_fwd(t: QuantType, x: jax.Array, fields: dict[str, jax.Array]) -> tuple[jax.Array, Residuals]:
    return _forward(t, x, fields), (x, fields)


def _matmul_bwd(t: QuantType, saved: Residuals, dy: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    x, fields = saved
    dx = _cotangent(t, "x", x, fields, dy)
    out: dict[str, Any] = {}
    for name, value in fields.items():
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        out[name] = _cotangent(t, name, x, fields, dy) if floating else np.zeros(value.shape, jax.dtypes.float0)
    return dx, out


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@partial(jax.jit, static_argnums=(0, 1))
def _cotangent(t: QuantType, name: str, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> jax.Array:
    term, leaf = _cotangent_term(x.shape[0], t, short(x.dtype), short(dy.dtype), name, jax.default_backend())
    env = {**fields, "x": x, "dy": dy}
    # A part of the dense gradient is alive together with what is made of it.
    return _emit_in_order(term, env, tuple(leaf.dims), numpy_dtype(leaf.dtype), share=4)


@lru_cache(maxsize=4096)
def _cotangent_term(m: int, t: QuantType, dtype: Any, dy_dtype: Any, name: str, platform: str) -> tuple[Expr, Param]:
    product = _product(m, t, dtype)
    leaf = params(product)[name]
    dy = param("dy", dy_dtype, None, m=m, n=dict(t.dims)["n"])
    term = transpose(product, leaf, dy)
    return forms(term, MACHINES.get(platform, MACHINES["gpu"]))[0].term, leaf
