"""What was measured, as one JSON file that can be merged and shipped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
from absl import logging

from lowbit.io.atomic import replacing
from lowbit.ir.build import param
from lowbit.ir.text import text
from lowbit.quant_type import QuantType

FILE_VERSION = 1
AGAIN = "delete it, and run lb.autotune again"


class CacheError(ValueError):
    """A file of measured times that cannot be understood; the message names it, and both versions."""


@dataclass(frozen=True)
class Entry:
    """The fastest way that was measured to run one product.

    Attributes:
      product: what it is, for people; the key of the entry says it exactly.
      device: its kind, as jax names it.
      jax: version.
      lowbit: version.
      lowering: the name of a form or kernel.
      schedule: columns, parts and depth of a kernel (`lowbit.kernels.mma.Tuning`); None for those that it would take.
      nanoseconds: measured.
      tried: by candidate, nanoseconds or why it has none.
    """

    product: str
    device: str
    jax: str
    lowbit: str
    lowering: str
    schedule: tuple[int, int, int] | None
    nanoseconds: float
    tried: Mapping[str, float | str]

    def __str__(self) -> str:
        schedule = "" if self.schedule is None else list(self.schedule)
        return f"{self.product} on {self.device}: {self.lowering}{schedule}, {self.nanoseconds / 1e3:.1f} us"


@dataclass(frozen=True, eq=False)
class Cache:
    """Entries by key. Two caches are merged by `|`; where both have an entry, the right one's counts.

    >>> from lowbit.autotuning import Cache
    >>> len((Cache({}) | Cache({})).entries)
    0
    """

    entries: Mapping[str, Entry]

    def __or__(self, other: Cache) -> Cache:
        return Cache({**self.entries, **other.entries})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that appears whole or not at all. Raises OSError where it cannot be written."""
        entries = {key: asdict(entry) for key, entry in self.entries.items()}
        with replacing(path) as file:
            document = {"lowbit_tuned": FILE_VERSION, "entries": entries}
            file.write(json.dumps(document, indent=1, sort_keys=True).encode())

    def __str__(self) -> str:
        return "\n".join(f"{e} ({len(e.tried)} tried)" for e in self.entries.values())


def load(path: str | os.PathLike[str]) -> Cache:
    """The cache in a file. Entries of other versions of jax or lowbit stay in it unused, and one warning says so.

    Raises CacheError for a file that is cut off or has another version, OSError for one that cannot be read.
    """
    try:
        document = json.loads(Path(path).read_bytes())
    except ValueError as err:  # also of bytes that are no text
        raise CacheError(f"{str(path)!r} is no whole file of measured times ({err}): {AGAIN}") from err
    found = document.get("lowbit_tuned") if isinstance(document, dict) else None
    if found != FILE_VERSION:
        here = f"lowbit {_versions()[1]} reads version {FILE_VERSION}"
        raise CacheError(f"{str(path)!r} holds measured times of version {found}, and {here}: {AGAIN}")
    try:
        cache = Cache({str(key): _entry(data) for key, data in document["entries"].items()})
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise CacheError(f"{str(path)!r} has an entry that cannot be read ({err}): {AGAIN}") from err
    others = sorted({(e.jax, e.lowbit) for e in cache.entries.values()} - {_versions()})
    if others:
        _warn_of_versions(str(path), tuple(others))
    return cache


def _entry(data: dict[str, Any]) -> Entry:
    if data.keys() != (known := {f.name for f in fields(Entry)}):
        raise ValueError(f"it has {sorted(data)}, not {sorted(known)}")
    schedule = data["schedule"]
    if schedule is not None:
        columns, parts, depth = map(int, schedule)
        schedule = columns, parts, depth
    return Entry(**{**data, "schedule": schedule, "nanoseconds": float(data["nanoseconds"])})


@lru_cache(maxsize=64)
def _warn_of_versions(path: str, others: tuple[tuple[str, str], ...]) -> None:
    made = " and ".join(f"jax {jax_version} with lowbit {lowbit_version}" for jax_version, lowbit_version in others)
    here = "jax {} with lowbit {}".format(*_versions())
    logging.warning(
        "%s has times measured by %s, which are not used by %s: run lb.autotune again for what still runs here",
        path, made, here,
    )  # fmt: skip


def _versions() -> tuple[str, str]:
    return jax.__version__, import_module("lowbit").__version__


@lru_cache(maxsize=4096)
def key_of(m: int, t: QuantType, dtype: Any, device: str) -> str:
    """The key of x [m, k] @ w: a digest of its term, of how w is stored, of the kind of device, and of versions."""
    x = param("x", dtype, None, m=m, k=dict(t.dims)["k"])
    said = [text(t.product(x)), str(t), t.layout, device, *_versions()]
    return sha256(json.dumps(said).encode()).hexdigest()


def entry_of(
    product: str, device: str, lowering: str, schedule: tuple[int, int, int] | None, ns: float, tried: Any
) -> Entry:
    """An entry of these versions."""
    return Entry(product, device, *_versions(), lowering, schedule, ns, tried)
