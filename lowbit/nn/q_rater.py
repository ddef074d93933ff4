"""Clipping and rounding searched by the loss itself, layer after layer, as in Q-Rater (arXiv 2105.01868).

A layer has two numbers: c, the share of the range [min(w, 0), max(w, 0)] of each group that is kept, and r, by how many
steps the weights within it are moved away from zero before they are rounded: those of a fraction above 1/2 - r go up.
Both are part of a dense weight. Weights at the ends of the range stay there, so that round to nearest finds the range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.formats import Format
from lowbit.nn.clipping import grouped, rounded, rows_of, set_rows, span, ungrouped, uniform_layers
from lowbit.nn.kinds import layers
from lowbit.nn.linen import opened
from lowbit.nn.progress import bar
from lowbit.nn.reached import in_order
from lowbit.nn.resume import steps
from lowbit.nn.rules import Rules
from lowbit.nn.running import digest_of

M = TypeVar("M", bound=nnx.Module)
CLIPS = tuple(1 - i / 20 for i in range(1, 13))
SHIFTS = (-0.2, -0.1, 0.1, 0.2)


def q_rater(
    model: M,
    rules: Rules,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], jax.Array],
    *,
    clips: Sequence[float] = CLIPS,
    shifts: Sequence[float] = SHIFTS,
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> M:
    """A copy of a model whose layers are clipped, and their rounding shifted, by what lowers the loss of the rounded
    model on sample data.

    First every layer is rounded to nearest. Then each in turn, in the order in which they run, takes the clipping with
    the least loss, then the shift; what is found is never changed again. So no step raises the loss, and on the batches
    the end is no worse than rounding to nearest. (In the paper the layers to come are not rounded yet.) The result is
    dense: `lb.quantize` with the same rules makes of it the model whose loss was searched.

    Args:
      model: left as it is; what is not changed is shared.
      rules: as for `lb.quantize`; formats must be uniform, and round to nearest their quantizer.
      batches: what `loss` takes; all are held. Few overfit.
      loss: `loss(model, batch)`, a scalar, compiled; its mean over the batches counts. It may be any number of the
        task, with or without a gradient. It runs once a batch for each number tried, of each layer.
      clips: values of c below 1 to try.
      shifts: values of r to try; none leaves rounding as it is.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that each layer's numbers are written to when they are found. A run that was killed, started
        again with the same folder, goes on after the last finished layer. What `loss` computes cannot be told: after
        changing it, give another folder.

    Raises ValueError for a loss that is NaN, inf or no scalar, for a layer that never runs, for no batches, for numbers
    out of range, and for formats that are not uniform.

    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> x = jax.random.normal(jax.random.key(0), (64, 64))
    >>> data = x, model(x).argmax(1)
    >>> errors = lambda m, d: (m(d[0]).argmax(1) != d[1]).mean()
    >>> better = lb.q_rater(model, lb.uniform(2), [data], errors)
    >>> bool(errors(lb.quantize(better, lb.uniform(2)), data) < errors(lb.quantize(model, lb.uniform(2)), data))
    True
    """
    model = opened(model)
    out: M = nnx.clone(model)
    targets = uniform_layers(out, rules, "lb.q_rater")
    given = list(batches)
    _check(given, clips, shifts)
    search = _Search(nnx.clone(model), loss, given)
    order = in_order(model, targets, loss, given[0])
    for path, (layer, fmt) in targets.items():
        search.put(path, rows_of(layer), fmt)
    search.start()
    told = tuple(clips), tuple(shifts), [(path, str(targets[path][1])) for path in order]
    found = steps(resume, lambda: digest_of(model, given, told))
    with bar(progress, len(order), "searching by the loss") as advance:
        for path in order:
            layer, fmt = targets[path]

            def solve(path: str = path, layer: Any = layer, fmt: Format = fmt) -> dict[str, Any]:
                return {"clip and shift": np.array(search.best(path, rows_of(layer), fmt, clips, shifts))}

            numbers = found(path, solve)["clip and shift"]
            set_rows(layer, _shaped(rows_of(layer), fmt, *map(float, numbers)))
            search.put(path, rows_of(layer), fmt)
            advance()
    return out


def _check(batches: Sequence[Any], clips: Sequence[float], shifts: Sequence[float]) -> None:
    if not batches:
        raise ValueError("no batches were given: there is no loss to search by")
    if odd := [c for c in clips if not 0 < c < 1]:
        raise ValueError(f"clips are shares of each range, above 0 and below 1, not {odd[0]!r}")
    if odd := [r for r in shifts if not -0.5 < r < 0.5]:
        raise ValueError(f"shifts are parts of a step, above -0.5 and below 0.5, not {odd[0]!r}")


@partial(jax.jit, static_argnums=1)
def _shaped(rows: jax.Array, fmt: Format, clip: float, shift: float) -> jax.Array:
    """Rows [r, k] clipped to `clip` times the ranges of their groups, moved by `shift` steps within."""
    values = grouped(rows, fmt)
    lo, hi = (clip * end for end in span(values))
    step = (hi - lo) / (2 ** fmt["bits"] - 1)
    moved = jnp.where((values > lo) & (values < hi), values + shift * step * jnp.sign(values), values)
    return ungrouped(jnp.clip(moved, lo, hi), rows.shape[1])


class _Search:
    """A model whose layers are replaced one at a time, and its mean loss."""

    def __init__(self, model: nnx.Module, loss: Callable[[Any, Any], jax.Array], batches: Sequence[Any]) -> None:
        self.model = model
        self.batches = batches
        self.layers = layers(model)
        graph = nnx.graphdef(model)
        self.loss = jax.jit(lambda state, batch: loss(nnx.merge(graph, state, copy=True), batch))

    def put(self, path: str, rows: jax.Array, fmt: Format) -> None:
        """Rounds these rows to nearest, in the dtype of the layer."""
        set_rows(self.layers[path], rows)
        set_rows(self.layers[path], rounded(rows_of(self.layers[path]), fmt))

    def start(self) -> None:
        """Raises ValueError for a loss that is no finite scalar of the model as it is now."""
        for i, batch in enumerate(self.batches):
            value = self.loss(nnx.state(self.model), batch)
            if jnp.shape(value) != ():
                raise ValueError(f"the loss has shape {jnp.shape(value)}: give one that is a scalar, such as a mean")
            if not jnp.isfinite(value):
                raise ValueError(f"the loss of the rounded model is {value} on batch {i}: give others")

    def value(self) -> float:
        return float(np.mean([float(self.loss(nnx.state(self.model), batch)) for batch in self.batches]))

    def best(
        self, path: str, rows: jax.Array, fmt: Format, clips: Sequence[float], shifts: Sequence[float]
    ) -> tuple[float, float]:
        """The clipping with the least loss, then the shift; 1 and 0 unless others are better."""

        def tried(clip: float, shift: float) -> float:
            self.put(path, _shaped(rows, fmt, clip, shift), fmt)
            return self.value()

        least, clip, shift = tried(1.0, 0.0), 1.0, 0.0
        for c in clips:
            if (loss := tried(c, shift)) < least:
                least, clip = loss, c
        for r in shifts:
            if (loss := tried(clip, r)) < least:
                least, shift = loss, r
        return clip, shift
