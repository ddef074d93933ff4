"""Where in a model the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.models.decoder import Decoder
from lowbit.nn.around import Around
from lowbit.nn.kernel import joined, kernels


class _NotFiniteError(Exception):
    pass


class _Watched(Around):
    """A layer that raises where what it returns is not finite."""

    def __init__(self, layer: Any, path: str) -> None:
        super().__init__(layer)
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(self.layer(*args, **kwargs))

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(self.layer.attend(*args, **kwargs))

    def _checked(self, out: Any) -> Any:
        floats = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
        if not all(bool(jnp.isfinite(a).all()) for a in floats):
            raise _NotFiniteError(self.path)
        return out


def first_not_finite(model: Decoder, tokens: Sequence[int]) -> str | None:
    """The path of the first layer, in the order of the computation, that returns NaN or inf for these tokens; None if
    none does without a cache."""

    def watch(path: tuple[Any, ...], node: Any) -> Any:
        watched = path and isinstance(node, nnx.Module) and callable(node) and joined(path) not in readers
        return _Watched(node, joined(path)) if watched else node

    readers = {f"{path}/reader" for path in kernels(model)}  # which make the products of a layer that is watched
    try:
        nnx.recursive_map(watch, nnx.clone(model))(jnp.asarray([tokens], jnp.int32))
    except _NotFiniteError as found:
        return str(found)
    return None


def not_finite(model: Decoder, tokens: Sequence[int], what: str) -> FloatingPointError:
    """The error for logits with NaN or inf after these tokens of `what`, which names the layer they come from."""
    after = f"the logits of {what} are not finite after its {len(tokens)} tokens"
    if path := first_not_finite(model, tokens):
        return FloatingPointError(
            f"{after}: the first NaN or inf is what layer {path!r} returns. Look at its weights, or at the type it "
            "computes in"
        )
    return FloatingPointError(f"{after}: without a cache those of all layers are, so look at what the cache stores")
