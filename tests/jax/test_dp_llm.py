"""`examples/dp_llm.py`: what it claims, the mixes that it compares with, and a small run of all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from examples import dp_llm, dp_plots, precisions
from examples.dp_table import ASYNCHRONOUS, DP, MIXES, WIDER, Row, broken, gains, over, read, table
from examples.precisions import Settings, Text


def row(method: str, loss: float, bits: float = 3.5, **more: Any) -> Row:
    return Row(method, 3.5, bits, 2.5, loss, {"a": 3.25, "b": 4.0}, [loss - 0.1, loss, loss + 0.1], **more)


def chosen(loss: float, bits: float = 3.5, **more: Any) -> Row:
    return row(DP, loss, bits, pairs={"a": (3, 4)}, of_queries=[3.4, 3.5, 3.6, 3.5], **more)


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/dp_llm.md").read_text()


def test_the_page_has_the_tables_of_the_results() -> None:
    (file,) = ROOT.glob("benchmarks/results/*/dp_llm.json")
    result = json.loads(file.read_text())
    rows, pairs = read(result, "rows"), read(result, "pairs")
    for made in (table(rows), gains(rows), table(pairs), gains(pairs, WIDER)):
        assert made in PAGE
    assert broken([*rows, *pairs]) == [] and result["machine"] in PAGE
    assert f"{result['float']['perplexity']:.4f} a byte, {result['float']['bits_per_byte']:.4f} bits" in PAGE
    for names, said in (("q k v gate up", "27 to 29 %"), ("o", "34 to 39 %"), ("down", "42 to 53 %")):
        found = [v for path, v in result["carried"].items() if path.rpartition("/")[2] in names.split()]
        assert f"{100 * min(found):.0f} to {100 * max(found):.0f} %" == said and said in PAGE


COSTS = {
    "block_fixed": "none, fixed widths",
    "block_line": "lines",
    "block_projection": "projections",
    "block_both": "lines for q, k and gate, projections for others",
    "block_both_asynchronous": "the same, asynchronous",
    "block_estimates_line": "lines by themselves",
    "block_estimates_projection": "projections by themselves",
    "block_estimates_both": "both by themselves",
    "given3_step": "3 bits, given in an array",
    "forced3_step": "3 bits, by thresholds that leave no choice",
    "known3_step": "3 bits, known when it is compiled",
}


def test_the_page_has_the_table_of_costs() -> None:
    (file,) = ROOT.glob("benchmarks/results/*/generate_dp.json")
    found = {r["name"]: r for r in json.loads(file.read_text())}
    for name, label in COSTS.items():
        r = found[name]
        low, high = r["thirds"]
        assert f"| {label} | {r['value']:.4g} | {r['ratio']:.3f} | {low:.3f} to {high:.3f} |" in PAGE


def test_claims() -> None:
    assert broken([chosen(1.5), row("HAWQ-V2", 1.5), row("uniform", 1.0)]) == []
    lost, all_lost = broken([chosen(1.5), row("LLM-MQ", 1.4)])
    assert lost == "DP-LLM at 3.5 loses 0.1000 bits a byte to LLM-MQ, +- 0.0000"
    assert all_lost == "DP-LLM is not shown to be within 0.0028 bits a byte of LLM-MQ: +0.1000 +- 0.0000"
    assert len(broken([chosen(float("nan")), row("LLM-MQ", 1.4)])) == 2
    (off,) = broken([chosen(1.5, bits=3.58)])
    assert off == "DP-LLM at 3.5: 3.580 effective bits, more than 2% off"
    (off,) = broken([row("LLM-MQ", 1.5, bits=3.4)])
    assert off == "LLM-MQ at 3.5: 3.400 effective bits, more than 2% off"
    (constant,) = broken([replace(chosen(1.5), layers={"a": 4.0, "b": 4.0})])
    assert constant == "DP-LLM at 3.5: layer 'a' has 4.0 bits always, of 3 and 4"
    assert broken([replace(chosen(1.5), pairs={})]) == ["DP-LLM at 3.5: no layer chooses"]


def test_what_may_be_chance_is_no_loss() -> None:
    mix = replace(row("HAWQ-V2", 1.5), losses=[1.0, 2.0, 3.0, 2.0])
    own = replace(chosen(1.5), losses=[1.2, 2.1, 2.9, 2.2])
    more, error = over([(own, mix)])
    assert more == pytest.approx(0.1) and error == pytest.approx(np.std([0.2, 0.1, -0.1, 0.2], ddof=1) / 2)
    (unclear,) = broken([own, mix])  # 0.1 is less than two errors, and two errors are more than the margin
    assert unclear.startswith("DP-LLM is not shown to be within")
    assert len(broken([replace(own, losses=[1.2, 2.1, 3.1, 2.2]), mix])) == 2
    assert len(broken([replace(own, losses=[1.2]), replace(mix, losses=[1.0])])) == 2  # one says nothing


def test_over_all_targets_each_sequence_has_one_difference() -> None:
    a, b = chosen(1.5), row("HAWQ-V2", 1.5)
    other = replace(a, target=4.0, losses=[1.5, 1.4, 1.6]), replace(b, target=4.0, losses=[1.4, 1.4, 1.4])
    more, error = over([(a, b), other])
    assert more == pytest.approx(0.05) and error == pytest.approx(np.std([0.05, 0, 0.1], ddof=1) / 3**0.5)
    assert gains([a, b, *other], [(DP, "HAWQ-V2")]).splitlines() == [
        "| target | DP-LLM over HAWQ-V2 |",
        "|---|---|",
        "| 3.5 | +0.0000 ± 0.0000 |",
        "| 4 | +0.1000 ± 0.0577 |",
        "| all | +0.0500 ± 0.0289 |",
    ]


def test_tables() -> None:
    rows = [chosen(1.23456), row("HAWQ-V2", 1.5)]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| 3.5 | DP-LLM | 3.500 | 2.5000 | 1.2346 | 1 of 2 | 2.86% | 2.86% |",
        "| 3.5 | HAWQ-V2 | 3.500 | 2.5000 | 1.5000 |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {9}
    assert rows[0].drift(0.5) == pytest.approx(0.05 / 3.5)
    assert dp_plots.shares(rows[0], "a") == {3: 0.75, 4: 0.25} and dp_plots.shares(rows[0], "b") == {4: 1.0}


def test_sequences_of_a_text() -> None:
    assert precisions.cut(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(SystemExit, match="the text has 3 tokens, and a sequence takes 4"):
        precisions.cut(np.arange(3), 3)


SIZES = {"vocab": 16, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head": 8, "hidden": 16, "context": 32}


def decoder(**more: int) -> Any:
    return lb.models.Decoder(lb.models.Config(**SIZES | more), rngs=nnx.Rngs(0))


def test_what_cannot_be_compared_is_refused() -> None:
    dense = decoder()
    precisions.expect_plain("m", dense, 32)
    with pytest.raises(SystemExit, match="m was made for 32 positions, and --length is 33"):
        precisions.expect_plain("m", dense, 33)
    with pytest.raises(SystemExit, match="m is a mixture of 2 experts, whose widths nothing chooses"):
        precisions.expect_plain("m", decoder(experts=2, experts_per_token=1), 32)
    with pytest.raises(SystemExit, match="m is quantized"):
        precisions.expect_plain("m", lb.quantize(dense, {"layers/0/attn/q": lb.any_bcq(1, 2), "**": None}), 32)
    with pytest.raises(SystemExit, match="m has 16 tokens, which are no bytes: give a --text"):
        precisions.text_of("m", dense, None, 16)
    tokens = np.zeros((3, 17), np.int32)
    with pytest.raises(SystemExit, match="3 sequences to train on and 3 held out, and 16 and 4 are asked for"):
        precisions.prepared(dense, Text(tokens, tokens, 1.0), Settings(gradients=2, calibration=16, held=4))


@pytest.mark.slow
def test_a_small_run_of_all_of_it(tmp_path: Path) -> None:
    dense = decoder()
    tokens = np.random.default_rng(0).integers(0, 16, (12, 17)).astype(np.int32)
    settings = Settings(steps=2, gradients=4, calibration=8, estimator_steps=2, held=4, length=16)
    s = precisions.prepared(dense, Text(tokens[:8], tokens[8:], 1.0), settings)
    for path in s.sizes:  # of one number, the square of the mean is no more than the mean of the squares
        square = s.stats[path].gradient_square
        assert square is not None and (np.square(s.gradient[path]) <= 1.01 * square + 1e-9).all()
    for name, harm in precisions.HARMS.items():
        widths = precisions.mix(precisions.offered(s, harm(s)), 3.5)
        used, unit = sum(s.sizes[p] * b for p, b in widths.items()), min(s.sizes.values())
        assert abs(used - 3.5 * sum(s.sizes.values())) <= unit / 2, name  # each layer's weights are multiples of it
        assert all(b <= s.most[p] for p, b in widths.items())
    with pytest.raises(SystemExit, match=r"targets \[2.5, 6.0\] are not from 3 to 5.000 bits"):
        dp_llm.run(s, [2.5, 3.5, 6.0], tmp_path, print)
    dp_llm.run(s, [3.5], tmp_path, print)
    result = json.loads((tmp_path / "results.json").read_text())
    rows, pairs = read(result, "rows"), read(result, "pairs")
    assert [r.method for r in rows] == ["uniform"] * 4 + [*MIXES, dp_llm.BLENDED, dp_llm.EXACT, ASYNCHRONOUS, DP]
    assert [r.method for r in pairs] == ["(4, 5)", "(4, 6)", "(3, 5)", "(3, 6)"]
    for r in rows[:4]:
        logits = lb.at_width(s.small, int(r.target))(jnp.asarray(s.text.held[:, :-1]))
        nats = -np.take_along_axis(np.asarray(nnx.log_softmax(logits)), s.text.held[:, 1:, None], -1).mean()
        assert r.bits == r.target and r.perplexity == pytest.approx(np.exp(nats), rel=1e-5)
    assert all(3 <= r.bits <= 6 and len(r.of_queries) == 4 for r in [*rows[7:], *pairs])
    assert all(made in (tmp_path / "table.md").read_text() for made in (table(rows), gains(rows), table(pairs)))
    assert {p.name for p in tmp_path.iterdir()} >= {"curve.png", "widths.png", "drift.png"}
    assert_goes_on(s, tmp_path)


def assert_goes_on(s: precisions.Subject, folder: Path) -> None:
    """From where a run was killed, to the same rows, and not with those of another run."""
    file = folder / "results.json"
    whole = json.loads(file.read_text())
    rest = whole | {"rows": whole["rows"][:-2], "pairs": [], "machine": whole["machine"][:-10] + "2001-01-01"}
    file.write_text(json.dumps(rest))
    told: list[str] = []
    dp_llm.run(s, [3.5], folder, told.append)
    assert json.loads(file.read_text()) == whole | {"machine": rest["machine"]}
    assert [line.split(" | ")[1] for line in told[4:6]] == [ASYNCHRONOUS, DP] and len(told) == 6 + 4
    other = replace(s, settings=replace(s.settings, steps=3))
    with pytest.raises(SystemExit, match=r"of another run: settings is .*'steps': 2.* there and .*'steps': 3.* here"):
        dp_llm.run(other, [3.5], folder, told.append)
    file.write_text(json.dumps(whole)[:-100])
    with pytest.raises(SystemExit, match="holds no results of this example"):
        dp_llm.run(s, [3.5], folder, told.append)
