"""What the static model of the kernels assumes of an H100, measured: `python -m benchmarks.gpu_micro [--list]`.

Each question is a loop of PTX in one block on each SM, timed in clocks of the SM by its own counter, so neither launch
nor clock rate matter: how often an SM starts a WGMMA with A in registers, how many lanes a clock of the instructions
that decode, and clocks for a load from shared memory in the patterns of the kernels. The last question takes the
kernels' own pipeline without decoding and multiplying: what fetching x again for every block of rows costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from benchmarks.cold import copies, middle
from benchmarks.gpu_cases import DTYPES, SHAPES, Case, canonical
from benchmarks.gpu_results import Row, here, hopper, newest, opened, peaks
from benchmarks.gpu_timing import profiled, timed
from lowbit.ir.dtypes import numpy_dtype
from lowbit.kernels.decoders import STAGE
from lowbit.kernels.lanes import Program
from lowbit.kernels.layout import SMS, layout
from lowbit.kernels.mma import Shape, mma, tuning
from lowbit.kernels.verbs import Gpu

NAME = "gpu_micro"
LANES = 128
TURNS = 512
"""Iterations of a loop."""
BUFFER = 8192
"""Words of shared memory: 32 KB."""
CHAINS = 8
"""Independent instructions in a loop, to hide their latency."""


@dataclass(frozen=True)
class Question:
    """A loop, and what the model says of it.

    Attributes:
      setup, body: PTX. %addr is shared memory, %lane the thread; %word0 to %word7 hold words that are not constant.
      each: instructions of the kind in question in the body.
      groups: warpgroups of an SM that run it at once.
      expected: lanes a clock and SM, or clocks of an SM for one (of a warp; of a warpgroup for WGMMA).
      lanes: whether the answer is lanes a clock.
    """

    name: str
    setup: str
    body: str
    each: int
    groups: int
    expected: float
    lanes: bool

    def answer(self, clocks: float) -> float:
        """From the clocks of all turns."""
        if self.lanes:
            return self.each * TURNS * self.groups * LANES / clocks
        warps = 1 if self.name.startswith("wgmma") else LANES // 32
        return clocks / (self.each * TURNS * self.groups * warps)

    @property
    def unit(self) -> str:
        return "lanes a clock" if self.lanes else "clocks"


# ---------------------------------------------------------------- the questions


def rate(name: str, expected: float, *instructions: str) -> Question:
    """Instructions on each of CHAINS registers, with four warpgroups: {0} is the register."""
    body = "\n".join(i.format(f"%word{n}") for n in range(CHAINS) for i in instructions)
    return Question(f"rate {name}", "", body, CHAINS * len(instructions), 4, expected, True)


def loads(name: str, address: str, width: int, expected: float) -> Question:
    """Loads of `width` words by each lane from shared memory; `address` computes %at from %lane, in bytes."""
    names = [f"%v{i}" for i in range(width)]
    vector_, into = (f".v{width}", f"{{{', '.join(names)}}}") if width > 1 else ("", names[0])
    body = ""
    for n in range(CHAINS):
        body += f"ld.volatile.shared{vector_}.u32 {into}, [%at + {2048 * (n % 4)}];\n"
        body += "".join(f"xor.b32 %word{n}, %word{n}, {v};\n" for v in names)
    setup = f".reg .b32 %at, {', '.join(names)};\n{address}\nadd.u32 %at, %at, %addr;"
    return Question(f"shared {name}", setup, body, CHAINS, 4, expected, False)


def products(columns: int, groups: int, registers: bool = True) -> Question:
    """WGMMAs of 64 x `columns` x 16 in bf16, 16 at a time as in a stage, A in registers or in shared memory."""
    count = columns // 2
    sums = ", ".join(f"%d{i}" for i in range(count))
    a = "{%word0, %word1, %word2, %word3}" if registers else "%desc_a"
    flags = "1, 1, 1, 0" if registers else "1, 1, 1, 0, 0"
    op = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
    one = f"{op} {{{sums}}}, {a}, %desc, {flags};"
    # K-major rows of 128 bytes, swizzled: a group of 8 rows is 1024 bytes. 16 inputs are 32 bytes further on.
    setup = f""".reg .b64 %desc, %desc_a, %wide;
    .reg .f32 {sums};
    shr.u32 %v, %addr, 4;
    and.b32 %v, %v, 0x3FFF;
    cvt.u64.u32 %wide, %v;
    or.b64 %desc, %wide, {1 << 62 | 64 << 32 | 1 << 16};
    add.u64 %desc_a, %desc, 1024;
    """ + "\n".join(f"mov.f32 %d{i}, 0f00000000;" for i in range(count))
    steps = [f"{one}\n" + ("add.u64 %desc, %desc, 2;" if n % 4 < 3 else "sub.u64 %desc, %desc, 6;") for n in range(16)]
    body = "\n".join(
        ["wgmma.fence.sync.aligned;", *steps, "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    )
    kind = "A in registers" if registers else "A in shared memory"
    wide = f"{groups} warpgroup{'s' * (groups > 1)}"
    return Question(
        f"wgmma n={columns}, {kind}, {wide}", setup, body + "\nmov.b32 %word4, %d0;", 16, groups, columns / 2, False
    )


def questions() -> list[Question]:
    """Those of docs/kernels.md that no compiler answers."""
    out = [products(n, groups) for n in (8, 16, 64, 128) for groups in (1, 2, 3)]
    out += [products(8, 2, registers=False)]
    high, logic = "mul.hi.u32 {0}, {0}, %k;", "lop3.b32 {0}, {0}, %k, %lane, 0x6a;"
    halves, multiply = "fma.rn.f16x2 {0}, {0}, %k, %lane;", "mad.lo.u32 {0}, {0}, %k, %lane;"
    out += [
        rate("IMAD.HI", 64, high),
        rate("IMAD", 64, multiply),
        rate("LOP3", 64, logic),
        rate("PRMT", 64, "prmt.b32 {0}, {0}, %k, 0x5140;"),
        rate("HFMA2", 128, halves),
        rate("IMAD.HI + LOP3", 128, high, logic),
        rate("IMAD.HI + HFMA2", 128, high, halves),
        rate("IMAD + HFMA2", 128, multiply, halves),
    ]
    quads = "shr.u32 %at, %lane, 2; and.b32 %at, %at, 7; shl.b32 %at, %at, 2;"
    return [
        *out,
        loads("words of a stage, 16 bytes a lane", "shl.b32 %at, %lane, 4;", 4, 4),
        loads("parameters, one for 4 lanes", quads, 1, 1),
        loads("4 bytes a lane", "shl.b32 %at, %lane, 2;", 1, 1),
        loads("every lane in one bank", "and.b32 %at, %lane, 15; shl.b32 %at, %at, 7;", 1, 16),
    ]


# ---------------------------------------------------------------- the loop around them


def ptx(q: Question) -> str:
    """Clocks of all turns of this lane, in $0; $1 is an address in shared memory. Every result is used."""
    registers = "\n".join(f"mad.lo.u32 %word{i}, %lane, {2 * i + 3}, %k;" for i in range(CHAINS))
    mixed = "\n".join(f"xor.b32 %v, %v, %word{i};" for i in range(CHAINS))
    return f"""{{
    .reg .pred %again, %never;
    .reg .b32 %addr, %lane, %k, %v, %turn, %start, %end, %word<{CHAINS}>;
    mov.u32 %addr, $1;
    mov.u32 %lane, %tid.x;
    and.b32 %lane, %lane, {LANES - 1};
    mov.u32 %k, %clock;
    or.b32 %k, %k, 1;
    {registers}
    {q.setup}
    mov.u32 %turn, 0;
    bar.sync 0;
    mov.u32 %start, %clock;
    AGAIN:
    {q.body}
    add.u32 %turn, %turn, 1;
    setp.lt.u32 %again, %turn, {TURNS};
    @%again bra AGAIN;
    mov.u32 %v, 0;
    {mixed}
    mov.u32 %end, %clock;
    sub.u32 $0, %end, %start;
    setp.eq.u32 %never, %v, 0x12345678;
    @%never add.u32 $0, $0, 1;
    }}"""


def program(q: Question) -> Callable[[jax.Array], jax.Array]:
    """Clocks i32 [SMS, groups, LANES] of a question. It takes a word, for jax compiles for where arguments are."""
    strided = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=strided)
    )
    def clocks(ctx: Any, buffer: Any) -> Any:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        address = llvm.ptrtoint(i32, utils.memref_ptr(buffer))
        value: Any = llvm.inline_asm(i32, [address], ptx(q), "=r,r", has_side_effects=True)
        made = np.empty((1,), dtype=object)
        made[0] = vector.broadcast(ir.VectorType.get((1,), i32), value)
        return fa.FragmentedArray(_registers=made, _layout=fa.WGStridedFragLayout((LANES,), 1), _is_signed=True)

    def body(word: Any, out: Any, buffer: Any) -> None:
        del word
        block, group = jax.lax.axis_index("block"), jax.lax.axis_index("group")
        out[block, group, :] = clocks(buffer)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((SMS, q.groups, LANES), jnp.int32),
        scratch_types=[plgpu.SMEM((BUFFER,), jnp.uint32)],
        grid=(SMS,),
        grid_names=("block",),
        num_threads=q.groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


# ---------------------------------------------------------------- x, fetched for every block of rows


class Fetching(Gpu):
    """A back end that fetches all that a product needs, and computes nothing."""

    def words(self, ref: Any, staged: bool = True) -> Any:
        return None

    def rows(self, ref: Any, staged: bool) -> Any:
        return None

    def decode(self, program: Program, table: Any, words: Any, *stored: Any) -> Any:
        return None

    def multiply(self, acc: Any, weights: Any, x: Any) -> None:
        pass


def fetch(case: Case) -> tuple[Callable[..., jax.Array], list[jax.ShapeDtypeStruct]]:
    """The pipeline of a product without its arithmetic, and what it takes: the stored arrays, then x."""
    of = layout(canonical(case.what, case.n, case.k).decode)
    program, shape = of.program("bf16"), Shape(case.m, of.tiles, of.stages)
    leaves = [of.fields[name] for name in of.read()]
    avals = [jax.ShapeDtypeStruct(tuple(leaf.dims.values()), numpy_dtype(leaf.dtype)) for leaf in leaves]
    x = jax.ShapeDtypeStruct((case.m, of.stages * STAGE), jnp.bfloat16)
    return mma(program, shape, tuning(shape, program), Fetching()), [*avals, x]


def fetches() -> list[Case]:
    """At the widest and the narrowest format, more and more rows."""
    return [Case(what, *SHAPES[0], m, DTYPES[0], None) for what in ("uniform4", "bcq2") for m in (8, 16, 32, 64, 128)]


def fetched(case: Case, cupti: bool) -> Row:
    """Seconds to fetch weights and x, beside those of the bytes at the peak of memory."""
    run, avals = fetch(case)
    made = [[jnp.full(a.shape, i + 1, a.dtype) for a in avals[:-1]] for i in range(copies(case.stored))]
    x = jnp.ones(avals[-1].shape, avals[-1].dtype)
    _, times = timed(lambda x, ws: [run(*w, x) for w in ws], (x, made), len(made), cupti)
    expected = 1e6 * case.bytes / peaks(jax.devices()[0].device_kind).memory
    return {"name": title(case), "value": 1e6 * times["seconds"], "unit": "us", "expected": expected, **times}


def title(case: Case) -> str:
    return f"fetch {case.what} {case.n}x{case.k} m={case.m}"


# ---------------------------------------------------------------- running them


def asked(q: Question) -> Row:
    """The median over SMs of the slowest lane of each."""
    run = jax.jit(program(q))
    word = jnp.zeros(1, jnp.uint32)
    jax.block_until_ready(run(word))
    clocks = np.asarray(run(word)).max((1, 2))
    times = middle([q.answer(float(c)) for c in clocks])
    return {
        "name": q.name,
        "value": times["seconds"],
        "unit": q.unit,
        "expected": q.expected,
        "spread": times["spread"],
    }


def line(name: str, unit: str, expected: float, row: Row | None) -> str:
    value = f"{row['value']:.2f}" if row else "not measured"
    return f"{name:52} {expected:>10.2f} {value:>14} {unit}"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the questions, and the answers so far; needs no GPU")
    given = parser.parse_args(args)
    print(f"{'question':52} {'the model':>10} {'measured':>14}")
    if given.list:
        rows = newest(NAME)
        of = peaks(rows.machine["device"])
        for q in questions():
            print(line(q.name, q.unit, q.expected, rows.rows.get(q.name)))
        for case in fetches():
            print(line(title(case), "us", 1e6 * case.bytes / of.memory, rows.rows.get(title(case))))
        return 0
    results = opened(NAME, here(hopper(parser).device_kind))
    cupti = profiled()
    todo: list[tuple[str, Callable[[], Row]]] = [(q.name, partial(asked, q)) for q in questions()]
    todo += [(title(case), partial(fetched, case, cupti)) for case in fetches()]
    failed = 0
    for name, ask in todo:
        if not results.done(name):
            try:
                results.add(ask())
            except Exception as err:  # one that does not run must not cost the others
                failed += 1
                print(f"FAILED {name}: {type(err).__name__}: {str(err)[:2000]}", flush=True)
                continue
        row = results.rows[name]
        print(line(name, row["unit"], row["expected"], row), flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
