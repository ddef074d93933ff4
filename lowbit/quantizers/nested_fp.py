"""Nested floats: no search, the bytes of each weight as float16."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from absl import logging

from lowbit.formats.format import Format
from lowbit.formats.nested_fp import LARGEST, split_bytes
from lowbit.quantizers.checks import IneligibleError
from lowbit.quantizers.quantizer import Fields, expect_format, set_default_quantizer


@dataclass(frozen=True)
class SplitBytes:
    """Each weight as float16, in two bytes. The default of `nested_fp`.

    Weights beyond 1.75 in magnitude are refused; under `jax.jit`, where they cannot be seen, they become +-1.75.
    """

    def __call__(self, w: jax.Array, fmt: Format) -> Fields:
        expect_format(fmt, "nested_fp", self)
        upper, lower = split_bytes(jnp.clip(w, -LARGEST, LARGEST).astype(jnp.float16))
        return {"upper": upper, "lower": lower}

    def examine(self, w: jax.Array, name: str) -> None:
        """Logs what the cast loses; raises IneligibleError for a weight beyond the limit. Traced ones are not seen."""
        seen = _cast(w)
        if isinstance(seen[0], jax.core.Tracer):
            return
        largest, largest_half, changed, off = map(float, seen)
        if largest_half > LARGEST:
            held = f"{LARGEST} is the limit: it has to stay dense"
            raise IneligibleError(f"{name} has |w| up to {largest:.4g}, and {held}")
        if changed:
            logging.warning(
                "lowbit: the cast from %s to float16 changes %d of the %d weights of %s, by at most %.2g of their size",
                w.dtype, changed, w.size, name, off,
            )  # fmt: skip


@jax.jit
def _cast(w: jax.Array) -> tuple[jax.Array, ...]:
    """Of the cast to float16: the largest |w| before and after, how many change, and the largest relative change."""
    half = jax.lax.optimization_barrier(w.astype(jnp.float16))  # or XLA may leave the cast and its inverse out
    size = jnp.abs(w).astype(jnp.promote_types(w.dtype, jnp.float32))
    off = jnp.abs(jnp.abs(half).astype(size.dtype) - size) / jnp.where(size == 0, 1, size)
    return size.max(), jnp.abs(half).max(), (off > 0).sum(), off.max()


set_default_quantizer("nested_fp", SplitBytes())
