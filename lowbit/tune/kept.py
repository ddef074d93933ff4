"""A training run in a folder: its log, and checkpoints from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowbit.io.atomic import folder_at, replacing
from lowbit.nn.checkpoint import plain


@dataclass(frozen=True)
class Progress:
    """Where a run is after some steps: all that the next one depends on, besides the model that it began with.

    Attributes:
      masters: what trains, in float32.
      moments: the optimizer's state.
      changing: what else of the model a step changes: counts of random keys, running means.
      best: what did best in evaluations, with `least`; None without any.
      since: evaluations since then.
    """

    step: int
    masters: Any
    moments: Any
    changing: Any
    best: Any = None
    least: float | None = None
    since: int = 0

    @property
    def arrays(self) -> Any:
        return {"trained": self.masters, "optimizer": self.moments, "changing": self.changing, "best": self.best}

    @property
    def values(self) -> dict[str, jax.Array]:
        """Every array by its place; of random keys their data."""
        flat = jax.tree_util.tree_leaves_with_path(self.arrays)
        return {jax.tree_util.keystr(path): jnp.asarray(plain("", leaf)) for path, leaf in flat}


class Kept:
    """`log.jsonl`, a record a step, and `checkpoints`, which orbax writes: each appears whole or not at all."""

    def __init__(self, folder: str | PathLike[str], of: Mapping[str, Any], start: Progress, keep: int) -> None:
        """Begins a run at `start`, or finds out where the one in the folder is.

        Args:
          folder: of this run alone.
          of: what tells the run from others.
          start: a checkpoint is made of it if there is none.
          keep: how many checkpoints; older ones are deleted.

        Raises ValueError for the folder of another run, OSError when it cannot be made.
        """
        import orbax.checkpoint as ocp  # takes half a second

        self.orbax, self.folder, self.of = ocp.args, folder_at(folder).resolve(), dict(of)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)
        self.file = self.folder / "log.jsonl"
        self.records: list[dict[str, Any]] = []
        self.at = start
        if self.manager.latest_step() is None:
            if self.file.exists():
                raise ValueError(f"{self.file} is a log without checkpoints: give another folder, or delete it")
            self.save(start)
        else:
            self.at = self._restored(start)
            found = _read(self.file) if self.at.step else []  # the first checkpoint is older than the first record
            self.records = [record for record in found if record["step"] <= self.at.step]
        with replacing(self.file) as file:
            file.writelines(map(_line, self.records))

    @property
    def latest(self) -> int:
        """The step of the latest checkpoint."""
        return int(self.manager.latest_step())

    def add(self, record: dict[str, Any]) -> None:
        """A line of the log. Raises OSError when it cannot be written."""
        self.records.append(record)
        with open(self.file, "ab") as file:
            file.write(_line(record))

    def save(self, at: Progress) -> None:
        """A checkpoint, if there is none of this step. Raises OSError when it cannot be written."""
        if self.manager.latest_step() != at.step:  # a run that was over has it
            told = {"of": self.of, "least": at.least, "since": at.since}
            items = {"state": self.orbax.StandardSave(at.values), "run": self.orbax.JsonSave(told)}
            self.manager.save(at.step, args=self.orbax.Composite(**items))

    def _restored(self, start: Progress) -> Progress:
        step = self.manager.latest_step()
        run = self.manager.restore(step, args=self.orbax.Composite(run=self.orbax.JsonRestore())).run
        for name, value in self.of.items():
            if (found := run["of"].get(name)) != value:
                raise ValueError(
                    f"{self.folder} holds another run: its {name} is {found}, and here it is {value}; give another "
                    "folder, or delete it"
                )
        args = self.orbax.Composite(state=self.orbax.StandardRestore(start.values))
        values = self.manager.restore(step, args=args).state
        arrays = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _as(leaf, values[jax.tree_util.keystr(path)]), start.arrays
        )
        return Progress(
            step, arrays["trained"], arrays["optimizer"], arrays["changing"], arrays["best"], run["least"], run["since"]
        )


def _as(leaf: Any, value: jax.Array) -> Any:
    """Random keys from their data."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
    return value


def _read(file: Path) -> list[dict[str, Any]]:
    """The records up to the first that was not written whole."""
    records = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()
