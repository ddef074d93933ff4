"""`lb.allocate`: an integer program over formats, and the estimates that it is fed."""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.cli.spelling import read_rules
from lowbit.nn.allocation import Allocation, Candidate, solve
from lowbit.nn.calibrate import LayerStats

RNG = np.random.default_rng(0)
FORMATS = (lb.bcq(1), lb.bcq(2), lb.bcq(3))


def model() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Dict(a=nnx.Linear(32, 8, rngs=rngs), b=nnx.Linear(8, 16, rngs=rngs), table=nnx.Embed(8, 16, rngs=rngs))


def stats(of: Any) -> dict[str, LayerStats]:
    out = {}
    for path, shape, k in (("a", (32, 8), 32), ("b", (8, 16), 8), ("table", (8, 16), 16)):
        half = RNG.standard_normal((k, k))
        square = RNG.uniform(0.1, 2.0, shape).astype(np.float32)
        moment = jnp.asarray(RNG.uniform(0.1, 2.0, k), jnp.float32)
        out[path] = LayerStats(moment, None, 9, gradient_square=square, gram=jnp.asarray(half @ half.T, jnp.float32))
    return out


MODEL, STATS = model(), stats(None)


def dense(path: str) -> jax.Array:
    layer = MODEL[path]
    return (layer.embedding if path == "table" else layer.kernel).get_value()


def error(path: str, fmt: lb.Format, **weighs: Any) -> np.ndarray:
    dims = ("n", "k") if path == "table" else ("k", "n")
    made = lb.dequantize(lb.quantize_array(dense(path), fmt, dims=dims, **weighs))
    return np.asarray(made - dense(path), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("by", [*(pytest.param(by, marks=pytest.mark.slow) for by in ("loss", "trace")), "output"])
def test_estimates(by: Any) -> None:
    found = lb.allocate(MODEL, STATS, formats=FORMATS, bits=64, by=by)
    assert [str(c.rule.format) for c in found.chosen] == ["bcq(bits=3)"] * 3
    for c in found.chosen:
        seen = STATS[c.layer]
        d = error(c.layer, c.rule.format, importance=seen.second_moment)
        f = np.asarray(seen.gradient_square, np.float64)
        if by == "output":
            rows, own = (a if c.layer == "table" else a.T for a in (d, np.asarray(dense(c.layer), np.float64)))
            gram = np.asarray(seen.gram, np.float64)
            expected = np.einsum("nk,kl,nl->", rows, gram, rows) / np.einsum("nk,kl,nl->", own, gram, own)
        else:
            expected = (f * d * d).sum() if by == "loss" else f.mean() * (d * d).sum()
        np.testing.assert_allclose(c.harm, expected, rtol=1e-4)  # float32 sums of a few hundred squares


@pytest.mark.slow
def test_second_moments_stand_in_for_grams() -> None:
    plain = {path: LayerStats(s.second_moment, None, 9) for path, s in STATS.items()}
    whole = {path: LayerStats(s.second_moment, None, 9, gram=jnp.diag(s.second_moment)) for path, s in STATS.items()}
    one, other = (lb.allocate(MODEL, s, formats=FORMATS, bits=9, by="output") for s in (plain, whole))
    assert one.rules == other.rules
    np.testing.assert_allclose(one.harm, other.harm, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = tuple(
        Candidate(str(layer), lb.Rule(str(layer), FORMATS[i]), 10, int(rng.integers(1, 50)), rng.uniform(1e-9, 1))
        for layer in range(5) for i in range(3)
    )  # fmt: skip
    groups = [every[3 * i : 3 * i + 3] for i in range(5)]
    sums = [(sum(c.bits for c in of), sum(c.harm for c in of)) for of in itertools.product(*groups)]
    for budget in (min(b for b, _ in sums), 90, 130, 1000):
        found = solve(every, budget)
        assert sum(c.bits for c in found.chosen) <= budget
        assert found.harm == pytest.approx(min(h for b, h in sums if b <= budget))


@pytest.mark.parametrize("seed", range(3))
def test_harms_of_all_sizes_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, harms = rng.integers(1e6, 1e8, 6), 10.0 ** -np.arange(0, 12, 2)
    every = tuple(
        Candidate(str(i), lb.Rule(str(i), fmt), 10, int(sizes[i]) * b, harms[i] * 4.0**-b * rng.uniform(0.5, 1))
        for i in range(6) for b, fmt in enumerate(FORMATS, 2)
    )  # fmt: skip
    for picked in rng.integers(3, size=(4, 6)):
        budget = sum(every[3 * i + j].bits for i, j in enumerate(picked))
        choices = itertools.product(*(every[3 * i : 3 * i + 3] for i in range(6)))
        best = min(sum(c.harm for c in of) for of in choices if sum(c.bits for c in of) <= budget)
        assert solve(every, budget).harm == pytest.approx(best, rel=1e-12)


@pytest.mark.slow
def test_a_budget_that_is_just_a_choice_allows_it() -> None:
    own = nnx.Dict(a=nnx.Linear(25, 1, rngs=nnx.Rngs(0)))
    seen = {"a": LayerStats(jnp.ones(25), None, 1)}
    ask = partial(lb.allocate, own, seen, formats=[lb.bcq(1, scale_dtype="float16"), lb.bcq(2)], by="output")
    for bits in {c.bits for c in ask(bits=64).candidates}:
        assert 8 * ask(bits=bits / 25).bytes == bits
        assert ask(bytes=bits // 8).bits_per_weight == bits / 25


@pytest.mark.slow
def test_a_killed_run_goes_on_and_quantize_finds_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, made = sys.modules["lowbit.nn.resume"], []

    def counted(*args: Any, **more: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(args)
        return lb.quantize_array(*args, **more)

    ask = partial(lb.allocate, MODEL, STATS, formats=[lb.bcq(1), (lb.bcq(2), lb.greedy())], bits=5.5)
    want = ask()
    monkeypatch.setattr(module, "quantize_array", counted)
    with pytest.raises(KeyboardInterrupt):
        ask(resume=tmp_path)
    made.clear()
    found = ask(resume=tmp_path, progress=True)
    assert len(made) == 2 and "allocating" in capsys.readouterr().err
    assert found == want and len({c.rule.format for c in found.chosen}) == 2
    monkeypatch.setattr(module, "quantize_array", None)
    lb.quantize(MODEL, found.rules, stats=STATS, resume=tmp_path)


@pytest.mark.slow
def test_layers_that_share_a_weight_get_one_format_and_count_once() -> None:
    tied = nnx.Dict(a=nnx.Linear(32, 8, rngs=nnx.Rngs(0)), b=nnx.Linear(32, 8, rngs=nnx.Rngs(1)))
    tied.b.kernel = tied.a.kernel
    seen = {path: LayerStats(jnp.ones(32), None, 1) for path in "ab"}
    found = lb.allocate(tied, seen, formats=[(lb.bcq(2), lb.greedy()), lb.bcq(3)], bits=4, by="output")
    assert [(r.path, r.format) for r in found.rules] == [("a", lb.bcq(2)), ("b", lb.bcq(2))]
    small = lb.quantize(tied, found.rules)
    assert small.a.kernel is small.b.kernel and found.bytes == small.a.kernel.array.type.bits // 8


@pytest.mark.slow
def test_budgets_are_kept_and_more_is_never_worse() -> None:
    harms, formats = [], [(fmt, lb.greedy()) for fmt in FORMATS]  # compiles fast
    for bits in (5.0, 5.5, 6.0, 7.0):
        found = lb.allocate(MODEL, STATS, formats=formats, bits=bits)
        assert found.bits_per_weight <= bits
        assert lb.allocate(MODEL, STATS, formats=formats, bytes=int(bits * 512 / 8)).rules == found.rules
        small = lb.quantize(MODEL, found.rules, stats=STATS)
        assert found.bytes == sum(small[p].kernel.array.type.bits for p in ("a", "b")) // 8 + (
            small["table"].embedding.array.type.bits // 8
        )
        harms.append(found.harm)
    assert harms == sorted(harms, reverse=True) and harms[0] > harms[-1]
    curve = found.curve(6)
    assert [h for _, h in curve] == sorted((h for _, h in curve), reverse=True)


# Layers, each of three sizes in bits and harms, and a budget one bit below a choice. Of the first the solver takes that
# choice to be within its tolerance, and of the second its presolve lost the best one.
CLOSE = (
    (((117_324_691, 4.5e-3), (176_003_129, 1.9e-4), (234_647_581, 8.8e-5)),
     ((33_475_417, 3.7e-4), (50_213_960, 9.1e-6), (66_951_210, 3.1e-7)),
     ((26_801_746, 3.4e-6), (40_202_798, 1.0e-7), (53_603_028, 2.7e-8))), (
     ((89_187_516, 2.779648742099656e-05), (133_782_108, 4.169772575219989e-06), (178_375_890, 2.4080824112671617e-08)),
     ((47_570_393, 0.0017402319678642797), (71_355_743, 8.646293951704409e-07), (95_140_980, 1.2275785741921657e-07)),
     ((194076681, 0.005048182303156695), (291115625, 2.5793155377418975e-05), (388153772, 5.940621131805375e-08))),
)  # fmt: skip


@pytest.mark.parametrize("layers", CLOSE)
def test_budgets_are_kept_to_the_bit_and_the_best_choice_is_found(layers: Any) -> None:
    every = tuple(Candidate(str(i), lb.Rule("**", None), 1, *of) for i, layer in enumerate(layers) for of in layer)
    choices = [(sum(b for b, _ in of), sum(h for _, h in of)) for of in itertools.product(*layers)]
    for budget in sorted(bits - 1 for bits, _ in choices)[1:]:
        found = solve(every, budget)
        assert sum(c.bits for c in found.chosen) <= budget
        assert found.harm == pytest.approx(min(h for b, h in choices if b <= budget), rel=1e-4)


@pytest.mark.parametrize(
    "quantizer",
    [
        lb.gptq(act_order=False, weighs_by=("guided_gram",)), lb.lnq(weighs_by=("guided_gram",)), lb.alternating(),
        lb.nested_kmeans(weighs_by=("gradient_square",)), lb.alternating(weighs_by=()), lb.quantizers.MinMax(),
        lb.quantizers.TwoLevelRounding(), lb.additive_codebooks(beam=2), lb.refitted_kmeans(("guided_gram",)), None,
    ],
)  # fmt: skip
def test_rules_come_back_as_they_were_written(quantizer: Any, tmp_path: Path) -> None:
    chosen = (Candidate("a", lb.Rule("a", lb.bcq(2), quantizer), 1, 2, 0.0),)
    Allocation(chosen, chosen).save(tmp_path / "rules.json")
    assert read_rules(str(tmp_path / "rules.json")) == [lb.Rule("a", lb.bcq(2), quantizer)]


def test_harm_beyond_float32_is_named() -> None:
    large = {"a": LayerStats(jnp.ones(32), None, 1, gradient_square=np.full((32, 8), 3e38, np.float32))}
    with pytest.raises(ValueError, match=r"layer 'a': what errors of bcq\(bits=1\) do is estimated at inf, as numbers"):
        lb.allocate(MODEL, large, formats=FORMATS, bits=3)


def test_what_is_written(tmp_path: Path) -> None:
    found = lb.allocate(MODEL, {"b": STATS["b"]}, formats=[(lb.bcq(2), lb.greedy()), lb.uniform(3)], bits=64)
    found.save(tmp_path / "rules.json")
    (rule,) = json.loads((tmp_path / "rules.json").read_text())["rules"]
    assert (
        rule["path"] == "b"
        and lb.Format(rule["format"], tuple(sorted(rule["options"].items()))) == found.rules[0].format
    )
    assert "quantizer" not in rule
    greedy = lb.allocate(MODEL, {"b": STATS["b"]}, formats=[(lb.bcq(2), lb.greedy())], bits=64)
    assert greedy.to_dict()["rules"][0]["quantizer"] == "BinarySolver(rounds=0, weighs_by=('second_moment',))"
    assert str(found).splitlines()[-1].startswith("together: ")
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_format_that_a_layer_cannot_have_is_no_candidate() -> None:
    large = nnx.Dict(a=nnx.Linear(8, 8, kernel_init=lambda *a: jnp.full((8, 8), 3.0), rngs=nnx.Rngs(0)))
    seen = {"a": LayerStats(jnp.ones(8), None, 1, gradient_square=np.ones((8, 8), np.float32))}
    found = lb.allocate(large, seen, formats=[lb.nested_fp(), lb.bcq(1)], bits=64)
    assert [c.rule.format for c in found.candidates] == [lb.bcq(1)]
    with pytest.raises(ValueError, match=r"layer 'a' fits none of nested_fp\(\): add a format"):
        lb.allocate(large, seen, formats=[lb.nested_fp()], bits=64)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "bits=None and bytes=None: give one budget"),
    ({"bits": 3.0, "bytes": 9}, "bits=3.0 and bytes=9: give one budget"),
    ({"bits": float("nan")}, "the budget is nan: it must be above 0"),
    ({"bits": 3.0, "by": "luck"}, "by='luck' must be one of loss, trace, output"),
    ({"bits": 1.0}, "the budget is 64 bytes, 1 bits per weight, and the smallest formats need 192 bytes, 3 bits"),
])  # fmt: skip
def test_what_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lb.allocate(MODEL, STATS, formats=[(fmt, lb.greedy()) for fmt in FORMATS], **options)


@pytest.mark.parametrize(("formats", "message"), [
    (lb.bcq(2), "give a list of one or more"),
    ([], "give a list of one or more"),
    ([lb.bcq(2), None], "None is neither a format such as"),
])  # fmt: skip
def test_what_are_no_formats(formats: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lb.allocate(MODEL, STATS, formats=formats, bits=3)


def test_statistics_that_are_missing() -> None:
    with pytest.raises(ValueError, match="by='loss' takes gradient_square, which stats does not have of layer 'a'"):
        lb.allocate(MODEL, {"a": LayerStats(jnp.ones(32), None, 1)}, formats=FORMATS, bits=3)
    with pytest.raises(ValueError, match="stats has no layer of this model"):
        lb.allocate(MODEL, {}, formats=FORMATS, bits=3)
    assert isinstance(lb.allocate(MODEL, {"a": STATS["a"]}, formats=FORMATS, bits=9), Allocation)


@pytest.mark.parametrize(("seen", "by", "message"), [
    ({"gradient_square": np.full((32, 8), np.nan, np.float32)}, "loss", "'gradient_square' of layer 'a' .* 256 NaN"),
    ({"gradient_square": np.ones((8, 32), np.float32)}, "trace", r"the shape \(8, 32\), but the weight's is \(32, 8\)"),
    ({"gram": jnp.eye(31)}, "output", r"'gram' of layer 'a' with the shape \(31, 31\)"),
])  # fmt: skip
def test_statistics_that_do_not_fit(seen: Any, by: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lb.allocate(MODEL, {"a": LayerStats(jnp.ones(32), None, 1, **seen)}, formats=FORMATS, bits=3, by=by)


def test_a_layer_of_which_all_is_zero_is_named(caplog: pytest.LogCaptureFixture) -> None:
    zeros = LayerStats(jnp.ones(32), None, 1, gradient_square=np.zeros((32, 8), np.float32))
    lb.allocate(MODEL, {"a": zeros}, formats=FORMATS, bits=9)
    assert "by what stats has, no format does harm to a: each gets any" in caplog.text
