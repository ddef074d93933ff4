"""What `examples.quality` quantizes: the tiny language model, or the matrices of a file."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors import safe_open

import lowbit as lb
from examples.tinylm import corpus, weights
from examples.tinylm.batches import Windows

BATCHES, HELD = 256, 8
"""Windows of a batch each, so that squared gradients are those of single sequences, and windows that outputs are of."""
CHUNKS = 4
"""Of each layer's outputs, that GuidedQuant tells apart."""
FOLDS = (
    lb.Fold("layers/*/attn_norm", [f"layers/*/attn/{name}" for name in "qkv"]),
    lb.Fold("layers/*/attn/v", "layers/*/attn/o"),
    lb.Fold("layers/*/mlp_norm", ["layers/*/mlp/gate", "layers/*/mlp/up"]),
    lb.Fold("layers/*/mlp/up", "layers/*/mlp/down"),
)
"""Of the tiny language model."""


@dataclass(frozen=True)
class Subject:
    """What is quantized, and what to measure it with.

    Attributes:
      rules: of layers that stay dense.
      batches: to calibrate on.
      held: a batch that no quantizer sees.
      loss: of (model, batch), or None.
      text: that no quantizer sees, or None where the model is not of language.
      folds, blocks: of the model, for what runs before and after quantizers.
    """

    model: nnx.Module
    rules: tuple[lb.Rule, ...]
    batches: list[Any]
    held: Any
    loss: Callable[[Any, Any], jax.Array] | None = None
    text: bytes | None = None
    folds: tuple[lb.Fold, ...] = ()
    blocks: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    def calibrated(self) -> Subject:
        """With the statistics that its batches and its loss give."""
        if not self.batches:
            return self
        names = ("second_moment", "magnitude", "gram", *(("gradient_square", "guided_gram") if self.loss else ()))
        stats = lb.calibrate(self.model, self.batches, statistics=names, loss=self.loss, chunks=CHUNKS)
        dense = {path for path in stats for rule in self.rules if rule.matches(path)}
        return replace(self, stats={path: of for path, of in stats.items() if path not in dense})

    @property
    def together(self) -> list[Any]:
        """Its batches, several at a time, for what runs each one often."""
        several = [self.batches[i : i + HELD] for i in range(0, len(self.batches), HELD)]
        return [jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches) for batches in several]

    def all_in(self, fmt: lb.Format, quantizer: Any = None) -> list[lb.Rule]:
        return [*self.rules, lb.Rule("**", fmt, quantizer)]

    def quantized(self, fmt: lb.Format, quantizer: Any = None, model: nnx.Module | None = None) -> nnx.Module:
        return lb.quantize(model or self.model, self.all_in(fmt, quantizer), stats=self.stats or None)


def tinylm() -> Subject:
    model, seen = weights.load(), np.frombuffer(b"".join(corpus.train_code().values()), np.uint8)
    windows = Windows(seen, model.config.context, 0)
    batches = [jnp.asarray(windows.batch(i, 1).astype(np.int32)) for i in range(BATCHES)]
    held = jnp.asarray(windows.batch(BATCHES // HELD + 1, HELD)[:, :-1].astype(np.int32))

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    text = corpus.match_listed("code").text
    return Subject(model, (lb.Rule("embed", None),), batches, held, loss, text, FOLDS, "layers/*")


class Layers(nnx.Module):
    """Linear layers beside each other."""

    def __init__(self, matrices: dict[str, np.ndarray]) -> None:
        self.layers = nnx.Dict({name: self._linear(w) for name, w in matrices.items()})

    @staticmethod
    def _linear(w: np.ndarray) -> nnx.Linear:
        layer = nnx.eval_shape(lambda: nnx.Linear(w.shape[1], w.shape[0], use_bias=False, rngs=nnx.Rngs(0)))
        layer.kernel.set_value(jnp.asarray(w.T))
        return layer

    def __call__(self, rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.concatenate([layer(rows[name]).ravel() for name, layer in self.layers.items()])


def of_file(path: pathlib.Path, inputs: pathlib.Path | None) -> Subject:
    """The matrices of a safetensors file. Without inputs these are white noise, and no quantizer is told."""
    matrices = {n: a for n, a in _arrays(path).items() if a.ndim == 2 and a.any()}
    if not matrices:
        raise SystemExit(f"{path} has no float matrix but of zeros: name a file of linear layers, [out, in]")
    rows = _arrays(inputs) if inputs else {}
    for name, w in matrices.items():
        if inputs and (name not in rows or rows[name].shape[1:] != w.shape[1:] or len(rows[name]) < 2):
            has = f"{list(rows[name].shape)}" if name in rows else "none"
            raise SystemExit(f"{inputs}: {name!r} needs inputs [2 rows or more, {w.shape[1]}], and has {has}")
    first, second = ({n: jnp.asarray(half(a)) for n, a in rows.items()} for half in (_first, _second))
    noise = {n: jax.random.normal(jax.random.key(0), (64, w.shape[1])) for n, w in matrices.items()}
    return Subject(Layers(matrices), (), [first] if inputs else [], second if inputs else noise)


def _first(a: np.ndarray) -> np.ndarray:
    return a[: len(a) // 2]


def _second(a: np.ndarray) -> np.ndarray:
    return a[len(a) // 2 :]


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The floats of a safetensors file by their names, with "." where a name has "/", which divides a model's paths."""
    with safe_open(path, framework="flax") as file:  # numpy has no bfloat16 of its own
        found = {name: file.get_tensor(name) for name in file.keys()}
    floats = {n: a for n, a in found.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    names = {n.replace("/", "."): n for n in floats}
    if same := floats.keys() - names.values():
        raise SystemExit(f"{path}: {min(same)!r} and {names[min(same).replace('/', '.')]!r} are one name: change one")
    return {name: np.asarray(floats[n], np.float32) for name, n in names.items()}
