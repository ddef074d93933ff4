"""`lb.report`: what a model stores, layer by layer, and `lb.explain`: how a layer's product runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf, isnan, log10, prod
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from lowbit.array import QuantArray
from lowbit.autotuning.lookup import measured
from lowbit.backward import floats, planned_db, planned_dw, planned_dx, tables
from lowbit.ir.dtypes import short
from lowbit.nn.kernel import Kernel, Stats, expect_module, kernels
from lowbit.nn.kinds import KINDS, QUANTIZED, layers
from lowbit.nn.linen import opened
from lowbit.nn.quantize import matrices, others
from lowbit.planning import plan
from lowbit.quant_type import QuantType


@dataclass(frozen=True)
class Row:
    """One weight matrix.

    Attributes:
      layer: path of the layer.
      format: the format and what is on it, or "dense float32", with the module's type where rules cannot name it.
      weights: entries of the dense matrix.
      bits_per_weight: everything stored for it (codes, scales, padding) over `weights`.
      bytes: of everything stored for it.
      relative_error: Frobenius norm of the error over that of the weight, when it was quantized; None if dense, and
        for what `lb.at_width` reads at another width than then.
      sqnr_db: the same as a signal-to-noise ratio in dB.
    """

    layer: str
    format: str
    weights: int
    bits_per_weight: float
    bytes: int
    relative_error: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Report:
    """Rows for the weight matrices; `other_bytes` counts every other parameter (biases, norms). `str()` is a table."""

    rows: tuple[Row, ...]
    other_bytes: int

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.rows) + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Over the weight matrices, quantized or not."""
        return 8 * sum(r.bytes for r in self.rows) / max(1, sum(r.weights for r in self.rows))

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(r) for r in self.rows],
            "other_bytes": self.other_bytes,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
        }

    def __str__(self) -> str:
        table = Table("layer", "format", "weights", "bits/weight", "bytes", "rel. error", "SQNR dB")
        for column in table.columns[2:]:
            column.justify = "right"
        for r in self.rows:
            error = "" if r.relative_error is None else f"{r.relative_error:.4f}"
            sqnr = "" if r.sqnr_db is None else f"{r.sqnr_db:.1f}"
            table.add_row(r.layer, r.format, f"{r.weights:,}", f"{r.bits_per_weight:.3f}", f"{r.bytes:,}", error, sqnr)
        table.add_section()
        total = sum(r.weights for r in self.rows)
        matrices = self.bytes - self.other_bytes
        table.add_row("all of these", "", f"{total:,}", f"{self.bits_per_weight:.3f}", f"{matrices:,}")
        table.add_row("other parameters", "", "", "", f"{self.other_bytes:,}")
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def report(model: nnx.Module) -> Report:
    """What a model stores: a row for each quantized weight, each dense layer, and each other module with a matrix.

    Bits are counted from the stored types, so sub-byte codes, scales and padding are all in. Errors are those measured
    when `lb.quantize` ran; training the scales afterwards does not change them, and weights that
    `lb.at_width` reads at another width have none.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> small = lb.quantize(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), lb.bcq(3, group=128, scale_dtype="float16"))
    >>> lb.report(small).rows[0].bits_per_weight
    3.375
    """
    expect_module(model, "report on")
    model = opened(model)
    rows = [_quantized_row(path.rpartition("/")[0], k) for path, k in kernels(model).items()]
    seen: set[int] = set()  # a weight that two layers share is stored, and counted, once
    for path, layer in (layers(model) | others(model)).items():
        new = [v for v in matrices(layer) if id(v) not in seen]
        seen.update(map(id, new))
        if new:
            rows.append(_dense_row(path, layer, [v.get_value() for v in new]))
    everything = sum(_nbytes(v) for v in jax.tree.leaves(nnx.state(model, nnx.Not(Stats))))
    return Report(tuple(rows), everything - sum(r.bytes for r in rows))


def _quantized_row(layer: str, kernel: Kernel) -> Row:
    t = kernel.type
    stats = kernel.stats.get_value()
    relative = sqnr = None
    if not isinstance(stats, jax.ShapeDtypeStruct | jax.core.Tracer):
        error, norm = (float(v) for v in stats.reshape(-1, 2).sum(0))
        if not isnan(error):
            ratio = error / norm if norm else 0.0
            relative, sqnr = ratio**0.5, (-10 * log10(ratio) if ratio else inf)
    size, count = prod(kernel.shape), prod(kernel.array.stack)
    return Row(layer, t.encoding, size, t.bits_per_weight, count * t.bits // 8, relative, sqnr)


def _dense_row(layer: str, module: Any, weights: list[Any]) -> Row:
    size, nbytes = sum(prod(w.shape) for w in weights), sum(_nbytes(w) for w in weights)
    kind = "" if type(module) in KINDS else f" ({type(module).__name__})"
    return Row(layer, f"dense {weights[0].dtype}{kind}", size, 8 * nbytes / size, nbytes)


def _nbytes(a: Any) -> int:
    """Of an array, abstract or not; random keys and plain numbers are no parameters."""
    dtype = getattr(a, "dtype", None)
    if dtype is None or jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return 0
    return int(prod(a.shape) * dtype.itemsize)


def explain(layer: Any, batch: int = 1, platform: str | None = None, dtype: Any = None, gradient: bool = False) -> str:
    """Every way to run a quantized layer's product at a batch size, cheapest first: predicted costs, and what
    cannot run, with the reason. Where one was measured (`lb.tuned`), the last line says which: that one runs.

    Args:
      layer: a quantized layer (of an `lb.nn.Embed` its `attend`), its kernel, or a QuantArray. Of a stack, one slice;
        of one whose width may change, every width.
      batch: rows of activations.
      platform: "cpu", "gpu" or "tpu"; the default backend's if None.
      dtype: of the activations; if None that which the layer computes in, or else that of its weight.
      gradient: whether to list the ways to the gradients of the activations and of the weight's parameters, too.

    Raises TypeError for a layer that is not quantized, ValueError for a batch below 1 or an unknown platform.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> small = lb.quantize(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), lb.bcq(3))
    >>> print(lb.explain(small, batch=1, platform="cpu").splitlines()[0])
    x[1, k] @ f32[k=256 n=64] as bcq(bits=3) on cpu
    """
    held = getattr(layer, QUANTIZED[type(layer)].attribute) if type(layer) in QUANTIZED else layer
    array = held.array if isinstance(held, Kernel) else held
    if not isinstance(array, QuantArray):
        raise TypeError(f"{type(layer).__name__} is not a quantized layer or array: nothing to explain")
    given = dtype or getattr(layer, "dtype", None) or array.dtype
    changes = isinstance(held, Kernel) and not (held.width is None and held.reader is None)
    types = [array.type.at(width) for width in array.type.format.widths] if changes else [array.type]
    return "\n\n".join(_explained(batch, t, platform, given, gradient) for t in types)


def _explained(batch: int, t: QuantType, platform: str | None, dtype: Any, gradient: bool) -> str:
    made = plan((batch, dict(t.dims)["k"]), t, platform, dtype)
    entry = measured(batch, t, short(dtype)) if made.machine == jax.default_backend() else None
    listed = [str(made) if entry is None else f"{made}\nmeasured {entry}"]
    if gradient:
        listed.append(str(planned_dx(batch, t, short(dtype), made.machine)))
        trained, shared = set(floats(t)), tables(t)
        for planned, names in ((planned_dw, trained - shared), (planned_db, trained & shared)):
            if names:
                listed.append(str(planned(batch, t, short(dtype), made.machine)))
    return "\n\n".join(listed)
