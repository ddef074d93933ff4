"""One computation with two programs: for CUDA, and for every other platform.

`jax.lax.platform_dependent` would do, but Pallas refuses to be lowered for several platforms at once, as `jax.export`
does, even in a branch for one of them. This primitive lowers its CUDA program for CUDA alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

_two_programs = Primitive("lowbit_two_programs")
_two_programs.multiple_results = True


def by_platform(cuda: Callable[..., Any], default: Callable[..., Any], *args: Any) -> Any:
    """`cuda(*args)` in what is compiled for CUDA, `default(*args)` elsewhere; both give one tree of arrays of the same
    types.

    Of a batch by `jax.vmap`, CUDA computes one after another.
    """
    (for_cuda, _), (for_others, shapes) = (jax.make_jaxpr(f, return_shape=True)(*args) for f in (cuda, default))
    out = _two_programs.bind(*jax.tree.leaves(args), cuda=for_cuda, default=for_others)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


@_two_programs.def_impl
def _run(*args: Any, cuda: ClosedJaxpr, default: ClosedJaxpr) -> Any:
    return jax.jit(partial(_two_programs.bind, cuda=cuda, default=default))(*args)


@_two_programs.def_abstract_eval
def _abstract(*_: Any, cuda: ClosedJaxpr, default: ClosedJaxpr) -> Any:
    types = [[(a.shape, a.dtype) for a in program.out_avals] for program in (cuda, default)]
    if types[0] != types[1]:
        raise TypeError(f"the program for CUDA gives {cuda.out_avals}, the other {default.out_avals}")
    return default.out_avals


def _lower_default(ctx: Any, *args: Any, cuda: ClosedJaxpr, default: ClosedJaxpr) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(default), multiple_results=True)(ctx, *args)


def _lower_cuda(ctx: Any, *args: Any, cuda: ClosedJaxpr, default: ClosedJaxpr) -> Any:
    alone = ctx.replace(module_context=ctx.module_context.replace(platforms=("cuda",)))
    return mlir.lower_fun(jaxpr_as_fun(cuda), multiple_results=True)(alone, *args)


def _batched(args: Any, dims: Any, *, cuda: ClosedJaxpr, default: ClosedJaxpr) -> Any:
    moving = [d is not None for d in dims]
    first = [jax.numpy.moveaxis(a, d, 0) if m else a for a, d, m in zip(args, dims, moving, strict=True)]

    def one_by_one(*args: Any) -> Any:
        def one(slices: Any) -> Any:
            it = iter(slices)
            return jaxpr_as_fun(cuda)(*(next(it) if m else a for a, m in zip(args, moving, strict=True)))

        return jax.lax.map(one, [a for a, m in zip(args, moving, strict=True) if m])

    axes = [0 if m else None for m in moving]
    together = jax.vmap(jaxpr_as_fun(default), axes)
    return by_platform(one_by_one, together, *first), [0] * len(default.out_avals)


mlir.register_lowering(_two_programs, _lower_default)
mlir.register_lowering(_two_programs, _lower_cuda, platform="cuda")
batching.primitive_batchers[_two_programs] = _batched
