"""The gradients of a product: terms of their own, or this library's kernels, and which of them runs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, own
from lowbit.by_kernel import by_mma_dx
from lowbit.by_term import emit_in_order
from lowbit.devices import is_hopper, no_kernels_here
from lowbit.dispatch import by_platform
from lowbit.ir.cost import cost
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.ir.walk import params
from lowbit.kernels.choice import LAUNCH, dx_choice, restoring
from lowbit.passes.choose import Form
from lowbit.planning import Lowering, Plan, cotangent_forms, machine_of
from lowbit.quant_type import QuantType, readings


def cotangents(
    t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array, asked: Lowering
) -> tuple[jax.Array, dict[str, Any]]:
    """Of x [m, k] and of every field, from dy [m, n]; `asked` is how that of x is made."""
    return _of_x(t, asked, dy, fields), _of_fields(t, x, fields, dy)


@lru_cache(maxsize=4096)
def planned_dx(m: int, t: QuantType, dtype: Any, platform: str) -> Plan:
    """The plan of the gradient of x [m, k] in x @ w."""
    machine, stored = machine_of(platform), t.bits // 8
    made, _ = cotangent_forms(m, t, dtype, dtype, "x", platform)
    before = restoring(readings(t), stored, t.layout)  # the form takes the format's own layout
    before += LAUNCH if machine.name == "gpu" else 0.0
    form = replace(made[0], name="xla_dx", nanoseconds=made[0].nanoseconds + before)
    read = cost(t.decode).bytes if t.format.widths else stored  # of one width
    kernel = dx_choice(m, readings(t), readings(t).index(t.decode), read, t.layout, dtype, machine.name)
    kernel = replace(kernel, refused=kernel.refused or no_kernels_here())
    return Plan(f"dx[{m}, k] of x @ {t}", machine.name, (form,), (kernel,))


@partial(jax.jit, static_argnums=(0, 1))
def _of_x(t: QuantType, asked: Lowering, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """On a Hopper GPU as planned there, elsewhere by the term: in one program for all platforms."""
    here, product = jax.default_backend(), (len(dy), t, short(dy.dtype))
    choice = planned_dx(*product, here).choice(asked)  # raises for a lowering that it lacks
    if t.layout == "own" or (here == "gpu" and not is_hopper(jax.devices()[0])):
        return _of_x_by_term(t, dy, fields)
    if here != "gpu":
        choice = planned_dx(*product, "gpu").choice()
    return (_of_x_by_term if isinstance(choice, Form) else _of_x_by_kernel)(t, dy, fields)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_x_by_kernel(t: QuantType, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    return by_platform(partial(by_mma_dx, t), partial(_of_x_by_term, t), dy, fields)


def _of_x_by_kernel_fwd(t: QuantType, dy: jax.Array, fields: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    return _of_x_by_kernel(t, dy, fields), (dy, fields)


def _of_x_by_kernel_bwd(t: QuantType, saved: Any, ddx: jax.Array) -> Any:
    return jax.vjp(partial(_of_x_by_term, t), *saved)[1](ddx)


_of_x_by_kernel.defvjp(_of_x_by_kernel_fwd, _of_x_by_kernel_bwd)


def _of_x_by_term(t: QuantType, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    term = planned_dx(len(dy), t, short(dy.dtype), jax.default_backend()).term
    # A part of the dense gradient is alive together with what is made of it.
    return emit_in_order(term, {**own(QuantArray(fields, t)).fields, "dy": dy}, ("m", "k"), dy.dtype, share=4)


def _of_fields(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> dict[str, Any]:
    if t.layout != "own":
        restored, back = jax.vjp(lambda f: own(QuantArray(f, t)).fields, fields)
        return back(_of_fields(replace(t, layout="own"), x, restored, dy))[0]
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            out[name] = np.zeros(value.shape, jax.dtypes.float0)
        elif name in params(t.decode):
            out[name] = _of_field(t, name, x, fields, dy)
        else:  # of another width
            out[name] = jnp.zeros_like(value)
    return out


@partial(jax.jit, static_argnums=(0, 1))
def _of_field(t: QuantType, name: str, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> jax.Array:
    made, leaf = cotangent_forms(len(x), t, short(x.dtype), short(dy.dtype), name, jax.default_backend())
    return emit_in_order(made[0].term, {**fields, "x": x, "dy": dy}, tuple(leaf.dims), numpy_dtype(leaf.dtype), share=4)
