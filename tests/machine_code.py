"""A small kernel's machine code as ptxas and nvdisasm print it, for the tests of tools/aot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = """\
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : (C7519) Potential Performance Loss: 'warpgroup.arrive' is injected in around line 812
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""

# A loop over tiles around the loop that multiplies, which waits behind itself; then the padding.
SASS = """\
.text.kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
.L_x_0:
   -:-:-:-:04        /*0010*/                   SHF.L.U32 R8, R8, 0x1f, RZ
.L_x_1:
   -:-:1:Y:02        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R8
  0x02:-:-:Y:05      /*0030*/              @!P1 BRA `(.L_x_3)
.L_x_2:
   -:-:2:Y:01        /*0040*/                   LDS.64 R16, [R12+0x1000]
 2&1:-:-:Y:02        /*0050*/                   LOP3.LUT R36, R17.reuse, 0xf000f, R95, 0xea, !PT
   -:-:-:-:13        /*0060*/                   HADD2 R36, R36, -1032, -1032
   -:-:-:Y:01        /*0070*/                   IMAD.SHL.U32 R49, R10.reuse, 0x2, RZ
   -:-:-:Y:02        /*0080*/               @P0 UIADD3 UR6, UP0, UR4, 0x2, URZ
   -:-:-:Y:01        /*0090*/                   HGMMA.64x16x16.F32 R24, R32, gdesc[UR4], R24
   -:-:-:Y:01        /*00a0*/                   HGMMA.64x16x16.F32 R24, R36, gdesc[UR8], R24, gsb0
   1:-:-:Y:05        /*00b0*/               @P2 BRA `(.L_x_1)
   -:-:-:Y:05        /*00c0*/               @P3 BRA `(.L_x_0)
   -:-:-:Y:05        /*00d0*/                   EXIT
.L_x_3:
   -:-:1:Y:02        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R8
   1:-:-:Y:05        /*00f0*/               @P1 BRA `(.L_x_2)
   -:-:-:Y:05        /*0100*/                   BRA `(.L_x_3)
.L_x_4:
   -:-:-:Y:00        /*0110*/                   BRA `(.L_x_4)
"""


def never(*args: Any) -> None:
    raise AssertionError("these kernels are not compiled")


@dataclass(frozen=True)
class Listed:
    """A kernel of a catalog. One lane decodes 8 weights in an iteration of `SASS`."""

    name: str = "small"
    function: Callable[..., Any] = never
    avals: tuple[Any, ...] = ()
    weights: int = 8
    bits: float = 4.0
    wgmmas: int = 2
    times: int | None = None
    target: float | None = 0.9


def write(dump: Path, log: str = LOG, sass: str = SASS, name: str = "kernel_0") -> None:
    """What a compilation leaves in `dump`."""
    dump.mkdir(parents=True, exist_ok=True)
    (dump / f"{name}.ptxas").write_text(log, encoding="utf-8")
    (dump / f"{name}.sass_ctrl").write_text(sass, encoding="utf-8")
