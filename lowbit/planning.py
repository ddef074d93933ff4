"""Which form of a product runs: every candidate with its predicted cost, and the ways to ask for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import jax

from lowbit.array import QuantArray
from lowbit.ir.build import contract, param
from lowbit.ir.cost import cost
from lowbit.ir.dtypes import bits, short
from lowbit.ir.expr import Expr, Param
from lowbit.ir.transpose import transpose
from lowbit.ir.walk import params, topo
from lowbit.kernels.choice import (
    GRADIENTS,
    KERNELS,
    LAUNCH,
    KernelChoice,
    fp8_choice,
    int8_choice,
    kernel_choices,
    no_kernel_here,
    restoring,
)
from lowbit.passes.choose import Form, Machine, forms
from lowbit.passes.in_int8 import COLUMNS
from lowbit.passes.pipeline import PIPELINES
from lowbit.passes.style import Style
from lowbit.quant_type import QuantType, readings

Lowering = str | Sequence[str] | None
"""The name of a form or kernel, several in order of preference, or None for the cheapest."""
WATCH: ContextVar[Callable[[jax.Array, QuantArray], None] | None] = ContextVar("WATCH", default=None)
FORCED = jax.make_user_context(None)
"""What `lowering` asks for: part of every jit cache key, also of functions that were traced before."""
FORCED_BACK = jax.make_user_context(None)
"""The same for gradients."""

# name, byte, dot, pointwise, moved, field, lookup, far_lookup, select, scatter, cache, style
MACHINES = {
    "cpu": Machine(
        "cpu", 0.05, 0.0075, 0.03, 2.5, 0.03, 0.3, 1.2, 0.01, 20, 1 << 20, Style(1 << 22, sums_as_dots=True)
    ),
    "gpu": Machine("gpu", 4e-4, 3e-6, 5e-5, 2e-3, 5e-5, 2e-3, 2e-2, 5e-5, 0.05, 1 << 15, Style(vectors_as_loops=True)),
    "tpu": Machine("tpu", 6e-4, 5e-6, 2e-4, 2e-3, 2e-4, 0.5, 5, 2e-4, 5, 1 << 15, Style(vectors_as_loops=True)),
}
"""Coarse costs by platform: for a CPU fitted to times on 2 cores, for the others estimates, not yet measured."""


@dataclass(frozen=True)
class Plan:
    """Every way to compute one product; the first choice is what runs, unless another was measured (`lb.tuned`).

    Attributes:
      forms: of its term, that XLA compiles, cheapest first (what ties goes by simplicity).
      kernels: of this library, taken or refused.
    """

    what: str
    machine: str
    forms: tuple[Form, ...]
    kernels: tuple[KernelChoice, ...] = ()

    @property
    def term(self) -> Expr:
        return self.forms[0].term

    @property
    def choices(self) -> tuple[Form | KernelChoice, ...]:
        """What can run: the cheapest first (of what ties with a form, the form), then by cost."""
        kernels = sorted((k for k in self.kernels if k.refused is None), key=lambda k: k.nanoseconds)
        cheaper = [k for k in kernels if not self.forms or k.nanoseconds < self.forms[0].nanoseconds]
        every: list[Form | KernelChoice] = [*cheaper, *self.forms, *(k for k in kernels if k not in cheaper)]
        first, rest = every[0], every[1:]
        return first, *sorted(rest, key=lambda c: c.nanoseconds)

    def choice(self, lowering: Lowering = None) -> Form | KernelChoice:
        """The first of the names in `lowering` that can run, or the first choice for None.

        Raises LoweringError, with the whole table, where none of them can.
        """
        if lowering is None:
            return self.choices[0]
        names = (lowering,) if isinstance(lowering, str) else tuple(lowering)
        by_name = {c.name: c for c in self.choices}
        if found := [by_name[name] for name in names if name in by_name]:
            return found[0]
        asked = " or ".join(map(repr, names))
        listed = {k.name for k in self.kernels}
        e4m3 = f"\n{'fp8':8} refused: it multiplies e4m3, and x stays as it is" if "fp8" in {*names} - listed else ""
        raise LoweringError(f"lowering {asked} cannot run {self.what}: {_options(by_name)}\n{self}{e4m3}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.choices)

    def __str__(self) -> str:
        columns = f"{'form':8} {'predicted':>12} {'bytes read':>12} {'fma':>14} {'look-ups':>12}"
        refused = [f"{k.name:8} refused: {k.refused}" for k in self.kernels if k.refused is not None]
        return "\n".join([f"{self.what} on {self.machine}", columns, *map(_row, self.choices), *refused])


def _row(c: Form | KernelChoice) -> str:
    start = f"{c.name:8} {c.nanoseconds / 1e3:>9.1f} us"
    if isinstance(c, KernelChoice):
        return f"{start} {c.bytes:>12,}"
    return f"{start} {c.cost.bytes:>12,} {c.cost.fma:>14,} {c.cost.lookups:>12,}"


class LoweringError(ValueError):
    """A lowering that does not exist, or that a product does not have; the message lists those that it has."""


def _options(names: Iterable[str]) -> str:
    return f"use one of {', '.join(names)}"


@contextmanager
def lowering(name: str | Sequence[str]) -> Iterator[None]:
    """Within it, `lb.matmul` and every quantized layer run the product in the form or by the kernel of that name (the
    first of several that can run), whatever it costs.

    Functions compiled before are compiled again. Gradients are made as ever, those of activations as "mma_dx" or
    "xla_dx" say where that is among the names, and those of weights as "mma_dw" or "xla_dw" do, of codebooks "mma_db"
    or "xla_db". `lb.explain` lists the forms of a product; those that come out the same as another go by one name.

    Raises LoweringError for a name that does not exist, and then in `lb.matmul` for one that a product does not have.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.bcq(2, group=8))
    >>> with lb.testing.lowering("table"):
    ...     lb.matmul(jnp.ones((3, 8)), w).shape
    (3, 4)
    """
    with forced(name):
        yield


@contextmanager
def forced(names: Lowering) -> Iterator[None]:
    """`lowering`, where None changes nothing, and names of ways to a gradient nothing of products, nor the reverse."""
    asked = checked_lowering(names) or ()
    products = tuple(name for name in asked if name not in GRADIENTS)
    gradients = tuple(name for name in asked if name in GRADIENTS)
    with FORCED(products or FORCED.value), FORCED_BACK(gradients or FORCED_BACK.value):
        yield


def checked_lowering(names: Lowering) -> tuple[str, ...] | None:
    """Raises LoweringError for a name that does not exist, or no name."""
    if names is None:
        return None
    names = (names,) if isinstance(names, str) else tuple(names)
    known = (*PIPELINES, *KERNELS, *GRADIENTS)
    if not names:
        raise LoweringError(f"lowering names nothing: {_options(known)}, or None for the cheapest")
    for name in names:
        if name not in known:
            raise LoweringError(f"there is no lowering {name!r}: {_options(known)}")
    return names


@contextmanager
def watching(seen: Callable[[jax.Array, QuantArray], None]) -> Iterator[None]:
    """Within it, `seen(x, w)` is called with the operands of every product: tracers where it is being compiled, and for
    the slices of a stack after the stack itself."""
    before = WATCH.set(seen)
    try:
        yield
    finally:
        WATCH.reset(before)


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
    check_last_dim(x_shape, t)
    rows = prod(x_shape[:-1])
    if rows < 1:
        raise ValueError(f"x has shape {tuple(x_shape)}: a plan needs at least one row")
    name = {"cuda": "gpu", "rocm": "gpu"}.get(str(platform), platform)
    if name is not None and name not in MACHINES:
        raise ValueError(f"platform {platform!r} has no costs here: use one of {', '.join(MACHINES)}")
    return planned(rows, t, short(dtype), name or jax.default_backend())


def machine_of(platform: str) -> Machine:
    """The costs of a platform; one that is not known is taken for a GPU."""
    return MACHINES.get(platform, MACHINES["gpu"])


@lru_cache(maxsize=4096)
def planned(m: int, t: QuantType, dtype: Any, platform: str, plain: bool = False) -> Plan:
    """The plan of x [m, k] @ w; if `plain`, of x as it is, also where the format encodes activations."""
    machine = machine_of(platform)
    x, product = _product(m, t, dtype, plain)
    made = forms(product, machine)
    stored = t.bits // 8
    before = restoring(readings(t), stored, t.layout)  # the forms take the format's own layout
    before += LAUNCH if machine.name == "gpu" else 0.0
    made = tuple(replace(f, nanoseconds=f.nanoseconds + before) for f in made)
    read = cost(t.decode).bytes if t.format.widths else stored  # of one width
    at = readings(t).index(t.decode)
    *own, dense = kernel_choices(m, readings(t), at, read, t.layout, dtype, machine.name)
    kernels = (*(k if k.refused else k.unless(no_kernel_here(k.name, readings(t), at)) for k in own), dense)
    if t.numerics != "float":
        refused = f"it multiplies x as it is, and this product is in {t.numerics}"
        int8 = int8_choice(m, COLUMNS[t.numerics], readings(t), at, read, t.layout, machine.name)
        others = (k.unless(refused) for k in kernels if k.name != int8.name)
        return Plan(f"x[{m}, k] @ {t}", machine.name, made, (int8.unless(no_kernel_here("int8")), *others))
    encoded = x if plain else t.activations(x)
    if encoded is x:
        return Plan(f"x[{m}, k] @ {t}", machine.name, made, kernels)
    code = min((e.dtype for e in topo(encoded) if "k" in e.dims), key=bits)
    refused = f"it multiplies x as it is, and {t.format} turns it into {code}"
    none = (k.unless(refused) for k in kernels)
    fp8 = fp8_choice(m, readings(t), at, read, t.layout, code, machine.name)
    fp8 = fp8.unless(no_kernel_here("fp8"))
    return Plan(f"x[{m}, k] as {code} @ {t}", machine.name, made, (fp8, *none))


def _product(m: int, t: QuantType, dtype: Any, plain: bool) -> tuple[Param, Expr]:
    x = param("x", dtype, None, m=m, k=dict(t.dims)["k"])
    return x, contract((x, t.decode), ("k",)) if plain else t.product(x)


def check_last_dim(shape: Sequence[int], t: QuantType) -> None:
    k = dict(t.dims)["k"]
    if not shape or shape[-1] != k:
        raise ValueError(f"x has shape {tuple(shape)}, but w is {t}: x's last dim must be k = {k}")


@lru_cache(maxsize=4096)
def cotangent_forms(
    m: int, t: QuantType, dtype: Any, dy_dtype: Any, name: str, platform: str
) -> tuple[tuple[Form, ...], Param]:
    """Of the gradient of x or of a field, from dy [m, n]; and what it is the gradient of."""
    # Rounding activations has no slope: the gradient of x is that of the product with x as it is.
    _, product = _product(m, t, dtype, plain=name == "x")
    leaf = params(product)[name]
    dy = param("dy", dy_dtype, None, m=m, n=dict(t.dims)["n"])
    return forms(transpose(product, leaf, dy), machine_of(platform)), leaf
