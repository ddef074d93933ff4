"""The race against other libraries, without a GPU: its weights and checks, processes that fail, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cold
from benchmarks.gpu_results import ASSUMED, KEPT, Results, newest
from benchmarks.peers import __main__ as command
from benchmarks.peers import jax_clock, papers, race, report
from benchmarks.peers.peer import Peer, check, everyone, expected, find, probes
from benchmarks.peers.weights import BOOKS, Weight, make
from benchmarks.peers.with_jax import FORMATS, lowbit_array
from lowbit.ir import evaluate
from tests import fake_peers

MACHINE = {"device": ASSUMED, "jax": "0.11.2", "jaxlib": "0.11.2", "source": "abc", "date": "2026-01-01"}
KINDS = ("dense", "e4m3", "nf4", *FORMATS)


def contender(name: str) -> Peer:
    return next(peer for peer in everyone() if peer.name == name)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("what", FORMATS)
def test_weights_are_those_that_lowbit_decodes(what: str) -> None:
    w = make(what, 24, 1024)
    ours = lowbit_array(w)
    decode = ours.type.decode
    dense = evaluate(decode, {name: np.asarray(a).astype(np.float64) if a.dtype.kind == "f" else np.asarray(a)
                              for name, a in ours.fields.items()})  # fmt: skip
    exact, size = w.columns(np.arange(w.k))
    order = [list(decode.dims).index(d) for d in ("n", "k")]
    np.testing.assert_allclose(dense.transpose(order), exact, rtol=1e-6, atol=1e-9)  # float32 scales times float32
    assert (size >= np.abs(exact) * (1 - 1e-12)).all()


@pytest.mark.parametrize("what", KINDS)
def test_weights_repeat_and_both_halves_hold_those_that_decode_exactly(what: str) -> None:
    import ml_dtypes

    w = make(what, 24, 1024)
    assert all((make(what, 24, 1024).fields[name] == a).all() for name, a in w.fields.items())
    exact, _ = w.columns(np.arange(w.k))
    if what.startswith(("dense", "uniform", "bcq")):
        assert all((exact.astype(dtype) == exact).all() for dtype in (np.float16, ml_dtypes.bfloat16))
    if what == "e4m3":
        assert (exact.astype(ml_dtypes.float8_e4m3fn) == exact).all()


def test_unknown_weights() -> None:
    with pytest.raises(ValueError, match=r"no weight is called 'trit2': dense, .*m2v8row, or one of uniform, bcq"):
        make("trit2", 8, 1024)


def test_words_of_any_precision() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, 2048), np.uint8)
    words = papers.any_precision_words(codes, 4).view(np.uint32)
    assert words.shape == (4, 3, 64)
    for k in (0, 7, 8, 300, 1023, 1500):
        warp, byte = divmod(k // 8, 128)
        lane, quarter = byte % 32, byte // 32
        bit = 8 * (3 - quarter) + 7 - k % 8
        code = sum((words[3 - p, :, warp * 32 + lane] >> bit & 1) << p for p in range(4))
        assert (code == codes[:, k]).all()


def test_words_of_binary_codes_and_of_codebooks() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (3, 256), np.uint8)
    words = papers.bcq_words(codes, 3).view(np.uint32)
    assert words.shape == (8, 3, 3)
    assert all((sum((words[k // 32, p] >> k % 32 & 1) << p for p in range(3)) == codes[:, k]).all() for k in range(256))
    vectors = rng.integers(0, 256, (2, 3, 64), np.uint8)
    words = papers.codegemm_words(vectors).view(np.uint32)
    assert words.shape == (2, 16, 3)
    assert all((words[:, i // 4] >> 8 * (i % 4) & 255 == vectors[:, :, i]).all() for i in range(64))


# ---------------------------------------------------------------- the check


def rounded(peer: Peer, w: Weight, change: Any = None) -> Any:
    """A product that rounds weights and results to the peer's halves, of weights that `change` may have spoilt."""
    import ml_dtypes

    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[peer.dtype]
    dense = w.columns(np.arange(w.k))[0].astype(dtype).astype(np.float64)
    if change:
        change(dense)
    return lambda x: (x.astype(np.float64) @ dense.T).astype(dtype).astype(np.float32)


@pytest.mark.parametrize("peer", everyone(), ids=lambda peer: peer.name)
def test_a_check_passes_what_is_rounded_and_sees_one_wrong_weight(peer: Peer) -> None:
    w = make(peer.what, 8, 1024)
    check(expected(peer, w), 3, rounded(peer, w))
    inputs, _ = probes(w.k)

    def change(dense: Any) -> None:
        dense[5, inputs[7, 0]] += 0.3 * np.abs(dense).mean()  # of 4-bit codes, as far as the next one

    with pytest.raises(AssertionError, match=r"^1 of 24 differ; at \(1, 5\)"):
        check(expected(peer, w), 3, rounded(peer, w, change))


def test_a_check_sees_tiles_nan_and_shapes() -> None:
    peer, w = contender("humming uniform4"), make("uniform4", 8, 1024)

    def left_out(dense: Any) -> None:
        dense[:, 512:528] = 0

    for m in (1, 16, 200):
        with pytest.raises(AssertionError, match="differ"):
            check(expected(peer, w), m, rounded(peer, w, left_out))
    with pytest.raises(AssertionError, match=r"8 of 8 differ; at .*: nan, not"):
        check(expected(peer, w), 1, lambda x: np.full((1, 8), np.nan))
    with pytest.raises(AssertionError, match=r"y has shape \[1, 4\], not \[1, 8\]"):
        check(expected(peer, w), 1, lambda x: np.zeros((1, 4)))


def test_probes_reach_every_tile() -> None:
    inputs, signs = probes(8192)
    assert sorted(inputs.reshape(-1) // 16) == list(range(512)) and set(signs.reshape(-1)) == {-1, 1}


# ---------------------------------------------------------------- processes


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setattr(race, "BATCHES", (1, 2, 4))
    return Results(tmp_path / "peers.json", MACHINE)


def fakes(*names: str) -> list[Peer]:
    return [find(fake_peers.__name__, name) for name in names]


def run(results: Results, *names: str, silence: float = 60.0) -> dict[str, Any]:
    rows = {}
    for row in race.race(fakes(*names), [(16, 512)], results, time.monotonic() + 60, silence):
        rows[row["name"]] = row
        assert json.loads(results.path.read_text("utf-8"))["rows"].count(row) == 1  # whole after each
    return rows


def test_a_run_measures_once(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(results, "good")
    row = rows["good 16x512 m=4"]
    assert row["seconds"] == 4e-6 and row["bytes"] == 16 * 512 * 8 and row["versions"] == {"fake": "1"}
    assert len(rows) == 3 and run(results, "good") == {}
    newer = Results(results.path, MACHINE | {"source": "def"}, results.rows)
    assert not race.done(newer, "good 16x512 m=4")
    assert list(race.race(fakes("good"), [(16, 1024)], results, time.monotonic() - 1)) == []


def test_what_is_not_there_is_a_row_and_is_asked_for_again(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    spawn = race.spawn
    monkeypatch.setattr(race, "spawn", lambda peer, *args: started.append(peer.name) or spawn(peer, *args))
    rows = run(results, "absent", "refuses", "leaves")
    assert started == ["absent", "refuses", "leaves"]  # once for all numbers of rows
    reasons = {row["peer"]: row["reason"] for row in rows.values()}
    assert len(rows) == 9
    assert reasons["absent"] == "no module 'no_such_package'"
    assert reasons["refuses"] == "ValueError: no bcq3\nhere"
    assert reasons["leaves"] == "the process ended without a word"
    assert {row["peer"] for row in run(results, "absent", "refuses").values()} == {"absent"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crashes", r"the process ended with -6"),
        ("hangs", r"no result within 4 s"),
        ("raises", r"RuntimeError: two are too many"),
        ("errs", r"of 32 differ"),
    ],
)
def test_one_failure_costs_no_other_result(results: Results, name: str, reason: str) -> None:
    rows = run(results, name, silence=4.0)
    assert [("seconds" in row) for row in rows.values()] == [True, False, True]
    row = rows[f"{name} 16x512 m=2"]
    assert reason in row.get("reason", row.get("wrong", ""))
    assert race.done(results, row["name"]) == ("wrong" not in row)


def test_time_that_is_up_leaves_no_row(results: Results) -> None:
    rows = race.race(fakes("hangs"), [(16, 512)], results, time.monotonic() + 3)
    assert {row["m"] for row in rows} <= {1}


@pytest.mark.parametrize("name", ["XLA e4m3", "lowbit bcq3"])
def test_contenders_of_jax_run_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "ROTATED", 1 << 10)
    peer = contender(name)
    w = make(peer.what, 128, 1024)
    packed = peer.pack(w)
    check(expected(peer, w), 64, lambda x: jax_clock.run(peer, x, packed))
    row = jax_clock.timed(peer, np.ones((2, 1024), np.float32), jax_clock.rotation(packed))
    assert row["seconds"] > 0 and row["clock"] == "host"
    assert 8 * jax_clock.nbytes(packed) / 128 / 1024 == {"XLA e4m3": 8, "lowbit bcq3": 3 + 3 * 16 / 128}[name]


# ---------------------------------------------------------------- what it says


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "PART=1/6"]) == 0
    out = capsys.readouterr().out
    assert "weights: 28672 x 8192; rows of x: 1, 2, 4, 8, 16, 64, 512" in out
    assert all(peer.name in out and peer.needs in out for peer in everyone())
    assert command.main(["--list", "--only", "gemlite"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["gemlite"] * 2


def test_every_contender_is_found_by_its_process() -> None:
    peers = everyone()
    assert len({peer.name for peer in peers}) == len(peers)
    assert all(find(peer.module, peer.name) is peer for peer in peers)
    assert {peer.what for peer in peers} == set(KINDS)
    assert {peer.rival or peer.what for peer in peers} <= {*FORMATS, "dense", "e4m3"}


def test_a_process_of_torch_imports_no_jax() -> None:
    modules = "benchmarks.peers.worker, benchmarks.peers.libraries, benchmarks.peers.papers"
    said = f"import sys, {modules}; print({{'jax', 'torch'}} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", said], cwd=race.ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_measuring_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        command.main([])
    assert "this measures an H100 or H200" in capsys.readouterr().err
    monkeypatch.setattr(command, "device", lambda: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(SystemExit):
        command.main([])
    assert "'NVIDIA A100-SXM4-80GB' has no peaks here" in capsys.readouterr().err


def made() -> Results:
    """Times of two contenders and of lowbit, and failures of others."""

    def row(peer: str, m: int, what: str = "uniform4", bits: float = 4.125, **more: Any) -> dict[str, Any]:
        n, k = race.SHAPES[0]
        name = f"{peer} {n}x{k} m={m}"
        timed = {"bytes": int(n * k * bits / 8), "clock": "CUPTI", "versions": {peer.split()[0]: "1"}}
        own = {"name": name, "peer": peer, "what": what, "dtype": "float16", "rival": None, "n": n, "k": k, "m": m}
        return own | (timed if "seconds" in more else {}) | more

    rows = [
        row("lowbit uniform4", 1, seconds=40e-6),
        row("lowbit uniform4", 512, seconds=400e-6),
        row("gemlite uniform4", 1, seconds=30e-6),
        row("gemlite uniform4", 512, reason="RuntimeError: no\nluck"),
        row("XLA float16", 1, "dense", 16, seconds=200e-6, clock="host"),
        row("XLA float16", 512, "dense", 16, seconds=200e-6),
        row("humming uniform4", 1, wrong="1 of 2 differ"),
    ]
    return Results(Path(), MACHINE, {r["name"]: r for r in rows})


def test_every_loss_and_failure_is_said() -> None:
    lines = list(report.page(made()))
    assert lines[0] == f"On {ASSUMED}, 2026-01-01; XLA 1, gemlite 1, lowbit 1."
    assert "| lowbit uniform4 | 4.12 | 40.0 |  |  |  |  |  | 400.0 |".replace("400.0", "**400.0**") in lines
    assert "| gemlite uniform4 | 4.12 | **30.0** |  |  |  |  |  | - |" in lines
    assert "| XLA float16 | 16 | 200.0* |  |  |  |  |  | **200.0** |" in lines
    assert "| humming uniform4 | - | wrong |  |  |  |  |  |  |" in lines
    assert "- lowbit uniform4 28672x8192 m=1: gemlite uniform4 is 1.33 times as fast" in lines
    assert "- lowbit uniform4 28672x8192 m=512: XLA float16 is 2.00 times as fast" in lines
    assert "- 2 of 2 products of lowbit are not the fastest of their kind." in lines
    assert "- gemlite uniform4, 1 of its products: RuntimeError: no luck" in lines
    assert "- humming uniform4, 1 of its products: wrong: 1 of 2 differ" in lines


def test_nothing_lost_and_nothing_measured() -> None:
    results = made()
    results.rows = {name: row for name, row in results.rows.items() if row["peer"].startswith("lowbit")}
    lines = list(report.page(results))
    assert "0 of 2 products of lowbit are not the fastest of their kind." in lines and lines[-1] == "Nothing."
    assert list(report.page(Results(Path(), MACHINE))) == [report.NONE_YET]


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "newest", lambda name: made())
    assert command.main(["--plot", str(tmp_path / "race.png")]) == 0
    assert (tmp_path / "race.png").stat().st_size > 10_000
    monkeypatch.setattr(command, "newest", lambda name: Results(Path(), MACHINE))
    assert command.main(["--plot", str(tmp_path / "none.png")]) == 1
    assert "nothing is measured yet: run make gpu-peers" in capsys.readouterr().out


def test_the_page_names_everyone_and_has_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    text = KEPT.parents[1].joinpath("docs/peers.md").read_text("utf-8")
    assert command.main(["--table"]) == 0
    assert capsys.readouterr().out in text, "docs/peers.md has other results than benchmarks/results"
    assert newest(command.NAME).rows or report.NONE_YET in text
    for peer in everyone():
        assert f"`{peer.needs}`" in text, f"docs/peers.md does not say that {peer.name} needs {peer.needs}"
    assert all(f"`{what}`" in text for what in BOOKS)
