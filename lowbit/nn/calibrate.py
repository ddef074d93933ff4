"""`lb.calibrate`: what the inputs and gradients of each layer look like, measured while a model runs on sample data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowbit.nn.curvature import curved
from lowbit.nn.gradients import Means, differentiated
from lowbit.nn.kernel import expect_module, joined
from lowbit.nn.kinds import KINDS, NAMES, layers, refusal, statistic_shape
from lowbit.nn.linen import opened
from lowbit.nn.probe import TAPPED, Probe, owners, probes
from lowbit.nn.progress import bar
from lowbit.nn.rules import STATISTICS, Rules, Statistic, as_rules, assign, needed
from lowbit.nn.running import Running

DEFAULT = ("second_moment", "largest")
OF_GRADIENTS = {"gradient_square", *TAPPED}
OF_LOSS = {"hessian_trace", *OF_GRADIENTS}


@dataclass(frozen=True)
class LayerStats:
    """What one layer's product was given and what its errors cost. What was not measured is None.

    With x [rows, k] every row of inputs, of all batches, y [rows, n] = x w the product's outputs, and L the loss of one
    batch, a scalar:

    Attributes:
      second_moment: float32 [k], the mean of x squared for each input: how much an error in its weights costs.
      largest: float32 [k], the largest |x| of each input.
      rows: how many rows were seen, by each slice.
      gradient_square: float32, of the weight's shape: the mean over *batches* of (dL/dw) squared, dL/dw summed over the
        rows of a batch and all places that use the weight: the diagonal of the empirical Fisher matrix, as SqueezeLLM
        (Kim et al., ICML 2024) weighs errors if each batch is one sequence. A numpy array, on the host.
      output_gradient: float32 [n], the mean over rows of (dL/dy) squared for each output, L being the loss of the row's
        batch: GuidedQuant's weights (Kim et al., ICML 2025), averaged over rows.
      gram: float32 [k, k], the mean over rows of the products of each two inputs, x^T x: what an error costs that
        others can make up for. Its diagonal is the second moment.
      guided_gram: float32 [c, k, k], the same for each of c equal chunks of consecutive outputs, a row counting as much
        as the mean over the chunk of (1e3 dL/dy) squared: GuidedQuant's Hessians (Kim et al., ICML 2025).
      magnitude: float32 [k], the mean of |x| of each input, which `lb.awq` scales weights by.
      hessian_trace: float32 [], the trace of the matrix of second derivatives d2L/dw2 over the number of weights, the
        mean over batches, by Hutchinson's estimate with one vector of random signs a batch, as HAWQ-V2 tells layers
        apart (Dong et al., NeurIPS 2020). It falls below zero where a few batches are too few, or L is no minimum.

    Of a stack of matrices each slice has its own, with its axes before k or n; k and n run as in the quantized layer.
    The experts of a mixture are measured together.
    """

    second_moment: jax.Array | None
    largest: jax.Array | None
    rows: int
    gradient_square: np.ndarray[Any, np.dtype[np.float32]] | None = None
    output_gradient: jax.Array | None = None
    gram: jax.Array | None = None
    guided_gram: jax.Array | None = None
    magnitude: jax.Array | None = None
    hessian_trace: jax.Array | None = None


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] | None = None,
    *,
    statistics: Sequence[Statistic] | None = None,
    rules: Rules | None = None,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    chunks: int = 1,
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> dict[str, LayerStats]:
    """Run a model on sample data, once, and measure every layer that `lb.quantize` could quantize.

    Args:
      model: left as it is; its weights are shared, not copied.
      batches: what `call` takes, one at a time: only one is held.
      call: `call(model, batch)`, compiled; `model(batch)` by default. Transformations within it that take the model
        must be those of nnx, `nnx.scan` or `nnx.remat`; under `jax.vmap` or `jax.jit` no layer can be measured.
      statistics: fields of `LayerStats`, for all layers; its second moments and maxima by default.
      rules: instead of `statistics`, what `lb.quantize` will be given: each layer gets what its quantizer weighs errors
        by, and layers whose quantizer needs nothing get none.
      loss: instead of `call`, `loss(model, batch)`, a scalar; statistics of its derivatives need it.
      chunks: of the outputs that `guided_gram` tells apart; they must divide those of every layer that has it.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that holds everything measured so far after each batch. A run that was killed, started again with
        the same folder and the same batches, skips what it had counted and ends with the same bits. What `call` or
        `loss` computes cannot be told: after changing it, give another folder.

    Returns the statistics by layer path, as in rules. Layers that never ran, and embeddings that are only looked up,
    have none: they are left out.

    The device holds the model, what running one batch needs, [k] and [n] numbers a layer, for `gram` also [k, k] and
    for `guided_gram` [c, k, k], and the gradient of *one* weight at a time: its square is sent to the host as soon as
    it is made. There all squares together are as large as the model in float32: in memory without `resume`; with it in
    two files a layer, of which one layer's is held. For `hessian_trace` each batch runs once more,
    with the derivatives of gradients, which take about twice a gradient's time, and the device holds signs, gradients
    and products, each as large as the weights of these layers.

    Raises ValueError when there are no batches or no layers, for two layers of one name, for rules that need no
    statistics, for derivatives without `loss`, and for a folder of another model, other statistics or other batches;
    CheckpointError for a damaged one; TypeError for what is no module, and by JAX for `hessian_trace` of a loss with a
    `jax.custom_vjp`, which has no forward derivatives.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
    >>> stats = lb.calibrate(model, [jnp.ones((2, 8)), jnp.zeros((2, 8))])
    >>> stats["layers/0"].rows, stats["layers/0"].second_moment.tolist()[0]
    (4, 0.5)
    >>> of_loss = lb.calibrate(model, [jnp.ones((2, 8))], statistics=["gradient_square"], loss=lambda m, x: m(x).mean())
    >>> of_loss["layers/0"].gradient_square.shape
    (8, 4)
    """
    expect_module(model, "calibrate")
    if not (found := layers(model := opened(model))):
        raise ValueError(f"{type(model).__name__} holds no {NAMES}: there is nothing to calibrate")
    wanted = _wanted(found, statistics, rules)
    of_loss = _of_loss(wanted, call, loss)
    _check_chunks(chunks, found, wanted)
    probed = _probed(model, wanted, chunks)
    first, watched = owners(probes(probed)), probes(probed)
    running = None if resume is None else Running(resume, model, wanted, chunks)
    squared = [owner for path, owner in first.items() if "gradient_square" in wanted[path]]
    means = Means({path: watched[path].weight.shape for path in squared}, running.folder if running else None)
    step = _step(loss or call or (lambda m, batch: m(batch)), of_loss, means)
    if running:
        running.restore(probed, means)
    with bar(progress, len(batches) if isinstance(batches, Sized) else None, "calibrating") as advance:
        for batch in running.new(batches) if running else batches:
            step(probed, batch)
            jax.effects_barrier()
            means.finish()
            if running:
                running.keep(probed, means)
            advance()
    if not means.count:
        raise ValueError("no batches were given: nothing was measured")
    return {path: _stats(p, means, first[path]) for path, p in watched.items() if p.rows.get_value().any()}


def _wanted(
    found: Mapping[str, Any], statistics: Sequence[str] | None, rules: Rules | None
) -> dict[str, frozenset[str]]:
    """What to measure of each layer by path; layers of which nothing is wanted are left out."""
    if rules is None:
        names = DEFAULT if statistics is None else tuple(statistics)
        if not names or not set(names) <= set(STATISTICS):
            raise ValueError(f"statistics={names!r} must be some of {', '.join(STATISTICS)}")
        refused = {path: refusal(layer) for path, layer in found.items()}
        if all(refused.values()):
            path, reason = next(iter(refused.items()))
            raise ValueError(f"there is nothing to calibrate: layer {path!r} cannot be quantized: {reason}")
        return {path: frozenset(names) for path, reason in refused.items() if not reason}
    if statistics is not None:
        raise ValueError("both statistics= and rules= were given: leave one out")
    assigned = assign(as_rules(rules), list(found), {})
    needs = {path: frozenset(needed(rule)) for path, rule in assigned.items() if rule.format is not None}
    for path in needs:  # `lb.quantize` would say it after hours
        if reason := refusal(found[path]):
            raise ValueError(f"layer {path!r} cannot be quantized: {reason}")
    if not any(needs.values()):
        raise ValueError("no quantizer of these rules weighs errors by anything: there is nothing to calibrate")
    return {path: names for path, names in needs.items() if names}


def _of_loss(wanted: Mapping[str, frozenset[str]], call: Any, loss: Any) -> set[str]:
    """What is wanted of the loss's derivatives."""
    derivatives = {name for names in wanted.values() for name in names} & OF_LOSS
    if loss is not None and call is not None:
        raise ValueError("both call= and loss= were given: leave out call, the loss runs the model")
    if derivatives and loss is None:
        raise ValueError(f"{min(derivatives)!r} is of the loss's derivatives: give loss=, a function of (model, batch)")
    return derivatives


def _step(run: Callable[[Any, Any], Any], of_loss: set[str], means: Means) -> Callable[[Any, Any], None]:
    """What runs the probed model on a batch."""
    step = nnx.jit(differentiated(run, means) if of_loss & OF_GRADIENTS else run)
    curve = nnx.jit(curved(run)) if "hessian_trace" in of_loss else None

    def both(probed: nnx.Module, batch: Any) -> None:
        if curve:
            curve(probed, batch, means.count)
        step(probed, batch)

    return both


def _check_chunks(chunks: int, found: Mapping[str, Any], wanted: Mapping[str, frozenset[str]]) -> None:
    if type(chunks) is not int or chunks < 1:
        raise ValueError(f"chunks must be a positive int, parts of each layer's outputs, not {chunks!r}")
    for path in (p for p, names in wanted.items() if "guided_gram" in names):
        if (n := statistic_shape(found[path], "n")[-1]) % chunks:
            raise ValueError(f"layer {path!r} has {n} outputs, which {chunks} chunks do not divide: give other chunks")


def _probed(model: nnx.Module, wanted: Mapping[str, frozenset[str]], chunks: int = 1) -> nnx.Module:
    """A clone with a Probe in place of each wanted layer."""
    made: dict[int, Probe] = {}

    def probe(path: tuple[Any, ...], node: Any) -> Any:
        names = wanted.get(joined(path), frozenset())
        if type(node) not in KINDS or not names:
            return node
        return made.setdefault(id(node), Probe(node, names, chunks))

    return nnx.recursive_map(probe, nnx.clone(model))


def _stats(p: Probe, means: Means, owner: str) -> LayerStats:
    seen = {name: getattr(p, name).get_value() for name in p.wanted - {"gradient_square"}}
    square = means.mean(owner) if "gradient_square" in p.wanted else None
    rows = int(p.rows.get_value().max())
    return LayerStats(seen.pop("second_moment", None), seen.pop("largest", None), rows, square, **seen)
