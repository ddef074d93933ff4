"""What the assembler leaves of a kernel: its instructions and loops, its registers, spills and warnings."""

import re
from dataclasses import dataclass

WGMMA = ("HGMMA", "QGMMA", "IGMMA")
PRODUCTS = (*WGMMA, "HMMA")
"""HMMA is what `mma.sync` becomes."""
ADDS = ("FADD",)
LOCAL = ("LDL", "STL")

ADDRESS = re.compile(r"/\*[0-9a-f]{4,}\*/")
# wait mask : read barrier : write barrier : yield : stall, /*address*/, predicate, opcode, operands
LINE = re.compile(r"\s*[^\s:]+:[^\s:]+:[^\s:]+:[^\s:]+:(\d+)\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*)")
LABEL = re.compile(r"\s*(\.L_\w+):")


@dataclass(frozen=True)
class Instruction:
    """`opcode` has its modifiers, LDS.128; `stall` is how many clocks later its warp may issue the next one."""

    opcode: str
    operands: str
    stall: int

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Program:
    """The instructions of a kernel in the order of their addresses, and its loops as places in it."""

    instructions: tuple[Instruction, ...]
    loops: tuple[range, ...]

    def count(self, bases: tuple[str, ...], where: range | None = None) -> int:
        """How many instructions, of all or of those in `where`, have one of these opcodes."""
        chosen = self.instructions if where is None else self.instructions[where.start : where.stop]
        return sum(i.base in bases for i in chosen)

    def behind(self, loop: range) -> tuple[Instruction, ...]:
        """What runs after a loop, to the end: what stands behind that are waits."""
        rest = self.instructions[loop.stop :]
        return rest[: 1 + next(i for i, instruction in enumerate(rest) if instruction.base == "EXIT")]


def read_sass(text: str) -> Program:
    """Reads nvdisasm's listing with control codes. A loop is what lies between a label and a later branch to it."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif parts := LINE.match(line):
            found.append(Instruction(parts[2], parts[3].strip(), int(parts[1])))
        elif ADDRESS.search(line):
            raise ValueError(f"not an instruction with its control code: {line.strip()!r}")
    loops = []
    for place, instruction in enumerate(found):
        if instruction.base == "BRA" and (to := re.search(r"\.L_\w+", instruction.operands)):
            if labels[to[0]] < place:  # a branch to itself is the padding after the end
                loops.append(range(labels[to[0]], place + 1))
    return Program(tuple(found), tuple(loops))


def hot_loop(program: Program, work: tuple[str, ...] = PRODUCTS) -> range:
    """The loop that multiplies: of the innermost loops with such work the one with the most, and then the shortest.

    The shortest, because code that waits for a barrier stands behind the loop and branches back into its middle.
    """
    busy = [loop for loop in program.loops if program.count(work, loop)]
    inside = [a for a in busy if not any(a.start <= b.start and b.stop <= a.stop and a != b for b in busy)]
    if not inside:
        what = "a WGMMA or HMMA" if work == PRODUCTS else " or ".join(work)
        raise ValueError(f"none of {len(program.loops)} loops has {what}, so there is no loop to judge")
    return max(inside, key=lambda loop: (program.count(work, loop), -len(loop)))


@dataclass(frozen=True)
class Log:
    """What ptxas says of one kernel: registers a thread, bytes of stack and of spills, numbers of its warnings."""

    registers: int
    stack: int
    spills: int
    warnings: tuple[str, ...]


def read_log(text: str) -> Log:
    """Reads the output of `ptxas -v`."""
    used = re.findall(r"Used (\d+) registers", text)
    bytes_ = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if not used or not bytes_:
        raise ValueError(f"the log of ptxas has no line on registers or on spills:\n{text}")
    stack, stores, loads = (sum(int(row[column]) for row in bytes_) for column in range(3))
    return Log(max(map(int, used)), stack, stores + loads, tuple(sorted(set(re.findall(r"\bC75\d\d\b", text)))))
