"""AWQ: weights scaled by how large their inputs are, then clipped, before any quantizer (Lin et al., MLSys 2024).

With a the mean |x| of each input of the layers that a fold goes into, and Q rounding to nearest, the scales are

    s = max(a^r, 1e-4) / sqrt(max(s) min(s)),   r of 0, 1/20, ..., 19/20 with the least  E |x (Q(w s) / s - w)|^2

summed over the layers. Then each group of a row is clipped at the c of 1, 0.95, ..., 0.55 times its largest |w| with
the least E |x_g (Q(clip(w_g, -c, c)) - w_g)|^2. Both errors are exact means over all rows that calibration saw, by
the products of each two inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.formats import Format
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.clipping import grouped, nearest, rounded, rows_of, set_rows, ungrouped, uniform_layers
from lowbit.nn.fold import Fold, Placed, check_folds, placed
from lowbit.nn.importance import check_statistic, weighed
from lowbit.nn.linen import opened
from lowbit.nn.progress import bar
from lowbit.nn.resume import Solve, steps
from lowbit.nn.rules import Rule, Rules
from lowbit.nn.running import digest_of

M = TypeVar("M", bound=nnx.Module)
RATIOS = tuple(i / 20 for i in range(20))
CLIPS = tuple(1 - i / 20 for i in range(10))


def awq(
    model: M,
    rules: Rules,
    stats: Mapping[str, LayerStats],
    *,
    folds: Sequence[Fold] = (),
    batch: Any = None,
    call: Callable[[Any, Any], Any] | None = None,
    clip: Sequence[str] = ("**",),
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> M:
    """A copy of a model whose weights lose less by rounding to the formats of `rules`; without clipping the same model.

    Input channels that matter are scaled up, and what makes them is scaled down: so that their weights are rounded more
    finely. Then the range of each group of weights is clipped. The result is dense, for `lb.quantize` with the same
    rules and any quantizer.

    Args:
      model: left as it is; what is not changed is shared.
      rules: as for `lb.quantize`; formats must be uniform. Layers that they leave dense are no part of any error.
      stats: what `lb.calibrate(model, batches, statistics=["magnitude", "gram"])` measured.
      folds: which channels can be scaled; none by default. They are taken in this order.
      batch: what the folds are tried on: the model must compute the same with some channels halved.
      call: `call(model, batch)`; `model(batch)` by default.
      clip: paths of the layers to clip, patterns as in rules. The paper leaves out queries and keys.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that the scales of each fold and the clipped rows of each layer are written to. A run that was
        killed, started again with the same folder, goes on after them and ends with the same bits.

    The inputs of folded layers are others now: calibrate the result again for quantizers that take statistics.
    The paper measures the output of the attention or MLP block that the layers are in; here it is their own, summed.

    Raises TypeError for `folds` that are no list of them; ValueError for folds that change what the model computes or
    do not fit it, for a layer that calibration never reached or saw only zeros of, for statistics that lack `magnitude`
    or `gram` or hold NaN or inf, and for formats that are not uniform.

    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.LayerNorm(64, rngs=nnx.Rngs(0)), nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> model.layers[0].scale.set_value(jnp.where(jnp.arange(64) < 4, 30.0, 1.0))
    >>> x = jax.random.normal(jax.random.key(0), (256, 64))
    >>> stats = lb.calibrate(model, [x], statistics=["magnitude", "gram"])
    >>> scaled = lb.awq(model, lb.uniform(3), stats, folds=[lb.Fold("layers/0", ["layers/1"])], batch=x)
    >>> plain, after = (jnp.mean((lb.quantize(m, lb.uniform(3))(x) - model(x)) ** 2) for m in (model, scaled))
    >>> bool(after < 0.5 * plain)
    True
    """
    model = opened(model)
    out: M = nnx.clone(model)
    targets = uniform_layers(out, rules, "lb.awq")
    clipped = _clipped(clip, targets)
    scaled = placed(folds, out)
    if not scaled and not clipped:
        raise ValueError("there are no folds and nothing to clip: give folds=, or leave clip= as it is")
    grams = {path: _gram(path, targets, stats, scaled) for path in _used(scaled, targets, clipped)}
    if scaled:
        if batch is None:
            raise ValueError("folds are tried before they are used: give batch=, what the model is called with")
        check_folds(out, scaled, batch, call)
    told = [str(fold) for fold in scaled], [(path, str(fmt)) for path, (_, fmt) in targets.items()]
    measured = [{path: (stats[path].magnitude, gram) for path, gram in grams.items()}]
    found = _of_one(steps(resume, lambda: digest_of(model, measured, told)))
    with bar(progress, len(scaled) + len(clipped), "AWQ") as advance:
        for at, fold in enumerate(scaled):
            s = found(f"fold {at}", partial(_scales, fold, targets, stats, grams))
            fold.apply(s)
            for path in fold.into.keys() & grams.keys():
                grams[path] /= s[:, None] * s[None]
            advance()
        for path in clipped:
            layer, fmt = targets[path]
            set_rows(layer, found(f"clipped {path}", partial(_clip, fmt, rows_of(layer), grams[path])))
            advance()
    return out


def _of_one(step: Callable[[str, Solve], dict[str, Any]]) -> Callable[[str, Callable[[], jax.Array]], jax.Array]:
    """Steps that give one array each."""
    return lambda name, solve: jnp.asarray(step(name, lambda: {"found": solve()})["found"])


def _clipped(patterns: Sequence[str], targets: Mapping[str, Any]) -> list[str]:
    """The layers to clip. Raises ValueError for a pattern that matches none."""
    if isinstance(patterns, str):
        raise TypeError(f"clip={patterns!r} is one pattern: give a sequence of them")
    for pattern in patterns:
        if not any(Rule(pattern, None).matches(path) for path in targets):
            raise ValueError(f"clip={pattern!r} matches no layer with a format: it could be {', '.join(targets)}")
    return [path for path in targets if any(Rule(p, None).matches(path) for p in patterns)]


def _used(folds: Sequence[Placed], targets: Mapping[str, Any], clipped: Sequence[str]) -> Iterator[str]:
    """The layers whose errors are measured."""
    for fold in folds:
        if not fold.into.keys() & targets.keys():
            raise ValueError(f"{fold} goes into no layer with a format: leave it out")
        yield from (path for path in fold.into if path in targets)
    yield from clipped


def _gram(path: str, targets: Mapping[str, Any], stats: Mapping[str, LayerStats], folds: Sequence[Placed]) -> jax.Array:
    """Of a layer [*stack, k, k], checked, like the mean |x| if the layer is in a fold."""
    layer = targets[path][0]
    if path not in stats:
        raise ValueError(f"stats has nothing of layer {path!r}: calibration never reached it; run it or leave it out")
    for name in ("gram", *(["magnitude"] if any(path in fold.into for fold in folds) else [])):
        if getattr(stats[path], name) is None:
            raise ValueError(f"stats lacks {name!r} of layer {path!r}: lb.calibrate(..., statistics=[{name!r}, ...])")
        check_statistic(stats, path, name, layer)
    gram = weighed(stats, path, ("gram",), layer)
    if not jnp.any(gram):
        raise ValueError(f"the inputs of layer {path!r} were all zero in calibration: nothing says what an error costs")
    return gram


def _scales(
    fold: Placed, targets: Mapping[str, Any], stats: Mapping[str, LayerStats], grams: Mapping[str, jax.Array]
) -> jax.Array:
    paths = [path for path in fold.into if path in targets]
    rows = [rows_of(targets[path][0]) for path in paths]
    formats = tuple(targets[path][1] for path in paths)
    magnitude = jnp.asarray(stats[paths[0]].magnitude)
    return _best_scales(formats, rows, [grams[path] for path in paths], magnitude)


def _scales_of(magnitude: jax.Array, ratio: Any) -> jax.Array:
    s = jnp.maximum(magnitude**ratio, 1e-4)
    return s / jnp.sqrt(s.max() * s.min())


@partial(jax.jit, static_argnums=0)
def _best_scales(
    formats: tuple[Format, ...], rows: Sequence[jax.Array], grams: Sequence[jax.Array], magnitude: jax.Array
) -> jax.Array:
    """The scales [k] with the least error of layers [n, k], one ratio after the other."""

    def error(ratio: jax.Array) -> jax.Array:
        s = _scales_of(magnitude, ratio)[None]
        total = jnp.float32(0)
        for fmt, w, gram in zip(formats, rows, grams, strict=True):
            d = rounded(w * s, fmt) / s - w
            total += (jnp.matmul(d, gram, precision="highest") * d).sum()
        return total

    ratios = jnp.asarray(RATIOS)
    return _scales_of(magnitude, ratios[jax.lax.map(error, ratios).argmin()])


@partial(jax.jit, static_argnums=0)
def _clip(fmt: Format, rows: jax.Array, grams: jax.Array) -> jax.Array:
    """Rows [s n, k] of s matrices, each group clipped where its own error is least under grams [*s, k, k]; of shared
    rows s is 1."""
    k = rows.shape[1]
    grams = grams.reshape(-1, k, k)
    stack = len(grams)

    def of_matrix(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, gram = grouped(pair[0], fmt), _diagonal_blocks(pair[1], fmt)
        largest = jnp.abs(w).max(-1, keepdims=True)

        def error(share: jax.Array) -> jax.Array:
            d = nearest(jnp.clip(w, -share * largest, share * largest), fmt) - w
            return (jnp.einsum("ngt,gtu->ngu", d, gram, precision="highest") * d).sum(-1)

        shares = jnp.asarray(CLIPS)
        bound = shares[jax.lax.map(error, shares).argmin(0)][..., None] * largest
        return ungrouped(jnp.clip(w, -bound, bound), k)

    return jax.lax.map(of_matrix, (rows.reshape(stack, -1, k), grams)).reshape(-1, k)


def _diagonal_blocks(gram: jax.Array, fmt: Format) -> jax.Array:
    """[k, k] as [g, t, t], zeros filling the last group."""
    half = grouped(gram, fmt).transpose(1, 2, 0)  # [g, t, k]
    count, t, k = half.shape
    both = grouped(half.reshape(-1, k), fmt).reshape(count, t, count, t)
    return both[jnp.arange(count), :, jnp.arange(count)]
