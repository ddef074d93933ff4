"""AlphaTuning (Kwon et al., EMNLP Findings 2022): a handful of scales adapts a quantized model to a task.

Quantize once with binary-coding planes, then train only the scales of the first plane, with gradients divided by the
group size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from string import digits
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lowbit.array import QuantArray, own
from lowbit.formats.planes import group_size
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Param
from lowbit.ir.walk import params
from lowbit.nn.kernel import Kernel, Scale, expect_arrays, joined, kernels
from lowbit.quant_type import QuantType, Split

M = TypeVar("M", bound=nnx.Module)
ALPHA, BETA = "alpha", "beta"


@dataclass(frozen=True)
class AlphaTuning(Generic[M]):
    """A model prepared for tuning, and what trains in it.

    Attributes:
      model: a copy whose trained scales are `lb.Scale` Variables in float32, and nothing else is.
      trainable: how many numbers train.
      scaling: the gradient transformation of the method, which divides each gradient by its layer's group size.
    """

    model: M
    trainable: int
    scaling: optax.GradientTransformation

    def optimizer(self, tx: optax.GradientTransformation) -> nnx.Optimizer[M]:
        """An optimizer over the trained scales only: its state holds nothing for any other parameter."""
        return nnx.Optimizer(self.model, optax.chain(self.scaling, tx), wrt=Scale)


def alpha_tuning(model: M, which: Literal["first", "all"] = "first", offsets: bool = False) -> AlphaTuning[M]:
    """Prepare a model whose layers hold binary-coding planes for fine-tuning through its scale factors.

    Args:
      model: left as it is. One that was tuned before, and perhaps saved and loaded since, goes on from where it is.
      which: train the scales of the first plane, the largest, as in the paper; or those of all planes.
      offsets: train the offsets (beta) too, where the format has them.

    Scales that do not train, and every other parameter, are frozen: take gradients with `wrt=lb.Scale`. Of `lb.any_bcq`
    those of the width that the model is read at train, `lb.at_width(model, 3)`, and those of other widths stay. To
    train all widths at once, give an optimizer `wrt=lb.Scale` a loss that sums over `lb.at_width(model, b)`.

    Raises ValueError for a model without binary-coding planes, with adapters on them, or read at a width that may
    change, an abstract one, or another `which`.

    >>> from flax import nnx
    >>> import lowbit as lb, optax
    >>> small = lb.quantize(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), lb.bcq(3))
    >>> tuning = lb.tune.alpha_tuning(small)
    >>> tuning.trainable  # one scale an output, row-wise
    64
    >>> optimizer = tuning.optimizer(optax.adamw(1e-3))
    """
    if which not in ("first", "all"):
        raise ValueError(f"which must be 'first' or 'all', not {which!r}")
    check_tunable(model)
    trained: set[str] = set()

    def prepare(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, Kernel):
            return node
        new, names = _prepare(node, _alphas(node.type, which, offsets))
        trained.update(joined((*path, name)) for name in names)
        return new

    tuned: M = nnx.recursive_map(prepare, nnx.clone(model))
    if not trained:
        name = type(model).__name__
        raise ValueError(f"{name} has no layer with a field {ALPHA!r} of planes p: quantize it with lb.bcq(...) first")
    count = sum(prod(v.shape) for v in jax.tree.leaves(nnx.state(tuned, Scale)))
    return AlphaTuning(tuned, count, _divide_by_group(tuned))


def every_float(model: M) -> M:
    """A copy in which all scales and codebooks that the model is read with train, in float32, and those of other widths
    are frozen. `fold` takes it back.
    """

    def prepare(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, Kernel):
            return node
        t = replace(node.type, splits=(), layout="own")
        floats = [leaf for name, leaf in params(t.decode).items() if t.role(name) in ("scale", "codebook")]
        narrow = [(leaf.name, *next(iter(leaf.dims.items()))) for leaf in floats if leaf.dtype != "f32"]
        return _prepare(node, narrow, [leaf.name for leaf in floats if leaf.dtype == "f32"])[0]

    out: M = nnx.recursive_map(prepare, nnx.clone(model))
    return out


def check_tunable(model: nnx.Module) -> None:
    """Raises ValueError for a model that is abstract, with adapters, or read at a width that may change."""
    expect_arrays(model, "tune")
    for path, kernel in kernels(model).items():
        where = path.rpartition("/")[0]
        if not (kernel.width is None and kernel.reader is None):
            raise ValueError(
                f"layer {where!r} is read at a width that may change: choose the one to tune, lb.at_width(model, 3)"
            )
        if kernel.type.adapter is not None:
            raise ValueError(
                f"layer {where!r} has the adapter {kernel.type.adapter}, which trains instead of its scales: tune the "
                "model that lb.nn.lora was given, and put the adapter on the tuned one"
            )


def fold(model: M) -> M:
    """The tuned model in its canonical form: split scales joined, in their format's scale dtype, and none frozen.

    A copy: the tuned model is left as it is, and can be tuned further.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> small = lb.quantize(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), lb.bcq(3))
    >>> tuned = lb.tune.alpha_tuning(small).model
    >>> sorted(tuned.kernel.type.fields), sorted(lb.tune.fold(tuned).kernel.type.fields)
    (['alpha_first', 'alpha_rest', 'planes'], ['alpha', 'planes'])
    """

    def join(_: tuple[Any, ...], node: Any) -> Any:
        return _fold(node) if isinstance(node, Kernel) else node

    out: M = nnx.recursive_map(join, nnx.clone(model))
    return out


def _fold(kernel: Kernel) -> Kernel:
    fields = dict(own(kernel.array).fields)
    canonical = replace(kernel.type, splits=(), layout="own")
    for field, dim, _at in kernel.type.splits:
        leaf = canonical.fields[field]
        parts = [fields.pop(n).astype(jnp.float32) for n in (f"{field}_first", f"{field}_rest") if n in fields]
        fields[field] = jnp.concatenate(parts, _axis(leaf, dim)).astype(numpy_dtype(leaf.dtype))
    return Kernel(QuantArray.of(fields, canonical), kernel.stats.get_value())


def _axis(leaf: Param, dim: str) -> int:
    """From the end: the axes of a stack come first."""
    return list(leaf.dims).index(dim) - len(leaf.dims)


def _read(t: QuantType, stem: str) -> tuple[str, Mapping[str, int]]:
    """Name and dims of the field `stem`, or of that of the width that the type is read at; no dims if there is none."""
    for name, leaf in params(t.decode).items():
        if name == stem or (t.format.widths and name.rstrip(digits) == stem):
            return name, leaf.dims
    return stem, {}


def _alphas(t: QuantType, which: str, offsets: bool) -> list[Split]:
    """What AlphaTuning trains of a weight."""
    splits = []
    (alpha, alpha_dims), (beta, beta_dims) = (_read(replace(t, splits=(), layout="own"), s) for s in (ALPHA, BETA))
    if "p" in alpha_dims:
        splits.append((alpha, "p", 1 if which == "first" else alpha_dims["p"]))
    if offsets and beta_dims:
        splits.append((beta, "n", beta_dims["n"]))
    return splits


def _prepare(kernel: Kernel, splits: list[Split], whole: Sequence[str] = ()) -> tuple[Kernel, list[str]]:
    """The kernel with what trains split off in float32, and the names of the fields that train: these and `whole`."""
    array = own(kernel.array)
    canonical = replace(array.type, splits=())
    new = replace(canonical, splits=tuple(splits))
    if new != array.type and array.type.splits:
        array = _fold(kernel).array
    fields = dict(array.fields)
    for field, dim, at in splits if new != array.type else ():
        first, rest = jnp.split(fields.pop(field), [at], _axis(canonical.fields[field], dim))
        fields[f"{field}_first"] = first.astype(jnp.float32)
        if rest.size:
            fields[f"{field}_rest"] = rest
    names = [*(f"{field}_first" for field, _, _ in splits), *whole]
    frozen = frozenset(n for n in fields if new.role(n) in ("scale", "codebook") and n not in names)
    return Kernel(QuantArray.of(fields, new), kernel.stats.get_value(), frozen), names


def _divide_by_group(model: nnx.Module) -> optax.GradientTransformation:
    """dL/dalpha over the group size, the paper's stabiliser; nearly cancelled by Adam, not by SGD."""
    groups = {path: _group(k.type) for path, k in kernels(model).items() if k.type.splits}

    def one(path: tuple[Any, ...], gradient: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        prefixes = ("/".join(names[:i]) for i in range(len(names) + 1))
        return gradient / groups[next(p for p in prefixes if p in groups)]

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


def _group(t: QuantType) -> int:
    """Inputs that share one scale."""
    options: dict[str, Any] = dict(t.format.options)
    return group_size(dict(t.dims)["k"], options.get("group"))
