"""The gradients of a product: terms of their own, or this library's kernels, and which of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, own
from lowbit.by_kernel import by_mma_db, by_mma_dw, by_mma_dx
from lowbit.by_term import emit_in_order
from lowbit.devices import runs_kernels
from lowbit.dispatch import by_platform
from lowbit.ir.build import param
from lowbit.ir.cost import cost
from lowbit.ir.dtypes import is_float, numpy_dtype, short
from lowbit.ir.expr import Gather, Param
from lowbit.ir.walk import params, topo
from lowbit.kernels.choice import (
    DB,
    DW,
    DX,
    LAUNCH,
    KernelChoice,
    db_choice,
    dw_choice,
    dx_choice,
    no_kernel_here,
    restoring,
)
from lowbit.passes.choose import Form
from lowbit.planning import Lowering, Plan, cotangent_forms, machine_of
from lowbit.quant_type import QuantType, readings

Floats = Literal["dw", "db"]
"""Gradients of tables that all rows share, `db`, and of all other fields."""


def cotangents(
    t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array, asked: Lowering
) -> tuple[jax.Array, dict[str, Any]]:
    """Of x [m, k] and of every field, from dy [m, n]; `asked` names how they are made."""
    of_x, of_rows, of_tables = (tuple(name for name in asked or () if name in ways) or None for ways in (DX, DW, DB))
    made: dict[str, Any] = {name: np.zeros(a.shape, jax.dtypes.float0) for name, a in fields.items()}
    floats = {name for name, a in fields.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    shared = floats & tables(t)
    if rows := floats - shared:
        made |= _of_floats("dw", t, tuple(sorted(rows)), of_rows, x, fields, dy)
    if shared:
        made |= _of_floats("db", t, tuple(sorted(shared)), of_tables, x, fields, dy)
    return _of_x(t, of_x, dy, fields), made


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(kernel: Callable[..., Any], by_term: Callable[..., Any], *args: Any) -> Any:
    """`kernel(*args)` on CUDA, `by_term(*args)` elsewhere, and in gradients of it."""
    return by_platform(kernel, by_term, *args)


def _by_kernel_fwd(kernel: Callable[..., Any], by_term: Callable[..., Any], *args: Any) -> Any:
    return _by_kernel(kernel, by_term, *args), args


def _by_kernel_bwd(kernel: Callable[..., Any], by_term: Callable[..., Any], args: Any, ct: Any) -> Any:
    return jax.vjp(by_term, *args)[1](ct)


_by_kernel.defvjp(_by_kernel_fwd, _by_kernel_bwd)


@lru_cache(maxsize=4096)
def planned_dx(m: int, t: QuantType, dtype: Any, platform: str) -> Plan:
    """The plan of the gradient of x [m, k] in x @ w."""
    t = replace(t, numerics="float")  # gradients are those in floats
    machine, stored = machine_of(platform), t.bits // 8
    made, _ = cotangent_forms(m, t, dtype, dtype, "x", platform)
    before = restoring(readings(t), stored, t.layout)  # the form takes the format's own layout
    before += LAUNCH if machine.name == "gpu" else 0.0
    form = replace(made[0], name="xla_dx", nanoseconds=made[0].nanoseconds + before)
    read = cost(t.decode).bytes if t.format.widths else stored  # of one width
    kernel = dx_choice(m, readings(t), readings(t).index(t.decode), read, t.layout, dtype, machine.name)
    kernel = kernel.unless(no_kernel_here(kernel.name))
    return Plan(f"dx[{m}, k] of x @ {t}", machine.name, (form,), (kernel,))


@partial(jax.jit, static_argnums=(0, 1))
def _of_x(t: QuantType, asked: Lowering, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """On a Hopper GPU as planned there, elsewhere by the term: in one program for all platforms."""
    here, product = jax.default_backend(), (len(dy), t, short(dy.dtype))
    choice = planned_dx(*product, here).choice(asked)  # raises for a lowering that it lacks
    if t.layout == "own" or (here == "gpu" and not runs_kernels(jax.devices()[0])):
        return _of_x_by_term(t, dy, fields)
    if here != "gpu":
        choice = planned_dx(*product, "gpu").choice()
    by_term = partial(_of_x_by_term, t)
    return by_term(dy, fields) if isinstance(choice, Form) else _by_kernel(partial(by_mma_dx, t), by_term, dy, fields)


def _of_x_by_term(t: QuantType, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    term = planned_dx(len(dy), t, short(dy.dtype), jax.default_backend()).term
    # A part of the dense gradient is alive together with what is made of it.
    return emit_in_order(term, {**own(QuantArray(fields, t)).fields, "dy": dy}, ("m", "k"), dy.dtype, share=4)


@lru_cache(maxsize=4096)
def planned_dw(m: int, t: QuantType, dtype: Any, platform: str) -> Plan:
    """The plan of the gradients of w's parameters in x [m, k] @ w, but for tables that all rows share."""
    return _planned_floats("dw", m, t, dtype, platform)


@lru_cache(maxsize=4096)
def planned_db(m: int, t: QuantType, dtype: Any, platform: str) -> Plan:
    """That of those tables."""
    return _planned_floats("db", m, t, dtype, platform)


def _planned_floats(what: Floats, m: int, t: QuantType, dtype: Any, platform: str) -> Plan:
    t = replace(t, numerics="float")  # gradients are those in floats
    machine, stored, plain = machine_of(platform), t.bits // 8, replace(t, layout="own")
    before = restoring(readings(t), stored, t.layout) + (LAUNCH if machine.name == "gpu" else 0.0)
    names = [name for name in floats(plain) if (name in tables(t)) == (what == "db")]
    made = [cotangent_forms(m, plain, dtype, dtype, name, platform)[0][0] for name in names]
    read = cost(t.decode).bytes if t.format.widths else stored  # of one width
    choice = dw_choice if what == "dw" else db_choice
    kernel = choice(m, readings(t), readings(t).index(t.decode), read, t.layout, dtype, machine.name)
    x = param("x", dtype, None, m=m, k=dict(t.dims)["k"])
    encoded = None if t.format.activations(x) is x else f"it multiplies x as it is, and {t.format} rounds it"
    kernel = kernel.unless(encoded).unless(no_kernel_here(kernel.name))
    took = before + sum(form.nanoseconds for form in made)
    by_term = KernelChoice(f"xla_{what}", None, sum(form.cost.bytes for form in made), took)
    return Plan(f"{what} of x[{m}, k] @ {t}", machine.name, (), (kernel, by_term))


def floats(t: QuantType) -> list[str]:
    """The fields that have gradients in a product."""
    return [name for name, leaf in t.fields.items() if is_float(leaf.dtype) and name in params(t.decode)]


def tables(t: QuantType) -> set[str]:
    """Those of them that are tables which all rows share."""
    looked_up = [e.table for e in topo(t.decode) if isinstance(e, Gather) and isinstance(e.table, Param)]
    return {table.name for table in looked_up if is_float(table.dtype) and "n" not in table.dims}


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _of_floats(
    what: Floats, t: QuantType, names: tuple[str, ...], asked: Lowering, x: jax.Array, fields: dict[str, jax.Array],
    dy: jax.Array,
) -> dict[str, jax.Array]:  # fmt: skip
    """On a Hopper GPU as planned there, elsewhere by their terms: in one program for all platforms."""
    here, product = jax.default_backend(), (len(x), t, short(x.dtype))
    planned, kernel = (planned_dw, by_mma_dw) if what == "dw" else (planned_db, by_mma_db)
    choice = planned(*product, here).choice(asked)  # raises for a lowering that it lacks
    by_term = partial(_of_floats_by_term, t, names)
    if t.layout == "own" or (here == "gpu" and not runs_kernels(jax.devices()[0])):
        return by_term(x, fields, dy)
    if here != "gpu":
        choice = planned(*product, "gpu").choice()
    if choice.name == f"xla_{what}":
        return by_term(x, fields, dy)
    made: dict[str, jax.Array] = _by_kernel(partial(kernel, t), by_term, x, fields, dy)
    return made


def _of_floats_by_term(
    t: QuantType, names: Sequence[str], x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array
) -> dict[str, jax.Array]:
    plain, restored = replace(t, layout="own"), own(QuantArray(fields, t)).fields
    made = {
        name: _of_field(plain, name, x, restored, dy) if name in params(t.decode)
        else jnp.zeros_like(restored[name])  # of another width
        for name in names
    }  # fmt: skip

    def restored_floats(floats: dict[str, jax.Array]) -> dict[str, jax.Array]:
        there = own(QuantArray({**fields, **floats}, t)).fields
        return {name: there[name] for name in floats}

    out: dict[str, jax.Array] = jax.vjp(restored_floats, {name: fields[name] for name in names})[1](made)[0]
    return out


@partial(jax.jit, static_argnums=(0, 1))
def _of_field(t: QuantType, name: str, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> jax.Array:
    made, leaf = cotangent_forms(len(x), t, short(x.dtype), short(dy.dtype), name, jax.default_backend())
    return emit_in_order(made[0].term, {**fields, "x": x, "dy": dy}, tuple(leaf.dims), numpy_dtype(leaf.dtype), share=4)
