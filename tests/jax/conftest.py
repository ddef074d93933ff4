"""Strict jax for the tests on the CPU: nothing is broadcast in rank behind the author's back.

Strict type promotion is not set for all of them, because optax's own schedules need the standard one; a test of our own
arithmetic asks for it with `with jax.numpy_dtype_promotion("strict")`.
"""

import os

# Before jax is imported: these tests are about the CPU, also on a machine that has a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA has as many threads as cores, and each thread of a kernel that the interpreter lets wait for a barrier holds one:
# on two cores the thread that they wait for would never run.
os.environ.setdefault("NPROC", "8")
os.environ["LOWBIT_CACHE"] = os.devnull + ".none"  # what somebody measured here is no part of a test

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

AT_ONCE = 400
"""Tests whose programs a process keeps: those of all of them take more memory than a small machine has."""
ran = 0


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Forgets what is compiled, after so many tests."""
    global ran
    yield
    if ran >= AT_ONCE:
        jax.clear_caches()
        ran = 0


@pytest.fixture(autouse=True)
def count_tests() -> None:
    global ran
    ran += 1
