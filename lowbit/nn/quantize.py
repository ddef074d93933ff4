"""`lb.quantize`: the layers of a model replaced by quantized ones, rule by rule."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from os import PathLike
from typing import Any, TypeVar

import jax
from absl import logging
from flax import nnx

from lowbit.nn.calibrate import LayerStats
from lowbit.nn.importance import all_zero, check_measured, importance
from lowbit.nn.kernel import Kernel, expect_module, joined
from lowbit.nn.kinds import KINDS, NAMES, QUANTIZED, dense_matrices, layers, refusal, weight
from lowbit.nn.linen import Linen, opened
from lowbit.nn.progress import bar
from lowbit.nn.resume import Finished, solved
from lowbit.nn.rules import Rule, Rules, as_rules, assign, needed
from lowbit.quant_type import QuantType, check_products
from lowbit.quantizers.checks import IneligibleError, check_weight

M = TypeVar("M", bound=nnx.Module)


def quantize(
    model: M,
    rules: Rules,
    *,
    stats: Mapping[str, LayerStats] | None = None,
    donate: bool = False,
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> M:
    """A copy of a model with the layers that rules name quantized; the rest is shared, not copied.

    Works on any NNX model whose weights sit in `nnx.Linear`, `nnx.Embed`, `nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv`
    or `lb.nn.Experts`, nested in modules, lists or dicts, and on the `nn.Dense` and `nn.Embed` layers of Linen models
    that `nnx.bridge.ToNNX` wraps (see `lb.nn.Linen`). A layer reachable by several paths is quantized once and stays
    shared; so an embedding tied to the head through `attend` is looked up and multiplied from the same arrays. Layers
    that `nnx.vmap` stacked along axis 0 are quantized slice by slice, and run in `nnx.scan` as before.

    Args:
      model: left as it is, unless `donate`.
      rules: a format for all layers; a dict from path patterns to formats (None: leave dense); or `Rule`s, which can
        also name the quantizer, and numerics. Ordered, the first match wins.
      stats: what `lb.calibrate` measured. Binary-coding solvers then weigh the error of each input by its second
        moment, which is the expected error of the layer's output, or by what else they were told to (`lb.alternating`);
        `lb.additive_codebooks` takes `gram`, and round to nearest has no use for any. A logged warning names layers of
        which it has nothing, or zeros: they are not weighed. Layers that share one quantized weight are weighed by the
        statistics of the first.
      donate: free each dense weight of `model` as soon as it is quantized. The old model is unusable afterwards. A
        weight that a part left dense uses too is kept.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that each layer is written to when it is done. A run that was killed, started again with the same
        folder, takes the finished layers from it and ends with the same bits. What was made of other weights, stats,
        formats, quantizers or versions is never taken, and a damaged file is named in a warning and made again. A
        quantizer is known by its name and attributes: after changing its code, give another folder. The folder is
        yours to delete.

    A layer with a weight that its format cannot hold stays dense: a logged warning names it and says why.
    Layers that no rule matches stay dense too, and so do other modules with a matrix, such as nnx.ConvTranspose or a
    subclass of nnx.Linear, which may compute something else: a logged warning names them, and `lb.report` lists them.

    Raises ValueError for a rule that is never used, a weight with NaN or inf (named by its path; under `jax.jit` it
    cannot be seen), a layer that cannot be quantized, statistics of a layer that lack what its quantizer needs or hold
    NaN or inf, two layers of one name, or a model with nothing to quantize; TypeError for a weight that is not
    floating, and with `resume` for a quantizer that cannot be pickled, such as a lambda: another run could not know it
    again. These are found before any layer is quantized or freed; scales that do not fit their `scale_dtype` are found
    on the way, and with `donate` the layers before that one are then gone.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> small = lb.quantize(model, {"layers/0": lb.bcq(3, group=128), "layers/2": lb.uniform(4)})
    >>> small(jnp.ones((2, 256))).shape
    (2, 8)
    """
    expect_module(model, "quantize")
    return quantized(opened(model), rules, stats or {}, donate=donate, progress=progress, resume=resume)


def quantized(
    model: M,
    rules: Rules,
    stats: Mapping[str, LayerStats],
    *,
    fill: Callable[[str, Any], None] | None = None,
    donate: bool = False,
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> M:
    """`quantize`. With `fill`, of a model whose layers are abstract: `fill(path, layer)` gives each its arrays when its
    turn comes, and the weight of one that is quantized is freed before the next."""
    found, rest = layers(model), others(model)
    if not found:
        raise ValueError(f"{type(model).__name__} holds no {NAMES}: there is nothing to quantize")
    assigned = assign(as_rules(rules), list(found), _hints(model, found, rest))
    chosen = {p: r for p, r in assigned.items() if r.format is not None}
    _check(model, found, chosen, stats, filled=fill is None)
    finished = None if resume is None else Finished(resume, chosen.values())
    job = _Job(_holders(model) if donate else None, stats, finished)
    with bar(progress, len(chosen), "quantizing") as advance:

        def replace(path: tuple[Any, ...], node: Any) -> Any:
            if type(node) not in KINDS:
                return node
            if fill is not None:
                fill(joined(path), node)
                job.holders = Counter([id(weight(node).get_value())])
            if (rule := chosen.get(joined(path))) is None:
                return node
            node = job.replaced(node, rule, joined(path))
            advance()
            return node

        # The clone has new Variables over the same arrays: training one model leaves the other alone.
        out: M = nnx.recursive_map(replace, nnx.clone(model))
    skipped = [p for p in found if p not in assigned] + [f"{p} ({type(m).__name__})" for p, m in rest.items()]
    if skipped:
        logging.warning("lowbit: no rule quantizes %s: left dense", ", ".join(skipped))
    return out


def _check(
    model: nnx.Module,
    found: Mapping[str, Any],
    chosen: Mapping[str, Rule],
    stats: Mapping[str, LayerStats],
    *,
    filled: bool,
) -> None:
    """What can be wrong, before any layer is freed, or solved for minutes."""
    keys = {joined(keys): keys for keys, _ in nnx.iter_modules(model)}
    for path, rule in chosen.items():
        assert rule.format is not None
        layer = found[path]
        if reason := refusal(layer, filled=filled) or _fixed(model, keys[path]):
            raise ValueError(f"layer {path!r} cannot be quantized: {reason}")
        if filled:
            check_weight(dense_matrices(layer), f"layer {path!r}")
        view = KINDS[type(layer)].view(layer)
        try:
            dims = tuple((d, view.size(d)) for d in view.dims)
            check_products(QuantType(dims, "f32", rule.format, numerics=rule.numerics))
        except ValueError as err:
            raise ValueError(f"layer {path!r} cannot be quantized: {err}") from err
    if unknown := sorted(stats.keys() - found.keys()):
        raise ValueError(f"stats has {unknown[0]!r}, which is no layer of this {type(model).__name__}: calibrate it")
    check_measured(stats, chosen, found)
    if unmeasured := [path for path, rule in chosen.items() if stats and path not in stats and needed(rule)]:
        logging.warning("lowbit: stats has nothing of %s: all their errors weigh the same", ", ".join(unmeasured))
    if zeros := all_zero(stats, chosen):
        logging.warning("lowbit: what stats has of %s is zero: all their errors weigh the same", ", ".join(zeros))


def others(model: nnx.Module) -> dict[str, nnx.Module]:
    """Modules with a dense matrix of their own that rules cannot name, by path."""
    return {joined(path): m for path, m in nnx.iter_modules(model) if type(m) not in KINDS and matrices(m)}


def matrices(module: Any) -> list[nnx.Variable[Any]]:
    """A module's own dense weights: of a layer that rules can name that one, none of a quantized layer, whose bias may
    have two dims too, and of any other module its parameters of two or more dims."""
    if type(module) in KINDS:
        return [weight(module)]
    if isinstance(module, Kernel) or type(module) in QUANTIZED:
        return []
    own = module.loose if isinstance(module, Linen) else vars(module)
    return [v for v in own.values() if isinstance(v, nnx.Param) and getattr(v.get_value(), "ndim", 0) >= 2]


def _hints(model: nnx.Module, found: dict[str, Any], rest: dict[str, nnx.Module]) -> dict[str, str]:
    """Why a path that looks like a layer's is none that rules can name."""
    hints = {p: f"is a {type(m).__name__}; only {NAMES} themselves can be" for p, m in rest.items()}
    for path, module in rest.items():
        hints |= module.hints(path) if isinstance(module, Linen) else {}
    for group in nnx.find_duplicates(model, only=lambda _, node: type(node) in KINDS):
        paths = [joined(path) for path in group]
        first = next(p for p in paths if p in found)
        hints |= {p: f"is the shared layer {first!r}, which goes by this path" for p in paths if p != first}
    return hints


def _holders(model: nnx.Module) -> Counter[int]:
    """How many places of a model hold each array, by its id."""
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    count = Counter(id(v.get_value()) for v in variables.values())
    for group in nnx.find_duplicates(model, only=nnx.Variable):
        shared = next(variables[path] for path in group if path in variables)
        count[id(shared.get_value())] += len(group) - 1
    return count


def _fixed(model: nnx.Module, keys: tuple[Any, ...]) -> str | None:
    """Why the layer under these keys cannot be replaced: its container takes no new items."""
    holder: Any = model
    for key in keys[:-1]:
        holder = holder[key] if isinstance(holder, Mapping | Sequence) else getattr(holder, key)
    if not keys or isinstance(holder, nnx.Module | MutableSequence | MutableMapping):
        return None
    return f"it sits in a {type(holder).__name__}, which takes no new items; use nnx.List or nnx.Dict"


class _Job:
    """One run over a model: what is shared or freed, and when."""

    def __init__(
        self, holders: Counter[int] | None, stats: Mapping[str, LayerStats], finished: Finished | None
    ) -> None:
        self.holders = holders
        self.stats = stats
        self.finished = finished
        self.made: dict[Any, Kernel] = {}

    def replaced(self, layer: nnx.Module, rule: Rule, path: str) -> nnx.Module:
        """The quantized layer, or the dense one where a format cannot hold its weight."""
        try:
            return self.quantized(layer, rule, path)
        except IneligibleError as err:
            logging.warning("lowbit: %s", err)
            return layer

    def quantized(self, layer: Any, rule: Rule, path: str) -> nnx.Module:
        kind, variable = KINDS[type(layer)], weight(layer)
        view = kind.view(layer)
        # Two layers with one weight keep sharing it, if they multiply by the same matrices and get the same format.
        key = id(variable), view, rule.format, id(rule.quantizer), rule.numerics
        if key not in self.made:
            weighed = importance(self.stats, path, rule, layer)
            made = solved(path, dense_matrices(layer), rule, view.dims, weighed, self.finished)
            made.type = dataclasses.replace(made.type, numerics=rule.numerics)
            self.made[key] = made
        self._release(variable.get_value(), self.made[key])
        return kind.make(layer, self.made[key])

    def _release(self, weight: Any, kernel: Kernel) -> None:
        """Free a donated weight once the last place that holds it is quantized."""
        if self.holders is None or not isinstance(weight, jax.Array) or isinstance(weight, jax.core.Tracer):
            return
        self.holders[id(weight)] -= 1
        if not self.holders[id(weight)]:
            jax.block_until_ready((kernel.array, kernel.stats.get_value()))
            weight.delete()
