"""What `examples.dp_llm` compares: layers that choose their widths as they run, and mixes of widths chosen before."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lowbit as lb
from examples.dp_table import MIXES
from examples.tinylm import corpus
from lowbit.cli import texts
from lowbit.nn.allocate import harm_by
from lowbit.nn.allocation import Candidate, by_layer
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kernel import layer_kernels
from lowbit.nn.kinds import dense_matrices, layers
from lowbit.tune.budget import candidates, within
from lowbit.tune.captured import Passes
from lowbit.tune.nested import mean_over, nested
from lowbit.tune.nested import weights as size_of
from lowbit.tune.precision import NEAR
from lowbit.tune.thresholds import QuantileOf

BLOCKS = ("layers/*/attn/*", "layers/*/mlp/*")
"""The linear layers that choose."""
Tokens = np.ndarray[tuple[int, int], np.dtype[np.int32]]


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
      least, most: widths.
      budget: of the first phase, bits a weight; published.
      steps, rate, batch: of AdamW. Published are 5000, 1e-2 and one sequence of 512 tokens.
      gradients: sequences that the gradients of weights are of.
      calibration: sequences that thresholds are found on; published are 40 of 512 tokens.
      estimator_steps: of gradient descent on a projection; published are 10,000.
      held: sequences that are measured.
      length: of a sequence in tokens.
    """

    least: int = 3
    most: int = 6
    budget: float = 5.0
    steps: int = 100
    rate: float = 1e-1
    batch: int = 2
    gradients: int = 64
    calibration: int = 16
    estimator_steps: int = 100
    held: int = 64
    length: int = 256

    @property
    def widths(self) -> range:
        return range(self.least, self.most + 1)


@dataclass(frozen=True)
class Text:
    """Sequences of a text that is for calibration and training, and of one that nothing sees, each [n, length + 1]."""

    seen: Tokens
    held: Tokens
    bytes_per_token: float


def expect_plain(folder: str, dense: Any, length: int) -> None:
    """Refuses models that this cannot compare, before anything is measured."""
    if layer_kernels(dense):
        raise SystemExit(f"{folder} is quantized: give the model that it was made from")
    if dense.config.experts:
        raise SystemExit(
            f"{folder} is a mixture of {dense.config.experts} experts, whose widths nothing chooses: give another"
        )
    if length > dense.config.context:
        raise SystemExit(f"{folder} was made for {dense.config.context} positions, and --length is {length}: give less")


def text_of(folder: str, model: Any, path: pathlib.Path | None, length: int) -> Text:
    """Of a file, whose last tenth is held out; if None, of the tiny language model, for models of bytes."""
    size = 1.0
    if path is None and model.config.vocab != 256:
        raise SystemExit(f"{folder} has {model.config.vocab} tokens, which are no bytes: give a --text for it")
    if path is None:
        code, other = b"".join(corpus.train_code().values()), corpus.match_listed("code").text
        seen, held = (np.frombuffer(part, np.uint8) for part in (code, other))
    else:
        text = texts.read(str(path))
        parts = text[: -(len(text) // 10)], text[-(len(text) // 10) :]
        seen, held = (texts.encoded(folder, model, part) for part in parts)
        size = len(parts[1].encode()) / max(len(held), 1)
    order = np.random.default_rng(0)  # neighbors are alike
    return Text(order.permutation(cut(seen, length)), order.permutation(cut(held, length)), size)


def cut(ids: np.ndarray[Any, Any], length: int) -> Tokens:
    """Sequences beside each other; the last token of one is the first of the next. What is left over is dropped."""
    count = (len(ids) - 1) // length
    if count < 1:
        raise SystemExit(f"the text has {len(ids)} tokens, and a sequence takes {length + 1}: give more text")
    return ids[np.arange(count)[:, None] * length + np.arange(length + 1)].astype(np.int32)


def mean_loss(model: Any, tokens: jax.Array) -> jax.Array:
    """Nats a token."""
    return optax.softmax_cross_entropy_with_integer_labels(
        model(tokens[:, :-1]).astype(jnp.float32), tokens[:, 1:]
    ).mean()


@dataclass(frozen=True)
class Subject:
    """A model, its nested codes, and what is known of both.

    Attributes:
      dense, small: the model, and with its blocks in nested codes.
      text: see `Text`.
      settings: see `Settings`.
      stats: mean squared gradients of each layer.
      gradient: mean gradient of each layer's matrix, as in the quantized layer.
      most: widths of the first phase.
    """

    dense: Any
    small: Any
    text: Text
    settings: Settings
    stats: Mapping[str, LayerStats]
    gradient: Mapping[str, jax.Array]
    most: Mapping[str, int]
    tx: optax.GradientTransformation
    estimators: lb.tune.Estimators

    def mean(self, bits: Mapping[str, float]) -> float:
        """Bits a weight."""
        return mean_over(nested(self.small, BLOCKS), bits)

    @property
    def sizes(self) -> dict[str, int]:
        """Weights of each layer."""
        return {path: size_of(kernel) for path, kernel in nested(self.small, BLOCKS).items()}


def prepared(dense: Any, text: Text, s: Settings) -> Subject:
    """The first phase, and what it needs."""
    seen, held = max(s.gradients, s.calibration), s.held
    if len(text.seen) < seen or len(text.held) < held:
        raise SystemExit(
            f"the text has {len(text.seen)} sequences to train on and {len(text.held)} held out, and {seen} and {held} "
            "are asked for: give more text, or less to --gradients, --calibration and --held"
        )
    tokens = [jnp.asarray(window[None]) for window in text.seen[: s.gradients]]
    stats = lb.calibrate(dense, tokens, statistics=["gradient_square"], loss=mean_loss)
    codes = lb.any_precision(s.least, s.most), lb.nested_kmeans(weighs_by=("gradient_square",))  # as published
    small = lb.quantize(dense, [*(lb.Rule(path, *codes) for path in BLOCKS), lb.Rule("**", None)], stats=stats)
    most = lb.tune.max_widths(small, dense, stats, bits=s.budget)
    tx, estimators = optax.adamw(s.rate, weight_decay=1e-2), lb.tune.Estimators(steps=s.estimator_steps)
    return Subject(dense, small, text, s, stats, _gradient(dense, tokens), most, tx, estimators)


def _gradient(dense: Any, tokens: list[jax.Array]) -> dict[str, jax.Array]:
    """The mean gradient of the loss by each matrix of the blocks."""
    graph, params, *rest = nnx.split(dense, nnx.All(nnx.Param, lambda path, _: path[0] == "layers"), ...)

    @jax.jit
    def add(total: Any, tokens: jax.Array) -> Any:
        own = jax.grad(lambda params: mean_loss(nnx.merge(graph, params, *rest), tokens))(params)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, own)

    total = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    for batch in tokens:
        total = add(total, batch)
    of = layers(nnx.merge(graph, total, *rest))
    return {path: dense_matrices(layer) / len(tokens) for path, layer in of.items() if path.startswith("layers/")}


# ---------------------------------------------------------------- mixes of widths chosen before

Harm = Callable[[str, jax.Array], float]


def offered(s: Subject, harm: Harm) -> list[Candidate]:
    """The widths of each layer, none above that of the first phase, with the harm of each."""
    of, held = layers(s.dense), nested(s.small, BLOCKS)
    every = [c for path, kernel in held.items() for c in candidates(path, kernel, of[path], partial(harm, path))]
    return [c for c in every if c.bits <= s.most[c.layer] * c.weights]


def mix(found: list[Candidate], bits: float) -> dict[str, int]:
    """A width for each layer with the least harm at the nearest number of bits that there is, or less by a hundredth
    of a bit, as is published: harm by the first order may rise with a width."""
    sums, total = {0}, sum({c.layer: c.weights for c in found}.values())
    for of in by_layer(found).values():
        sums = {stored + c.bits for stored in sums for c in of}
    near = min(sums, key=lambda stored: (abs(stored - bits * total), -stored)) / total
    return within(found, near, near - 0.01)


def hawq(s: Subject) -> Harm:
    """HAWQ-V2 (Dong et al. 2020): the mean of the Hessian's diagonal, the Fisher matrix's in its place, ||error||^2."""
    return lambda path, error: harm_by(path, layers(s.dense)[path], s.stats, "trace")(error)


def llm_mq(s: Subject) -> Harm:
    """LLM-MQ (Li et al. 2023): the first order change of the loss."""
    return lambda path, error: abs(float(jnp.vdot(s.gradient[path], error)))


HARMS: Mapping[str, Callable[[Subject], Harm]] = dict(zip(MIXES, (hawq, llm_mq), strict=True))


# ---------------------------------------------------------------- layers that choose


def precise(s: Subject, target: float, *, most: int | None = None, widths: Sequence[int] | None = None) -> Any:
    """The second phase. The target is data, so that one compiled step serves all.

    Args:
      target: of the mean over all layers.
      most: of all layers, instead of the first phase's.
      widths: see `lb.tune.blended`.
    """
    start = lb.tune.blended(s.small, s.most if most is None else most, target, widths=widths, layers=BLOCKS)
    alpha = 10.0 if target <= s.settings.least + NEAR else 1.0  # as published
    pull = {"target": np.float32(target), "alpha": np.float32(alpha)}
    order = np.arange(s.settings.steps * s.settings.batch).reshape(-1, s.settings.batch) % len(s.text.seen)
    data = [pull | {"tokens": s.text.seen[i], "mask": np.ones_like(s.text.seen[i], bool)} for i in order]
    return lb.tune.train(start, data, tx=s.tx, steps=s.settings.steps, wrt=lb.Threshold, loss=_toward).model


def _toward(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    return lb.tune.Toward(batch["target"], batch["alpha"])(model, batch)


def thresholds(s: Subject, model: Any, estimators: lb.tune.Estimators | None) -> lb.tune.Thresholds:
    """The third phase, over the inputs that layers have beside blended ones.

    Published are those of the dense model. The entries of a table are means, so what layers of 3 bits give is smaller,
    and fewer inputs than the share are above a threshold of dense ones. Estimates err by more than most layers' norms
    differ, hence the quantiles of estimates.
    """
    batches = [jnp.asarray(s.text.seen[: s.settings.calibration, :-1])]
    of: QuantileOf = "error" if estimators is None else "estimate"
    return lb.tune.thresholds(model, model, batches, estimators=estimators, quantile_of=of, progress=False)


def carried(s: Subject) -> dict[str, float]:
    """Of the squared difference that the two least widths of a layer make, the part that falls on the quarter of its
    inputs for which it is largest: a quarter where all inputs are alike, and then there is nothing to choose by."""
    low = s.settings.least
    batches = [jnp.asarray(s.text.seen[: s.settings.calibration, :-1])]
    passes = Passes(s.dense, _called, batches, dict.fromkeys(s.sizes, (low, low + 1)), nested(s.small, BLOCKS))
    squares = {path: np.sort(of.errors.astype(np.float64) ** 2) for path, of in passes.measured().items()}
    return {path: float(of[-(len(of) // 4) :].sum() / of.sum()) for path, of in squares.items()}


def _called(model: Any, tokens: jax.Array) -> jax.Array:
    out: jax.Array = model(tokens)
    return out
