"""`lb.at_width`: a model whose weights can be read at several widths, read at one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import Kernel, Width, expect_module, kernels, layer_kernels
from lowbit.nn.linen import Linen
from lowbit.nn.rules import Rule, assign
from lowbit.widths import one_integer

M = TypeVar("M", bound=nnx.Module)


def at_width(model: M, width: int | jax.Array | Mapping[str, int | jax.Array]) -> M:
    """The model with its weights of several widths, such as `lb.any_bcq` ones, read at one; the arrays are shared.

    Args:
      model: left as it is. Weights that are read at one width only stay as they are.
      width: an int gives the layers another type, and what is compiled is that width alone. An integer in an array,
        such as an argument of a jitted function, becomes an `lb.nn.Width` in each layer: it may change from call to
        call of one compiled function, which computes only what that width needs, and is the nearest that a layer has.
        A dict from path patterns, as in `lb.quantize`, to either: layer by layer, the first match wins, others stay.

    Gradients reach the scales and tables of the width that is read, those of other widths get zeros. To train those of
    one width and leave the rest as they are, give `lb.tune.alpha_tuning` the model at that width.

    Raises ValueError for a model without such layers, a width that a layer does not have, a pattern that is never used,
    or an array for a layer of a Linen model; TypeError for what is no model, no integer, or several.

    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, lowbit as lb
    >>> small = lb.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), lb.any_bcq(2, 4))
    >>> x = jnp.ones((1, 64))
    >>> run = nnx.jit(lambda model, x, width: lb.at_width(model, width)(x))
    >>> all(bool(jnp.allclose(run(small, x, jnp.int32(b)), lb.at_width(small, b)(x), rtol=1e-5)) for b in (2, 3, 4))
    True
    """
    expect_module(model, "read at a width")
    out: M = nnx.clone(model)
    held = {path: kernel for path, kernel in layer_kernels(out).items() if kernel.type.format.widths}
    if not held:
        raise ValueError(
            f"{type(model).__name__} has no layer that is read at several widths, such as lb.any_bcq(2, 4)"
        )
    linen = {id(kernel) for _, m in nnx.iter_modules(out) if isinstance(m, Linen) for kernel in kernels(m).values()}
    widths = width if isinstance(width, Mapping) else {"**": width}
    rules = assign(tuple(Rule(p, None) for p in widths), list(held), {}, "layers that are read at several widths")
    for path, rule in rules.items():
        chosen = widths[rule.path]
        if not isinstance(chosen, int) and id(held[path]) in linen:
            raise ValueError(f"layer {path!r} is of a Linen model, whose widths are fixed: give an int, not an array")
        _read(held[path], chosen, path)
    return out


def _read(kernel: Kernel, width: Any, path: str) -> None:
    if isinstance(width, int):
        try:
            read = kernel.type.at(width)
        except ValueError as err:
            raise ValueError(f"layer {path!r}: {err}") from err
        same = kernel.width is None and kernel.reader is None and read.decode == kernel.type.decode
        kernel.type = read
        if kernel.width is not None:
            del kernel.width
    else:
        same = False
        kernel.width = Width(jnp.broadcast_to(one_integer(width), kernel.array.stack))
    if kernel.reader is not None:
        del kernel.reader  # it would choose another width
    stats = kernel.stats.get_value()
    if not same and isinstance(stats, jax.Array):
        kernel.stats.set_value(jnp.full_like(stats, jnp.nan))  # no error was measured at this width
