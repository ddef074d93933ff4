"""Bytes of shared memory that a schedule takes."""

from __future__ import annotations

from math import prod

from lowbit.ir.dtypes import bits
from lowbit.kernels.computed import Bytes
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import LANES, Program
from lowbit.kernels.layout import WARPGROUPS

SHARED = 226 << 10
"""Bytes for buffers; barriers take the rest."""
ALIGNED = 1024
"""Bytes that a buffer begins at a multiple of."""


def fetched(program: Program, parameters: bool) -> int:
    """Of the words of a stage for each warpgroup, and of their `parameters`."""
    words = 4 * WARPGROUPS * sum(program.words) * LANES + ALIGNED * (len(program.words) - 1)
    if not parameters:
        return words
    leaves = {e.leaf for e in program.weights.parameters}
    stored = sum(WARPGROUPS * ROWS * bits(e.leaf.dtype) // 8 for e, _ in program.inputs)
    return words + stored + ALIGNED * len(leaves)


def looked_up(program: Program) -> int:
    """Of what is looked up: tables of all rows, or of those of each warpgroup."""
    if not program.decoder.shared:
        return 0
    return 2 * (1 if program.weights.books else WARPGROUPS) * prod(program.table_shape)


FEWEST = 8
"""Rows of x that a block multiplies at least."""


def results(columns: int) -> int:
    """Of a block's results on their way out."""
    return 4 * WARPGROUPS * ROWS * columns


def stage_bytes(program: Program, columns: int) -> int:
    """Of what a step of the schedule `mma` fetches, with so many rows of x."""
    return 2 * columns * STAGE + fetched(program, parameters=not program.of_rows)  # those of rows are there at first


BEFORE_HOPPER = 96 << 10
"""What a block may have there: 8.6 and 8.9 have 99 KiB for one, and 8.0 more."""


def too_much_before_hopper(program: Program) -> str | None:
    """Why no block of compute capability 8 can run the schedule `mma`; None where one can."""
    if isinstance(program.decoder, Bytes):
        return "weights of whole bytes are decoded on compute capability 9.0 alone"
    needed = looked_up(program) + 2 * stage_bytes(program, FEWEST)
    if needed > BEFORE_HOPPER:
        return f"its tables and two stages take {needed:,} bytes of shared memory, and a block has {BEFORE_HOPPER:,}"
    return None


DY_ROWS = 64
"""Rows of dy that a block of the schedule `mma_dx` multiplies: those of one WGMMA."""


def dx_stage(program: Program) -> int:
    """Of what a step of the schedule `mma_dx` fetches."""
    return fetched(program, parameters=True) + 2 * DY_ROWS * WARPGROUPS * ROWS


def dx_beside(program: Program) -> int:
    """Of the weights that the schedule `mma_dx` has decoded, and of its tables."""
    return 2 * WARPGROUPS * ROWS * STAGE + looked_up(program)


def too_much_for_dx(program: Program) -> str | None:
    """Why shared memory does not hold two steps of the schedule `mma_dx`; None where it does."""
    return _too_much(dx_beside(program), dx_stage(program))


def too_much_for_mma(program: Program) -> str | None:
    """The same of the schedule `mma`, with as few rows of x as it takes."""
    return _too_much(looked_up(program) + results(FEWEST), stage_bytes(program, FEWEST))


def too_much_for_int8(program: Program) -> str | None:
    """The same in 8-bit integers: rows of x take half as much, and tables are in registers."""
    return _too_much(results(FEWEST), stage_bytes(program, FEWEST // 2))


STEP = 64
"""Rows of x that the schedules `mma_dw` and `mma_db` multiply at a time."""


def dw_stage() -> int:
    """Of what a step of theirs fetches."""
    return 2 * STEP * (WARPGROUPS * ROWS + STAGE)


def too_much_for_db(words: int) -> str | None:
    """The same of the schedule `mma_db`, with two integers for each of so many sums of a warpgroup."""
    return _too_much(db_beside(words), dw_stage())


def db_beside(words: int) -> int:
    return 2 * 4 * WARPGROUPS * words


def _too_much(beside: int, stage: int) -> str | None:
    needed = beside + 2 * stage
    return None if needed <= SHARED else f"a block needs {needed:,} bytes of shared memory, and there are {SHARED:,}"
