"""Kernels compiled and counted, one after another or in several processes."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name

from tools.aot.model import CHIPS
from tools.aot.report import Figures, Kernel, measure
from tools.aot.target import compile_for


def compiled(chip: str, kernel: Kernel, dump: Path) -> Figures:
    """The figures of one kernel; an error says which kernel it is about."""
    try:
        compile_for(chip, kernel.function, *kernel.avals, dump=dump)
        return measure(kernel, dump, CHIPS[chip])
    except Exception as error:
        error.add_note(f"while compiling the kernel {kernel.name} for an {CHIPS[chip].name}")
        raise


@cache
def _catalog(name: str) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in resolve_name(name)()}


def _compiled(catalog: str, chip: str, name: str, dump: Path) -> Figures:
    """`compiled` in a process of its own, which finds the kernel by its name: functions do not travel."""
    return compiled(chip, _catalog(catalog)[name], dump)


def all_compiled(catalog: str, chip: str, kernels: Sequence[Kernel], dump: Path, jobs: int) -> list[Figures]:
    """The figures of each of some kernels of a catalog, in order, by so many processes."""
    if jobs == 1:
        return [compiled(chip, kernel, dump / kernel.name) for kernel in kernels]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        asked = [(catalog, chip, kernel.name, dump / kernel.name) for kernel in kernels]
        return list(pool.map(_compiled, *zip(*asked, strict=True)))
