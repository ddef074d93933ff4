"""What XLA compiles of a term, in the style of the platform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from lowbit.ir.expr import Expr
from lowbit.passes.lower_xla import align, emit
from lowbit.planning import machine_of


def emit_in_order(term: Expr, env: dict[str, jax.Array], order: Sequence[str], dtype: Any, share: int = 1) -> jax.Array:
    """A term with its dims in an order. Of the memory that parts of it may take, one `share`th."""
    style = machine_of(jax.default_backend()).style
    value = emit(term, env, replace(style, part=style.part / share))
    return align(value, term.dims, {d: term.dims[d] for d in order}).astype(dtype)
