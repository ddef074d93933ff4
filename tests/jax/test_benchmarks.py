"""The benchmarks run, at sizes that take no time: what they print is what the README and the results quote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit as lb
from benchmarks import cpu_matmul, generate, gradient_memory, harness, load_memory, quantize_speed, selector


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "EVICT", 1 << 10)
    monkeypatch.setattr(cpu_matmul, "SHAPES", ((256, 256), (256, 384)))
    monkeypatch.setattr(cpu_matmul, "BATCHES", (3,))
    for module in (gradient_memory, quantize_speed):
        monkeypatch.setattr(module, "K", 256)
        monkeypatch.setattr(module, "N", 256)
    monkeypatch.setattr(quantize_speed, "SHARE", 2)
    monkeypatch.setattr(quantize_speed, "LAYER", 128)


def named(rows: list[harness.Row]) -> dict[str, harness.Row]:
    out = {r["name"]: r for r in rows}
    assert len(out) == len(rows)
    for r in rows:
        assert set(r) - {"thirds"} == {"name", "value", "unit", "baseline", "ratio"}
    return out


@pytest.mark.slow
def test_products() -> None:
    found = named(list(cpu_matmul.measure()))
    assert {"bcq3_g128_batch3", "uniform4_g128_256x384_batch3", "dense_batch3"} <= set(found)
    assert {"codebook_m2v8_batch3", "any_precision_3_of_8_batch3", "any_precision_8_256x384_batch3"} <= set(found)
    assert all(r["value"] > 0 for r in found.values())
    assert found["dense_batch3"]["ratio"] == 1


def test_gradients() -> None:
    found = named(list(gradient_memory.measure()))
    for name in ("scale_gradient", "autodiff_scale_gradient"):
        assert found[f"{name}_temp"]["ratio"] == found[f"{name}_temp"]["value"] / (256 * 256 * 4)
        assert found[f"{name}_time"]["value"] > 0


@pytest.mark.slow
def test_solver_is_as_good_as_the_published_one() -> None:
    found = named(list(quantize_speed.binary()))
    assert 0.02 < found["bcq3_alternating_mse"]["value"] < 0.04
    # Half of the rows each: the two errors differ by what the halves differ.
    assert found["bcq3_alternating_mse"]["ratio"] == pytest.approx(1, abs=0.05)
    assert found["bcq3_greedy_mse"]["ratio"] > 1


@pytest.mark.slow
def test_additive_codebooks_are_better_than_what_they_start_from() -> None:
    found = named(list(quantize_speed.additive()))
    assert found["m2v8_kmeans_error"]["ratio"] > 1


@pytest.mark.slow
def test_second_order_quantizers_are_better_than_what_they_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(list(quantize_speed.second_order()))
    assert found["gptq4_error"]["ratio"] < 1 and found["lnq2_error"]["ratio"] < 1
    assert found["lnq2_of_limit"]["ratio"] == found["lnq2"]["value"] / 600 < 1
    monkeypatch.setattr(quantize_speed, "LNQ_SECONDS", 1e-3)
    with pytest.raises(SystemExit, match=r"^lnq at 2 bits took \d+ s for 256x256, and may take 0$"):
        list(quantize_speed.second_order())


def test_the_solvers_run_as_a_script() -> None:
    root = Path(quantize_speed.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "benchmarks/quantize_speed.py", "--help"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and "--json" in run.stdout, run.stderr


@pytest.mark.slow
def test_nested_k_means_beside_the_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_speed, "find_spec", lambda name: None)
    found = named(list(quantize_speed.nested()))
    assert found["nested3to8_unweighed"]["value"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("layout", ["gguf", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_conversion_takes_one_layer(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout == "gguf":
        pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'lowbit[gguf]'")
    monkeypatch.setattr(load_memory, "LAYOUTS", {layout: load_memory.LAYOUTS[layout]})
    monkeypatch.setattr(load_memory, "loading", lambda size: [])
    monkeypatch.setattr(load_memory, "FEWEST", 64)  # so that a layer is small beside the file
    size = 128_000_000
    found = named(list(load_memory.measure(size)))
    assert set(found) == {f"{layout}_{what}" for what in ("anonymous", "resident", "time", "rate")}
    assert found[f"{layout}_anonymous"]["value"] < size / 2
    assert found[f"{layout}_rate"]["value"] == pytest.approx(size / found[f"{layout}_time"]["value"], rel=0.05)
    monkeypatch.setattr(load_memory, "FIXED", -(1 << 40))
    with pytest.raises(SystemExit, match=rf"^{layout}: \d+ bytes of anonymous memory, and one layer may take -\d+$"):
        list(load_memory.measure(2_000_000))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_load_takes_the_model_and_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(list(load_memory.loading(4_000_000)))
    assert set(found) == {f"load_{what}" for what in ("anonymous", "beside_the_model", "resident", "time", "rate")}
    assert found["load_resident"]["value"] > found["load_anonymous"]["value"] > 0
    monkeypatch.setattr(load_memory, "FIXED", -(1 << 40))
    with pytest.raises(
        SystemExit, match=r"^load: \d+ bytes of anonymous memory, and beside the model's \d+ two layers may"
    ):
        list(load_memory.loading(4_000_000))


@pytest.mark.slow
def test_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CACHES", {"kivi4": lb.models.Kivi(4, group=8, residual=8)})
    found = named(list(generate.measure(batch=2, smoke=True)))
    kinds = {"dense", "uniform4", "bcq3", "dense_kivi4_cache"}
    assert set(found) == {f"{kind}_{what}" for kind in kinds for what in ("prefill", "decode", "read")}
    assert all(r["value"] > 0 for r in found.values())
    s = generate.SMOKE
    weights = s.width * (3 * s.hidden + s.vocab) + s.width * 64 * 2 * (2 + 1) + 3 * s.width
    cache = (s.prompt + s.new) * (2 * 64 + 1) * 4 + 4  # of each sequence: keys, values, positions and a length
    assert found["dense_read"]["value"] == 4 * weights / 2 + cache
    assert found["bcq3_read"]["ratio"] < found["uniform4_read"]["ratio"] < 0.3
    assert found["dense_kivi4_cache_read"]["ratio"] < 1


@pytest.mark.slow
def test_what_choosing_widths_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    more = harness.row("block_fixed", 1.0, "ms", "block_fixed", 1.0)
    monkeypatch.setattr(selector, "measure", lambda width, hidden, smoke: [more])
    found = named(list(generate.measure(batch=1, smoke=True, dp=True)))
    kinds = ["chosen", "forced3", "forced4", "given3", "given4", "known3", "known4"]
    assert list(found) == [*(f"{kind}_step" for kind in kinds), "block_fixed"]
    assert all(found[f"{kind}_step"]["value"] > 0 for kind in kinds)
    assert found["given3_step"]["ratio"] == 1 and found["forced4_step"]["baseline"] == "given4_step"


def test_a_ratio_is_of_the_fastest_rounds() -> None:
    told = harness.fastest("a", [2.0, 4.0, 9.0, 6.0, 3.0, 3.0], "b", [2.0, 1.0, 3.0, 4.0, 6.0, 2.0])
    assert told == {"name": "a", "value": 2000, "unit": "ms", "baseline": "b", "ratio": 2, "thirds": [1.5, 2]}


@pytest.mark.slow
def test_choosing_widths() -> None:
    found = named(selector.measure(512, 512, smoke=True))
    layers = {f"{k}x{n}_{way}" for k, n in ((512, 512), (512, 128)) for way in ("fixed", "line", "projection")}
    ways = ("fixed", "line", "projection", "both", "both_asynchronous")
    alone = {f"block_estimates_{way}" for way in ("line", "projection", "both")}
    assert set(found) == layers | {f"block_{way}" for way in ways} | alone
    assert all(r["value"] > 0 for r in found.values())
    assert all(found[f"{name}_fixed"]["ratio"] == 1 for name in ("512x512", "512x128", "block"))


def test_options_of_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--size", "7"])
    given: list[int] = []
    harness.main("title", lambda size: given.append(size) or [], size=3)
    assert given == [7]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick"])
    harness.main("title", lambda quick: given.append(quick) or [], quick=False)
    assert given == [7, True]


def test_rows_are_written_where_json_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(target)])
    harness.main("title", lambda: [harness.row("a", 3.0, "ms", "b", 2.0)])
    rows = json.loads(target.read_text())
    assert rows == [{"name": "a", "value": 3.0, "unit": "ms", "baseline": "b", "ratio": 1.5}]
    assert "1.500" in capsys.readouterr().out
