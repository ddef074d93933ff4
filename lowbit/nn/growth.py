"""`lb.compare`: how the error of quantization grows from layer to layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, log10
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from lowbit.nn.around import Around
from lowbit.nn.kernel import expect_arrays, expect_module, joined
from lowbit.nn.kinds import KINDS, QUANTIZED
from lowbit.nn.linen import opened


@dataclass(frozen=True)
class Growth:
    """The outputs of one layer in two models, given the same batch.

    Attributes:
      layer: its path; "(output)" is what the models return.
      relative_error: norm of the difference over the norm of the first model's output.
      sqnr_db: the same as a signal-to-noise ratio in dB; infinite when the outputs are equal.
    """

    layer: str
    relative_error: float
    sqnr_db: float


@dataclass(frozen=True)
class Comparison:
    """Rows in the order in which the layers ran, the models' own output last. `str()` is a table."""

    rows: tuple[Growth, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        table = Table("layer", "rel. error", "SQNR dB")
        for r in self.rows:
            table.add_row(r.layer, f"{r.relative_error:.4f}", f"{r.sqnr_db:.1f}")
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get()

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the relative errors, first layer left, to an image file. Needs matplotlib, as `lowbit[demo]` has."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.25 * len(self.rows)), 4))
        axes = figure.subplots()
        axes.plot(range(len(self.rows)), [r.relative_error for r in self.rows], marker="o")
        axes.set_xticks(range(len(self.rows)), [r.layer for r in self.rows], rotation=90)
        axes.set_ylabel("relative error of the output")
        figure.tight_layout()
        figure.savefig(path, dpi=120)


class Watch(Around):
    """A layer that puts what it returns into a list."""

    def __init__(self, layer: Any, path: str, seen: Callable[[str, jax.Array], None]) -> None:
        super().__init__(layer)
        self.path = path
        self.seen = seen

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self._note(self.layer(*args, **kwargs))

    def attend(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self._note(self.layer.attend(*args, **kwargs))

    def _note(self, value: jax.Array) -> jax.Array:
        if isinstance(value, jax.core.Tracer):  # in nnx.scan: known, slice by slice, only when it runs
            jax.debug.callback(partial(self.seen, self.path), value, ordered=True)
        else:
            jax.effects_barrier()
            self.seen(self.path, value)
        return value


def compare(
    model: nnx.Module, quantized: nnx.Module, batch: Any, call: Callable[[Any, Any], Any] | None = None
) -> Comparison:
    """Run two models of one structure on the same batch, and compare the outputs of each layer.

    Args:
      model: the reference, usually the float model that `quantized` was made from.
      quantized: the other one.
      batch: what `call` takes.
      call: `call(model, batch)`; `model(batch)` by default. It runs uncompiled, and returns one array.

    A layer that runs several times has several rows, and so has one that `nnx.scan` or `nnx.vmap` runs slice by slice.

    Raises ValueError when the models do not run the same layers or a layer gives them outputs of two shapes, and for
    abstract models; TypeError for what is no module, and for models that return no array.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> found = lb.compare(model, lb.quantize(model, lb.bcq(3, group=32)), jnp.ones((2, 64)))
    >>> [row.layer for row in found.rows]
    ['layers/0', 'layers/2', '(output)']
    """
    for given, what in ((model, "compare"), (quantized, "compare with")):
        expect_module(given, what)
        expect_arrays(given, what)
    run = call or (lambda m, b: m(b))
    first, second = _outputs(opened(model), batch, run), _outputs(opened(quantized), batch, run)
    for at, ((p, _), (q, _)) in enumerate(zip(first, second, strict=False)):  # the shorter one ends with its output
        if p != q:
            raise ValueError(f"the models do not run the same layers: at step {at} one runs {p!r}, the other {q!r}")
    return Comparison(tuple(_growth(p, a, b) for (p, a), (_, b) in zip(first, second, strict=True)))


def _outputs(model: nnx.Module, batch: Any, run: Callable[[Any, Any], Any]) -> list[tuple[str, jax.Array]]:
    found: list[tuple[str, jax.Array]] = []
    made: dict[int, Watch] = {}

    def watch(path: tuple[Any, ...], node: Any) -> Any:
        if type(node) not in KINDS and type(node) not in QUANTIZED:
            return node
        return made.setdefault(id(node), Watch(node, joined(path), lambda *seen: found.append(seen)))

    result = run(nnx.recursive_map(watch, nnx.clone(model)), batch)
    jax.effects_barrier()
    if not isinstance(result, jax.Array):
        raise TypeError(f"the models return a {type(result).__name__}: give call=, a function that returns one array")
    return [*found, ("(output)", result)]


def _growth(path: str, a: jax.Array, b: jax.Array) -> Growth:
    if a.shape != b.shape:
        raise ValueError(
            f"{path!r} gives the shape {a.shape} in one model, {b.shape} in the other: compare like models"
        )
    reference, other = a.astype(jnp.float32), b.astype(jnp.float32)
    norm = float(jnp.linalg.norm(reference.ravel()))
    error = float(jnp.linalg.norm((reference - other).ravel()))
    ratio = error / norm if norm else inf if error else 0.0
    return Growth(path, ratio, -20 * log10(ratio) if ratio else inf)
