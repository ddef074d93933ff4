"""Squared gradients of a loss with respect to the weights and the outputs of probed layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback

from lowbit.io import CheckpointError
from lowbit.io.atomic import replacing
from lowbit.io.tensors import sha256
from lowbit.nn.probe import TAPPED, Sinks, probes

Array = np.ndarray[Any, np.dtype[np.float32]]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_square(w: jax.Array, sink: jax.Array, send: Callable[[Any], None]) -> jax.Array:
    """w itself. When a gradient with respect to `sink` [] is made, dL/dw squared goes to the host, and is gone."""
    return w


def _send_bwd(send: Callable[[Any], None], _: None, dw: jax.Array) -> tuple[jax.Array, jax.Array]:
    io_callback(send, None, jnp.square(dw.astype(jnp.float32)))
    return jnp.zeros_like(dw), jnp.zeros(())


send_square.defvjp(lambda w, sink, send: (w, None), _send_bwd)


class Means:
    """Running means over batches of one float32 array a layer, in host memory or in the files of a folder.

    In a folder each layer has two files in turns: the next batch's mean never overwrites the last one's, and `count`
    says which is which. So a process that is killed leaves the means of `count` batches whole. `digests` has their
    checksums.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], folder: Path | None) -> None:
        self.shapes = shapes
        self.folder = folder
        self.held: dict[str, Array] = {}
        self.count = 0
        self.digests: dict[str, str] = {}
        self.sent: set[str] = set()

    def add(self, path: str, value: Any) -> None:
        """Moves a layer's mean towards the value of the next batch."""
        mean = self.mean(path)
        new = mean + (np.asarray(value) - mean) * np.float32(1 / (self.count + 1))
        if self.folder is None:
            self.held[path] = new
        else:
            with replacing(self._file(path, self.count + 1)) as file:
                np.save(file, new)
            self.digests[path] = sha256(new)
        self.sent.add(path)

    def finish(self) -> None:
        """Counts the batch. A layer that sent nothing was not run: its gradient is zero."""
        for path in self.shapes.keys() - self.sent:
            self.add(path, np.zeros(self.shapes[path], np.float32))
        self.count += 1
        self.sent.clear()

    def go_on(self, count: int, digests: Mapping[str, str]) -> None:
        """From what a folder holds of `count` batches. Raises CheckpointError for a damaged file."""
        self.count, self.digests = count, dict(digests)
        for path in self.shapes:
            if sha256(self.mean(path)) != self.digests[path]:
                raise CheckpointError(f"{self._file(path, count)} is damaged: delete its folder and calibrate again")

    def mean(self, path: str) -> Array:
        """A layer's mean over `count` batches; from a folder, mapped. Raises CheckpointError for a damaged file."""
        if self.count == 0:
            return np.zeros(self.shapes[path], np.float32)
        if self.folder is None:
            return self.held[path]
        file = self._file(path, self.count)
        try:
            mean: Array = np.load(file, mmap_mode="r")
        except (ValueError, OSError) as err:
            raise CheckpointError(f"{file} cannot be read ({err}): delete its folder and calibrate again") from err
        if mean.shape != self.shapes[path] or mean.dtype != np.float32:
            raise CheckpointError(
                f"{file} holds {mean.dtype}{list(mean.shape)}, not float32{list(self.shapes[path])}: delete its folder "
                "and calibrate again"
            )
        return mean

    def _file(self, path: str, count: int) -> Path:
        assert self.folder is not None
        return self.folder / f"gradient_square-{sorted(self.shapes).index(path)}-{count % 2}.npy"


def checked_scalar(loss: jax.Array) -> jax.Array:
    """Raises ValueError for a loss that is no scalar."""
    if jnp.shape(loss) != ():
        raise ValueError(f"the loss has shape {jnp.shape(loss)}: give one that is a scalar, such as a mean")
    return loss


def differentiated(loss: Callable[[Any, Any], jax.Array], means: Means) -> Callable[[Any, Any], None]:
    """A step that runs `loss(model, batch)`, sends squared gradients to `means`, and moves what is `TAPPED`.

    Only sinks are differentiated, so no gradient outlives the step of the backward pass that makes it.
    """

    def step(model: nnx.Module, batch: Any) -> None:
        graph, state = nnx.split(model)
        watched = {path: p for path, p in probes(model).items() if not p.wanted.isdisjoint(TAPPED)}
        before = {path: p.rows.get_value() for path, p in watched.items()}
        sinks = {path: p.sinks.get_value() for path, p in watched.items()}

        def objective(outputs: dict[str, Sinks], weights: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            inner = nnx.merge(graph, state, copy=True)  # Variables of this trace, which may be set here
            found = probes(inner)
            dense = {path: found[path].weight.get_value() for path in weights}
            for path, tapped in outputs.items():
                found[path].sinks.set_value(tapped)
            for path, sink in weights.items():
                found[path].weight.set_value(send_square(dense[path], sink, partial(means.add, path)))
            value = checked_scalar(loss(inner, batch))
            for path in outputs:
                found[path].sinks.set_value(sinks[path])
            return value, nnx.state(inner, nnx.Not(nnx.Param))

        of_weights = {path: jnp.zeros(()) for path in means.shapes}
        (sums, _), changed = jax.grad(objective, argnums=(0, 1), has_aux=True)(sinks, of_weights)
        nnx.update(model, changed)
        for path, p in watched.items():
            for name, total in sums[path].items():
                p.move(getattr(p, name), total, p.rows.get_value() - before[path], before[path])

    return step
