"""Nested floats: no search, the bytes of each weight as float16."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from absl import logging

from lowbit.formats.format import Format
from lowbit.formats.nested_fp import LARGEST, split_bytes
from lowbit.quantizers.checks import IneligibleError
from lowbit.quantizers.quantizer import Fields, set_default_quantizer


@dataclass(frozen=True)
class SplitBytes:
    """Each weight as float16, in two bytes. The default of `nested_fp`.

    Weights beyond 1.75 in magnitude are refused; under `jax.jit`, where they cannot be seen, they become +-1.75.
    """

    def __call__(self, w: jax.Array, fmt: Format) -> Fields:
        upper, lower = split_bytes(jnp.clip(w, -LARGEST, LARGEST).astype(jnp.float16))
        return {"upper": upper, "lower": lower}

    def examine(self, w: jax.Array, name: str) -> None:
        half = w.astype(jnp.float16)
        if float(jnp.abs(half).max()) > LARGEST:
            largest = f"{float(jnp.abs(w).max()):.4g}"
            raise IneligibleError(f"{name} has |w| up to {largest}, and {LARGEST} is the limit: it has to stay dense")
        wide = jnp.promote_types(w.dtype, jnp.float32)
        off = jnp.abs(half.astype(wide) - w.astype(wide)) / jnp.where(w == 0, 1, jnp.abs(w.astype(wide)))
        if changed := int((off > 0).sum()):
            logging.warning(
                "lowbit: the cast from %s to float16 changes %d of the %d weights of %s, by at most %.2g of their size",
                w.dtype, changed, w.size, name, float(off.max()),
            )  # fmt: skip


set_default_quantizer("nested_fp", SplitBytes())
