"""The running statistics of a calibration in a folder, with what tells the batches behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowbit.io import read, read_header, write
from lowbit.io.atomic import folder_at
from lowbit.io.tensors import sha256, to_host
from lowbit.nn.checkpoint import plain, restored, variables
from lowbit.nn.gradients import Means
from lowbit.nn.kernel import Code, Frozen, Stats
from lowbit.nn.probe import SIDE, Sink


class Running:
    """One checked file in a folder, replaced after each batch: every Variable that may have changed, and the count."""

    def __init__(
        self, folder: str | PathLike[str], model: nnx.Module, wanted: Mapping[str, frozenset[str]], chunks: int
    ) -> None:
        self.folder = folder_at(folder)
        self.file = self.folder / "calibration.safetensors"
        self.of = _identity(model, (chunks, *SIDE, sorted((path, *sorted(names)) for path, names in wanted.items())))
        self.counted, self.counted_batches = 0, ""
        self.batches = ""

    def restore(self, probed: nnx.Module, means: Means) -> None:
        """Sets Variables and means to what they were, if the folder has them."""
        if not self.file.exists():
            return
        kept = read_header(self.file)["metadata"]
        if kept.get("of") != self.of:
            raise ValueError(
                f"{self.folder} holds statistics of another model or other statistics: give another folder or delete it"
            )
        nnx.update(probed, restored(self.file, _changing(probed), read(self.file)))
        self.counted, self.counted_batches = int(kept["count"]), kept["batches"]
        means.go_on(self.counted, json.loads(kept["squares"]))

    def new(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that were not counted yet. Raises ValueError if those that were are others now."""
        given = 0
        for batch in batches:
            given += 1
            self.batches = _chained(self.batches, batch)
            if given > self.counted:
                yield batch
            elif given == self.counted and self.batches != self.counted_batches:
                raise ValueError(f"{self.folder} holds statistics of {given} other batches: {SAME}")
        if given < self.counted:
            raise ValueError(f"{self.folder} holds statistics of {self.counted} batches, {given} were given: {SAME}")

    def keep(self, probed: nnx.Module, means: Means) -> None:
        """Replaces the file. Raises OSError when it cannot be written."""
        entries = {name: plain(name, v.get_value()) for name, v in variables(_changing(probed)).items()}
        kept = {"of": self.of, "count": str(means.count), "batches": self.batches}
        write(self.file, entries, metadata=kept | {"squares": json.dumps(means.digests)})


SAME = "give the same batches again, in the same order, or another folder"


def _changing(model: nnx.Module) -> Any:
    """The state that a run may change: statistics, counts of random keys, running means of normalizations."""
    return nnx.state(model, nnx.Not(nnx.Any(nnx.Param, Code, Frozen, Stats, Sink)))


def digest_of(model: nnx.Module, batches: Iterable[Any], told: object) -> str:
    """A digest of a model, of batches in their order, and of what else was told."""
    digest = ""
    for batch in batches:
        digest = _chained(digest, batch)
    return _identity(model, (digest, told))


def _identity(model: nnx.Module, told: object) -> str:
    """A digest of all Variables of a model, and of what else is told."""
    digest = hashlib.sha256(repr(told).encode())
    for name, variable in variables(nnx.state(model)).items():
        value = to_host(name, plain(name, variable.get_value()))
        digest.update(repr((name, value.dtype.name, value.shape, sha256(value))).encode())
    return digest.hexdigest()


def _chained(before: str, batch: Any) -> str:
    """A digest of all batches so far, from that of those before this one."""
    leaves, tree = jax.tree.flatten(batch)
    values = [np.asarray(leaf) if isinstance(leaf, np.generic) else plain("a batch", leaf) for leaf in leaves]
    arrays = [to_host("a batch", value) for value in values]
    told = [(a.dtype.name, a.shape, sha256(a)) for a in arrays]
    return hashlib.sha256(repr((before, str(tree), told)).encode()).hexdigest()
