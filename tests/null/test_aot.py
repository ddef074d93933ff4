"""The machine code of kernels: what is read from it, the model of an H100 and what is refused."""

import re
from pathlib import Path

import pytest

from tests.machine_code import LOG, SASS, Listed, write
from tools.aot.model import BYTES, CHIPS, RATES, load, pipes, slots
from tools.aot.report import BEGIN, END, measure, place, refusals, table
from tools.aot.sass import Instruction, hot_loop, read_log, read_sass

ROOT = Path(__file__).parents[2]


def repeated(**times: int) -> list[Instruction]:
    """Instructions by opcode, a `_` for each `.`, each stalling its warp for two clocks."""
    return [Instruction(name.replace("_", "."), "", 2) for name, count in times.items() for _ in range(count)]


# ---------------------------------------------------------------- reading


def test_instructions_are_read_with_modifiers_operands_and_stalls() -> None:
    found = read_sass(SASS).instructions
    assert len(found) == 18
    assert found[4] == Instruction("LDS.64", "R16, [R12+0x1000]", 1)
    assert (found[6].opcode, found[6].stall) == ("HADD2", 13)
    assert (found[8].opcode, found[8].base) == ("UIADD3", "UIADD3")  # not its predicate
    assert found[10].base == "HGMMA"


def test_a_line_that_is_no_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not an instruction with its control code: '/\*0000\*/   LDC"):
        read_sass("    /*0000*/   LDC R1, c[0x0][0x28]")


def test_the_hot_loop_is_the_innermost_that_multiplies_less_its_wait() -> None:
    program = read_sass(SASS)
    assert set(program.loops) == {range(2, 12), range(1, 13), range(4, 16), range(14, 17)}
    assert hot_loop(program) == range(2, 12)
    assert program.count(("HGMMA",), hot_loop(program)) == program.count(("HGMMA",)) == 2


def test_of_two_loops_the_one_with_more_products_is_hot() -> None:
    tail = SASS.replace(".L_x_", ".L_y_").replace("/*0090*/                   HGMMA.64x16x16.F32", "/*0090*/ HADD2")
    assert hot_loop(read_sass(tail + SASS)) == range(20, 30)
    assert hot_loop(read_sass(SASS + tail)) == range(2, 12)


def test_a_loop_around_two_that_multiply_is_not_hot() -> None:
    both = SASS + SASS.replace(".L_x_", ".L_y_")
    program = read_sass(f".L_around:\n{both}   -:-:-:Y:05 /*0240*/ BRA `(.L_around)\n")
    assert range(37) in program.loops
    assert hot_loop(program) == range(2, 12)


def test_code_without_products_has_no_hot_loop() -> None:
    with pytest.raises(ValueError, match="none of 4 loops has a WGMMA"):
        hot_loop(read_sass(SASS.replace("HGMMA.64x16x16.F32", "HADD2")))


def test_the_log_of_ptxas() -> None:
    log = read_log(LOG.replace("0 bytes spill stores, 0 bytes", "24 bytes spill stores, 40 bytes"))
    assert (log.registers, log.stack, log.spills, log.warnings) == (168, 0, 64, ("C7519",))
    with pytest.raises(ValueError, match="no line on registers or on spills:\nptxas fatal"):
        read_log("ptxas fatal")


# ---------------------------------------------------------------- the model


def test_memory_feeds_as_many_weights_as_their_bits_allow() -> None:
    assert BYTES == pytest.approx(14.46, abs=0.005)  # 3.35 TB/s over 132 SMs at 1.755 GHz
    for bits in (1, 4.5):
        # One instruction of the ALU a weight, beside a product that keeps the loop a loop of products.
        its = load(repeated(LOP3_LUT=1000, HGMMA_64x8x16=1), 1000, bits)
        assert its.pipes["ALU"] == pytest.approx(8 * BYTES / bits / 64)
        assert its.pipes["issue"] == pytest.approx(8 * BYTES / bits / 128, rel=1e-3 + 1e-9)
        assert its.worst == "ALU"


def test_a_loop_of_known_counts() -> None:
    # The loop of a 4-bit decode by magic numbers, 128 weights a lane: its figures were worked out by hand.
    its = load(
        repeated(LOP3_LUT=66, HADD2=32, HFMA2=32, SHF_R=19, IMAD_U32=5, LDS_128=4, HGMMA_64x16x16=16, UIADD3=40), 128, 4
    )
    assert its.instructions == 214 / 128
    fed = 8 * BYTES / 4
    slots = {"issue": 214, "ALU": 85, "IMAD": 5, "FMA": 69, "LSU": 16, "XU": 0, "TC": 16 * 8}
    assert its.pipes == pytest.approx({pipe: n / 128 * fed / RATES[pipe] for pipe, n in slots.items()})
    assert (round(its.pipes["issue"], 2), its.worst, its.stall) == (0.38, "issue", 2)
    assert its.clocks == pytest.approx(128 * 128 / 16 / fed)
    assert round(its.clocks, 1) == 35.4


def test_what_follows_a_loop_is_counted_once() -> None:
    program = read_sass(SASS)
    behind = program.behind(hot_loop(program))
    assert [i.base for i in behind] == ["BRA", "EXIT"]
    its = load(repeated(FADD=4, HGMMA_64x8x16=1), 8, 4, times=10, after=repeated(FADD=6, LDS_64=2))
    assert its.instructions == (50 + 8) / 8
    assert its.pipes["FMA"] == pytest.approx((40 + 6) / 8 * 2 * BYTES / RATES["FMA"])
    assert its.clocks == pytest.approx(128 * 8 / 10 / (2 * BYTES))


@pytest.mark.parametrize(
    ("opcode", "where", "how_many"),
    [
        ("PRMT", ("ALU",), 1),
        ("IMAD.HI.U32", ("IMAD", "FMA"), 1),
        ("HFMA2.BF16_V2", ("FMA",), 1),
        ("LDS.U16", ("LSU",), 1),
        ("LDS.64", ("LSU",), 2),
        ("LDSM.16.M88.4", ("LSU",), 4),
        ("I2F.U8", ("XU",), 1),
        ("QGMMA.64x8x32.F32.E4M3.E4M3", ("TC",), 4),
        ("IGMMA.64x256x32.S8.S8", ("TC",), 128),
        ("WARPGROUP.DEPBAR.LE", (), 1),
        ("USHF.R.U64", (), 1),
    ],
)
def test_what_an_instruction_takes(opcode: str, where: tuple[str, ...], how_many: int) -> None:
    instruction = Instruction(opcode, "", 1)
    assert pipes(instruction) == where
    assert slots(instruction) == how_many


def test_four_warps_multiply_before_hopper() -> None:
    # 16 x 8 x 16 multiply-adds each, of which an A100 has 1024 a clock and SM, an RTX 4090 256 with sums in float32.
    for chip, rate in (("a100", 1024), ("rtx4090", 256)):
        its = load(repeated(HMMA_16816_F32=2), 16, 4, chip=CHIPS[chip])
        assert pipes(Instruction("HMMA.16816.F32", "", 1)) == ("TC",)
        fed = 8 * CHIPS[chip].memory / CHIPS[chip].clock / CHIPS[chip].sms / 4  # weights a clock and SM
        assert its.pipes["TC"] == pytest.approx(2 * 4 * 16 * 8 * 16 / rate / (16 * 128 / fed))
        assert its.clocks == pytest.approx(16 * 128 / 2 / fed)


def test_an_instruction_that_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not know which pipe TTUOPEN\.X runs on: add it to"):
        load(repeated(TTUOPEN_X=1, HGMMA_64x8x16=1), 1, 4)


# ---------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("log", "sass", "kernel", "complaint"),
    [
        (("0 bytes spill loads", "16 bytes spill loads"), None, Listed(), "spills 16 bytes of registers"),
        (("0 bytes stack", "32 bytes stack"), None, Listed(), "32 bytes of stack and 0 loads and stores"),
        (None, ("LDC R1", "LDL R1"), Listed(), "0 bytes of stack and 1 loads and stores"),
        (("C7519", "C7510"), None, Listed(), "WGMMAs serialized (C7510)"),
        (None, None, Listed(wgmmas=4), "has 2 WGMMAs in its loop where the catalog says 4"),
        (None, None, Listed(target=0.3), "fills TC to 45.2% at memory speed; its target is 30%"),
        (None, None, Listed(bits=1.5), "fills TC to 120.5% at memory speed; its target is 90%"),
        (None, None, Listed(bits=1.5, target=None), None),
        (None, None, Listed(times=2), "fills TC to 90.4% at memory speed; its target is 90%"),
        (None, None, Listed(), None),
    ],
    ids=["spills", "stack", "local", "serialized", "products", "target", "bits", "no target", "times", "good"],
)
def test_refusals(
    log: tuple[str, str] | None, sass: tuple[str, str] | None, kernel: Listed, complaint: str | None, tmp_path: Path
) -> None:
    write(tmp_path, LOG.replace(*log) if log else LOG, SASS.replace(*sass) if sass else SASS)
    found = refusals(kernel, measure(kernel, tmp_path))
    if complaint is None:
        assert found == []
    else:
        (line,) = found
        assert line.startswith("small ") and complaint in line


def test_a_kernel_beside_the_one_that_multiplies_is_counted_too(tmp_path: Path) -> None:
    write(tmp_path)
    plain = SASS.replace("HGMMA.64x16x16.F32", "HADD2")
    write(tmp_path, LOG.replace("0 bytes spill loads", "8 bytes spill loads"), plain, "kernel_1")
    figures = measure(Listed(), tmp_path)
    assert (figures.wgmmas, figures.spills) == (2, 8)


def test_a_kernel_that_only_adds_is_judged_by_its_adds(tmp_path: Path) -> None:
    write(tmp_path, sass=SASS.replace("HGMMA.64x16x16.F32", "FADD"))
    figures = measure(Listed(wgmmas=0), tmp_path)
    assert (figures.wgmmas, figures.load.clocks, figures.load.pipes["TC"]) == (0, 0, 0)
    assert figures.load.instructions == 10 / 8  # the loop is the one that multiplies otherwise
    with pytest.raises(ValueError, match="0 of them with FADD, and just one must be"):
        measure(Listed(wgmmas=0), tmp_path / "nothing")
    with pytest.raises(ValueError, match="none of 4 loops has FADD"):
        hot_loop(read_sass(SASS), ("FADD",))


@pytest.mark.parametrize("names", [(), ("kernel_0", "kernel_1")])
def test_a_compilation_without_one_kernel_that_multiplies_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path, name=name)
    said = rf"{re.escape(str(tmp_path))}, {len(names)} of them with products, and just one must be\. One that equals"
    with pytest.raises(ValueError, match=said):
        measure(Listed(), tmp_path)


# ---------------------------------------------------------------- the page


def test_the_table(tmp_path: Path) -> None:
    write(tmp_path)
    kernels = [Listed(), Listed("none", target=None)]
    text = table([(kernel, measure(kernel, tmp_path)) for kernel in kernels], "jax 1 and ptxas 2").splitlines()
    assert text[0] == "Compiled by jax 1 and ptxas 2."
    assert len({line.count("|") for line in text[2:]}) == 1
    # 10 instructions for 8 weights; 28.9 weights a clock: 8 * 128 of them for two products take 35.4 clocks.
    assert text[4] == "| `small` | 4 | 168 | 2 | 1.25 | 28% | 6% | 6% | 6% | 23% | 45% | 17.7 | 3.3 | TC 45% of 90% |"
    assert text[5].endswith("| TC 45% |")


def test_the_table_stands_between_its_markers_and_again_when_made_again() -> None:
    page = f"# Title\n\n{BEGIN}\n{END}\n\nend\n"
    once = place(page, "| a |")
    assert once == f"# Title\n\n{BEGIN}\n\n| a |\n\n{END}\n\nend\n"
    assert place(place(page, "| longer |\n| text |"), "| a |") == once
    with pytest.raises(ValueError, match="the page needs a line '<!-- the table of `make aot` begins -->' and later"):
        place(f"{END}\n{BEGIN}\n", "| a |")


def test_the_page_of_the_documentation_has_the_markers() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    for chip in CHIPS.values():
        assert f"| {chip.name} |" in place(page, f"| {chip.name} |", chip)


def test_a_table_says_what_its_tensor_cores_do(tmp_path: Path) -> None:
    write(tmp_path, sass=SASS.replace("HGMMA.64x16x16.F32", "HMMA.16816.F32"))
    figures = measure(Listed(), tmp_path, CHIPS["a100"])
    assert figures.wgmmas == 2 and "| registers | HMMA |" in table([(Listed(), figures)], "jax", CHIPS["a100"])
