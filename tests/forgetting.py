"""What lowbit has compiled, forgotten: cheaper than `jax.clear_caches`, after which every test compiles all anew."""

from __future__ import annotations

import sys

import jax

import lowbit as lb


def forget() -> None:
    """Clears the compiled functions of lowbit's modules, which know the device, the plans and what was measured."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lowbit"]:
        for value in vars(sys.modules[name]).values():
            if callable(clear := getattr(value, "clear_cache", None)):
                clear()
    jax.jit(lb.matmul).clear_cache()  # traces are kept by function, whoever compiles it
