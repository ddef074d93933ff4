"""What the demo promises of the shipped weights, on the text and with the functions that it uses itself."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from examples.tinylm import corpus, demo, weights
from examples.tinylm.batches import Windows
from examples.tinylm.evaluate import bits_per_byte
from examples.tinylm.model import TinyLM

TEXT = corpus.match_listed("code").text
VARIANTS = {v.name: v for v in demo.variants()}


@pytest.fixture(scope="module")
def model() -> TinyLM:
    return weights.load()


@pytest.fixture(scope="module")
def bits(model: TinyLM) -> dict[str, float]:
    """Bits a byte of the float model and of the variants that the promises name, on the demo's sample."""
    names = ("bcq alternating 4-bit", "bcq alternating 3-bit", "bcq greedy 3-bit", "RTN 3-bit")
    measured = {n: demo.on_sample(demo.quantized(model, VARIANTS[n]), TEXT, "code") for n in names}
    return {"fp32": demo.on_sample(model, TEXT, "code"), **measured}


@pytest.mark.slow
def test_alternating_beats_greedy_and_rounding_at_3_bits(bits: dict[str, float]) -> None:
    assert bits["bcq alternating 3-bit"] < bits["bcq greedy 3-bit"]
    assert bits["bcq alternating 3-bit"] < bits["RTN 3-bit"]


@pytest.mark.slow
def test_alternating_beats_rounding_at_3_bits_on_all_of_the_text(model: TinyLM) -> None:
    names = ("bcq alternating 3-bit", "RTN 3-bit")
    alternating, rounding = (bits_per_byte(demo.quantized(model, VARIANTS[n]), TEXT) for n in names)
    assert alternating < rounding


@pytest.mark.slow
def test_weighing_errors_by_calibration_helps_at_2_bits(model: TinyLM) -> None:
    text = np.frombuffer(b"".join(corpus.train_code().values()), np.uint8)
    windows = Windows(text, model.config.context, 0)
    batches = [jnp.asarray(windows.batch(i, 8)[:, :-1].astype(np.int32)) for i in range(4)]
    variant = VARIANTS["bcq alternating 2-bit"]
    rules = [lb.Rule("embed", None), lb.Rule("layers/**", variant.format, variant.quantizer)]
    weighed = lb.quantize(model, rules, stats=lb.calibrate(model, batches))
    plain = demo.quantized(model, variant)
    assert demo.on_sample(weighed, TEXT, "code") < demo.on_sample(plain, TEXT, "code")


@pytest.mark.slow
def test_4_bits_are_close_to_float(bits: dict[str, float]) -> None:
    assert bits["bcq alternating 4-bit"] < bits["fp32"] + 0.05


@pytest.mark.slow
def test_nested_widths_cost_at_most_a_fiftieth_of_a_bit(model: TinyLM) -> None:
    """Over arrays of that width alone, a byte; and every width of an array is stored in the same bytes."""
    found = {}
    for name in ("any_bcq 4-bit", "any_precision 4-bit"):
        small = demo.quantized(model, VARIANTS[name])
        for bits in (3, 4):
            read = lb.at_width(small, bits)
            found[name.replace("4", str(bits))] = demo.on_sample(read, TEXT, "code")
            assert lb.report(read).bytes == lb.report(small).bytes
    for name, nested in found.items():
        alone = VARIANTS[f"{VARIANTS[name].alone} {VARIANTS[name].bits}-bit"]
        assert nested < demo.on_sample(demo.quantized(model, alone), TEXT, "code") + 0.02


@pytest.mark.slow
def test_scales_alone_close_half_of_the_gap_to_full_tuning(model: TinyLM) -> None:
    held = corpus.match_listed("topics").text
    tuned = demo.tune(model, VARIANTS["bcq alternating 3-bit"], corpus.tune_prose(), held)
    assert tuned.closed >= 0.5
    assert tuned.trainable[0] * 100 < tuned.trainable[1]


def test_figures_are_rows_with_a_baseline(tmp_path) -> None:
    measured = {"fp32": 32.0, "any_bcq 3-bit": 3.5, "bcq alternating 3-bit": 3.4, "bcq alternating 4-bit": 4.5}
    results = [demo.Result(n, n.rpartition(" ")[0] or n, b, 100, 1.5, 2.0) for n, b in measured.items()]
    tuned = demo.Tuned(3.0, 3.0, 2.5, 2.0, None, (10, 1000))  # type: ignore[arg-type]
    rows = json.loads(json.dumps(demo.rows(results, tuned, 2.0, 1.0)))
    assert all(set(r) == {"name", "value", "unit", "baseline", "ratio"} for r in rows)
    (nested,) = (r for r in rows if r["name"].endswith("nested"))
    assert (nested["name"], nested["baseline"]) == ("any_bcq 3-bit: held-out code, nested", "bcq alternating 3-bit")
    assert next(r for r in rows if r["name"] == "share of the gap closed")["value"] == 0.5
    demo.plot(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
