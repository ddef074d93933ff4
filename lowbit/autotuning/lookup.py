"""Which lowering a product takes: the one asked for, the fastest one measured, or the cheapest by the cost model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from absl import flags, logging

from lowbit.autotuning.cache import Cache, CacheError, Entry, key_of, load
from lowbit.kernels.choice import KernelChoice
from lowbit.passes.choose import Form
from lowbit.planning import FORCED, planned
from lowbit.quant_type import QuantType

OnMiss = Literal["heuristic", "autotune", "error"]
Schedule = tuple[int, int, int]
FLAG, ENVIRONMENT = "lowbit_on_cache_miss", "LOWBIT_ON_CACHE_MISS"
SHIPPED = Path(__file__).parents[1] / "data"
"""Files of times that were measured on devices known to many."""


class CacheMissError(LookupError):
    """A product that no cache has, where `--lowbit_on_cache_miss=error`."""


@dataclass(frozen=True)
class Tuned:
    cache: Cache
    on_miss: OnMiss | None


TUNED = jax.make_user_context(None)
"""What `tuned` asks for: part of every jit cache key."""


@contextmanager
def tuned(cache: Cache | str | os.PathLike[str], on_miss: OnMiss | None = None) -> Iterator[Cache]:
    """Within it products run as this cache, or file, has them. What it lacks is looked up as ever.

    Functions compiled before are compiled again. Of two such blocks, the inner one alone counts.

    Args:
      on_miss: what to do for a product that no cache has: "heuristic", the cheapest by the cost model; "autotune",
        measure it now and keep the result in the user's file; "error". If None what the flag
        `--lowbit_on_cache_miss` says, or else the environment's LOWBIT_ON_CACHE_MISS, or else "heuristic".

    Raises CacheError for a file that cannot be understood, OSError for one that cannot be read, ValueError for another
    `on_miss`; and within it CacheMissError as asked for.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.uniform(4))
    >>> with lb.tuned(lb.autotuning.Cache({}), on_miss="heuristic"):
    ...     lb.matmul(jnp.ones((1, 8)), w).shape
    (1, 4)
    """
    asked = None if on_miss is None else _checked(on_miss, "on_miss")
    held = cache if isinstance(cache, Cache) else load(cache)
    with TUNED(Tuned(held, asked)):
        yield held


def _checked(value: str, who: str) -> OnMiss:
    for known in get_args(OnMiss):
        if value == known:
            return known
    raise ValueError(f"{who} is {value!r}: use one of {', '.join(get_args(OnMiss))}")


def on_miss() -> OnMiss:
    """What to do for a product that no cache has, read each time that one is compiled."""
    held: Tuned | None = TUNED.value
    if held is not None and held.on_miss is not None:
        return held.on_miss
    parsed = flags.FLAGS.is_parsed() and flags.FLAGS[FLAG].value
    if parsed:
        return _checked(parsed, f"--{FLAG}")
    return _checked(os.environ.get(ENVIRONMENT) or "heuristic", ENVIRONMENT)


def chosen(
    m: int, t: QuantType, dtype: Any, platform: str, plain: bool = False
) -> tuple[Form | KernelChoice, Schedule | None]:
    """How x [m, k] @ w runs where the default device is of that platform, and the schedule of a kernel that was
    measured. What is `plain` (see `planned`) is never measured.

    Raises LoweringError for a lowering that it lacks, CacheMissError as asked for.
    """
    plan = planned(m, t, dtype, platform, plain)
    if FORCED.value is not None or plain:
        return plan.choice(FORCED.value), None
    entry, todo = measured(m, t, dtype), on_miss()
    if entry is None and todo == "error":
        raise CacheMissError(
            f"{plan.what} on {jax.devices()[0].device_kind} has no measured time, and {FLAG} is 'error': run"
            f" lb.autotune on the function and save what it gives to {str(user_file())!r}, or run it within lb.tuned"
        )
    if entry is None and todo == "autotune":
        entry = _measured(m, t, dtype)
    return (plan.choices[0], None) if entry is None else (plan.choice(entry.lowering), entry.schedule)


def measured(m: int, t: QuantType, dtype: Any) -> Entry | None:
    """What is known of x [m, k] @ w on the default device, in the cache of `tuned`, the user's or the shipped one."""
    held: Tuned | None = TUNED.value
    caches = [c for c in (held.cache if held else Cache({}), user_cache(), shipped()) if c.entries]
    if not caches:
        return None
    key = key_of(m, t, dtype, jax.devices()[0].device_kind)
    return next((c.entries[key] for c in caches if key in c.entries), None)


def _measured(m: int, t: QuantType, dtype: Any) -> Entry:
    from lowbit.autotuning.search import Worker, tune  # which looks nothing up

    with Worker() as worker:
        entry = tune(m, t, dtype, worker)
    keep(Cache({key_of(m, t, dtype, entry.device): entry}))
    return entry


def user_file() -> Path:
    """$LOWBIT_CACHE, or lowbit/tuned.json in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOWBIT_CACHE") or Path(base) / "lowbit" / "tuned.json")


_NEW: dict[str, Entry] = {}
"""Measured by this process where a product was compiled."""


def user_cache() -> Cache:
    """The user's file, read once a process, and what this process measured for it."""
    return _read(user_file()) | Cache(_NEW) if _NEW else _read(user_file())


@lru_cache(maxsize=8)
def _read(path: Path) -> Cache:
    if not path.exists():
        return Cache({})
    try:
        return load(path)
    except CacheError as err:
        logging.warning("%s; until then products run as if nothing had been measured", err)
        return Cache({})


def keep(cache: Cache) -> None:
    """Adds to the user's file what was measured; one that cannot be understood stays as it is."""
    _NEW.update(cache.entries)
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        before = load(path) if path.exists() else Cache({})
    except CacheError:
        return  # `_read` has warned of it
    (before | cache).save(path)


@lru_cache(maxsize=1)
def shipped() -> Cache:
    """What comes with lowbit."""
    out = Cache({})
    for path in sorted(SHIPPED.glob("*.json")):
        out |= load(path)
    return out
