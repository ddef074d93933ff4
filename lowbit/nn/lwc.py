"""Learnable weight clipping: ranges found by gradients, block by block (OmniQuant, Shao et al., ICLR 2024).

Each group of a weight has two numbers, g and b. It is clipped to [sigmoid(b) min(w, 0), sigmoid(g) max(w, 0)], then
rounded to nearest. Adam moves them so that the output of a block of rounded layers, on inputs from rounded blocks,
comes close to that of the float block on float inputs, in mean square. Gradients take rounding for the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lowbit.formats import Format
from lowbit.nn.clipping import grouped, rounded, rows_of, set_rows, span, ungrouped, uniform_layers
from lowbit.nn.kernel import joined
from lowbit.nn.kinds import layers
from lowbit.nn.linen import opened
from lowbit.nn.progress import bar
from lowbit.nn.reached import Call, Inputs, in_order, inputs_of
from lowbit.nn.resume import steps
from lowbit.nn.rules import Rule, Rules
from lowbit.nn.running import digest_of

M = TypeVar("M", bound=nnx.Module)
Logits = dict[str, tuple[jax.Array, jax.Array]]
"""By the path of a layer in its block, b and g of each group, [r, g, 1]."""
START = 4.0
"""Of g and b, as published: the ranges are 0.982 of what they were."""


@dataclass(frozen=True)
class _Static:
    """What is compiled: a block, the formats of its layers by path in it, and how fast they learn."""

    graph: Any
    formats: tuple[tuple[str, Format], ...]
    rate: float

    def output(self, logits: Logits, state: Any, inputs: Inputs) -> jax.Array:
        """Of the block with its layers clipped and rounded."""
        block = nnx.merge(self.graph, state, copy=True)
        found = layers(block)
        for path, fmt in self.formats:
            set_rows(found[path], _clipped(rows_of(found[path]), fmt, logits[path]))
            set_rows(found[path], rounded(rows_of(found[path]), fmt))
        out: jax.Array = inputs.call(block)
        return out


Pair = tuple[Inputs, jax.Array]


def lwc(
    model: M,
    rules: Rules,
    batches: Iterable[Any],
    *,
    blocks: Sequence[str],
    call: Call | None = None,
    epochs: int = 20,
    rate: float = 1e-2,
    progress: bool | None = None,
    resume: str | PathLike[str] | None = None,
) -> M:
    """A copy of a model with its weights clipped, group by group, where rounding then does the least to each block.

    The result is dense, for `lb.quantize` with the same rules and any quantizer. No block is worse on the batches,
    rounded to nearest, than it would be without clipping: the best of all epochs is taken.

    Args:
      model: left as it is; what is not changed is shared.
      rules: as for `lb.quantize`; formats must be uniform. Layers outside of all blocks stay as they are.
      batches: what `call` takes. All inputs and outputs of *one* block, for all batches, are held at a time.
      blocks: paths, patterns as in rules, of the modules whose outputs are compared, such as ["layers/*"]; each returns
        one array. They learn one after the other, in the order in which they run.
      call: `call(model, batch)`, not compiled; `model(batch)` by default.
      epochs: how often each block sees all batches.
      rate: Adam's step. The default is the paper's, for thousands of steps; with fewer take a larger one.
      progress: show a progress bar; by default when standard error is a terminal.
      resume: a folder that each block's ranges are written to when they are found. A run that was killed, started again
        with the same folder, goes on after the last finished block. What `call` computes cannot be told: after changing
        it, give another folder.

    OmniQuant also learns scales and shifts of activations, which this leaves to `lb.awq`.

    Raises ValueError for blocks that hold no layer with a format, lie within each other or do not run exactly once for
    a batch, for outputs that are NaN or inf, for inputs that are all zero, for no batches, for a rate that is not above
    0, and for formats that are not uniform; TypeError for a block that does not return one array.

    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> x = jax.random.normal(jax.random.key(0), (64, 64))
    >>> clipped = lb.lwc(model, lb.uniform(2), [x], blocks=["layers/*"], epochs=40, rate=0.1)
    >>> plain, after = (jnp.mean((lb.quantize(m, lb.uniform(2))(x) - model(x)) ** 2) for m in (model, clipped))
    >>> bool(after < 0.8 * plain)
    True
    """
    model = opened(model)
    out: M = nnx.clone(model)
    targets = uniform_layers(out, rules, "lb.lwc")
    run, given = call or (lambda m, batch: m(batch)), list(batches)
    if not given:
        raise ValueError("no batches were given: there is nothing to learn from")
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs must be a positive int, not {epochs!r}")
    if not rate > 0:
        raise ValueError(f"rate must be above 0, not {rate!r}")
    held = _blocks(model, blocks, targets, run, given[0])
    job = _Job(model, nnx.clone(model), run, given, epochs, rate)
    told = epochs, rate, list(held), [(path, str(fmt)) for path, (_, fmt) in targets.items()]
    step = steps(resume, lambda: digest_of(model, given, told))
    with bar(progress, len(held), "learning to clip") as advance:
        for block, inner in held.items():
            formats = {part: targets[path][1] for part, path in inner.items()}
            found = step(block, partial(job.learned, block, formats))
            for part, path in inner.items():
                layer, fmt = targets[path]
                set_rows(layer, _clipped(rows_of(layer), fmt, (found[f"b/{part}"], found[f"g/{part}"])))
                set_rows(layers(job.copy)[path], rounded(rows_of(layer), fmt))
            advance()
    return out


@partial(jax.jit, static_argnums=1)
def _clipped(rows: jax.Array, fmt: Format, logits: tuple[jax.Array, jax.Array]) -> jax.Array:
    values = grouped(rows, fmt)
    lo, hi = span(values)
    b, g = map(jax.nn.sigmoid, logits)
    return ungrouped(jnp.clip(values, b * lo, g * hi), rows.shape[1])


def _blocks(
    model: nnx.Module, patterns: Sequence[str], targets: Mapping[str, Any], call: Call, batch: Any
) -> dict[str, dict[str, str]]:
    """The blocks in the order in which they run: of each its layers, from the path in it to that in the model."""
    if isinstance(patterns, str):
        raise TypeError(f"blocks={patterns!r} is one pattern: give a sequence of them")
    paths = [joined(path) for path, m in nnx.iter_modules(model) if not isinstance(m, nnx.List | nnx.Dict)]
    taken: dict[str, dict[str, str]] = {}
    for pattern in patterns:
        matched = [p for p in paths if p and Rule(pattern, None).matches(p)]
        inner = {p: {t[len(p) + 1 :]: t for t in targets if t == p or t.startswith(f"{p}/")} for p in matched}
        if not any(inner.values()):
            raise ValueError(f"block {pattern!r} matches no module with a layer that gets a format")
        taken |= {p: parts for p, parts in inner.items() if parts}
    if not taken:
        raise ValueError("blocks is empty: name the modules whose outputs are compared, such as ['layers/*']")
    for p in taken:
        for q in taken:
            if q.startswith(f"{p}/"):
                raise ValueError(f"block {q!r} lies within block {p!r}: name one of them")
    in_order(model, [t for parts in taken.values() for t in parts.values()], call, batch)
    ran = in_order(model, taken, call, batch)
    if often := [p for p, times in ran.items() if times > 1]:
        raise ValueError(f"block {often[0]!r} runs more than once for a batch: it has no one input; leave it out")
    return {p: taken[p] for p in ran}


@dataclass(frozen=True)
class _Job:
    """One run: `copy` is the model with its finished blocks rounded."""

    model: nnx.Module
    copy: nnx.Module
    call: Call
    batches: Sequence[Any]
    epochs: int
    rate: float

    def learned(self, path: str, formats: Mapping[str, Format]) -> dict[str, jax.Array]:
        """The numbers of one block that had the least error, "b/..." and "g/..." of each layer in it."""
        block = next(m for p, m in nnx.iter_modules(self.model) if joined(p) == path)
        graph, state = nnx.split(block)
        static = _Static(graph, tuple(formats.items()), self.rate)
        pairs = [self._pair(path, graph, state, batch) for batch in self.batches]
        _check_inputs(path, pairs)
        sizes = {part: span(grouped(rows_of(layers(block)[part]), fmt))[0].shape for part, fmt in formats.items()}
        best: Logits = {part: (jnp.full(s, jnp.inf, jnp.float32),) * 2 for part, s in sizes.items()}
        least = _mean_loss(best, static, state, pairs)
        if not np.isfinite(least):
            raise ValueError(f"the output of block {path!r} is NaN or inf: give batches for which it is finite")
        logits = jax.tree.map(lambda x: jnp.full_like(x, START), best)
        moments = _adam(self.rate).init(logits)
        for _ in range(self.epochs):
            for inputs, wanted in pairs:
                logits, moments = _step(static, logits, moments, state, inputs, wanted)
            if (loss := _mean_loss(logits, static, state, pairs)) < least:
                best, least = logits, loss
        return {f"{end}/{part}": x for part, pair in best.items() for end, x in zip("bg", pair, strict=True)}

    def _pair(self, path: str, graph: Any, state: Any, batch: Any) -> Pair:
        """What the block is given after rounded blocks, and what it makes after float ones."""
        wanted = inputs_of(self.model, path, self.call, batch).call(nnx.merge(graph, state, copy=True))
        if not isinstance(wanted, jax.Array):
            raise TypeError(f"block {path!r} returns a {type(wanted).__name__}: name blocks that return one array")
        return inputs_of(self.copy, path, self.call, batch), wanted


def _check_inputs(path: str, pairs: Sequence[Pair]) -> None:
    floats = [x for inputs, _ in pairs for x in inputs.arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    if floats and not any(jnp.any(x) for x in floats):
        raise ValueError(f"the inputs of block {path!r} are all zero: they do not tell what errors of its weights cost")


def _adam(rate: float) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=0.0)


def _loss(logits: Logits, static: _Static, state: Any, inputs: Inputs, wanted: jax.Array) -> jax.Array:
    return jnp.square(static.output(logits, state, inputs).astype(jnp.float32) - wanted.astype(jnp.float32)).mean()


_loss_of = jax.jit(_loss, static_argnums=1)


def _mean_loss(logits: Logits, static: _Static, state: Any, pairs: Sequence[Pair]) -> float:
    return float(np.mean([_loss_of(logits, static, state, inputs, wanted) for inputs, wanted in pairs]))


@partial(jax.jit, static_argnums=0)
def _step(
    static: _Static, logits: Logits, moments: Any, state: Any, inputs: Inputs, wanted: jax.Array
) -> tuple[Logits, Any]:
    gradients = jax.grad(_loss)(logits, static, state, inputs, wanted)
    updates, moments = _adam(static.rate).update(gradients, moments, logits)
    new: Logits = optax.apply_updates(logits, updates)
    return new, moments
