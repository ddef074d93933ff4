"""`lb.quantize`: the layers of a model replaced by quantized ones, rule by rule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import jax
from absl import logging
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from lowbit.nn.kernel import Kernel, error_stats
from lowbit.nn.layers import Embed, Linear
from lowbit.nn.rules import Rule, Rules, as_rules, assign
from lowbit.quantizers import quantize_array

M = TypeVar("M", bound=nnx.Module)
WEIGHT = {nnx.Linear: ("kernel", ("k", "n")), nnx.Embed: ("embedding", ("n", "k"))}
"""Layers that can be quantized: the attribute that holds the weight, and the weight's dims (k is summed in products)."""


def quantize(model: M, rules: Rules, *, donate: bool = False, progress: bool | None = None) -> M:
    """A copy of a model with the layers that rules name quantized; the rest is shared, not copied.

    Works on any NNX model whose weights sit in `nnx.Linear` and `nnx.Embed`, nested in modules, lists or dicts. A layer
    reachable by several paths is quantized once and stays shared; so an embedding tied to the head through `attend` is
    looked up and multiplied from the same stored arrays.

    Args:
      model: left as it is, unless `donate`.
      rules: a format for all layers; a dict from path patterns to formats (None: leave dense); or `Rule`s, which can
        also name the quantizer. Ordered, the first match wins.
      donate: free each dense weight of `model` as soon as it is quantized. The old model is unusable afterwards.
      progress: show a progress bar; by default when standard error is a terminal.

    Layers that no rule matches stay dense and are logged; `lb.report` lists them too.

    Raises ValueError for a rule that is never used, a weight with NaN or inf (named by its path), a layer that cannot be
    quantized, or a model with nothing to quantize; TypeError for a weight that is not floating.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> small = lb.quantize(model, {"layers/0": lb.bcq(3, group=128), "layers/2": lb.uniform(4)})
    >>> small(jnp.ones((2, 256))).shape
    (2, 8)
    """
    found = layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} holds no nnx.Linear or nnx.Embed: there is nothing to quantize")
    chosen = {p: r for p, r in assign(as_rules(rules), list(found)).items() if r.format is not None}
    reasons = {p: reason for p in chosen if (reason := refusal(found[p]))}
    if reasons:
        path, reason = next(iter(reasons.items()))
        raise ValueError(f"layer {path!r} cannot be quantized: {reason}; leave it dense with a rule {{{path!r}: None}}")
    fresh = nnx.merge(*nnx.split(model))  # new Variables over the same arrays: training one model leaves the other alone
    with _bar(progress, len(chosen)) as advance:

        def replace(path: tuple[Any, ...], node: Any) -> Any:
            rule = chosen.get("/".join(map(str, path))) if type(node) in WEIGHT else None
            if rule is None:
                return node
            new = _quantized(node, rule, "/".join(map(str, path)), donate)
            advance()
            return new

        out: M = nnx.recursive_map(replace, fresh)
    dense = [p for p in found if p not in chosen]
    logging.info("lowbit: quantized %d layers%s", len(chosen), f", left dense: {', '.join(dense)}" if dense else "")
    return out


def layers(model: nnx.Module) -> dict[str, Any]:
    """The dense layers of a model that rules can name, by path; a shared layer appears once, under its first path."""
    found = [(path, m) for path, m in nnx.iter_modules(model) if type(m) in WEIGHT]
    return {"/".join(map(str, path)): m for path, m in sorted(found, key=lambda pm: [_natural(k) for k in pm[0]])}


def _natural(key: Any) -> tuple[int, Any]:
    return (0, key) if isinstance(key, int) else (1, str(key))


def refusal(layer: Any) -> str | None:
    """Why a layer cannot be quantized, or None if it can."""
    if isinstance(layer, nnx.Linear):
        plain = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        for name in ("dot_general", "promote_dtype", "preferred_element_type"):
            if getattr(layer, name) is not getattr(plain, name):
                return f"its {name} is not the default one"
    return None


def _quantized(layer: Any, rule: Rule, path: str, donate: bool) -> Linear | Embed:
    attribute, dims = WEIGHT[type(layer)]
    weight = getattr(layer, attribute).get_value()
    assert rule.format is not None
    array = quantize_array(weight, rule.format, rule.quantizer, dims=dims, name=f"layer {path!r}")
    kernel = Kernel(array, error_stats(weight, array))
    if donate and not isinstance(weight, jax.core.Tracer):
        jax.block_until_ready(array)
        weight.delete()
    if isinstance(layer, nnx.Embed):
        return Embed(kernel, layer.dtype)
    return Linear(kernel, layer.bias, layer.dtype)


def _bar(progress: bool | None, total: int) -> Any:
    if not (sys.stderr.isatty() if progress is None else progress):
        return nullcontext(lambda: None)
    return _Bar(total)


class _Bar:
    def __init__(self, total: int) -> None:
        self.bar = Progress(console=Console(stderr=True))
        self.task = self.bar.add_task("quantizing", total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
