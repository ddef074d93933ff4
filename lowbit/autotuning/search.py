"""Times every way to run a product, in a process of its own that may crash or hang."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from tempfile import TemporaryFile
from typing import Any

import jax

from lowbit.array import QuantArray
from lowbit.autotuning.cache import Cache, Entry, entry_of, key_of
from lowbit.autotuning.lookup import TUNED, Schedule, Tuned
from lowbit.devices import variant_here
from lowbit.formats.format import definition
from lowbit.ir.dtypes import short
from lowbit.passes.in_int8 import COLUMNS
from lowbit.planning import planned, watching
from lowbit.quant_type import QuantType, kernel_layout, readings, type_to_json

MEASURE = (sys.executable, "-m", "lowbit.measuring")
START = 300.0
"""Seconds for a process to import jax and find its devices."""


class AutotuneError(RuntimeError):
    """A product of which no candidate could be timed: the message has what each of them said."""


class CandidateError(RuntimeError):
    """Why a candidate has no time."""


@dataclass(frozen=True)
class Candidate:
    lowering: str
    schedule: Schedule | None = None

    def __str__(self) -> str:
        if self.schedule is None:
            return self.lowering
        return "{}(columns={}, parts={}, depth={})".format(self.lowering, *self.schedule)


def candidates(m: int, t: QuantType, dtype: Any, platform: str) -> list[Candidate]:
    """Every way to run x [m, k] @ w, the predicted best first: of a kernel also schedules near its own."""
    out = []
    for choice in planned(m, t, dtype, platform).choices:
        out.append(Candidate(choice.name))
        if choice.name in ("mma", "fp8"):
            from lowbit.kernels import int8, product  # which import Mosaic GPU, and other platforms do without

            of, at = kernel_layout(t), readings(t).index(t.decode)
            halves = None if choice.name == "fp8" else dtype
            if integers := COLUMNS.get(t.numerics):
                others = int8.nearby(of, integers * m, at)
            else:
                others = product.nearby(of, m, halves, at, variant_here())
            out += [Candidate(choice.name, (o.columns, o.parts, o.depth)) for o in others]
    return out


class Worker:
    """A process that times candidates; one that crashes or hangs is ended, and the next candidate gets a new one.

    Args:
      timeout: seconds for a candidate: to make its operands, compile, check and time it.
      command: what to start. It answers every line of JSON on its input with one on its output, and begins with one.
    """

    def __init__(self, timeout: float = 120.0, command: Sequence[str] = MEASURE) -> None:
        self.timeout, self.command = timeout, command
        self.running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: dict[str, Any]) -> float:
        """Nanoseconds. Raises CandidateError, with the reason, for a candidate that has none."""
        if self.running is not None and self.running.poll() is not None:
            self.end()  # it answered, and then it ended
        if self.running is None:
            self.start()
        running = self.running
        assert running is not None and running.stdin is not None
        try:
            running.stdin.write(json.dumps(request).encode() + b"\n")
            running.stdin.flush()
        except BrokenPipeError:
            raise CandidateError(self.ended()) from None
        answer = self.answer(self.timeout)
        if "error" in answer:
            raise CandidateError(answer["error"])
        return float(answer["nanoseconds"])

    def start(self) -> None:
        self.said = TemporaryFile()
        self.running = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, env=_environment()
        )
        self.answer(START)

    def answer(self, seconds: float) -> dict[str, Any]:
        running = self.running
        assert running is not None and running.stdout is not None
        if not select.select([running.stdout], [], [], seconds)[0]:
            self.end()
            raise CandidateError(f"it took more than {seconds:g} s")
        if not (line := running.stdout.readline()):
            raise CandidateError(self.ended())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ended(self) -> str:
        """How the process ended, and the last that it said."""
        running = self.running
        assert running is not None
        code = running.wait()
        self.said.seek(0)
        last = self.said.read().decode(errors="replace").strip().splitlines()[-1:]
        self.end()
        return ": ".join([f"its process ended with {code}", *last])

    def end(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.communicate()
            self.said.close()
            self.running = None


def _environment() -> dict[str, str]:
    """Of a process that imports what this one does, and leaves this one its device's memory."""
    found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found["JAX_ENABLE_X64"] = str(int(jax.config.read("jax_enable_x64")))
    if jax.default_backend() == "cpu":
        found["JAX_PLATFORMS"] = "cpu"
    return {**os.environ, **found}


def tune(m: int, t: QuantType, dtype: Any, worker: Worker) -> Entry:
    """The fastest way to run x [m, k] @ w. Raises AutotuneError where there is none."""
    plan = planned(m, t, dtype, platform := jax.default_backend())
    tried: dict[str, float | str] = {}
    best: tuple[float, Candidate] | None = None
    for candidate in candidates(m, t, dtype, platform):
        try:
            ns = worker.ask(_request(m, t, dtype, candidate))
        except CandidateError as err:
            tried[str(candidate)] = str(err)
            continue
        tried[str(candidate)] = ns
        if best is None or ns < best[0]:
            best = ns, candidate
    device = jax.devices()[0].device_kind
    if best is None:
        said = "\n".join(f"{name}: {why}" for name, why in tried.items())
        raise AutotuneError(f"no way to run {plan.what} on {device} could be timed:\n{said}")
    return entry_of(plan.what, device, best[1].lowering, best[1].schedule, best[0], tried)


def _request(m: int, t: QuantType, dtype: Any, candidate: Candidate) -> dict[str, Any]:
    product = {"m": m, "type": type_to_json(t), "dtype": dtype, "module": definition(t.format.name).decode.__module__}
    return {**product, "candidate": asdict(candidate), "device": jax.devices()[0].device_kind}


def autotune(fn: Callable[..., Any], *args: Any, timeout: float = 120.0, worker: Worker | None = None) -> Cache:
    """Times every way to run each quantized product of `fn(*args)` on the default device, and gives the fastest ones.

    `fn` is traced and not run; what is timed are its products alone, one after another, with random operands of the
    same types, in a process of its own. Each result is compared with the oracle, within the bound of its arithmetic. A
    candidate that raises, is wrong, crashes or hangs is recorded with the reason in `Entry.tried`, and is not taken.

    Products are timed with several copies of the weight in turn, up to 16 or 256 MiB of them, so that a large one is in
    no cache when it is read; a small one is. The process needs a share of the device: a GPU of which this process holds
    all memory (start it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.5, say), or that one process alone may use, gives
    AutotuneError, as does a TPU. A format of your own must be registered in a module that can be imported.

    Args:
      fn: a function of pytrees, as for `jax.eval_shape`, jitted or not.
      timeout: seconds for each candidate.
      worker: what times the candidates; a new process if None.

    Raises ValueError where fn has no quantized product, AutotuneError for one of which nothing could be timed.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.eye(8, 4), lb.uniform(4))
    >>> cache = lb.autotune(lb.matmul, jnp.ones((1, 8)), w)
    >>> (entry,) = cache.entries.values()
    >>> entry.product
    'x[1, k] @ f32[k=8 n=4] as uniform(bits=4)'
    >>> with lb.tuned(cache):
    ...     lb.matmul(jnp.ones((1, 8)), w).shape
    (1, 4)
    """
    found: dict[tuple[int, QuantType, Any], None] = {}

    def seen(x: jax.Array, w: QuantArray) -> None:
        rows = prod(x.shape[:-1])
        if not w.stack and rows != 0:  # slices of a stack follow it
            found[rows if isinstance(rows, int) else 1, w.type, short(x.dtype)] = None

    with watching(seen), TUNED(Tuned(Cache({}), "heuristic")):  # a new context: all is traced again
        jax.eval_shape(fn, *args)
    if not found:
        raise ValueError("fn has no quantized product: lb.matmul, or a layer that lb.quantize made, is not reached")
    device, entries = jax.devices()[0].device_kind, {}
    with worker or Worker(timeout) as run:
        for m, t, dtype in found:
            entries[key_of(m, t, dtype, device)] = tune(m, t, dtype, run)
    return Cache(entries)
