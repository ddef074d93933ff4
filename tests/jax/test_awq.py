"""`lb.awq`: channels scaled through folds that are tried first, and groups clipped by their own error."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from examples.tinylm.model import Config, TinyLM
from lowbit.nn import LayerStats
from lowbit.nn.awq import RATIOS
from lowbit.nn.clipping import nearest, rounded, rows_of, set_rows
from lowbit.nn.fold import check_folds, placed
from lowbit.nn.kinds import layers, weight
from lowbit.nn.resume import Folder
from lowbit.testing.tolerance import gamma
from tests.models import arrays, assert_same

RNG = np.random.default_rng(0)
FMT = lb.uniform(3, group=10)


class Net(nnx.Module):
    """A norm before two layers, of which one feeds a third through relu and gates it."""

    def __init__(self, seed: int = 0, width: int = 24, hidden: int = 20) -> None:
        rngs = nnx.Rngs(seed)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.norm.bias.set_value(jnp.linspace(-1, 1, width))
        self.norm.scale.set_value(jnp.where(jnp.arange(width) % 6 == 0, 5.0, 0.3))
        self.gate, self.up = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


NORM, UP = lb.Fold("norm", ["gate", "up"]), lb.Fold("up", "down")
X = jnp.asarray(RNG.standard_normal((64, 24)), jnp.float32)
NET = Net()


def measured(x: jax.Array) -> LayerStats:
    rows = np.asarray(x)
    return LayerStats(
        None, None, len(rows), gram=jnp.asarray(rows.T @ rows / len(rows)), magnitude=np.abs(rows).mean(0)
    )


Y = NET.norm(X)
STATS = {"gate": measured(Y), "up": measured(Y), "down": measured(nnx.silu(NET.gate(Y)) * NET.up(Y))}


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(lb.awq, NET, FMT, STATS, folds=[NORM, UP], batch=X, resume=tmp_path)
    want = lb.awq(NET, FMT, STATS, folds=[NORM, UP], batch=X)
    solved: list[str] = []

    def stop(self: Any, name: str, key: Any, solve: Any) -> Any:
        if len(solved) == 3:
            raise KeyboardInterrupt
        return kept(self, name, key, lambda: (solved.append(name), solve())[1])

    kept = Folder.entries
    monkeypatch.setattr(Folder, "entries", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    first, solved[:] = solved[:], []
    monkeypatch.setattr(Folder, "entries", lambda *a: kept(*a[:3], lambda: (solved.append(a[1]), a[3]())[1]))
    assert_same(arrays(run()), arrays(want))
    assert first + solved == ["fold 0", "fold 1", "clipped down", "clipped gate", "clipped up"]
    solved.clear()
    lb.awq(NET, FMT, {**STATS, "up": measured(2 * Y)}, folds=[NORM, UP], batch=X, resume=tmp_path)
    assert len(solved) == 5, "what other statistics gave is not taken"


# ---------------------------------------------------------------- what rounds


@pytest.mark.parametrize("scale", ["float32", "float16"])
@pytest.mark.parametrize("group", [*(pytest.param(g, marks=pytest.mark.slow) for g in (None, 8)), 10])
def test_rounding_is_that_of_the_quantizer(scale: str, group: int | None) -> None:
    fmt = lb.uniform(3, group=group, scale_dtype=scale)
    w = jnp.asarray(RNG.standard_normal((24, 6)), jnp.float32).at[:10, 2].set(0).at[:, 3].set(-1e-39)
    np.testing.assert_array_equal(
        jax.jit(rounded, static_argnums=1)(w.T, fmt), lb.dequantize(lb.quantize_array(w, fmt)).T
    )


@pytest.mark.slow
def test_ranges_have_the_gradient_of_clipped_weights() -> None:
    """What lies beyond an end moves with it, and the rest stays where it is but for the step."""
    values = jnp.asarray([[[-1.0, -0.4, 0.3, 0.9, 2.0, 3.0]]])
    clipped = lambda hi: nearest(jnp.clip(values, -1.0, hi), lb.uniform(2))  # noqa: E731
    np.testing.assert_array_equal(clipped(1.5)[0, 0, 4:], clipped(1.5)[0, 0, 5])
    gradient = jax.jit(jax.jacobian(clipped))(1.5)[0, 0]
    assert gradient[4] == gradient[5] and abs(gradient[4]) > abs(gradient[1])


@pytest.mark.parametrize("layer", [
    nnx.Embed(5, 8, rngs=nnx.Rngs(0)), nnx.Conv(4, 6, 3, feature_group_count=2, rngs=nnx.Rngs(0)),
    nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0)), lb.nn.Experts(3, 4, 5, rngs=nnx.Rngs(0)),
], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_rows_of_any_layer_and_back(layer: Any) -> None:
    before, rows = weight(layer).get_value(), rows_of(layer)
    set_rows(layer, 2 * rows)
    np.testing.assert_array_equal(weight(layer).get_value(), 2 * before)
    assert rows.shape[1] == {"Embed": 8, "Conv": 6, "LinearGeneral": 6, "Experts": 4}[type(layer).__name__]


# ---------------------------------------------------------------- scales


def test_means_of_magnitudes() -> None:
    stats = lb.calibrate(nnx.Dict(a=NET.up), [X[:3], X[3:]], lambda m, x: m.a(x), statistics=["magnitude"])["a"]
    # A sum of at most 61 and a mean, then one update (4 operations) for each of 2 batches.
    np.testing.assert_allclose(
        stats.magnitude, np.abs(np.asarray(X, np.float64)).mean(0), rtol=gamma(61 + 1 + 8, "f32")
    )
    assert stats.second_moment is None and stats.gram is None


@pytest.mark.slow
def test_the_float_model_stays_as_it_is() -> None:
    """Each number passes a norm (4 roundings) and two products, of 24 and 20 terms, with a bias; a few are scaled."""
    bound = 2 * gamma(4 + 24 + 20 + 8, "f32")
    y, bias = NET.norm(X), jnp.abs(NET.norm.bias[...])[None]
    size = {n: (jnp.abs(y - bias) + bias) @ jnp.abs(layers(NET)[n].kernel[...]) for n in ("gate", "up")}
    scaled = lb.awq(NET, FMT, STATS, folds=[NORM], batch=X, clip=())
    assert (scaled.norm.scale[...] != NET.norm.scale[...]).any()
    for path in ("gate", "up"):
        off = jnp.abs(layers(scaled)[path](scaled.norm(X)) - layers(NET)[path](y))
        assert (off <= bound * size[path]).all()
    scaled = lb.awq(NET, FMT, STATS, folds=[UP], batch=X, clip=())
    assert (scaled.up.kernel[...] != NET.up.kernel[...]).any()
    whole = (jnp.abs(nnx.silu(NET.gate(y))) * size["up"]) @ jnp.abs(NET.down.kernel[...]) + jnp.abs(X)
    assert (jnp.abs(scaled(X) - NET(X)) <= bound * whole).all()


def errors(model: Any) -> tuple[float, float]:
    """What the layers after the norm lose by rounding under its scales, in float64, and what it may differ by in
    float32: each of the 24 times 24 terms for an output is a product of three, with a weight that was scaled twice."""
    s = np.asarray(NET.norm.scale[...] / model.norm.scale[...], np.float64)[:, None]
    total = bound = 0.0
    for path in ("gate", "up"):
        q, gram = (lb.quantize_array(layers(model)[path].kernel[...], FMT), np.asarray(STATS[path].gram, np.float64))
        w = np.asarray(layers(NET)[path].kernel[...], np.float64)
        d = np.asarray(lb.dequantize(q), np.float64) / s - w
        total += (d * (gram @ d)).sum()
        bound += gamma(2 * 24 + 8, "f32") * ((np.abs(d) + np.abs(w)) * (np.abs(gram) @ np.abs(d))).sum()
    return total, bound


@pytest.mark.slow
def test_scales_have_the_least_error_of_the_layers_they_go_into() -> None:
    tried = []
    for r in RATIOS:
        model = nnx.clone(NET)
        s = jnp.maximum(STATS["gate"].magnitude ** r, 1e-4)
        placed([NORM], model)[0].apply(s / jnp.sqrt(s.max() * s.min()))
        tried.append(errors(model))
    found, bound = errors(lb.awq(NET, FMT, STATS, folds=[NORM], batch=X, clip=()))
    assert all(found <= other + bound + slack for other, slack in tried)
    assert tried[0] == errors(NET) and found < 0.8 * tried[0][0]


@pytest.mark.slow
def test_a_scale_that_does_not_help_is_left_out() -> None:
    """All inputs alike: nothing is gained, and the ratio 0 changes no bit."""
    model = nnx.Sequential(nnx.RMSNorm(20, rngs=nnx.Rngs(0)), nnx.Linear(20, 24, rngs=nnx.Rngs(0)))
    stats = {"layers/1": LayerStats(None, None, 9, gram=jnp.eye(20), magnitude=jnp.ones(20))}
    same = lb.awq(model, FMT, stats, folds=[lb.Fold("layers/0", "layers/1")], batch=X[:, :20], clip=())
    assert_same(arrays(same), arrays(model))


@pytest.mark.slow
def test_layers_left_dense_are_folded_but_no_part_of_the_error() -> None:
    rules = {"gate": FMT, "up": None, "down": None}
    stats = {"gate": STATS["gate"]}
    scaled = lb.awq(NET, rules, stats, folds=[NORM], batch=X)
    assert (scaled.up.kernel[...] != NET.up.kernel[...]).any()
    np.testing.assert_array_equal(scaled.down.kernel[...], NET.down.kernel[...])


# ---------------------------------------------------------------- clips


def by_group(w: Any, of: Any, gram: Any, size: int) -> np.ndarray:
    """The error of rounded rows w [n, k] as those of `of`, for each row and group, in float64."""
    d = np.asarray(rounded(w, FMT), np.float64) - np.asarray(of, np.float64)
    parts = [slice(i, i + size) for i in range(0, d.shape[1], size)]
    return np.stack([np.einsum("nk,kl,nl->n", d[:, p], np.asarray(gram, np.float64)[p, p], d[:, p]) for p in parts], 1)


@pytest.mark.slow
def test_no_group_loses_by_clipping_and_each_has_the_least_error_of_all() -> None:
    clipped = lb.awq(NET, FMT, STATS)
    rows, found = rows_of(NET.up), rows_of(clipped.up)
    gram = STATS["up"].gram
    errors = by_group(found, rows, gram, 10)
    tried = []
    for i in range(10):
        parts = [rows[:, j : j + 10] for j in (0, 10, 20)]
        bounds = [(1 - i / 20) * jnp.abs(p).max(1, keepdims=True) for p in parts]
        tried.append(
            by_group(
                jnp.concatenate([jnp.clip(p, -b, b) for p, b in zip(parts, bounds, strict=True)], 1), rows, gram, 10
            )
        )
    # Sums of at most 10 times 10 terms, compared in float32.
    slack = 1 + gamma(300, "f32") * np.linalg.cond(np.asarray(gram, np.float64))
    assert (errors <= np.min(tried, 0) * slack).all() and errors.sum() < 0.9 * tried[0].sum()
    inner = jnp.abs(found) < jnp.abs(rows)
    assert 0 < inner.mean() < 0.5 and (jnp.abs(found) <= jnp.abs(rows)).all()


def test_scaled_layers_are_clipped_by_what_their_inputs_are_now() -> None:
    scaled, both = (lb.awq(NET, FMT, STATS, folds=[NORM], batch=X, clip=clip) for clip in ((), ("up",)))
    s = NET.norm.scale[...] / scaled.norm.scale[...]
    now = {"up": LayerStats(None, None, 9, gram=STATS["up"].gram / (s[:, None] * s[None]))}
    np.testing.assert_array_equal(lb.awq(scaled, FMT, now, clip=["up"]).up.kernel[...], both.up.kernel[...])


def test_only_the_layers_that_are_named_are_clipped() -> None:
    clipped = lb.awq(NET, FMT, STATS, clip=["u*", "d*"])
    np.testing.assert_array_equal(clipped.gate.kernel[...], NET.gate.kernel[...])
    assert (clipped.up.kernel[...] != NET.up.kernel[...]).any()


@pytest.mark.slow
def test_stacks_are_clipped_slice_by_slice() -> None:
    conv = nnx.Conv(20, 6, 1, feature_group_count=2, rngs=nnx.Rngs(0))
    half = RNG.standard_normal((2, 10, 10))
    grams = jnp.asarray(half @ half.transpose(0, 2, 1), jnp.float32)
    of = nnx.Dict(conv=conv, moe=lb.nn.Experts(3, 10, 3, rngs=nnx.Rngs(1)))
    stats = {"conv": LayerStats(None, None, 9, gram=grams), "moe": LayerStats(None, None, 9, gram=grams[1])}
    out = lb.awq(of, FMT, stats)
    alone = nnx.Dict(conv=nnx.Linear(10, 3, rngs=nnx.Rngs(0)))
    alone.conv.kernel.set_value(conv.kernel[0, :, 3:])
    one = lb.awq(alone, FMT, {"conv": LayerStats(None, None, 9, gram=grams[1])})
    np.testing.assert_array_equal(one.conv.kernel[...], out.conv.kernel[0, :, 3:])
    assert (out.conv.kernel[...] != conv.kernel[...]).any()
    alone.conv.kernel.set_value(of.moe.kernel[2])
    one = lb.awq(alone, FMT, {"conv": LayerStats(None, None, 9, gram=grams[1])})
    np.testing.assert_array_equal(one.conv.kernel[...], out.moe.kernel[2])


def test_both_together_lower_the_error_of_the_model() -> None:
    after = lb.awq(NET, FMT, STATS, folds=[NORM, UP], batch=X)
    errors = [float(jnp.square(lb.quantize(m, FMT)(X) - NET(X)).sum()) for m in (NET, after)]
    assert errors[1] < 0.8 * errors[0]


# ---------------------------------------------------------------- folds


FOLDS = (
    lb.Fold("layers/*/attn_norm", ["layers/*/attn/q", "layers/*/attn/k", "layers/*/attn/v"]),
    lb.Fold("layers/*/attn/v", "layers/*/attn/o"),
    lb.Fold("layers/*/mlp_norm", ["layers/*/mlp/gate", "layers/*/mlp/up"]),
    lb.Fold("layers/*/mlp/up", "layers/*/mlp/down"),
)


@pytest.mark.slow
def test_folds_of_a_language_model() -> None:
    tiny = TinyLM(Config(layers=2, width=128, hidden=128, head=32, context=16), rngs=nnx.Rngs(0))
    for layer in tiny.layers:  # zeros at birth, which would hide what lies before them
        layer.attn.o.kernel.set_value(layer.attn.q.kernel[...])
        layer.mlp.down.kernel.set_value(layer.mlp.up.kernel[...])
    tokens = jnp.asarray(RNG.integers(256, size=(1, 6)))
    found = placed(FOLDS, tiny)
    assert len(found) == 8
    assert str(found[1]) == "the fold of 'layers/1/attn_norm' into " + ", ".join(f"'layers/1/attn/{n}'" for n in "qkv")
    check_folds(tiny, found, tokens, None)
    for source, into in (("attn/q", "attn/o"), ("mlp_norm", "mlp/gate")):
        bad = placed([lb.Fold(f"layers/1/{source}", f"layers/1/{into}")], tiny)
        with pytest.raises(
            ValueError, match=rf"^the fold of 'layers/1/{source}' into 'layers/1/{into}' changes what the "
        ):
            check_folds(tiny, [found[0], *bad], tokens, None)


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_folds_of_half_floats(dtype: str) -> None:
    model = nnx.Sequential(
        nnx.RMSNorm(32, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0)),
        nnx.Linear(32, 8, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(1)),
    )
    x = jnp.asarray(RNG.standard_normal((4, 32)) * np.logspace(-8, 0, 32), dtype)
    fold = lb.Fold("layers/0", "layers/1")
    check_folds(model, placed([fold], model), x, None)
    model.layers[1].kernel.set_value(model.layers[1].kernel[...] * 3e4 / 0.3)
    if dtype == "float16":
        with pytest.raises(ValueError, match=r"overflows the float16 of 'layers/1': cast its parameters to float32$"):
            placed([fold], model)[0].apply(jnp.full(32, 8.0))


def awq(folds: Any = (), rules: Any = FMT, stats: Any = STATS, **more: Any) -> Any:
    return partial(lb.awq, NET, rules, stats, folds=folds, **{"batch": X, **more})


def without(path: str, **fields: Any) -> dict[str, LayerStats]:
    return STATS | {path: LayerStats(None, None, 9, **fields)}


GRAM = STATS["up"].gram
STACK = nnx.Dict(
    norm=nnx.RMSNorm(4, use_scale=False, rngs=nnx.Rngs(0)), scaled=nnx.RMSNorm(4, rngs=nnx.Rngs(0)),
    moe=lb.nn.Experts(3, 4, 5, rngs=nnx.Rngs(1)), a=nnx.Linear(4, 4, rngs=nnx.Rngs(2)),
)  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [
    (awq([lb.Fold("norm", "gate")]), "^the fold of 'norm' into 'gate' changes what the model computes: outputs diff"),
    (awq([lb.Fold("gate", "down")]), "^the fold of 'gate' into 'down' changes what the model computes: .* name every "),
    (awq(NORM), r"^folds=Fold\(source='norm', into=\('gate', 'up'\)\): give a list of lb.Fold\(source, into\)$"),
    (awq(["norm"]), r"^folds=\['norm'\]: give a list of lb.Fold\(source, into\)$"),
    (awq([NORM], batch=None), "^folds are tried before they are used: give batch="),
    (awq([NORM], batch=jnp.full((2, 24), jnp.nan)), "^the model's outputs on the batch are all zero, or NaN: they"),
    (awq([lb.Fold("nom", "up")]), "^the fold of 'nom' has no source: it is none of the 5 such as 'norm'"),
    (awq([lb.Fold("norm", "dwn")]), "^the fold of 'norm' goes into 'dwn', none of the 3 such as 'down'"),
    (awq([lb.Fold("norm", "down")]), "^the fold of 'norm' into 'down': 24 channels come out, and 20 go in$"),
    (awq([NORM, lb.Fold("down", "up")]), "^layer 'up' is in the fold of 'norm' into 'gate', 'up' and in the fold of"),
    (awq([NORM], {"gate": None, "up": None, "down": FMT}), "^the fold of 'norm' .* goes into no layer with a format: "),
    (partial(lb.Fold, "a/*", ["b/*", "c"]), r"^the fold of 'a/\*' into 'c': both need the same number of `\*`"),
    (partial(lb.Fold, "a/**", "b/**"), r"^the fold of 'a/\*\*' into 'b/\*\*': both need the same number of `\*`, each"),
    (partial(lb.Fold, "a", []), "^the fold of 'a' goes into no layer: name at least one$"),
    (partial(placed, [lb.Fold("norm", "a")], STACK), "^the source 'norm' of a fold is a RMSNorm without a scale for"),
    (partial(placed, [lb.Fold("scaled", "moe")], STACK), r"^'moe' is a stack of matrices \[3, 4, 5\]: it cannot b"),
    (awq(rules=lb.bcq(3)), r"^layer 'down' gets bcq\(bits=3\): lb.awq looks for what rounding to a uniform format los"),
    (awq(rules={"**": None}), "^the rules leave every layer dense: there is nothing for lb.awq to do$"),
    (awq(clip=["q"]), "^clip='q' matches no layer with a format: it could be down, gate, up$"),
    (awq(clip=()), "^there are no folds and nothing to clip: give folds="),
    (awq(clip="up"), "^clip='up' is one pattern: give a sequence of them$"),
    (awq(stats={}), "^stats has nothing of layer 'down': calibration never reached it; run it or leave it out$"),
    (awq(stats=without("up", magnitude=jnp.ones(24))), "^stats lacks 'gram' of layer 'up': lb.calibrate"),
    (awq([NORM], stats=without("up", gram=GRAM)), "^stats lacks 'magnitude' of layer 'up': lb.calibrate"),
    (awq(stats=without("up", gram=0 * GRAM)), "^the inputs of layer 'up' were all zero in calibration: nothing says"),
    (awq(stats=without("up", gram=GRAM * jnp.nan)), "^'gram' of layer 'up' in stats has .* NaN"),
    (awq([NORM], stats=without("up", gram=GRAM, magnitude=-jnp.ones(24))), "^'magnitude' of layer 'up' in stats has 2"),
    (awq(stats=without("up", gram=jnp.eye(3))), r"^stats has 'gram' of layer 'up' with the shape \(3, 3\), but the w"),
])  # fmt: skip
def test_what_cannot_be_done(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_weights_with_nan() -> None:
    bad = Net()
    bad.up.kernel.set_value(bad.up.kernel[...].at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"^layer 'up' has 1 NaN or inf among its 480 entries"):
        lb.awq(bad, FMT, STATS)
