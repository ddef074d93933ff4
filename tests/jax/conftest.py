"""Strict jax for the tests on the CPU: nothing is broadcast in rank behind the author's back.

Strict type promotion is not set for all of them, because optax's own schedules need the standard one; a test of our own
arithmetic asks for it with `with jax.numpy_dtype_promotion("strict")`.
"""

import os

# Before jax is imported: these tests are about the CPU, also on a machine that has a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["LOWBIT_CACHE"] = os.devnull + ".none"  # what somebody measured here is no part of a test

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
