"""Named dims: a shape is an ordered mapping from names to sizes, and the names carry the meaning."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

Shape = tuple[tuple[str, int], ...]
"""(dim, size) pairs in the order in which an array is stored."""
Dims = Mapping[str, int]
"""Sizes by dim."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class DimError(TypeError):
    """An ill-formed term: the message names the dim, both sizes and the operands."""


class RangeError(DimError):
    """Integers that outgrow their type."""


def check_name(kind: str, name: str) -> None:
    """Names must survive the text form, so they are identifiers."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise DimError(f"{kind} {name!r} is not a name: use letters, digits and underscores, no digit first")


def check_shape(what: str, shape: Shape) -> None:
    """A shape has distinct names and plain positive integer sizes."""
    seen: dict[str, int] = {}
    for name, size in shape:
        check_name("dim", name)
        if type(size) is not int or size < 1:
            raise DimError(f"{what}: dim {name!r} has size {size!r}; sizes are positive ints")
        if name in seen:
            raise DimError(f"{what}: dim {name!r} occurs twice, with the sizes {seen[name]} and {size}")
        seen[name] = size


def check_ints(what: str, *values: int) -> None:
    """Counts and positions are plain ints: 2.0, True and numpy's would be the same node as 2 and 1."""
    for value in values:
        if type(value) is not int:
            raise DimError(f"{what}: {value!r} is not a plain int")


def show(dims: Dims) -> str:
    return "[" + " ".join(f"{k}={n}" for k, n in dims.items()) + "]"


def union(what: str, *operands: Dims) -> dict[str, int]:
    """All dims of the operands in order of appearance; a dim with two sizes is an error."""
    out: dict[str, int] = {}
    owner: dict[str, int] = {}
    for at, dims in enumerate(operands):
        for name, size in dims.items():
            if out.setdefault(name, size) != size:
                first = show(operands[owner[name]])
                raise DimError(f"{what}: dim {name!r} is {out[name]} in operand {first} and {size} in {show(dims)}")
            owner.setdefault(name, at)
    return out


def drop(dims: Dims, gone: Collection[str]) -> dict[str, int]:
    return {k: n for k, n in dims.items() if k not in gone}


def fresh(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of name_1, name_2, ... that is not taken. Deterministic, so texts are stable."""
    if name not in taken:
        return name
    stem = re.sub(r"_\d+\Z", "", name)
    at = 1
    while f"{stem}_{at}" in taken:
        at += 1
    return f"{stem}_{at}"


def fresh_all(names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """A renaming of those `names` that are taken, to names that clash neither with `taken` nor with each other."""
    busy, out = {*taken, *names}, {}
    for name in names:
        if name in taken:
            out[name] = fresh(name, busy)
            busy.add(out[name])
    return out
