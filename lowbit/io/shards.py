"""The tensors of a folder of safetensors files, or of one file, by name and mapped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.header import KEY
from lowbit.io.mapped import Mapped
from lowbit.io.tensors import Array

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE, PICKLES = "pytorch_model.bin", (".bin", ".pt", ".pth")


class Shards:
    """Open files, and which of them has each tensor.

    Raises CheckpointError for a folder without safetensors files, a shard that is missing, or one that does not hold
    what the index says; OSError for a file that cannot be opened.

    Attributes:
      config: what config.json beside the files holds, {} without one.
      file_of: the path of each tensor's file, by tensor.
    """

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        self.config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        index = _index(folder) if path.is_dir() else None
        paths = _files(path) if index is None else sorted({folder / file for file in index.values()})
        if index is not None and (missing := [p.name for p in paths if not p.exists()]):
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(paths)} files that {INDEX} names are missing, the first is "
                f"{missing[0]!r}: get them too"
            )
        self._files = {p: Mapped(p) for p in paths}
        self.file_of = {name: p for p, file in self._files.items() for name in file.names}
        self._check(path, index)
        if any(KEY in (file.metadata or {}) for file in self._files.values()):
            raise CheckpointError(f"{path} was written by lowbit: read it with lb.load")

    def _check(self, path: Path, index: Mapping[str, str] | None) -> None:
        for name, count in Counter(name for file in self._files.values() for name in file.names).items():
            if count > 1:
                raise CheckpointError(f"{path}: {count} files hold a tensor {name!r}: {AGAIN}")
        for name, file in (index or {}).items():
            if (found := self.file_of.get(name)) is None or found.name != Path(file).name:
                instead = f"{found.name!r} holds it" if found else "no file holds it"
                raise CheckpointError(f"{path}: {INDEX} has {name!r} in {file!r}, and {instead}: {AGAIN}")
        if index is not None and (extra := sorted(self.file_of.keys() - index.keys())):
            where = self.file_of[extra[0]].name
            raise CheckpointError(f"{path}: {where!r} holds {extra[0]!r}, which {INDEX} does not name: {AGAIN}")

    def array(self, name: str) -> Array:
        """A view of a tensor that cannot be written to. Raises CheckpointError for a dtype that is not known."""
        path = self.file_of[name]
        try:
            array = self._files[path].array(name)
        except ValueError as err:
            raise CheckpointError(
                f"{path}: tensor {name!r} cannot be read ({err}): convert it with its own tool"
            ) from err
        array.flags.writeable = False
        return array

    def forget(self) -> None:
        """Gives back the memory of what was read."""
        for file in self._files.values():
            file.forget()


def _index(folder: Path) -> dict[str, str] | None:
    """File by tensor, as the index has it; None without an index."""
    path = folder / INDEX
    if not path.exists():
        return None
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files of its folder: {AGAIN}")
    return files


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.safetensors"))
    if (path / SINGLE) in found:
        return [path / SINGLE]
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files and no {INDEX}: get that too, or name one file"
        )
    if (path / PICKLE).exists():
        raise pickled(path / PICKLE)
    raise CheckpointError(f"{path} holds no safetensors file: convert the checkpoint to safetensors with its own tool")


def pickled(path: Path) -> CheckpointError:
    """The error for a file of torch's."""
    return CheckpointError(
        f"{path} is a pickle, which may run anything and is not read. Convert it once, with torch: "
        "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in "
        f"torch.load({path.name!r}, weights_only=True).items()}}, {SINGLE!r})"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises CheckpointError for what is none."""
    try:
        read = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} is not JSON ({err}): {AGAIN}") from err
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} holds a {type(read).__name__}, not an object: {AGAIN}")
    return read
