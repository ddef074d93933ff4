"""What GPU benchmarks share and needs no GPU: devices' peaks, results that grow in a file, parts, and what they say."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lowbit
from lowbit.io.atomic import replacing

Row = dict[str, Any]
T = TypeVar("T")

KEPT = Path(__file__).parent / "results"
"""Where results are committed."""


@dataclass(frozen=True)
class Peaks:
    """What a data sheet says: bytes a second of memory, operations a second of dense 16-bit products."""

    memory: float
    products: float


PEAKS = {"H100": Peaks(3.35e12, 989e12), "H200": Peaks(4.8e12, 989e12)}
"""The SXM modules, by a word of the name that the driver gives them."""
ASSUMED = "NVIDIA H100 80GB HBM3"
"""The device of the rooflines where none is there."""


def peaks(device: str) -> Peaks:
    """Of a device by its name. Raises ValueError for another one."""
    for word, found in PEAKS.items():
        if word in device and not re.search("PCIe|NVL", device):
            return found
    raise ValueError(f"{device!r} has no peaks here, only SXM modules of {', '.join(PEAKS)}: add them to PEAKS")


def hopper(parser: argparse.ArgumentParser) -> Any:
    """The GPU of this machine; without one of compute capability 9.0 the command line's own error."""
    import jax

    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        parser.error(f"this measures GPUs of compute capability 9.0; jax found {device.device_kind}. --list needs none")
    return device


def source() -> str:
    """A digest of the code that is measured."""
    folder = Path(lowbit.__file__).parent
    files = [*sorted(folder.glob("kernels/*.py")), *sorted(folder.glob("formats/*.py"))]
    files += [folder / name for name in ("backward.py", "by_kernel.py", "by_term.py", "ops.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def here(device: str) -> dict[str, str]:
    """What a figure depends on: the device, the versions and the code, with the day."""
    import jax
    import jaxlib

    return {
        "device": device,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "python": platform.python_version(),
        "source": source(),
        "date": str(datetime.date.today()),
    }


@dataclass
class Results:
    """Rows by name in a JSON file that is whole after each of them.

    Attributes:
      path: written after each row.
      machine: the head of the file, see `here`.
    """

    path: Path
    machine: Mapping[str, str]
    rows: dict[str, Row] = field(default_factory=dict)

    def done(self, name: str) -> bool:
        """Whether it is there, of this code, and its product was right."""
        row = self.rows.get(name, {"wrong": ""})
        return "wrong" not in row and row["source"] == self.machine["source"]

    def add(self, row: Row) -> None:
        """One more row, stamped with the code and the day; one of the same name is replaced."""
        self.rows[row["name"]] = row | {what: self.machine[what] for what in ("source", "date")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": self.machine, "rows": list(self.rows.values())}, indent=1) + "\n"
        with replacing(self.path) as file:
            file.write(text.encode())


def opened(name: str, machine: Mapping[str, str], kept: Path = KEPT) -> Results:
    """The results called `name` of this device and jax: in $OUT if that is set, with what `kept` already has.

    Raises ValueError for a file that holds another machine's.
    """
    words = f"{machine['device']}_jax-{machine['jax']}".lower()
    folder = re.sub(r"[^\w.-]+", "-", words)
    target = Path(os.environ.get("OUT") or kept) / folder / f"{name}.json"
    results = Results(target, machine)
    for path in (kept / folder / f"{name}.json", target):
        if path.exists():
            results.rows |= read(path, machine)
    return results


def read(path: Path, machine: Mapping[str, str]) -> dict[str, Row]:
    """Rows by name. Raises ValueError if they are another machine's."""
    held = json.loads(path.read_text("utf-8"))
    for what in ("device", "jax", "jaxlib"):
        if held["machine"][what] != machine[what]:
            raise ValueError(
                f"{path} holds results of {what} {held['machine'][what]}, this is {machine[what]}: move it away"
            )
    return {row["name"]: row for row in held["rows"]}


def newest(name: str, kept: Path = KEPT) -> Results:
    """The last committed results, or none of the device that rooflines are for."""
    found = [json.loads(p.read_text("utf-8")) for p in kept.glob(f"*/{name}.json")]
    if not found:
        return Results(Path(), {"device": ASSUMED})
    held = max(found, key=lambda f: f["machine"]["date"])
    return Results(Path(), held["machine"], {row["name"]: row for row in held["rows"]})


def part(items: Sequence[T], text: str) -> list[T]:
    """Part i of n, written "i/n" or "PART=i/n": every n-th item, so that the first ones, which matter most, are spread.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"(?:PART=)?(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"part {text!r} is none: write PART=i/n with i from 1 to n, such as PART=1/3")
    return list(items[int(found[1]) - 1 :: int(found[2])])


@dataclass(frozen=True)
class Target:
    """A promise about measured times.

    Attributes:
      needs: names of the rows that it is about.
      value: from their rows, in that order.
      limit: of the value; `least` says on which side.
    """

    name: str
    needs: tuple[str, ...]
    value: Callable[..., float]
    limit: float
    least: bool

    def line(self, rows: Mapping[str, Row]) -> str:
        """What was promised and what came out, as a row of a table in Markdown."""
        sign = "at least" if self.least else "at most"
        missing = [name for name in self.needs if name not in rows]
        if missing:
            said = "not measured"
        else:
            value = self.value(*(rows[name] for name in self.needs))
            met = value >= self.limit if self.least else value <= self.limit
            said = f"{value:.2f}, {'met' if met else 'missed'}"
        return f"| {self.name} | {sign} {self.limit:g} | {said} |"
