"""`lb.allocate`: which format each layer gets, so that a budget is kept and the errors do the least harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from lowbit.array import dequantize
from lowbit.formats import Format
from lowbit.nn.allocation import Allocation, Candidate, by_layer, solve
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.importance import check_measured, check_statistic, importance, weighed
from lowbit.nn.kernel import expect_module
from lowbit.nn.kinds import KINDS, dense_matrices, layers, refusal, weight
from lowbit.nn.linen import opened
from lowbit.nn.progress import bar
from lowbit.nn.resume import Finished, solved
from lowbit.nn.rules import Rule
from lowbit.quantizers import IneligibleError, Quantizer

By = Literal["loss", "trace", "output"]
NEEDS: Mapping[str, tuple[str, ...]] = {
    "loss": ("gradient_square",),
    "trace": ("hessian_trace", "gradient_square"),
    "output": ("gram", "second_moment"),
}
"""The statistics of a layer that an estimate takes: the first of them that there is."""
Choice = Format | tuple[Format, Quantizer]


def allocate(
    model: nnx.Module,
    stats: Mapping[str, LayerStats],
    *,
    formats: Sequence[Choice],
    bits: float | None = None,
    bytes: int | None = None,
    by: By = "loss",
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> Allocation:
    """The format of each measured layer, so that all stay within a budget and the estimated harm is least.

    Every layer is quantized in every format, one at a time; which of them each layer gets is an integer program that is
    solved exactly. The harm of layers is taken to add up. Those that share a weight get one format, by the statistics
    of the first. With D the error of a weight:

    - by "loss": sum F D^2, F the mean squared gradients of the loss, as SqueezeLLM estimates what it costs the loss;
    - by "trace": of each matrix t sum D^2, t the average trace of its Hessian as HAWQ-V2 has it (Dong et al., NeurIPS
      2020), `hessian_trace`, or where that was not measured mean(F), which is much cheaper;
    - by "output": the squared error of the layer's output over the output's own square, from `gram`, or where that was
      not measured from `second_moment`.

    Args:
      model: left as it is.
      stats: what `lb.calibrate` measured: `gradient_square`, or for "output" `gram` or `second_moment`, or for "trace"
        `hessian_trace`. Layers that it does not have are left out, and get no rule. A logged warning names those of
        which it has only zeros.
      formats: such as `lb.bcq(3, group=128)`, or (format, quantizer).
      bits: the budget per weight, scales and padding counted.
      bytes: instead, the budget of all these layers together.
      by: the estimate.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that each layer is written to in each format, as `lb.quantize` has it. A run that was killed goes
        on after them, and `lb.quantize(model, found.rules, stats=stats, resume=folder)` finds those that were chosen.

    Raises TypeError for `formats` that are no list of formats; ValueError for no budget or two, for one below the
    smallest formats (both sizes are named), for a layer that no format can hold, where a statistic was not measured, is
    of another shape, NaN, inf or negative, and where an estimate is beyond float32.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 64, rngs=nnx.Rngs(1)))
    >>> stats = lb.calibrate(model, [jnp.ones((2, 64))])
    >>> found = lb.allocate(model, stats, formats=[lb.uniform(2), lb.uniform(4)], bits=4.0, by="output")
    >>> [str(rule.format) for rule in found.rules], found.bits_per_weight <= 4.0
    (['uniform(bits=2)', 'uniform(bits=4)'], True)
    """
    expect_module(model, "allocate")
    _check(formats, bits, bytes, by)
    every: list[Candidate] = []
    choices = [choice if isinstance(choice, tuple) else (choice, None) for choice in formats]
    finished = None if resume is None else Finished(resume, [Rule("**", *choice) for choice in choices])
    held = _shared(opened(model), stats)
    _check_statistics({path: layer for path, (layer, *_) in held.items()}, stats, by)
    with bar(progress, len(held) * len(choices), "allocating") as advance:
        for path, (layer, *shared) in held.items():
            harm, made = harm_by(path, layer, stats, by), len(every)
            for choice in choices:
                if found := _candidate(Rule(path, *choice), layer, stats, harm, finished):
                    every.append(replace(found, shared=tuple(shared)))
                advance()
            if len(every) == made:
                names = ", ".join(str(fmt) for fmt, _ in choices)
                raise ValueError(f"layer {path!r} fits none of {names}: add a format that it fits")
    if not every:
        raise ValueError("stats has no layer of this model: there is nothing to allocate")
    if dead := [path for path, of in by_layer(every).items() if not any(c.harm for c in of)]:
        logging.warning("lowbit: by what stats has, no format does harm to %s: each gets any", ", ".join(dead))
    weights = sum(of[0].weights for of in by_layer(every).values())
    # A product such as 25 * (57 / 25) may be rounded to less than what it stands for.
    return solve(tuple(every), 8 * bytes if bits is None else weights * bits * (1 + 2**-51))  # type: ignore[operator]


def _check(formats: Sequence[Choice], bits: float | None, bytes: float | None, by: str) -> None:
    if (bits is None) == (bytes is None):
        raise ValueError(f"bits={bits!r} and bytes={bytes!r}: give one budget, bits per weight or bytes for all layers")
    if not (budget := bytes if bits is None else bits) > 0:  # type: ignore[operator]
        raise ValueError(f"the budget is {budget!r}: it must be above 0")
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")
    if isinstance(formats, Format) or not formats:
        raise TypeError(f"formats={formats!r}: give a list of one or more, such as [lb.bcq(2), lb.bcq(4)]")
    for choice in formats:
        if not isinstance(choice[0] if isinstance(choice, tuple) else choice, Format):
            raise TypeError(f"{choice!r} is neither a format such as lb.bcq(2) nor (format, quantizer)")


def _check_statistics(layers: Mapping[str, Any], stats: Mapping[str, LayerStats], by: By) -> None:
    """Before hours of quantizing: that there is an estimate for each layer, and by "trace" the same for all."""
    names: dict[str, str] = {}
    for path, layer in layers.items():
        if reason := refusal(layer):
            raise ValueError(f"layer {path!r} cannot be quantized: {reason}")
        names.setdefault(_statistic(path, layer, stats, by), path)
    if by == "trace" and len(names) > 1:
        other, path = (names[name] for name in NEEDS[by])
        raise ValueError(
            f"stats has 'hessian_trace' of layer {other!r} and only 'gradient_square' of layer {path!r}, which are not"
            " of one size: measure the same of all layers"
        )


def _shared(model: nnx.Module, stats: Mapping[str, LayerStats]) -> dict[str, list[Any]]:
    """The measured layers of a model by path, each followed by the paths of those that would share what is stored."""
    out: dict[str, list[Any]] = {}
    first: dict[Any, str] = {}
    for path, layer in layers(model).items():
        if path in stats:
            held = id(weight(layer)), None if refusal(layer) else KINDS[type(layer)].view(layer)
            if (owner := first.setdefault(held, path)) == path:
                out[path] = [layer]
            else:
                out[owner].append(path)
    return out


def _candidate(
    rule: Rule, layer: Any, stats: Mapping[str, LayerStats], harm: Callable[[Any], float], finished: Finished | None
) -> Candidate | None:
    """A layer in the format of a rule, or None if that cannot hold it."""
    path, dense, dims = rule.path, dense_matrices(layer), KINDS[type(layer)].view(layer).dims
    check_measured({path: stats[path]}, {path: rule}, {path: layer})
    try:
        array = solved(path, dense, rule, dims, importance(stats, path, rule, layer), finished).array
    except IneligibleError:
        return None
    error = dequantize(array).astype(jnp.float32) - dense.astype(jnp.float32)
    stored = array.type.bits * int(np.prod(array.stack))
    if not np.isfinite(estimate := harm(error)):
        raise ValueError(
            f"layer {path!r}: what errors of {rule.format} do is estimated at {estimate}, as numbers too large for "
            "float32 give: scale down what the layer or its statistics hold"
        )
    return Candidate(path, rule, dense.size, stored, estimate)


def _statistic(path: str, layer: Any, stats: Mapping[str, LayerStats], by: By) -> str:
    """The name of what a layer's estimate takes. Raises ValueError where that was not measured, or cannot be."""
    if (name := next((n for n in NEEDS[by] if getattr(stats[path], n) is not None), None)) is None:
        needs = " or ".join(NEEDS[by])
        raise ValueError(f"by={by!r} takes {needs}, which stats does not have of layer {path!r}: measure it")
    if name == "hessian_trace" and (least := np.min(getattr(stats[path], name))) < 0:
        raise ValueError(
            f"layer {path!r}: the trace of its second derivatives is estimated at {least:.3g} a weight, as if errors"
            " did good: measure more batches, or give stats with gradient_square and without hessian_trace"
        )
    check_statistic(stats, path, name, layer)
    return name


def harm_by(path: str, layer: Any, stats: Mapping[str, LayerStats], by: By) -> Callable[[Any], float]:
    """The estimate for an error of the layer's matrices."""
    name = _statistic(path, layer, stats, by)
    dims, dense = KINDS[type(layer)].view(layer).dims, dense_matrices(layer).astype(jnp.float32)
    counts = weighed(stats, path, (name,), layer)

    def square(d: Any) -> float:
        """Of what the inputs make of an error."""
        rows = jnp.swapaxes(d, -1, -2) if dims[0] == "k" else d
        if name == "gram":
            return float((jnp.matmul(rows, counts, precision="highest") * rows).sum())
        return float((rows * rows * counts[..., None, :]).sum())

    if by == "output":
        own = square(dense)
        return lambda d: square(d) / own if own else 0.0
    if by == "trace":
        return lambda d: float((counts.mean((-1, -2)) * (d * d).sum((-1, -2))).sum())
    return lambda d: float((counts * d * d).sum())
