"""`lb.autotune` and `lb.tuned`: what is timed, what is kept, and what is made of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags, logging
from flax import nnx

import lowbit as lb
from lowbit import measuring
from lowbit.autotuning import AutotuneError, Cache, CacheError, CacheMissError, Entry, load, lookup, search
from lowbit.autotuning.cache import entry_of, key_of
from lowbit.autotuning.search import Candidate, CandidateError, Worker, candidates, tune
from lowbit.by_kernel import by_mma
from lowbit.kernels import product as launch
from lowbit.kernels.layout import layout
from lowbit.kernels.mma import Shape, Tuning, tuning
from lowbit.planning import LoweringError
from lowbit.quant_type import QuantType
from lowbit.testing import random_array
from tests.forgetting import forget

M, K, N = 2, 40, 70
TYPE = QuantType((("k", K), ("n", N)), "f32", lb.bcq(2, group=20))
X = jnp.ones((M, K))
HERE = jax.devices()[0].device_kind

FAULTY = (sys.executable, "-c", """
import json, sys, time
print("{}", flush=True)
for line in sys.stdin:
    lowering = json.loads(line)["candidate"]["lowering"]
    if lowering == "decode":
        time.sleep(600)
    if lowering == "join":
        sys.exit("out of registers")
    answer = {"error": "ValueError: no"} if lowering == "bucket" else {"nanoseconds": len(lowering)}
    print(json.dumps(answer), flush=True)
""")  # fmt: skip
"""Hangs, crashes, refuses or answers, as the candidate has it."""


class Here(Worker):
    """Times candidates in this process."""

    def ask(self, request: dict[str, Any]) -> float:
        try:
            return measuring.measure(request)
        except Exception as err:
            raise CandidateError(f"{type(err).__name__}: {err}") from err


@pytest.fixture(autouse=True)
def user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user's file of each test's own, in a folder that there is not yet."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("LOWBIT_CACHE", str(path))
    monkeypatch.setattr(measuring, "AT_LEAST", 1)
    monkeypatch.setattr(lookup, "_NEW", {})
    lookup.shipped.cache_clear()
    forget()
    yield path
    lookup.shipped.cache_clear()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    out: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: out.append(message % args))
    return out


def entry(lowering: str, schedule: Any = None) -> Entry:
    return entry_of("x @ w", HERE, lowering, schedule, 1.0, {lowering: 1.0})


def cache(lowering: str, m: int = M) -> Cache:
    return Cache({key_of(m, TYPE, "f32", HERE): entry(lowering)})


def program(x: Any = X) -> str:
    return str(jax.make_jaxpr(lb.matmul)(x, random_array(TYPE)))


def another() -> str:
    """A form that the cost model does not take."""
    first, *rest = (f.name for f in lb.plan((M, K), TYPE).forms)
    with lb.testing.lowering(first):
        own = program()
    for name in rest:
        with lb.testing.lowering(name):
            if program() != own:
                return name
    raise AssertionError("one form")


# ---------------------------------------------------------------- measuring


def test_every_product_of_a_function_is_timed_and_each_result_checked() -> None:
    layer = lb.quantize(nnx.Linear(K, N, rngs=nnx.Rngs(0)), lb.bcq(2, group=20))
    step = jax.jit(lambda model, x, w: (model(x), lb.matmul(x[:1], w)))
    w = random_array(TYPE.resized(n=4))
    step(layer, X, w)  # what was compiled before is traced again
    found = lb.autotune(step, layer, X, w, worker=Here())
    wide, narrow = key_of(M, layer.kernel.type, "f32", HERE), key_of(1, w.type, "f32", HERE)
    assert found.entries.keys() == {wide, narrow}
    best = found.entries[wide]
    assert list(best.tried) == list(lb.plan((M, K), layer.kernel.type).names)
    assert best.nanoseconds == best.tried[best.lowering] == min(best.tried.values())  # type: ignore[type-var]
    assert f"{best.product} on {HERE}: {best.lowering}, " in str(found)
    with lb.tuned(found):
        y, _ = step(layer, X, w)
    np.testing.assert_allclose(y, step(layer, X, w)[0], rtol=1e-5, atol=1e-5)


def test_a_wrong_result_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "matmul", lambda x, w: lb.matmul(x, w) * 1.001)
    with pytest.raises(AutotuneError, match=rf"no way to run x\[2, k\] @ .* on {HERE} .*\n\w+: AssertionError: \w+: y"):
        tune(M, TYPE, "f32", Here())


@pytest.mark.parametrize("fmt", [lb.codebook(2, 4, 4), lb.any_precision(2, 3), lb.nested_fp(8)], ids=str)
def test_operands_repeat_a_part_for_every_way_to_store(fmt: lb.Format) -> None:
    t = QuantType((("n", 130), ("k", 64)), "f16", fmt)
    x, w, few, env = measuring.operands(9, t, "f16")
    assert x.shape == (9, 64) and w.type == t and dict(few.dims)["n"] == 64
    assert (x[8] == x[0]).all() and (x[0] != x[1]).any()
    dense = np.asarray(lb.dequantize(w))
    assert (dense[64:128] == dense[:64]).all() and (dense[128:] == dense[:2]).all()
    exact, bound = measuring.expected(few, env, "f16", "decode")
    assert exact.shape == bound.shape == (8, 64)


def test_a_candidate_that_hangs_crashes_or_raises_is_recorded_and_the_rest_is_timed() -> None:
    names = [c.lowering for c in candidates(M, TYPE, "f32", "cpu")]
    assert {"decode", "join", "bucket"} < set(names)
    with Worker(timeout=2.0, command=FAULTY) as worker:
        found = tune(M, TYPE, "f32", worker)
    assert found.tried["decode"] == "it took more than 2 s"
    assert found.tried["bucket"] == "ValueError: no"
    assert found.tried["join"] == "its process ended with 1: out of registers"
    assert all(found.tried[n] == len(n) for n in names if n not in ("decode", "join", "bucket"))
    assert found.lowering in names and found.nanoseconds == len(found.lowering)


def test_without_the_device_nothing_can_be_timed() -> None:
    none = (sys.executable, "-c", "import sys; sys.exit('no device')")
    with pytest.raises(AutotuneError, match="its process ended with 1: no device"), Worker(command=none) as worker:
        tune(M, TYPE, "f32", worker)
    request = search._request(M, TYPE, "f32", Candidate("decode")) | {"device": "NVIDIA H100"}
    with pytest.raises(RuntimeError, match=f"this process has a {HERE}, and times are wanted of a NVIDIA H100"):
        measuring.measure(request)


def test_a_function_without_quantized_products_is_refused() -> None:
    with pytest.raises(ValueError, match="fn has no quantized product"):
        lb.autotune(jnp.sin, X)


@pytest.mark.slow
def test_prepared_weights_are_timed_as_they_are_stored() -> None:
    t = QuantType((("n", 100), ("k", 256)), "bf16", lb.uniform(4, group=128), layout="mma")
    found = tune(1, t, "bf16", Here())
    assert all(isinstance(ns, float) for ns in found.tried.values())
    with lb.tuned(Cache({key_of(1, t, "bf16", HERE): found}), on_miss="error"):
        x, w, _, _ = measuring.operands(1, t, "bf16")
        assert w.type == t and lb.matmul(jnp.asarray(x), w).shape == (1, 100)
        dx = jax.grad(lambda x: lb.matmul(x, w).astype("f4").sum())(jnp.asarray(x))  # gradients are not looked up
        assert dx.shape == (1, 256)


def test_the_process_itself() -> None:
    found = lb.autotune(lb.matmul, X, random_array(TYPE))
    (only,) = found.entries.values()
    assert all(isinstance(ns, float) for ns in only.tried.values())


def test_a_process_that_ends_after_its_answer_is_followed_by_another() -> None:
    once = "import sys; print('{}', flush=True); sys.stdin.readline(); print('{\"nanoseconds\": 7}')"
    with Worker(command=(sys.executable, "-c", once)) as worker:
        assert worker.ask({}) == 7
        assert worker.running is not None
        worker.running.wait()
        assert worker.ask({}) == 7


def test_schedules_beside_a_kernel_s_own() -> None:
    of = layout(lb.uniform(4, group=128).decode(n=4096, k=4096))
    own = tuning(Shape(64, of.tiles, of.stages), of.program("bf16", 0))
    found = launch.nearby(of, 64, "bf16")
    assert len(set(found)) == len(found) >= 3 and own not in found
    for other in found:
        differ = [name for name in ("columns", "parts", "depth") if getattr(other, name) != getattr(own, name)]
        assert len(differ) == 1 and of.stages % other.parts == 0 and 64 % other.columns == 0
    t = QuantType((("n", 4096), ("k", 4096)), "bf16", lb.uniform(4, group=128), layout="mma")
    every = candidates(64, t, "bf16", "gpu")
    assert next(c.schedule for c in every if c.lowering == "mma") is None
    assert Candidate("mma", (found[0].columns, found[0].parts, found[0].depth)) in every


def test_a_schedule_reaches_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(launch, "product", lambda of, x, fields, tuned, at, variant: seen.append(tuned))
    t = QuantType((("n", 64), ("k", 256)), "bf16", lb.uniform(4, group=128), layout="mma")
    by_mma(t, X, {}, (8, 2, 4))
    by_mma(t, X, {})
    assert seen == [Tuning(8, 2, 4), None]


# ---------------------------------------------------------------- looking up


def test_the_context_s_cache_comes_before_the_user_s_and_what_is_shipped(
    user_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = partial(lookup.chosen, M, TYPE, "f32", "cpu")
    names = [c.name for c in lb.plan((M, K), TYPE).choices]
    first, second, third = names[1], names[2], names[0]
    assert chosen()[0].name == third
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path)
    cache(first).save(tmp_path / "one.json")
    lookup.shipped.cache_clear()
    assert chosen()[0].name == first
    user_file.parent.mkdir()
    cache(second).save(user_file)
    lookup._read.cache_clear()
    assert chosen()[0].name == second
    with lb.tuned(cache(third)):
        assert chosen()[0].name == third
        with lb.testing.lowering(first):
            assert chosen()[0].name == first
    with lb.tuned(cache(first, m=M + 1)):
        assert chosen()[0].name == second


def test_explain_says_what_was_measured() -> None:
    w = random_array(TYPE)
    with lb.tuned(cache("bucket")):
        assert lb.explain(w, batch=M).splitlines()[-1] == f"measured x @ w on {HERE}: bucket, 0.0 us"
        assert "measured" not in lb.explain(w, batch=M, platform="gpu") + lb.explain(w, batch=M + 1)
    assert "measured" not in lb.explain(w, batch=M)


def test_functions_compiled_before_are_compiled_again(tmp_path: Path) -> None:
    name, w, traced = another(), random_array(TYPE), 0

    def f(x: Any) -> Any:
        nonlocal traced
        traced += 1
        return lb.matmul(x, w)

    own, run = program(), jax.jit(f)
    run(X)
    cache(name).save(tmp_path / "tuned.json")
    with lb.tuned(tmp_path / "tuned.json") as held:
        assert program() != own
        y = run(X)
    with lb.tuned(held):
        run(X)
    run(X)
    assert traced == 2
    with lb.testing.lowering(name):
        assert (y == run(X)).all()


def test_a_lowering_that_cannot_run_is_refused() -> None:
    with lb.tuned(cache("mma")), pytest.raises(LoweringError, match="lowering 'mma' cannot run"):
        lb.matmul(X, random_array(TYPE))


# ---------------------------------------------------------------- a miss


def test_a_miss_can_be_an_error() -> None:
    w = random_array(TYPE)
    with lb.tuned(cache("decode"), on_miss="error"):
        lb.matmul(X, w)
        with pytest.raises(CacheMissError, match=rf"x\[3, k\] @ .* on {HERE} has no measured time.*tuned\.json"):
            lb.matmul(jnp.ones((3, K)), w)


def test_a_miss_can_be_measured_and_kept(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "Worker", partial(Worker, timeout=2.0, command=FAULTY))
    monkeypatch.setenv("LOWBIT_ON_CACHE_MISS", "autotune")
    lb.matmul(X, random_array(TYPE))
    (kept,) = load(user_file).entries.values()
    assert kept.tried["decode"] == "it took more than 2 s"
    assert lookup.chosen(M, TYPE, "f32", "cpu")[0].name == kept.lowering
    lookup.keep(Cache({"other": kept}))
    assert len(load(user_file).entries) == 2
    user_file.write_text("{")
    lookup.keep(Cache({"third": kept}))
    assert user_file.read_text() == "{"


def test_the_flag_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lookup.on_miss() == "heuristic"
    monkeypatch.setenv("LOWBIT_ON_CACHE_MISS", "autotune")
    assert lookup.on_miss() == "autotune"
    try:
        flags.FLAGS(["program", "--lowbit_on_cache_miss=error"])
        assert lookup.on_miss() == "error"
        with pytest.raises(flags.IllegalFlagValueError, match=r"--lowbit_on_cache_miss=never.*<heuristic\|autotune"):
            flags.FLAGS(["program", "--lowbit_on_cache_miss=never"])
    finally:
        flags.FLAGS["lowbit_on_cache_miss"].unparse()
        flags.FLAGS.unparse_flags()
    with lb.tuned(Cache({}), on_miss="heuristic"):
        assert lookup.on_miss() == "heuristic"
    monkeypatch.setenv("LOWBIT_ON_CACHE_MISS", "never")
    with pytest.raises(ValueError, match="LOWBIT_ON_CACHE_MISS is 'never': use one of heuristic, autotune, error"):
        lookup.on_miss()
    with pytest.raises(ValueError, match="on_miss is 'never'"), lb.tuned(Cache({}), on_miss="never"):  # type: ignore[arg-type]
        pass


# ---------------------------------------------------------------- files


def test_a_file_holds_what_was_measured_and_two_are_merged(tmp_path: Path) -> None:
    one = Cache({"a": entry("mma", (8, 2, 4)), "b": entry("decode")})
    one.save(tmp_path / "one")
    assert load(tmp_path / "one").entries == one.entries
    both = load(tmp_path / "one") | Cache({"b": entry("table"), "c": entry("decode")})
    assert [e.lowering for e in both.entries.values()] == ["mma", "table", "decode"]


def test_a_key_says_all_that_a_time_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        key_of(M, TYPE, "f32", HERE), key_of(3, TYPE, "f32", HERE), key_of(M, TYPE.resized(n=8), "f32", HERE),
        key_of(M, TYPE, "bf16", HERE), key_of(M, TYPE, "f32", "H100"),
        key_of(M, TYPE, "f32", HERE), key_of(M, replace(TYPE, layout="mma"), "f32", HERE),
    }  # fmt: skip
    monkeypatch.setattr(lb, "__version__", "0.0.0")
    key_of.cache_clear()
    keys.add(key_of(M, TYPE, "f32", HERE))
    key_of.cache_clear()
    assert len(keys) == 7


def test_a_damaged_file_or_one_of_another_version_is_refused(user_file: Path, said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    cache("decode").save(path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match=rf"'{re.escape(str(path))}' is no whole file .*: delete it"), lb.tuned(path):
        pass
    path.write_text(whole.replace('"lowbit_tuned": 1', '"lowbit_tuned": 2'))
    message = rf"holds measured times of version 2, and lowbit {re.escape(lb.__version__)} reads version 1"
    with pytest.raises(CacheError, match=message):
        load(path)
    for text in (b"[]", b"\xff"):
        path.write_bytes(text)
        with pytest.raises(CacheError):
            load(path)
    path.write_text(whole.replace('"tried"', '"tired"'))
    with pytest.raises(CacheError, match=r"has an entry that cannot be read \(it has .*'tired'"):
        load(path)
    user_file.parent.mkdir()
    user_file.write_text(whole[:-5])
    for _ in range(2):  # the user's own says so once, and products run
        assert lookup.chosen(M, TYPE, "f32", "cpu")[0].name == lb.plan((M, K), TYPE).choices[0].name
    assert len(said) == 1 and str(user_file) in said[0] and "as if nothing had been measured" in said[0]


def test_entries_of_other_versions_are_not_used_and_one_warning_says_so(said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    old = replace(entry("decode"), jax="0.9.0", lowbit="0.0.1")
    Cache({"old": old}).save(path)
    assert load(path).entries == load(path).entries == {"old": old}
    here = f"not used by jax {jax.__version__} with lowbit {lb.__version__}"
    assert len(said) == 1 and str(path) in said[0]
    assert "measured by jax 0.9.0 with lowbit 0.0.1" in said[0] and here in said[0]
    assert json.loads(path.read_text())["lowbit_tuned"] == 1
