"""Thresholds at which layers choose the larger of two widths: the third phase of DP-LLM (Park et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, inf
from os import PathLike
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.io import CheckpointError, read, read_header, write
from lowbit.nn.kernel import Kernel, expect_module, layer_kernels
from lowbit.nn.progress import bar
from lowbit.nn.reached import Call
from lowbit.nn.statistics import Statistic, as_estimate
from lowbit.nn.switch import Switch, is_choice
from lowbit.tune.captured import Array, Measured, Passes
from lowbit.tune.estimators import Estimators
from lowbit.tune.nested import fingerprint, nested
from lowbit.tune.precision import Blend, blends, pair

M = TypeVar("M", bound=nnx.Module)
QuantileOf = Literal["error", "estimate"]
ALWAYS = 0.01
"""A width that fewer inputs than this share would have is left out: the layer has the other one alone."""
EQUAL = 1e-5
"""Relative to each other, errors of equal inputs that are summed in another order."""


@dataclass(frozen=True)
class Thresholds:
    """What the layers of a model choose their widths by, apart from the model: `lb.tune.switched` puts it in.

    Attributes:
      values: by "path/name", of each layer the widths `low`, `high` and `most`, its `threshold`, and what its estimate
        is made of: see `lb.nn.Switch`.
      base: a digest of the stored arrays of these layers.
    """

    values: Mapping[str, jax.Array]
    base: str

    @property
    def layers(self) -> dict[str, dict[str, jax.Array]]:
        """The values of each layer by path."""
        out: dict[str, dict[str, jax.Array]] = {}
        for name, value in self.values.items():
            path, _, field = name.rpartition("/")
            out.setdefault(path, {})[field] = value
        return out

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    def save(self, path: str | PathLike[str]) -> None:
        """Write them to one checked safetensors file, whole or not at all. Raises OSError when it cannot."""
        write(path, self.values, metadata={"thresholds of": self.base})

    @staticmethod
    def load(path: str | PathLike[str]) -> Thresholds:
        """What `save` wrote. Raises CheckpointError for a file that is damaged or holds no thresholds."""
        if (base := read_header(path)["metadata"].get("thresholds of")) is None:
            raise CheckpointError(f"{path} holds no thresholds: give a file that lb.tune.thresholds(...).save wrote")
        found = Thresholds({name: v for name, v in read(path).items() if isinstance(v, jax.Array)}, base)
        for layer, values in found.layers.items():
            if not is_choice(values):
                raise CheckpointError(f"{path}: layer {layer!r} has {sorted(values)}, which is no choice of a width")
        return found


def thresholds(
    model: nnx.Module,
    dense: nnx.Module,
    batches: Iterable[Any],
    call: Call | None = None,
    *,
    estimators: Estimators | Statistic | None = Estimators(),  # noqa: B008, it is frozen
    quantile_of: QuantileOf = "error",
    progress: bool | None = None,
) -> Thresholds:
    """Where each layer of a model whose precisions were trained changes from one width to the next.

    A layer with the precision p between the widths l < h uses h for the share 1 - r = (p - l) / (h - l) of its inputs,
    those for which it matters most: its threshold is the quantile r of ||(W_h - W_l) x|| over the inputs x that it has
    in the dense model. Of a format that rounds activations, such as `lb.nested_fp`, it is that of the same difference
    of products, ||y_h - y_l||. Where r is above 0.99 or below 0.01 it has one width. Of equal inputs, as in
    a first block those of the same token are, all use h or none, whichever comes nearer to the share. When it runs, the
    norm is estimated: by a line in ||x|| where that explains 0.9 of its variance, or else by ||G x||, a projection of
    64 rows.

    Args:
      model: of `lb.tune.blended`, trained; left as it is.
      dense: the model that it was made from, with layers at the same paths.
      batches: what `call` takes; they are held. Published are 40 sequences of 512 tokens. Each place counts, also
        padding.
      call: `call(model, batch)`; `model(batch)` by default. It is compiled.
      estimators: how they are found; None for layers that compute both widths, which is exact and dear. Or the name of
        a statistic of x, see `lb.tune.switched_by`: the threshold is then the quantile of that.
      quantile_of: "error", as published: the quantile is that of the norms themselves. Where these differ less from
        input to input than estimates of them err, more inputs than the share, or fewer, are estimated above it.
        "estimate": the quantile of what is estimated, so that the share is kept whatever the estimates are worth.
      progress: show a progress bar; by default when standard error is a terminal.

    The dense model runs once over the batches, and once more for each layer that needs a projection or the quantile of
    its estimates. The device holds the inputs of one such layer at a time, float32, and otherwise a few floats a row.

    Raises ValueError for a model without precisions, a layer that the dense model does not run or has with other
    inputs, inputs that are not finite, fewer inputs than the quantile of a layer needs, and a statistic that there is
    not; TypeError for what is no module.

    >>> from flax import nnx
    >>> import jax, lowbit as lb
    >>> dense = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.relu)
    >>> small = lb.quantize(dense, lb.any_precision(3, 6))
    >>> x = jax.random.normal(jax.random.key(0), (64, 16))
    >>> found = lb.tune.thresholds(lb.tune.blended(small, most=6, target=3.5), dense, [x])
    >>> [int(found.layers["layers/0"][name]) for name in ("low", "high", "most")]
    [3, 4, 6]
    """
    expect_module(model, "find the thresholds of")
    expect_module(dense, "run")
    if quantile_of not in get_args(QuantileOf):
        raise ValueError(f"quantile_of={quantile_of!r} must be one of {', '.join(get_args(QuantileOf))}")
    statistic = estimators if isinstance(estimators, str) else None
    one_width = as_estimate(statistic or "norm")
    found, held = blends(model), layer_kernels(model)
    between = {path: _between(blend) for path, blend in found.items()}
    pairs = {path: (low, high) for path, (low, high, share) in between.items() if ALWAYS <= share <= 1 - ALWAYS}
    passes = Passes(dense, call or _called, list(batches), pairs, held, statistic)
    if pairs and not passes.given:
        raise ValueError("no batches were given: there is nothing to take a quantile of")
    measured = passes.measured() if pairs else {}
    values: dict[str, jax.Array] = {}
    with bar(progress, len(found), "thresholds") as advance:
        for number, (path, blend) in enumerate(found.items()):
            low, high, share = between[path]
            made: dict[str, Any] = {"low": jnp.int32(low), "high": jnp.int32(high), "most": jnp.int32(blend.widths[-1])}
            if path in measured:
                _check(path, measured[path], 1 - share)
                x = cache(partial(passes.inputs, path))  # at most one more run of the model
                made |= _estimate(path, measured[path], passes, x, number, estimators)
                errors = measured[path].errors if quantile_of == "error" else _estimates(path, made, passes, x())
                made["threshold"] = _quantile(errors, 1 - share)
            else:
                made |= {"threshold": jnp.float32(-inf if share > 0.5 else inf), **one_width}
            values |= {f"{path}/{name}": value for name, value in made.items()}
            advance()
    return Thresholds(values, fingerprint(held, found))


def _called(model: Any, batch: Any) -> Any:
    return model(batch)


def _between(blend: Blend) -> tuple[int, int, float]:
    """The two widths, and the share of inputs that have the larger."""
    if len(blend.widths) == 1:
        return blend.widths[0], blend.widths[0], 0.0
    index, share = pair(blend.widths, blend.bits)
    return blend.widths[int(index)], blend.widths[int(index) + 1], float(share)


def _check(path: str, measured: Measured, r: float) -> None:
    """Raises ValueError for inputs of a layer that are not finite, or too few for the quantile r."""
    if not measured.is_finite.all():
        raise ValueError(f"the inputs of layer {path!r} in the dense model are NaN or inf: repair it, or the batches")
    if len(measured.errors) < (needed := ceil(1 / min(r, 1 - r))):
        raise ValueError(
            f"layer {path!r} takes the quantile {r:.3f} of {len(measured.errors)} inputs, which needs {needed} at "
            "least: give more or longer batches"
        )


def _quantile(errors: Array, r: float) -> jax.Array:
    """The quantile r. Where several are equal to it, a number that all of these are above, or none, whichever comes
    nearer to the share 1 - r: what is rounded another way when it runs then still falls on its side."""
    at, e = np.quantile(errors, r), np.asarray(errors, np.float64)
    equal = np.isclose(e, at, rtol=EQUAL, atol=0)
    if equal.sum() < 2:
        return jnp.float32(at)
    over, under = e[~equal & (e > at)].min(initial=inf), e[~equal & (e < at)].max(initial=-inf)
    between = (e[equal].max() + over) / 2, (e[equal].min() + under) / 2
    return jnp.float32(min(between, key=lambda t: abs(np.mean(e > t) - (1 - r))))


def _estimates(path: str, values: Mapping[str, jax.Array], passes: Passes, x: jax.Array) -> Array:
    """Of all rows that a layer multiplies, float32 [rows]."""
    return np.asarray(Switch({**values, "threshold": jnp.float32(0)}).estimate(x, passes.arrays[path]))


def _estimate(
    path: str,
    measured: Measured,
    passes: Passes,
    x: Callable[[], jax.Array],
    number: int,
    estimators: Estimators | Statistic | None,
) -> dict[str, jax.Array]:
    if estimators is None:
        return {}
    if isinstance(estimators, str):
        return as_estimate(estimators)
    if (line := estimators.line(measured.norms, measured.errors)) is not None:
        return line
    return estimators.projected(x(), passes.difference(path), measured.errors, number)


def switched(model: M, found: Thresholds, *, asynchronous: bool = False) -> M:
    """A copy of a model of nested weights whose layers choose their widths by what they are given.

    `model(tokens)` then gives each position its own width, and `lb.models.generate` chooses anew at each step: see
    `lb.nn.switching`. Thresholds of another target put in their place change arrays alone, and what was compiled runs
    on, as long as the estimators are of the same kinds. `lb.save` and `lb.load` keep them with the model.

    Args:
      model: quantized, blended or switched; left as it is, and its arrays are shared.
      found: of `thresholds`, or `Thresholds.load`.
      asynchronous: of an `lb.models.Decoder`, the layers that the residual stream feeds, from the second block on, are
        asked by it as it was before the last sublayer: q, k and v by what their norm makes of it without the output of
        the MLP before, gate and up without that of attention. So an estimate need not wait for the sublayer before. o
        and down and the first block have their own input. Files of the model have this too.

    Raises ValueError for thresholds of another model, for layers that it lacks or that are not nested, and for
    `asynchronous` of another model than an `lb.models.Decoder`.
    """
    out: M = nnx.clone(model)
    fed = _fed(out) if asynchronous else frozenset[str]()
    if missing := sorted(found.layers.keys() - layer_kernels(out).keys()):
        raise ValueError(f"the thresholds are of another model: this one has no quantized layer {missing[0]!r}")
    held = nested(out, list(found.layers))
    if (base := fingerprint(held, held)) != found.base:
        raise ValueError(
            f"the thresholds are of a model whose layers have the digest {found.base}, and here it is {base}: codes or "
            "tables differ; give the model that they were found for"
        )
    for path, values in found.layers.items():
        choose_by(held[path], {**values, "asynchronous": jnp.bool_(True)} if path in fed else values)
    return out


def choose_by(kernel: Kernel, values: Mapping[str, jax.Array]) -> None:
    """The kernel from now on chooses its width by these: see `lb.nn.Switch`."""
    if kernel.width is not None:
        del kernel.width
    kernel.reader = Switch(values)


def _fed(model: nnx.Module) -> frozenset[str]:
    """The layers that the model tells of an older input."""
    if not hasattr(model, "fed"):
        raise ValueError(
            f"asynchronous=True needs a model that tells its layers of older inputs, as an lb.models.Decoder does, and "
            f"not a {type(model).__name__}: leave it out"
        )
    return frozenset(model.fed)
