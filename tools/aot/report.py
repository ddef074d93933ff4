"""Judges kernels by their machine code and writes the table of docs/kernels.md."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tools.aot.model import H100, Chip, Load, load
from tools.aot.sass import ADDS, LOCAL, PRODUCTS, hot_loop, read_log, read_sass

BEGIN = "<!-- the table of `make aot` begins -->"
END = "<!-- the table of `make aot` ends -->"
"""For an H100; for another GPU with its name."""


class Kernel(Protocol):
    """What the catalog says of a kernel: how to compile it, and what its loop has to be.

    `weights` are those that one lane decodes in one iteration of the loop with the products, `bits` what is stored for
    a weight with its share of scales and tables, `wgmmas` the products of that iteration, 0 where it only adds. No pipe
    may be fuller than `target` at memory speed; None where arithmetic is the limit and not memory. Where the weights
    are not those of one iteration, `times` says of how many, and what follows the loop is counted too; None elsewhere.
    """

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> Callable[..., Any]: ...
    @property
    def avals(self) -> tuple[Any, ...]: ...
    @property
    def weights(self) -> int: ...
    @property
    def bits(self) -> float: ...
    @property
    def wgmmas(self) -> int: ...
    @property
    def times(self) -> int | None: ...
    @property
    def target(self) -> float | None: ...


@dataclass(frozen=True)
class Figures:
    """What was counted in a kernel. `local` are the instructions that load or store local memory."""

    registers: int
    stack: int
    spills: int
    local: int
    wgmmas: int
    warnings: tuple[str, ...]
    load: Load


def measure(kernel: Kernel, dump: Path, chip: Chip = H100) -> Figures:
    """Reads what compiling `kernel` left in `dump`. Of several programs there the one with products is the kernel."""
    work, what = (PRODUCTS, "products") if kernel.wgmmas else (ADDS, "FADD")
    logs = sorted(dump.glob("*.ptxas"))
    found = [(read_log(p.read_text()), read_sass(p.with_suffix(".sass_ctrl").read_text())) for p in logs]
    multiplying = [(log, program) for log, program in found if program.count(work)]
    if len(multiplying) != 1:
        raise ValueError(
            f"{kernel.name}: {len(found)} programs in {dump}, {len(multiplying)} of them with {what}, and just one "
            "must be. One that equals an earlier one is not compiled again: list it once"
        )
    ((log, program),) = multiplying
    loop = hot_loop(program, work)
    code = program.instructions[loop.start : loop.stop]
    after = () if kernel.times is None else program.behind(loop)
    return Figures(
        log.registers,
        sum(other.stack for other, _ in found),
        sum(other.spills for other, _ in found),
        sum(other.count(LOCAL) for _, other in found),
        program.count(PRODUCTS, loop),
        tuple(sorted({code for other, _ in found for code in other.warnings})),
        load(code, kernel.weights, kernel.bits, kernel.times or 1, after, chip),
    )


def refusals(kernel: Kernel, figures: Figures) -> list[str]:
    """One line for each thing that a kernel may not do."""
    found = []
    if figures.spills:
        found.append(f"spills {figures.spills} bytes of registers: make its tile smaller")
    if figures.stack or figures.local:
        found.append(
            f"uses local memory, {figures.stack} bytes of stack and {figures.local} loads and stores: "
            "index its registers by constants only"
        )
    if "C7510" in figures.warnings:
        found.append("has its WGMMAs serialized (C7510): keep accumulators and fragments untouched until the wait")
    if figures.wgmmas != kernel.wgmmas:
        found.append(f"has {figures.wgmmas} WGMMAs in its loop where the catalog says {kernel.wgmmas}")
    fullest = figures.load.pipes[figures.load.worst]
    if kernel.target is not None and fullest > kernel.target:
        found.append(f"fills {figures.load.worst} to {fullest:.1%} at memory speed; its target is {kernel.target:.0%}")
    return [f"{kernel.name} {line}" for line in found]


SHOWN = ("issue", "ALU", "IMAD", "FMA", "LSU", "TC")
COLUMNS = ("kernel", "bits", "registers", "{product}", "instr.", *SHOWN, "clk", "stall", "worst")


def table(rows: Iterable[tuple[Kernel, Figures]], versions: str, chip: Chip = H100) -> str:
    """The figures of all kernels in Markdown, under a line that says what compiled them."""
    head = _line(COLUMNS).format(product=chip.product)
    lines = [f"Compiled by {versions}.", "", head, _line(["---"] + ["---:"] * (len(COLUMNS) - 2) + ["---"])]
    for kernel, figures in rows:
        its = figures.load
        aim = "" if kernel.target is None else f" of {kernel.target:.0%}"
        cells = [f"`{kernel.name}`", f"{kernel.bits:.3g}", figures.registers, figures.wgmmas, f"{its.instructions:.2f}"]
        cells += [f"{its.pipes[pipe]:.0%}" for pipe in SHOWN]
        cells += [f"{its.clocks:.1f}", f"{its.stall:.1f}", f"{its.worst} {its.pipes[its.worst]:.0%}{aim}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def place(page: str, text: str, chip: Chip = H100) -> str:
    """`page` with `text` between its two marker lines."""
    first, last = (m if chip == H100 else m.replace("table", f"{chip.name}'s table") for m in (BEGIN, END))
    before, begin, rest = page.partition(first + "\n")
    _, end, after = rest.partition(last + "\n")
    if not begin or not end:
        raise ValueError(f"the page needs a line {first!r} and later a line {last!r} for the table to stand between")
    return f"{before}{begin}\n{text}\n\n{end}{after}"
