"""Block output reconstruction: scales and codebooks for which a quantized block returns what the dense one does.

AnyBCQ (ICLR 2026) tunes the scales of each width so, AQLM (Egiazarian et al., ICML 2024) codebooks, scales and norms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from os import PathLike
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.nn.checkpoint import plain, restored, variables
from lowbit.nn.kernel import Codebook, Scale, expect_arrays, expect_module, kernels
from lowbit.nn.progress import bar
from lowbit.nn.reached import Inputs
from lowbit.nn.resume import steps
from lowbit.nn.running import digest_of
from lowbit.quant_type import type_to_json
from lowbit.tune.alpha import check_tunable, fold
from lowbit.tune.blocks import Cut, Stream, Survey
from lowbit.tune.step import expect_floats
from lowbit.tune.training import Examples, Training, returned, tuned

M = TypeVar("M", bound=nnx.Module)


def reconstruct(
    model: M,
    dense: nnx.Module,
    batches: Iterable[Any],
    blocks: str | Sequence[str],
    call: Callable[[Any, Any], Any] | None = None,
    *,
    wrt: Any = (Scale, Codebook),
    held_out: int = 1,
    epochs: int = 10,
    rate: float = 1e-4,
    patience: int = 3,
    quantized_inputs: float = 1.0,
    seed: int = 0,
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> M:
    """A copy of a quantized model whose scales and codebooks bring each block's outputs near those of the dense model.

    Block after block, in the order in which they run, Adam minimizes the mean squared difference between what the block
    returns and what it returns in the dense model, in float32, its rate falling to zero as a cosine. Codes stay as they
    are. A block's inputs are those that it has after the blocks before it were quantized and tuned.

    After each epoch scales and codebooks are rounded as they are stored, and the error is measured on batches that are
    not trained on. The best ones are kept, those that the block came with among them: there it never gets worse.

    Args:
      model: quantized by `lb.quantize`; left as it is.
      dense: the model that it was made from, with blocks at the same paths. Both without dropout, by `model.eval()`.
      batches: what `call` takes, pytrees of arrays. They are gone through once, and held.
      blocks: patterns over the paths of modules, as in rules: "layers/*". Each block must run once for a batch, outside
        of transformations such as nnx.scan, and return arrays; it may be called with anything.
      call: `call(model, batch)`; `model(batch)` by default. It is compiled in parts.
      wrt: a filter for what trains, as `nnx.Optimizer` takes it. AQLM also trains what is not quantized, such as norms:
        `wrt=nnx.Param`.
      held_out: how many batches, the last ones, measure the error; the others train, one a step.
      epochs: passes over these at most.
      rate: Adam's at the start.
      patience: stop after so many epochs without a smaller error.
      quantized_inputs: the share of numbers in a block's inputs that come from quantized blocks when it trains, each
        drawn at random; the others are the dense model's. AnyBCQ has 0.5. The error is measured on quantized ones.
      seed: of these draws and the order of batches.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that each block is written to when it is done. A run that was killed, started again with the same
        arguments, goes on after them and ends with the same bits. What `call` and the blocks compute cannot be told:
        after changing them, give another folder. The folder is yours to delete.

    Of formats that are read at several widths the scales or tables of the width that the model is read at train, and
    blocks before are read at it too: `for b in (2, 3, 4): small = lb.tune.reconstruct(lb.at_width(small, b), ...)`.

    The host holds the batches, and of one block at a time the inputs and outputs for all of them; outputs of earlier
    blocks only where something later is computed from them. The device holds both models, and one batch. Weights come
    back in their format's own layout, as before `lb.prepare`.

    Raises ValueError for blocks that are not there, lie within each other, share parameters with what is outside, do
    not run exactly once by themselves or return other shapes than in the dense model; when nothing in them trains; for
    too few batches, NaN or inf in the dense model's outputs, abstract models, adapters, and widths that may change;
    TypeError for what is no module.

    >>> from flax import nnx
    >>> import jax, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1)))
    >>> batches = [jax.random.normal(jax.random.key(i), (64, 32)) for i in range(4)]
    >>> small = lb.quantize(model, lb.bcq(2))
    >>> tuned = lb.tune.reconstruct(small, model, batches, "layers/*", rate=1e-2)
    >>> off = lambda m: float(((m(batches[3]) - model(batches[3])) ** 2).mean())
    >>> off(tuned) < 0.97 * off(small)
    True
    """
    training = Training(held_out, epochs, rate, patience, quantized_inputs, seed)
    for given, what in ((model, "reconstruct"), (dense, "reconstruct from")):
        expect_module(given, what)
        expect_arrays(given, what)
    check_tunable(model)
    out, data, run = fold(model), list(batches), call or (lambda m, batch: m(batch))
    if len(data) <= held_out:
        raise ValueError(f"{len(data)} batches were given, and {held_out} are held out: give more, to train on")
    job = _Job(Stream(Cut(out, blocks, run), data), Stream(Cut(dense, blocks, run), data), wrt, training)
    order = job.checked(blocks)
    job.step = steps(resume, lambda: job.digests(out, dense))
    with bar(progress, len(order), "reconstructing") as advance:
        for path in order:
            job.do(path)
            advance()
    return out


class _Job:
    """One run: both models on their way through all batches."""

    def __init__(self, own: Stream, dense: Stream, wrt: Any, training: Training) -> None:
        self.own, self.dense = own, dense
        self.wrt, self.training = wrt, training
        self.optimizer = training.optimizer(len(own.batches) - training.held_out)
        self.step = steps(None, object)

    def checked(self, blocks: str | Sequence[str]) -> list[str]:
        """The blocks in the order in which they run, after checking that both models run them alike."""
        own, dense = self.own.cut, self.dense.cut
        if own.blocks.keys() != dense.blocks.keys():
            raise ValueError(f"blocks={blocks!r} are {[*own.blocks]}, but in the dense model {[*dense.blocks]}")
        order = [*own.survey(self.own.batches[0]).returned]
        for batch in self.own.batches:
            _check_alike(order, own.survey(batch), dense.survey(batch))
        trained = [v for block in own.blocks.values() for v in jax.tree.leaves(nnx.state(block, self.wrt))]
        if not trained:
            raise ValueError(f"no block of {blocks!r} has anything of {self.wrt!r}: there is nothing to train")
        expect_floats(trained, self.wrt)
        return order

    def digests(self, out: nnx.Module, dense: nnx.Module) -> list[str]:
        """Of what determines all finished blocks."""
        types = {path: type_to_json(kernel.type) for path, kernel in kernels(out).items()}
        names = {path: sorted(variables(nnx.state(b, self.wrt))) for path, b in self.own.cut.blocks.items()}
        told = astuple(self.training), json.dumps(types, sort_keys=True), names
        return [digest_of(model, self.own.batches, told) for model in (out, dense)]

    def do(self, path: str) -> None:
        """Tunes one block, in place, and goes on to what comes after it."""
        own, dense = self.own.cut.blocks[path], self.dense.cut.blocks[path]
        inputs, of_dense, targets = [], [], []
        for at in range(len(self.own.batches)):
            inputs.append(self.own.inputs(path, at))
            given = self.dense.inputs(path, at)
            targets.append(returned(dense, given))
            _check_finite(targets[at], path, at)
            of_dense.append(self._mixable(path, inputs[at], given))
        self.dense.go_on(path, targets)
        state = nnx.state(own, self.wrt)
        if jax.tree.leaves(state):

            def made() -> dict[str, Any]:
                examples = Examples(inputs, of_dense, targets)
                found = tuned(own, path, self.wrt, examples, self.training, self.optimizer)
                return {name: plain(name, v.get_value()) for name, v in variables(found).items()}

            nnx.update(own, restored("a finished block", state, self.step(path, made)))
        self.own.go_on(path, [returned(own, given) for given in inputs])

    def _mixable(self, path: str, own: Inputs, dense: Inputs) -> Inputs:
        """The dense model's inputs of a block, where they are needed."""
        if self.training.quantized_inputs == 1:
            return own
        if (own.tree, own.fixed, _shapes(own)) != (dense.tree, dense.fixed, _shapes(dense)):
            raise ValueError(
                f"block {path!r} is called with other arguments in the dense model: quantized_inputs=1.0 mixes none"
            )
        return dense


def _check_finite(targets: Any, path: str, at: int) -> None:
    floats = [a for a in jax.tree.leaves(targets) if jnp.issubdtype(a.dtype, jnp.floating)]
    if bad := sum(int((~np.isfinite(a.astype(np.float32))).sum()) for a in floats):
        raise ValueError(
            f"block {path!r} of the dense model returns {bad} NaN or inf for batch {at}: give batches for which all "
            "its values are finite"
        )


def _check_alike(order: list[str], own: Survey, dense: Survey) -> None:
    for found in ([*own.returned], [*dense.returned]):
        if found != order:
            raise ValueError(
                f"blocks run in the order {order}, and also {found}: both models must run alike for all batches"
            )
    for path, value in own.returned.items():
        if _shapes(value) != _shapes(dense.returned[path]):
            raise ValueError(
                f"block {path!r} returns {_shapes(value)}, but in the dense model {_shapes(dense.returned[path])}: "
                "give the model that this one was quantized from"
            )
        if not any(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(value)):
            raise ValueError(f"block {path!r} returns no floats: there is nothing to bring near")


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
