"""The finished layers of a long `lb.quantize`, kept in a folder: a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from os import PathLike
from typing import Any

import jax
from absl import logging

from lowbit.io import CheckpointError, read, read_header, write
from lowbit.io.atomic import folder_at
from lowbit.io.tensors import sha256, to_host
from lowbit.ir.dtypes import short
from lowbit.nn.kernel import Kernel, error_stats
from lowbit.nn.rules import Rule
from lowbit.quant_type import QuantType, type_to_json
from lowbit.quantizers.quantizer import default_quantizer, quantize_array


class Folder:
    """One checked file for each layer or block, named by a digest of all that determines what it holds."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        """Raises OSError when the folder cannot be made."""
        self.folder = folder_at(folder)

    def entries(self, path: str, key: Mapping[str, Any], solve: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is stored of a layer under this key, or what `solve` makes, which is then stored.

        A file that is damaged, or not the one its name says, is named in a logged warning and made again.
        """
        made_with = [import_module("lowbit").__version__, jax.__version__, jax.default_backend()]
        packed = json.dumps({"layer": path, "made with": made_with, **key}, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(packed.encode()).hexdigest()[:32]}.safetensors"
        if file.exists():
            try:
                if read_header(file)["metadata"].get("key") != packed:
                    raise CheckpointError(f"{file} holds another layer than its name says")
                return dict(read(file))
            except CheckpointError as err:
                logging.warning("lowbit: %r is solved again: %s", path, err)
        made = solve()
        write(file, made, metadata={"key": packed})
        return made


Solve = Callable[[], dict[str, Any]]


def steps(resume: str | PathLike[str] | None, of: Callable[[], object]) -> Callable[[str, Solve], dict[str, Any]]:
    """What gives the arrays of a step by its name: solved, or with a folder from what it has under the digests `of`."""
    if resume is None:
        return lambda name, solve: solve()
    folder, key = Folder(resume), {"of": of()}
    return lambda name, solve: folder.entries(name, key, solve)


class Finished:
    """A folder with one checked file a layer, named by a digest of all that determines the layer's arrays.

    That is its path, the bits of its matrices and importance, the format with its options and version, the quantizer,
    the versions of lowbit and jax, and the platform. So whatever has changed is solved again, and runs with other
    weights or rules may share the folder. Nothing in it is ever removed; delete it when the quantized model is saved.
    """

    def __init__(self, folder: str | PathLike[str], rules: Iterable[Rule]) -> None:
        """Raises TypeError for a quantizer without an identity, OSError when the folder cannot be made."""
        for rule in rules:  # all before any layer is solved for minutes
            _identity(rule)
        self.folder = Folder(folder)

    def kernel(
        self,
        path: str,
        matrices: jax.Array,
        rule: Rule,
        dims: tuple[str, str],
        importance: jax.Array | None,
        solve: Callable[[], Kernel],
    ) -> Kernel:
        """The stored kernel of a layer, or the one that `solve` makes of its [*stack, k, n], which is then stored."""
        assert rule.format is not None
        w = to_host(path, matrices)
        key = {
            "stack": w.shape[:-2],
            "type": type_to_json(QuantType(tuple(zip(dims, w.shape[-2:], strict=True)), short(w.dtype), rule.format)),
            "weight": sha256(w),
            "importance": None if importance is None else sha256(to_host(path, importance)),
            "quantizer": _identity(rule),
        }

        def entries() -> dict[str, Any]:
            kernel = solve()
            return {"kernel": kernel.array, "stats": kernel.stats.get_value()}

        stored = self.folder.entries(path, key, entries)
        return Kernel(stored["kernel"], stored["stats"])


def solved(
    path: str,
    matrices: jax.Array,
    rule: Rule,
    dims: tuple[str, str],
    importance: jax.Array | None,
    finished: Finished | None,
) -> Kernel:
    """The weight of a layer, [*stack, k, n], in the format of a rule: solved, or taken from the finished layers.

    Raises as `lb.quantize_array` does.
    """

    def solve() -> Kernel:
        assert rule.format is not None
        name = f"layer {path!r}"
        array = quantize_array(matrices, rule.format, rule.quantizer, dims=dims, name=name, importance=importance)
        return Kernel(array, error_stats(matrices, array))

    return finished.kernel(path, matrices, rule, dims, importance, solve) if finished else solve()


def _identity(rule: Rule) -> str:
    """A digest that tells a rule's quantizer from others, in another process too. Nothing is ever unpickled."""
    assert rule.format is not None
    quantizer = rule.quantizer or default_quantizer(rule.format)
    try:
        return hashlib.sha256(pickle.dumps(quantizer)).hexdigest()
    except Exception as err:  # whatever the class of a quantizer makes of being pickled
        raise TypeError(
            f"the quantizer {quantizer!r} of rule {rule.path!r} has no name that another run could know it by ({err}): "
            "for resume=, use a function of a module or an instance of a class of one"
        ) from err
