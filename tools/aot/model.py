"""How busy a loop keeps each part of a GPU while memory feeds it weights as fast as it can: a static model.

Memory gives a streaming multiprocessor (SM) `BYTES` each clock, which are F = 8 BYTES / bits weights. When a loop takes
t lane-slots of a pipe for a weight, of which the pipe has r each clock, then memory speed fills F t / r of the pipe.
Above 1 the pipe is the limit and not memory. Latency, conflicts of banks and dependences are not in it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tools.aot.sass import PRODUCTS, WGMMA, Instruction

WARPGROUP = 128  # lanes
# Lane-slots a clock and SM, as known for compute capability 9.0 and not verified; XU, the slow conversions, is
# taken as the slowest that any of them has there.
RATES = {"issue": 128, "ALU": 64, "IMAD": 64, "FMA": 128, "LSU": 32, "XU": 16, "TC": WARPGROUP}


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
      name: in prose.
      product: how its table calls what the tensor cores do.
      clock: Hz, the boost clock.
      memory: bytes a second.
      rates: as RATES.
      mma: clocks of its SM for four HMMA.16816 with sums in float32, one of each warp of a warpgroup.
    """

    name: str
    product: str
    sms: int
    clock: float
    memory: float
    rates: dict[str, int] = field(default_factory=lambda: RATES)
    mma: int = 0

    @property
    def bytes(self) -> float:
        """A clock and SM."""
        return self.memory / self.clock / self.sms


H100 = Chip("H100", "WGMMA", 132, 1.755e9, 3.35e12)
BYTES = H100.bytes  # 14.5
# Pairs of halves are multiplied at 64 on an RTX 4090, and float32 on an A100: the slower rate stands for both.
BEFORE_HOPPER = {**RATES, "FMA": 64}
CHIPS = {
    "h100": H100,
    "a100": Chip("A100", "HMMA", 108, 1.41e9, 2.039e12, BEFORE_HOPPER, mma=8),
    "rtx4090": Chip("RTX 4090", "HMMA", 128, 2.52e9, 1.008e12, BEFORE_HOPPER, mma=32),
}

_OPCODES = {
    ("ALU",): "LOP3 SHF PRMT IADD3 VIADD ISETP SEL FSEL LEA SGXT PLOP3 P2R R2P FMNMX IMNMX VIMNMX IABS FSETP HSETP2 "
    "HMNMX2 VABSDIFF BMSK MOV CS2R I2FP FCHK",
    ("IMAD", "FMA"): "IMAD",  # on half of the lanes of the FMA pipe
    ("FMA",): "FFMA FADD FMUL HFMA2 HADD2 HMUL2 IDP",
    ("LSU",): "LDS STS LDG STG LD ST LDSM STSM ATOMS ATOM ATOMG RED LDGSTS LDL STL SHFL",
    ("XU",): "I2F F2I F2F F2FP I2I MUFU POPC FLO BREV FRND",
    ("TC",): " ".join(PRODUCTS),
    # They cost an issue slot; loading and waiting are of the machinery around the loop.
    (): "BRA BRX EXIT RET CALL BSSY BSYNC BREAK NOP YIELD NANOSLEEP BAR DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR CCTL "
    "SYNCS WARPSYNC WARPGROUP WARPGROUPSET ELECT VOTE VOTEU R2UR S2R S2UR LDC USETMAXREG ACQBULK PREEXIT",
}
PIPES = {opcode: pipes for pipes, opcodes in _OPCODES.items() for opcode in opcodes.split()}


def pipes(instruction: Instruction) -> tuple[str, ...]:
    """The pipes that an instruction takes a slot of beside its issue slot; the uniform data path is none of them."""
    if instruction.base in PIPES:
        return PIPES[instruction.base]
    if instruction.base.startswith("U"):
        return ()
    raise ValueError(f"the model does not know which pipe {instruction.opcode} runs on: add it to tools/aot/model.py")


def slots(instruction: Instruction, chip: Chip = H100) -> int:
    """How many slots of its pipe one lane takes: one for 4 bytes of a load, one for a clock of the tensor cores."""
    if instruction.base in WGMMA:
        return int(instruction.opcode.split("x")[1]) // 2  # 64xNxK at the peak rate: N/2 clocks whatever K its type has
    if instruction.base in PRODUCTS:
        return chip.mma
    if instruction.base in ("LDSM", "STSM"):
        return int(instruction.opcode.rpartition(".")[2])  # matrices of 8 rows of 16 bytes, 4 bytes a lane
    return 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1


@dataclass(frozen=True)
class Load:
    """`pipes`: how full memory speed makes each; `worst` names the fullest. `clocks`: what an SM has for one product, 0
    without any.

    `stall` is the mean clocks from one instruction of a warp to its next, by their control codes alone: that many warps
    keep a scheduler busy when nothing else waits.
    """

    instructions: float  # a weight
    pipes: dict[str, float]
    clocks: float
    stall: float

    @property
    def worst(self) -> str:
        return max(self.pipes, key=self.pipes.__getitem__)


def load(
    loop: Sequence[Instruction],
    weights: int,
    bits: float,
    times: int = 1,
    after: Sequence[Instruction] = (),
    chip: Chip = H100,
) -> Load:
    """The load of a loop that handles `weights` weights a lane of `bits` stored bits each in so many iterations, and of
    what runs once `after` it."""
    used: Counter[str] = Counter()
    for code, count in ((loop, times), (after, 1)):
        for instruction in code:
            for pipe, amount in _work(instruction, chip):
                used[pipe] += amount * count
    fed = 8 * chip.bytes / bits  # weights a clock and SM
    busy = {pipe: used[pipe] / weights * fed / rate for pipe, rate in chip.rates.items()}
    products = sum(i.base in PRODUCTS for i in loop) * times
    clocks = WARPGROUP * weights / products / fed if products else 0.0
    return Load(used["issue"] / weights, busy, clocks, sum(i.stall for i in loop) / len(loop))


def _work(instruction: Instruction, chip: Chip) -> Iterator[tuple[str, int]]:
    yield "issue", 1
    for pipe in pipes(instruction):
        yield pipe, slots(instruction, chip)
