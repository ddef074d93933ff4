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
from examples.dp_llm import DP, Row, broken, gains, read, table
from examples.precisions import Settings, Text

RNG = np.random.default_rng(0)


def row(method: str, loss: float, bits: float = 3.5, **more: Any) -> Row:
    return Row(method, 3.5, bits, 2.5, loss, {"a": 3.25, "b": 4.0}, [loss - 0.1, loss, loss + 0.1], **more)


def chosen(loss: float, bits: float = 3.5, **more: Any) -> Row:
    return row(DP, loss, bits, pairs={"a": (3, 4)}, of_queries=[3.4, 3.5, 3.6, 3.5], **more)


def test_the_page_has_the_table_of_the_results() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs/dp_llm.md").read_text()
    for file in root.glob("benchmarks/results/*/dp_llm.json"):
        result = json.loads(file.read_text())
        rows, pairs = read(result, "rows"), read(result, "pairs")
        assert table(rows) in page and gains(rows) in page and table(pairs) in page
        assert broken([*rows, *pairs]) == []


def test_claims() -> None:
    assert broken([chosen(1.5), row("HAWQ-V2", 1.5), row("uniform", 1.0)]) == []
    (lost,) = broken([chosen(1.5), row("LLM-MQ", 1.4)])
    assert lost == "DP-LLM at 3.5 loses 0.1000 bits a byte to LLM-MQ, +- 0.0000"
    assert len(broken([chosen(float("nan")), row("LLM-MQ", 1.4)])) == 1
    (off,) = broken([chosen(1.5, bits=3.58)])
    assert off == "DP-LLM at 3.5: 3.580 effective bits, more than 2% off"
    (constant,) = broken([replace(chosen(1.5), layers={"a": 4.0, "b": 4.0})])
    assert constant == "DP-LLM at 3.5: layer 'a' has 4.0 bits always, of 3 and 4"


def test_what_may_be_chance_is_no_loss() -> None:
    mix = replace(row("HAWQ-V2", 1.5), losses=[1.0, 2.0, 3.0, 2.0])
    more, error = replace(chosen(1.5), losses=[1.2, 2.1, 2.9, 2.2]).over(mix)
    assert more == pytest.approx(0.1) and error == pytest.approx(np.std([0.2, 0.1, -0.1, 0.2], ddof=1) / 2)
    assert broken([replace(chosen(1.5), losses=[1.2, 2.1, 2.9, 2.2]), mix]) == []  # 0.1 is less than two errors
    assert len(broken([replace(chosen(1.5), losses=[1.2, 2.1, 3.1, 2.2]), mix])) == 1
    assert len(broken([replace(chosen(1.5), losses=[1.2]), replace(mix, losses=[1.0])])) == 1  # one says nothing


def test_tables() -> None:
    rows = [chosen(1.23456), row("HAWQ-V2", 1.5)]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| 3.5 | DP-LLM | 3.500 | 2.5000 | 1.2346 | 2.86% | 2.86% |",
        "| 3.5 | HAWQ-V2 | 3.500 | 2.5000 | 1.5000 |  |  |",
    ]
    assert {line.count("|") for line in lines} == {8}
    assert rows[0].drift(0.5) == pytest.approx(0.05 / 3.5)
    assert dp_plots.shares(rows[0], "a") == {3: 0.75, 4: 0.25} and dp_plots.shares(rows[0], "b") == {4: 1.0}


def test_sequences_of_a_text() -> None:
    assert precisions.cut(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(SystemExit, match="the text has 3 tokens, and a sequence takes 4"):
        precisions.cut(np.arange(3), 3)


@pytest.mark.slow
def test_a_small_run_of_all_of_it(tmp_path: Path) -> None:
    sizes = {"vocab": 16, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head": 8, "hidden": 16, "context": 32}
    dense = lb.models.Decoder(lb.models.Config(**sizes), rngs=nnx.Rngs(0))
    tokens = RNG.integers(0, 16, (12, 17)).astype(np.int32)
    settings = Settings(steps=2, gradients=4, calibration=8, estimator_steps=2, held=4, length=16)
    s = precisions.prepared(dense, Text(tokens[:8], tokens[8:], 1.0), settings)
    for path in s.sizes:  # of one number, the square of the mean is no more than the mean of the squares
        square = s.stats[path].gradient_square
        assert square is not None and (np.square(s.gradient[path]) <= 1.01 * square + 1e-9).all()
    for name, harm in precisions.MIXES.items():
        widths = precisions.mix(s, harm(s), 3.5)
        assert sum(s.sizes[p] * b for p, b in widths.items()) <= 3.5 * sum(s.sizes.values()), name
        assert all(b <= s.most[p] for p, b in widths.items())
    dp_llm.run(s, [3.5], tmp_path, print)
    result = json.loads((tmp_path / "results.json").read_text())
    rows, pairs = read(result, "rows"), read(result, "pairs")
    assert [r.method for r in rows] == ["uniform"] * 4 + [*precisions.MIXES, dp_llm.BLENDED, dp_llm.EXACT, DP]
    assert [r.method for r in pairs] == ["(4, 5)", "(4, 6)", "(3, 5)", "(3, 6)"]
    for r in rows[:4]:
        logits = lb.at_width(s.small, int(r.target))(jnp.asarray(s.text.held[:, :-1]))
        nats = -np.take_along_axis(np.asarray(nnx.log_softmax(logits)), s.text.held[:, 1:, None], -1).mean()
        assert r.bits == r.target and r.perplexity == pytest.approx(np.exp(nats), rel=1e-5)
    assert all(3 <= r.bits <= 6 and len(r.of_queries) == 4 for r in [*rows[7:], *pairs])
    assert all(made in (tmp_path / "table.md").read_text() for made in (table(rows), gains(rows), table(pairs)))
    assert {p.name for p in tmp_path.iterdir()} >= {"curve.png", "widths.png", "drift.png"}
