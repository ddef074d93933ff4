"""Compiles the kernels of a catalog for a GPU, counts what their machine code does and judges it.

    python -m tools.aot [--chip CHIP] [--only NAME] [--dump FOLDER] [--write PAGE | --check PAGE]
                        [--jobs N] [--catalog MODULE:NAME]

Fails when a kernel spills, uses local memory, has its products serialized, has another number of them than the catalog
says, or fills a pipe above its target.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

from tools.aot.compiling import all_compiled
from tools.aot.model import CHIPS
from tools.aot.report import Kernel, place, refusals, table
from tools.aot.target import assembler


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="h100", help="the GPU to compile for")
    parser.add_argument("--only", action="append", metavar="NAME", help="this kernel alone; may be given again")
    parser.add_argument("--dump", type=Path, metavar="FOLDER", help="keep the PTX, SASS and log of each kernel here")
    parser.add_argument("--catalog", metavar="MODULE:NAME", help="what lists the kernels, if not tools.aot.catalog")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile")
    page = parser.add_mutually_exclusive_group()
    page.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marker lines of this page")
    page.add_argument("--check", type=Path, metavar="PAGE", help="fail unless this page has this table")
    given = parser.parse_args()
    if given.only and (given.write or given.check):
        parser.error("--only gives a part of the table, and a page has all of it")
    given.catalog = given.catalog or f"tools.aot.catalog:{'catalog' if given.chip == 'h100' else 'before_hopper'}"
    return given


def chosen(kernels: Iterable[Kernel], only: list[str] | None) -> list[Kernel]:
    """The kernels named in `only`, or all."""
    named = {kernel.name: kernel for kernel in kernels}
    if unknown := set(only or ()) - named.keys():
        raise SystemExit(f"no kernel {', '.join(sorted(unknown))} in the catalog, which has {', '.join(named)}")
    return [named[name] for name in only or named]


def main() -> int:
    given = arguments()
    chip = CHIPS[given.chip]
    versions = f"jax {version('jax')} and ptxas {assembler()}"
    kernels = chosen(resolve_name(given.catalog)(), given.only)
    with tempfile.TemporaryDirectory() as scratch:
        found = all_compiled(given.catalog, given.chip, kernels, given.dump or Path(scratch), given.jobs)
    rows = list(zip(kernels, found, strict=True))
    text = table(rows, versions, chip)
    print(text)
    refused = [line for kernel, figures in rows for line in refusals(kernel, figures)]
    if given.write:
        given.write.write_text(place(given.write.read_text("utf-8"), text, chip), encoding="utf-8")
    if given.check and place(page := given.check.read_text("utf-8"), text, chip) != page:
        refused.append(f"{given.check} has another table than this one: run make aot and commit the page")
    for line in refused:
        print(line, file=sys.stderr)
    return bool(refused)


if __name__ == "__main__":
    sys.exit(main())
