"""GPU benchmarks without a GPU: their lists, files, parts and figures, kernels that lower, and a run on the CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cold, gpu_matmul, gpu_micro, gpu_plot, gpu_results, gpu_timing, needs
from benchmarks.gpu_cases import COPY, Case, canonical, groups, targets
from benchmarks.gpu_results import ASSUMED, Results, Target, newest, opened, part, peaks
from lowbit.ir.build import param
from lowbit.testing.checks import random_array, random_rows
from lowbit.testing.terms import kernel_term

MACHINE = {"device": ASSUMED, "jax": "0.11.2", "jaxlib": "0.11.2", "source": "abc", "date": "2026-01-01"}
SMALL = [[Case("halves", 128, 256, 2, "bfloat16", None)], [Case("bcq3", 128, 256, 2, "float16", "decode")]]
OTHERS = [
    [Case(what, 128, 256, 2, "bfloat16", "decode") for what in ("any_precision4", "any_precision3")],
    [Case("m1v4", 128, 256, 2, "bfloat16", "decode")],
    [Case(what, 128, 256, 2, "float16", "decode") for what in ("nested_fp16", "nested_fp8")],
]
BACK = [[Case(what, 128, 256, 2, "bfloat16", "xla_dx")] for what in ("halves", "bcq3")]


def rows_of(results: Results) -> dict[str, Any]:
    return json.loads(results.path.read_text("utf-8"))


# ---------------------------------------------------------------- what is measured


def test_stored_bytes_are_those_of_the_report() -> None:
    for what, bits in (("uniform4", 4 + (16 + 8) / 128), ("bcq4", 4 + 4 * 16 / 128), ("bcq2", 2 + 2 * 16 / 128)):
        case = Case(what, 28672, 8192, 1, "bfloat16", "mma")
        assert case.stored == 28672 * 8192 * bits / 8 == case.type.bits / 8
        assert case.bytes == case.stored + 2 * (8192 + 28672)


def test_stored_bytes_of_a_width_are_those_that_it_reads() -> None:
    for what, bits in (("any_precision4", 4 + 256 / 8192), ("any_precision3", 3 + 128 / 8192), ("nested_fp8", 8)):
        case = Case(what, 28672, 8192, 1, "bfloat16", None)
        assert case.stored == 28672 * 8192 * bits / 8 < case.type.bits / 8
    codebook = Case("m1v4", 28672, 8192, 1, "bfloat16", "mma")
    assert codebook.stored == 28672 * 8192 * (2 + 16 / 128) / 8 + 2 * 256 * 4 == codebook.type.bits / 8


def test_widths_of_one_array_stand_together() -> None:
    for group in groups():
        assert len({(case.n, case.k) for case in group}) == 1
        assert len({str(canonical(case.what, 64, 256).fields) for case in group if case.what != "halves"}) <= 1


def test_roofline_is_of_memory_then_of_the_matrix_unit() -> None:
    of, one, many = peaks(ASSUMED), *(Case("halves", 4096, 4096, m, "float16", None) for m in (1, 2048))
    assert one.roofline(of) == one.bytes / 3.35e12
    assert many.roofline(of) == 2 * 2048 * 4096**2 / 989e12
    assert Case("nested_fp8", 4096, 4096, 2048, "float16", "fp8").roofline(of) == many.roofline(of) / 2


def test_every_shape_batch_format_and_dtype_is_a_case() -> None:
    named = {case.name: case for group in groups() for case in group}
    once = 4 * (2 * 8 + 4 * (2 * 8 + 2) + 5 * (8 + 2) + 5 * 6 + 6 * 3) + 4 * (7 + 7 + 3 + 2 * 7)
    back = 2 * 3 * (1 + 4 * 2)
    assert len(named) == sum(map(len, groups())) == once + back
    assert sum(case.back for case in named.values()) == back
    promised = {need for target in targets() for need in target.needs} - {COPY}
    assert promised == {case.name for group in groups()[:15] for case in group}


def test_peaks_of_an_unknown_device() -> None:
    assert peaks("NVIDIA H200").memory == 4.8e12
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe"):
        with pytest.raises(ValueError, match=f"'{device}' has no peaks here.*add them to PEAKS"):
            peaks(device)


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_matmul, "newest", lambda name: Results(Path(), {"device": ASSUMED}))
    assert gpu_matmul.main(["--list", "PART=2/51"]) == 0
    out = capsys.readouterr().out
    assert "3.35 TB/s, 989 TFLOP/s; copy not measured" in out
    (one,) = (line for line in out.splitlines() if line.startswith("uniform4 mma 28672x8192 m=1 bfloat16"))
    assert one.split()[5:7] == ["122,945,536", "36.7"]
    assert one.endswith("not measured")
    assert "| uniform4 28672x8192: time at m=8 over m=1 | at most 1.3 | not measured |" in out


def test_list_of_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_micro.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(q.name in out for q in gpu_micro.questions()) and "fetch bcq2 28672x8192 m=128" in out


def test_measuring_needs_a_hopper() -> None:
    with pytest.raises(SystemExit):
        gpu_results.hopper(argparse.ArgumentParser())


# ---------------------------------------------------------------- parts, files, figures


def test_parts_are_disjoint_and_all_of_it() -> None:
    parts = [part(range(20), f"PART={i}/3") for i in (1, 2, 3)]
    assert sorted(i for found in parts for i in found) == list(range(20))
    assert parts[0][0] == 0 and part([7], "1/1") == [7]


@pytest.mark.parametrize("text", ["3", "0/3", "4/3", "a/b", "PART=1/"])
def test_parts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none: write PART=i/n"):
        part([1], text)


def test_results_are_kept_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    monkeypatch.delenv("OUT", raising=False)
    first = opened("x", MACHINE, kept)
    first.add({"name": "a", "seconds": 1.0})
    assert first.path == kept / "nvidia-h100-80gb-hbm3_jax-0.11.2" / "x.json"
    monkeypatch.setenv("OUT", str(out))
    later = opened("x", MACHINE | {"date": "2026-01-02"}, kept)
    later.add({"name": "b", "seconds": 2.0})
    assert later.path == out / "nvidia-h100-80gb-hbm3_jax-0.11.2" / "x.json"
    assert [(r["name"], r["date"]) for r in rows_of(later)["rows"]] == [("a", "2026-01-01"), ("b", "2026-01-02")]
    assert set(opened("x", MACHINE, kept).rows) == {"a", "b"}
    assert newest("x", kept).rows.keys() == {"a"} and newest("y", kept).machine == {"device": ASSUMED}


def test_results_of_another_machine_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    opened("x", MACHINE, tmp_path).add({"name": "a"})
    with pytest.raises(ValueError, match=r"holds results of jaxlib 0\.11\.2, this is 0\.11\.3: move it away"):
        opened("x", MACHINE | {"jaxlib": "0.11.3"}, tmp_path)
    assert opened("x", MACHINE | {"jax": "0.12.0"}, tmp_path).rows == {}


def test_what_was_wrong_or_of_other_code_is_measured_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.json", MACHINE)
    results.add({"name": "a"})
    results.add({"name": "b", "wrong": "by far"})
    assert [results.done(name) for name in "abc"] == [True, False, False]
    assert not Results(results.path, MACHINE | {"source": "def"}, results.rows).done("a")
    assert len(gpu_results.here("x")["source"]) == 12


def test_median_and_spread() -> None:
    assert cold.middle([4.0, 1.0, 2.0]) == {"seconds": 2.0, "spread": 1.5}
    assert gpu_timing.by_name([("a", 2.0), ("b", 4.0), ("a", 6.0)], 4) == {"a": 2e-3, "b": 1e-3}


def test_weights_in_turn_exceed_the_cache() -> None:
    assert cold.copies(470 << 20) == 2
    assert cold.copies(1 << 40) == 2
    assert cold.copies(4 << 20) == 128


def test_targets() -> None:
    most = Target("t", ("a", "b"), lambda a, b: a["seconds"] / b["seconds"], 1.3, least=False)
    assert most.line({"a": {"seconds": 1.0}}) == "| t | at most 1.3 | not measured |"
    assert most.line({"a": {"seconds": 5.0}, "b": {"seconds": 4.0}}) == "| t | at most 1.3 | 1.25, met |"
    bandwidth, _, speed, *_ = targets()
    copy = {"bytes": 3e12, "seconds": 1.0}
    assert bandwidth.value({"stored": 2e12, "seconds": 1.0}, copy) == pytest.approx(2 / 3)
    assert "0.67, missed" in bandwidth.line(
        dict(zip(bandwidth.needs, ({"stored": 2e12, "seconds": 1.0}, copy), strict=True))
    )
    rows = [{"what": what, "m": 8, "seconds": s} for what, s in (("halves", 1.0), ("bcq2", 4.0), ("bcq2", 2.0))]
    assert speed.value(*rows) == 0.5


def test_targets_over_several_batches() -> None:
    few, many, fp8 = (target for target in targets() if "28672x5120" in target.name)
    assert (few.limit, many.limit, fp8.limit) == (1.06, 1.2, 1.5)
    assert len(few.needs) == 2 * 4 and len(many.needs) == len(fp8.needs) == 3 * 3
    assert fp8.needs[3:5] == tuple(f"nested_fp8 {way} 28672x5120 m=512 float16" for way in ("fp8", "decode"))
    times = {512: (4.0, 2.0, 1.0), 1024: (8.0, 8.0, 4.0), 2048: (9.0, 6.0, 12.0)}  # dense, and two ways
    rows = [
        {"what": what, "m": m, "seconds": s}
        for m, seconds in times.items()
        for what, s in zip(("halves", "ours", "ours"), seconds, strict=True)
    ]
    assert fp8.value(*rows) == pytest.approx(1.5)
    assert many.value(*rows) == pytest.approx((1 / 4 + 1 / 2 + 2 / 3) / 3)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert needs.main() == 0
    monkeypatch.setattr(needs, "BESIDE", ("no-such-package>=1",))
    assert needs.main() == 1
    assert "lacks no-such-package>=1: install" in capsys.readouterr().out


def test_the_page_has_what_was_measured() -> None:
    page = Path(gpu_results.__file__).parents[1].joinpath("docs/gpu_benchmarks.md").read_text("utf-8")
    table = "\n".join(gpu_matmul.promises(newest(gpu_matmul.NAME).rows))
    assert table in page, f"docs/gpu_benchmarks.md has another table than the committed results:\n{table}"


# ---------------------------------------------------------------- kernels and a run


@pytest.mark.parametrize("kind", ["wgmma n=8, A in registers, 2", "rate IMAD.HI + HFMA2", "shared parameters"])
def test_questions_lower_for_cuda(kind: str) -> None:
    (q,) = (q for q in gpu_micro.questions() if q.name.startswith(kind))
    word = jax.ShapeDtypeStruct((1,), jnp.uint32)
    assert "mosaic_gpu" in jax.jit(gpu_micro.program(q)).trace(word).lower(lowering_platforms=("cuda",)).as_text()


def test_answers() -> None:
    rate, *_ = (q for q in gpu_micro.questions() if q.name == "rate LOP3")
    assert rate.answer(rate.each * gpu_micro.TURNS * 4 * 128 / 64) == 64  # as many clocks as 64 lanes a clock take
    wgmma, *_ = gpu_micro.questions()
    assert wgmma.answer(16 * gpu_micro.TURNS * 9) == 9
    load = gpu_micro.questions()[-1]  # 4 warps of each of 4 warpgroups
    assert load.answer(load.each * gpu_micro.TURNS * 16 * 2.5) == 2.5


def test_fetching_lowers_for_cuda() -> None:
    run, avals = gpu_micro.fetch(Case("bcq2", 256, 1024, 8, "bfloat16", None))
    assert "mosaic_gpu" in jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Results:
    monkeypatch.setattr(gpu_matmul, "profiled", lambda: False)
    monkeypatch.setattr(gpu_matmul, "COPIED", 1 << 12)
    monkeypatch.setattr(cold, "ROTATED", 1 << 10)
    return Results(tmp_path / "gpu_matmul.json", MACHINE)


def test_a_run_measures_and_goes_on(
    cpu: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_matmul.run(SMALL, cpu, -1.0) == 0
    assert "1 results" in (said := capsys.readouterr().out) and "2 of this part are left, run it again" in said
    assert gpu_matmul.run(SMALL, cpu, 60.0) == 0
    assert "3 results" in (said := capsys.readouterr().out) and "0 of this part are left\n" in said
    row = cpu.rows["bcq3 decode 128x256 m=2 float16"]
    assert row["clock"] == "host" and row["seconds"] > 0 and row["weights"] == 2 and "wrong" not in row
    monkeypatch.setattr(gpu_matmul, "measure", lambda *_: pytest.fail("it was measured before"))
    assert gpu_matmul.run(SMALL, cpu, 60.0) == 0


@pytest.mark.slow
def test_every_kind_of_weight_is_made_varied_and_checked(cpu: Results) -> None:
    assert gpu_matmul.run([*OTHERS, *BACK], cpu, 60.0) == 0
    assert [row["weights"] for name, row in cpu.rows.items() if name != COPY] == [2] * 7


def test_a_wrong_gradient_is_named(
    cpu: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_matmul.gradient
    monkeypatch.setattr(gpu_matmul, "gradient", lambda *args: right(*args) + 100)
    assert gpu_matmul.run(BACK[1:], cpu, 60.0) == 1
    assert "WRONG bcq3 xla_dx 128x256 m=2 bfloat16: dx [m, k]: 512 of 512 differ" in capsys.readouterr().out


@pytest.mark.usefixtures("cpu")
def test_weights_in_turn_differ_and_are_valid() -> None:
    _, (first, *others) = gpu_matmul.rotation(OTHERS[2])
    assert others
    for w in others:
        assert not np.array_equal(first.fields["upper"], w.fields["upper"])
        assert np.isfinite(np.asarray(gpu_matmul.lb.dequantize(w), np.float32)).all()
        assert not (np.asarray(w.fields["upper"]) & 0x7F == 0x7F).any()


def test_a_case_that_fails_or_is_wrong_is_named(
    cpu: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [[Case("bcq3", 128, 256, 2, "float16", "mma")], SMALL[1]]  # the kernels run on no CPU
    monkeypatch.setattr(gpu_matmul, "products", lambda case, x, ws: [
        gpu_matmul.lb.matmul(x, w, lowering=case.lowering) + 1 for w in ws
    ])  # fmt: skip
    assert gpu_matmul.run(bad, cpu, 60.0) == 2
    out = capsys.readouterr().out
    assert "FAILED bcq3 mma 128x256 m=2 float16: LoweringError: lowering 'mma'" in out
    assert "WRONG bcq3 decode 128x256 m=2 float16: y [m, n]: 32 of 32 differ" in out


def test_the_profiler_is_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = iter([3.0, 1.0, 2.0, 2.0, 9.0])

    def measure(f: Any, aggregate: bool) -> Any:
        return lambda *args: (f(*args), [("a", next(milliseconds)), ("b", 1.0)])

    monkeypatch.setattr(gpu_timing.profiler, "measure", measure)
    out, row = gpu_timing.timed(lambda x: x + 1, [jnp.zeros(2)], 2, cupti=True)
    assert out.tolist() == [1, 1] and row.pop("wall") > 0 and row.pop("temporary") >= 0
    assert row == {
        "seconds": 1.5e-3,
        "spread": pytest.approx(8 / 3),
        "clock": "CUPTI",
        "kernels": {"a": 1.5e-3, "b": 0.5e-3},
    }


def test_without_a_profiler_the_host_is_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    assert not gpu_timing.profiled()
    assert "times are the host's, launches included" in capsys.readouterr().out


def test_questions_are_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(tmp_path / "gpu_micro.json", MACHINE)
    monkeypatch.setattr(gpu_micro, "hopper", lambda parser: jax.devices()[0])
    monkeypatch.setattr(gpu_micro, "opened", lambda name, machine: results)
    first = gpu_micro.questions()[0]
    monkeypatch.setattr(gpu_micro, "questions", lambda: [first])
    monkeypatch.setattr(gpu_micro, "fetches", list)
    assert gpu_micro.main([]) == 1  # no kernel runs on a CPU
    assert "FAILED wgmma n=8, A in registers, 1 warpgroup: ValueError" in capsys.readouterr().out
    clocks = 16 * gpu_micro.TURNS * 9
    monkeypatch.setattr(gpu_micro, "program", lambda q: lambda _: jnp.full((132, q.groups, 128), clocks))
    assert gpu_micro.main([]) == 0
    monkeypatch.setattr(gpu_micro, "program", lambda _: pytest.fail("it was asked before"))
    assert gpu_micro.main([]) == 0
    assert results.rows[first.name]["value"] == 9 and results.rows[first.name]["expected"] == 4


@pytest.mark.slow
def test_the_kernels_results_are_checked_on_some_columns() -> None:
    case = Case("uniform4", 192, 512, 8, "bfloat16", "mma")
    own, x = random_array(canonical(case.what, case.n, case.k)), random_rows(8, 512, dtype="bfloat16")
    w = np.asarray(gpu_matmul.lb.dequantize(own)).astype(jnp.bfloat16).astype(np.float32)
    y = jnp.asarray(np.asarray(x, np.float32) @ w, jnp.bfloat16)
    gpu_matmul.check(case, jax.device_get(own), x, y)
    with pytest.raises(AssertionError, match=r"y \[m, n\]: 4 of 64 differ; at \(\d, 15\)"):
        gpu_matmul.check(case, jax.device_get(own), x, y.at[:, -1].add(1e5))


def test_sums_are_checked_within_the_bound_of_float32() -> None:
    case = Case("bcq1", 192, 512, 2, "float16", "sums")
    own, x = random_array(canonical(case.what, case.n, case.k)), random_rows(2, 512, dtype="float16") / np.float16(64)
    y = gpu_matmul.lb.matmul(jnp.asarray(x), own, lowering="table")
    gpu_matmul.check(case, jax.device_get(own), x, y)
    with pytest.raises(AssertionError, match=r"y \[m, n\]: 2 of 32 differ; at \(\d, 15\)"):
        gpu_matmul.check(case, jax.device_get(own), x, y.at[:, -1].add(100))


def test_the_product_in_8_bits_is_checked_with_encoded_activations() -> None:
    case = Case("nested_fp8", 192, 512, 8, "float16", "fp8")
    own, x = random_array(canonical(case.what, case.n, case.k)), random_rows(8, 512, dtype="float16") / np.float16(64)
    y = gpu_matmul.lb.matmul(jnp.asarray(x), own, lowering="decode")
    assert kernel_term(8, own.type, "f16") is own.type.product(param("x", "f16", None, m=8, k=512))
    gpu_matmul.check(case, jax.device_get(own), x, y)
    with pytest.raises(AssertionError, match=r"y \[m, n\]: 4 of 64 differ; at \(\d, 15\)"):
        gpu_matmul.check(case, jax.device_get(own), x, y.at[:, -1].add(100))


# ---------------------------------------------------------------- the plot


def test_the_plot_has_the_fastest_way_of_each_batch() -> None:
    names = {"uniform4 mma 28672x8192 m=1": 50e-6, "uniform4 mma 28672x8192 m=2048": 2e-3}
    names |= {"uniform4 dense 28672x8192 m=2048": 1e-3, "halves 28672x8192 m=1": 200e-6}
    results = Results(Path(), MACHINE, {f"{name} bfloat16": {"seconds": s} for name, s in names.items()})
    found = gpu_plot.curves(results)
    assert found.keys() == {"halves", "uniform4"}
    assert [y for _, y in found["uniform4"]] == [2 * 28672 * 8192 / 50e-6, 2 * 2048 * 28672 * 8192 / 1e-3]
    assert found["halves"][0][0] == pytest.approx(1, abs=1e-3)  # two operations for each weight of two bytes


def test_the_plot_is_drawn_or_says_that_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"uniform4 mma 28672x8192 m=1 bfloat16": {"seconds": 50e-6}, COPY: {"bytes": 3e9, "seconds": 1e-3}}
    monkeypatch.setattr(gpu_plot, "newest", lambda name: Results(Path(), MACHINE, rows))
    assert gpu_plot.main([str(tmp_path / "roof.png")]) == 0
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(gpu_plot, "newest", lambda name: Results(Path(), MACHINE))
    assert gpu_plot.main([str(tmp_path / "none.png")]) == 1
    assert "nothing is measured yet" in capsys.readouterr().out
