"""`examples/quality.py`: its claims on the tiny language model, and what it makes of files of layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

import lowbit as lb
from examples import quality, variants
from examples.quality import CLAIMS, Row, broken, sweep, table
from examples.subjects import Subject, of_file, tinylm

RNG = np.random.default_rng(0)


def row(method: str, bits: int, loss: float | None) -> Row:
    return Row(method, bits, 3.25, 12.34, 0.05678, loss)


def test_the_page_has_the_table_of_the_results() -> None:
    root = Path(__file__).parents[2]
    for file in root.glob("benchmarks/results/*/quality.json"):
        rows = [Row(**of) for of in json.loads(file.read_text())["rows"]]
        assert table(rows) in (root / "docs/quality.md").read_text()
        assert not broken(rows)


def test_claims_are_about_rows_that_were_measured() -> None:
    named = {method for better, than, _ in CLAIMS for method in (better, than)}
    assert named <= {v.method for v in variants.every(_of_everything(), 3)}
    rows = [row("LNQ", 2, 2.0), row("SqueezeLLM", 2, 1.9), row("k-means", 2, 1.95), row("LNQ", 4, 9.0)]
    assert broken(rows) == ["at 2 bits LNQ loses to SqueezeLLM: 2.0000 bits a byte, 1.9000"]
    assert broken([row("LNQ", 2, 1.9), row("SqueezeLLM", 2, 1.9)]) == []
    assert len(broken([row("GPTQ", 2, float("nan")), row("RTN", 2, 1.9)])) == 1
    assert broken([row("GPTQ", 2, None), row("RTN", 2, None)]) == []


def test_tables() -> None:
    text = table([row("RTN", 3, None), row("GPTQ", 3, 1.23456)]).splitlines()
    assert text[2:] == [
        "| RTN | 3 | 3.250 | 12.3 | 0.0568 |  |",
        "| GPTQ | 3 | 3.250 | 12.3 | 0.0568 | 1.2346 |",
    ]
    assert {line.count("|") for line in text} == {7}


def _of_everything() -> Subject:
    """A subject that has all that variants ask for, by what is true of it."""
    return Subject(None, (), [0], None, loss=lambda m, b: b, folds=(lb.Fold("a", "b"),))  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    arrays = {
        "a/q": jnp.asarray(RNG.standard_normal((16, 20)), jnp.bfloat16),
        "up": jnp.asarray(RNG.standard_normal((8, 24)), jnp.float16),
        "norm": jnp.ones(24, jnp.bfloat16),
        "unused": jnp.zeros((8, 8)),
        "ids": jnp.ones((8, 8), jnp.int32),
    }
    save_file(arrays, tmp_path / "layers.safetensors")
    rows = {
        name: jnp.asarray(RNG.standard_normal((n, k)), jnp.bfloat16) for name, n, k in (("a/q", 9, 20), ("up", 6, 24))
    }
    save_file(rows, tmp_path / "inputs.safetensors")
    return tmp_path


def test_layers_of_a_file(files: Path) -> None:
    s = of_file(files / "layers.safetensors", None)
    layers = s.model.layers  # type: ignore[attr-defined]
    assert {name: layer.kernel.shape for name, layer in layers.items()} == {"a.q": (20, 16), "up": (24, 8)}
    assert s.calibrated() is s and s.held["a.q"].shape[1] == 20
    assert {v.method for v in variants.every(s, 3)} == {v.method for v in variants.plain(3)}


@pytest.mark.slow
def test_half_of_the_inputs_is_to_calibrate_on(files: Path) -> None:
    s = of_file(files / "layers.safetensors", files / "inputs.safetensors").calibrated()
    assert {path: of.rows for path, of in s.stats.items()} == {"layers/a.q": 4, "layers/up": 3}
    assert {name: len(rows) for name, rows in s.held.items()} == {"a.q": 5, "up": 3}
    moment = jnp.square(s.batches[0]["up"]).mean(0)
    np.testing.assert_allclose(s.stats["layers/up"].second_moment, moment, rtol=1e-6)  # sums of three
    w, given = s.model.layers["up"].kernel.get_value(), s.held["up"]  # type: ignore[attr-defined]
    assert s.model(s.held)[-given.shape[0] * 8 :].tolist() == jnp.ravel(given @ w).tolist()  # type: ignore[operator]
    assert "GPTQ" in {v.method for v in variants.every(s, 3)}


@pytest.mark.slow
def test_bits_are_allocated_by_the_outputs_of_layers_of_a_file(tmp_path: Path) -> None:
    """What 3 bits leave of the budget is enough for the smaller one."""
    large, small, x = (RNG.standard_normal((rows, 256)).astype(np.float32) for rows in (60, 4, 8))
    save_file({"large": large, "small": small}, tmp_path / "layers")
    save_file({"large": x, "small": x}, tmp_path / "inputs")
    s = of_file(tmp_path / "layers", tmp_path / "inputs").calibrated()
    (v,) = (v for v in variants.every(s, 3) if v.method == "allocated")
    kernels = lb.nn.kernels(v.make(s)[1])
    assert [k.type.format["bits"] for k in kernels.values()] == [3, 4]
    assert sum(k.type.bits for k in kernels.values()) <= 3.25 * 64 * 256


@pytest.mark.slow
def test_what_a_format_cannot_hold_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def every(s: Subject, bits: int) -> Iterator[variants.Variant]:
        yield variants.by("RTN", bits, variants.even(bits))
        yield variants.by("codebooks", bits, variants.books(bits), lb.residual_kmeans(rounds=1))

    monkeypatch.setattr(variants, "every", every)
    save_file({"up": jnp.asarray(RNG.standard_normal((8, 24)), jnp.float32)}, tmp_path / "layers")
    said: list[str] = []
    (made,) = sweep(of_file(tmp_path / "layers", None), [2], 1, said.append)
    assert made.method == "RTN" and 5 < made.sqnr_db < 15 and 0.1 < made.output_error < 0.6
    assert said[0] == table([made]).splitlines()[-1]
    assert said[1].startswith("codebooks at 2 bits is left out: layer 'layers/up' cannot be quantized")


def test_nothing_is_left_out_of_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(s: Subject, v: Any, every: int) -> Row:
        raise ValueError("no")

    monkeypatch.setattr(quality, "measure", refuse)
    with pytest.raises(ValueError, match="no"):
        sweep(Subject(None, (), [], None, text=b"text"), [3], 1, print)  # type: ignore[arg-type]


@pytest.mark.parametrize(("layers", "inputs", "message"), [
    ({"norm": jnp.ones(4)}, None, "has no float matrix but of zeros: name a file of linear layers"),
    ({"a/b.c": jnp.ones((4, 8)), "a.b/c": jnp.ones((4, 8))}, None, "'a.b/c' and 'a/b.c' are one name: change one"),
    ({"a": jnp.ones((4, 8))}, {"b": jnp.ones((4, 8))}, r"'a' needs inputs \[2 rows or more, 8\], and has none"),
    ({"a": jnp.ones((4, 8))}, {"a": jnp.ones((4, 4))}, r"'a' needs inputs \[2 rows or more, 8\], and has \[4, 4\]"),
    ({"a": jnp.ones((4, 8))}, {"a": jnp.ones((1, 8))}, r"'a' needs inputs \[2 rows or more, 8\], and has \[1, 8\]"),
])  # fmt: skip
def test_files_that_do_not_fit(
    layers: dict[str, jax.Array], inputs: dict[str, jax.Array] | None, message: str, tmp_path: Path
) -> None:
    save_file(layers, tmp_path / "layers")
    if inputs:
        save_file(inputs, tmp_path / "inputs")
    with pytest.raises(SystemExit, match=message):
        of_file(tmp_path / "layers", tmp_path / "inputs" if inputs else None)


@pytest.mark.slow
def test_what_is_claimed_of_the_tiny_language_model() -> None:
    asked = {(method, bits) for better, than, at in CLAIMS for method in (better, than) for bits in {2, 3} & {*at}}
    s = tinylm().calibrated()
    made = [v for bits in (2, 3) for v in variants.every(s, bits) if (v.method, v.bits) in asked]
    assert {(v.method, v.bits) for v in made} == asked
    assert broken([quality.measure(s, v, every=10) for v in made]) == []
