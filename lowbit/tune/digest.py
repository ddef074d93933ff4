"""What tells arrays from others: a digest of their names and bits."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import jax

from lowbit.io.tensors import sha256, to_host
from lowbit.nn.checkpoint import plain

_KNOWN: dict[int, str] = {}
"""Of jax arrays that are alive, by id. They never change, and those of a large model take seconds."""


def digest(named: Mapping[str, Any], told: str = "") -> str:
    """32 hex digits, of arrays by name and of what else is told."""
    whole = hashlib.sha256(told.encode())
    for name in sorted(named):
        value = named[name]
        whole.update(repr((name, str(value.dtype), tuple(value.shape), _bits(name, value))).encode())
    return whole.hexdigest()[:32]


def of_tree(tree: Any) -> str:
    """The digest of a pytree's arrays."""
    flat = jax.tree_util.tree_leaves_with_path(jax.tree.map(jax.numpy.asarray, tree))
    return digest({jax.tree_util.keystr(path): leaf for path, leaf in flat})


def _bits(name: str, value: Any) -> str:
    if id(value) in _KNOWN:
        return _KNOWN[id(value)]
    found = sha256(to_host(name, plain(name, value)))
    if isinstance(value, jax.Array):
        _KNOWN[id(value)] = found
        weakref.finalize(value, _KNOWN.pop, id(value), None)
    return found
