"""Linen models in `nnx.bridge.ToNNX`: their Dense and Embed layers as NNX layers, for `lb.quantize` to replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax.numpy as jnp
from flax import errors, linen, nnx
from flax.core import meta
from flax.linen.dtypes import promote_dtype

from lowbit.array import QuantArray
from lowbit.nn.kernel import Kernel, joined
from lowbit.nn.kinds import KINDS, QUANTIZED
from lowbit.nn.layers import Embed, Linear

M = TypeVar("M", bound=nnx.Module)
WEIGHTS: Mapping[str, type[linen.Module]] = {"kernel": linen.Dense, "embedding": linen.Embed}
PRIVATE = ("to_nnx__", "_pytree__")  # attributes of a ToNNX that are no variables of its Linen module


class Linen(nnx.bridge.ToNNX):
    """A Linen module whose layers are NNX layers, at the paths of their parameters. Made by `lb.quantize`.

    It is called as `nnx.bridge.ToNNX` is: other methods, `rngs` and `mutable` too. The Linen module then runs with the
    quantized weights among its variables, so `nn.remat`, `nn.jit` and the like see them; its nn.Dense and nn.Embed
    layers compute what their namesakes in `lb.nn` do. Dense layers are run by Linen itself.

    Raises TypeError when a quantized kernel turns out to be of another module, which only a call shows, and ValueError
    for a layer with options that are not the default ones, and for variables sown under a layer. Before weights are
    freed, `nnx.eval_shape(lambda m, x: lb.quantize(m, rules)(x), model, x)` shows it.

    >>> from flax import linen as nn, nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.bridge.ToNNX(nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(8)]), rngs=nnx.Rngs(0))
    >>> small = lb.quantize(model.lazy_init(jnp.ones((1, 32))), {"layers_0": lb.bcq(3), "layers_2": lb.uniform(4)})
    >>> small(jnp.ones((2, 32))).shape
    (2, 8)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = _attributes(self)
        inner = nnx.bridge.ToNNX(self.to_nnx__module)
        inner.to_nnx__rngs = nnx.data(self.to_nnx__rngs)
        observers: dict[str, nnx.Module] = {}
        given = {name: _variables(value, name, observers) for name, value in own.items()}
        for name, value in given.items():
            setattr(inner, name, nnx.data(value))
        with linen.intercept_methods(_Route(observers)):
            out = inner(*args, **kwargs)
        for name, value in _attributes(inner).items():
            if value is not given.get(name):  # what a mutable collection changed
                setattr(self, name, nnx.data(_merged(own.get(name), value, name)))
        return out

    @property
    def loose(self) -> dict[str, nnx.Variable[Any]]:
        """The variables outside layers, by path."""
        found: dict[str, nnx.Variable[Any]] = {}
        stack = list(_attributes(self).items())
        while stack:
            path, value = stack.pop()
            if isinstance(value, dict):
                stack += [(f"{path}/{key}", v) for key, v in value.items()]
            elif isinstance(value, nnx.Variable):
                found[path] = value
        return found

    def hints(self, at: str) -> dict[str, str]:
        """Why its other matrices are no layers that rules can name, by path; `at` is its own."""
        only = "in a Linen model; only two-dimensional weights of nn.Dense and nn.Embed can be"
        matrices = [(path, v) for path, v in self.loose.items() if getattr(v.get_value(), "ndim", 0) >= 2]
        return {
            "/".join(filter(None, (at, path.rpartition("/")[0]))): f"holds {v.dtype}{list(v.shape)} {only}"
            for path, v in sorted(matrices, key=lambda pv: pv[1].ndim)
        }


def opened(model: M) -> M:
    """A copy with the layers of Linen models as NNX layers over the same arrays; the model itself if it holds none.

    Raises ValueError for a Linen model without variables.
    """
    if not any(type(m) is nnx.bridge.ToNNX for _, m in nnx.iter_modules(model)):
        return model
    return cast(M, nnx.recursive_map(_opened, nnx.clone(model)))


def _opened(path: tuple[Any, ...], node: Any) -> Any:
    if type(node) is not nnx.bridge.ToNNX:
        return node
    own, module = _attributes(node), node.to_nnx__module
    if not own:
        where = joined(path)
        raise ValueError(f"the Linen model {type(module).__name__} at {where!r} has no variables: call lazy_init first")
    if type(module) in WEIGHTS.values() and _unusual(module) is None and (layer := _layer(own)):
        layer.dtype, layer.precision = module.dtype, getattr(module, "precision", None)
        return layer
    new = Linen(module)
    new.to_nnx__rngs = nnx.data(node.to_nnx__rngs)
    for name, value in own.items():
        setattr(new, name, nnx.data(_nested(value)))
    return new


def _attributes(node: nnx.bridge.ToNNX) -> dict[str, Any]:
    return {name: value for name, value in vars(node).items() if not name.startswith(PRIVATE)}


def _nested(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return _layer(value) or {key: _nested(v) for key, v in value.items()}


def _layer(params: dict[str, Any]) -> Any:
    """The NNX layer over the parameters of one nn.Dense or nn.Embed, or None for what does not look like these."""
    shapes = {k: v.get_value().shape for k, v in params.items() if isinstance(v, nnx.Param)}
    match {k: shapes.get(k) for k in params}:
        case {"kernel": (inputs, outputs), **rest} if rest in ({}, {"bias": (outputs,)}):
            layer: Any = nnx.eval_shape(lambda: nnx.Linear(inputs, outputs, use_bias=bool(rest), rngs=nnx.Rngs(0)))
        case {"embedding": (rows, features), **rest} if not rest:
            layer = nnx.eval_shape(lambda: nnx.Embed(rows, features, rngs=nnx.Rngs(0)))
        case _:
            return None
    for name, variable in params.items():
        setattr(layer, name, variable)
    return layer


def _variables(value: Any, path: str, observers: dict[str, nnx.Module]) -> Any:
    """What ToNNX holds in place of an attribute; layers wrapped by lowbit to look at what they compute are noted."""
    if isinstance(value, dict):
        return {key: _variables(v, f"{path}/{key}", observers) for key, v in value.items()}
    if isinstance(value, nnx.Variable):
        return value
    layer = value
    if type(value) not in KINDS and type(value) not in QUANTIZED:
        observers[path], layer = value, value.layer
    held = {name: getattr(layer, name, None) for name in ("kernel", "bias", "embedding")}
    return {k: nnx.Param(v.array) if isinstance(v, Kernel) else v for k, v in held.items() if v is not None}


def _merged(old: Any, new: Any, path: str) -> Any:
    if isinstance(old, dict):
        return old | {key: _merged(old.get(key), v, f"{path}/{key}") for key, v in new.items()}
    if not isinstance(old, nnx.Module):
        return new
    if extra := new.keys() - {"kernel", "bias", "embedding"}:
        raise ValueError(f"layer {path!r} has no place for the variables {sorted(extra)} of a mutable collection")
    for name, variable in new.items():
        if not isinstance(variable.get_value(), QuantArray):
            setattr(old, name, variable)
    return old


def _unusual(module: linen.Module) -> str | None:
    """An option of a layer that makes it compute something else."""
    usual: Mapping[str, Any] = {"promote_dtype": promote_dtype, "dot_general": None, "dot_general_cls": None}
    return next((k for k, v in usual.items() if getattr(module, k, v) is not v), None)


class _Route:
    """Runs quantized layers, and layers that are looked at, in place of the methods of Linen layers."""

    def __init__(self, observers: Mapping[str, nnx.Module]) -> None:
        self.observers = observers

    def __call__(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module: linen.Module = context.module
        name = next((n for n in WEIGHTS if module.scope and isinstance(_param(module, n), QuantArray)), None)
        path = "/".join(module.path) if module.scope else ""
        if name is not None:
            _check(module, name, path)
        if type(module) not in WEIGHTS.values() or _unusual(module):
            return run(*args, **kwargs)
        if context.method_name == "setup":  # would make the dense weight
            return run(*args, **kwargs) if name is None else None
        if path in self.observers:
            return self._observed(path, module, context.method_name, args, kwargs)
        layer = run if name is None else getattr(_quantized(module, name), context.method_name)
        return layer(*args, **kwargs)

    def _observed(self, path: str, module: Any, method: str, args: Any, kwargs: Any) -> Any:
        observer: Any = self.observers[path]
        try:
            observer.layer.dtype = module.dtype
            return getattr(observer, method)(*args, **kwargs)
        except errors.TraceContextError as err:
            raise ValueError(f"layer {path!r} runs within nn.remat, nn.jit or nn.scan: it cannot be measured") from err


def _param(module: linen.Module, name: str) -> Any:
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _check(module: Any, name: str, path: str) -> None:
    leave = "leave it dense with a rule for its path with the format None"
    if type(module) is not WEIGHTS[name]:
        only = "only nn.Dense and nn.Embed themselves run quantized"
        raise TypeError(f"layer {path!r} is a {type(module).__name__}; {only}: {leave}")
    if option := _unusual(module):
        raise ValueError(f"layer {path!r} cannot run quantized: its {option} is not the default one; {leave}")


def _quantized(module: Any, name: str) -> Any:
    kernel = Kernel(_param(module, name), jnp.zeros(2))
    if name == "embedding":
        return Embed(kernel, module.dtype)
    bias = meta.unbox(_param(module, "bias"))
    return Linear(kernel, None if bias is None else nnx.Param(bias), module.dtype)
