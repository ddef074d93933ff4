"""What a schedule says in two back ends: the verbs that Pallas' interpreter lacks, for the GPU and for its twin.

The pipeline, index maps, barriers and everything else of a schedule is shared, so interpreting the twin checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.compat import load
from lowbit.kernels.decoders import ROWS
from lowbit.kernels.lane_gpu import ROW, WORDS, in_registers
from lowbit.kernels.lanes import Program, in_jnp

Ref = Any


class Verbs(Protocol):
    interpret: Any

    def accumulator(self, columns: int) -> Any:
        """A scratch type: float32 [ROWS, columns]."""

    def clear(self, acc: Ref) -> None:
        """Make it zero, where a new one is not."""

    def words(self, ref: Ref, program: Program) -> jax.Array: ...
    def rows(self, ref: Ref) -> jax.Array:
        """A value for each of the ROWS."""

    def decode(self, program: Program, words: jax.Array, *stored: jax.Array) -> jax.Array: ...
    def multiply(self, acc: Ref, weights: jax.Array, x: Ref) -> None:
        """acc += weights [ROWS, k] @ x [columns, k]^T, finished when it returns."""

    def release(self) -> None:
        """Say that the stage's buffers were read."""


class Gpu:
    """Mosaic GPU."""

    interpret = False

    def accumulator(self, columns: int) -> Any:
        return plgpu.ACC((ROWS, columns), jnp.float32)

    def clear(self, acc: Ref) -> None:
        pass

    def words(self, ref: Ref, program: Program) -> jax.Array:
        return load(ref, layout=WORDS[program.words])

    def rows(self, ref: Ref) -> jax.Array:
        return load(ref, layout=ROW)

    def decode(self, program: Program, words: jax.Array, *stored: jax.Array) -> jax.Array:
        return in_registers(program, words, *stored)

    def multiply(self, acc: Ref, weights: jax.Array, x: Ref) -> None:
        plgpu.wgmma(acc, weights, plgpu.transpose_ref(x, (1, 0)))
        plgpu.wgmma_wait(0)

    def release(self) -> None:
        pass


class Twin:
    """The interpreter: the accumulator lies in shared memory, decoding and multiplying are jnp.

    Attributes:
      interpret: parameters of Pallas' Mosaic GPU interpreter.
    """

    def __init__(self, interpret: Any) -> None:
        self.interpret = interpret

    def accumulator(self, columns: int) -> Any:
        return plgpu.SMEM((ROWS, columns), jnp.float32)

    def clear(self, acc: Ref) -> None:
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def words(self, ref: Ref, program: Program) -> jax.Array:
        return ref[...]

    def rows(self, ref: Ref) -> jax.Array:
        return ref[...]

    def decode(self, program: Program, words: jax.Array, *stored: jax.Array) -> jax.Array:
        return in_jnp(program, words, *stored)

    def multiply(self, acc: Ref, weights: jax.Array, x: Ref) -> None:
        acc[...] += jnp.dot(weights.astype(jnp.float32), x[...].astype(jnp.float32).T)

    def release(self) -> None:
        plgpu.commit_smem()
