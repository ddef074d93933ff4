"""`lb.lwc`, ranges learned block by block, and `lb.q_rater`, ranges and rounding searched by the loss."""

from __future__ import annotations

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
from lowbit.nn.clipping import grouped, rounded, rows_of, set_rows, span
from lowbit.nn.kinds import layers
from lowbit.testing.tolerance import gamma
from tests.models import arrays, assert_same

LWC, Q_RATER = (sys.modules[f"lowbit.nn.{name}"] for name in ("lwc", "q_rater"))
RNG = np.random.default_rng(0)
FMT = lb.uniform(2, group=10)
X = [jnp.asarray(RNG.standard_normal((16, 20)), jnp.float32) for _ in range(2)]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(20, 24, rngs=rngs), nnx.Linear(24, 20, rngs=rngs)

    def __call__(self, x: jax.Array, flip: bool, *, shift: Any = None) -> jax.Array:
        y = x + self.down(nnx.relu(self.up(x if shift is None else x + shift)))
        return -y if flip else y


class Net(nnx.Module):
    """Two blocks in a list, given a flag and an array by name, in the other order than their names."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(20, 4, rngs=rngs)
        self.spare = nnx.Linear(20, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.blocks[1](x, True, shift=jnp.float32(0.5))
        return self.head(self.blocks[0](x, False))


RULES = {"spare": None, "**": FMT}
NET = Net()
lwc = partial(lb.lwc, epochs=12, rate=0.1)


def loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.square(model(x) - NET(x)).mean()


def of_rounded(model: Any) -> float:
    return float(np.mean([loss(lb.quantize(model, RULES), x) for x in X]))


# ---------------------------------------------------------------- learned clipping


@pytest.mark.slow
def test_a_block_comes_closer_and_its_weights_are_clipped() -> None:
    rules = {"blocks/1/*": FMT}
    clipped = lwc(NET, rules, X, blocks=["blocks/1"])
    exact = [NET.blocks[1](x, True) for x in X]

    def error(model: Any) -> float:
        q = lb.quantize(model, rules).blocks[1]
        return float(np.mean([jnp.square(q(x, True) - y).mean() for x, y in zip(X, exact, strict=True)]))

    assert error(clipped) < 0.9 * error(NET)
    for path in ("blocks/1/up", "blocks/1/down"):
        before, after = (grouped(rows_of(layers(m)[path]), FMT) for m in (NET, clipped))
        (lo, hi), (low, high) = span(before), span(after)
        np.testing.assert_array_equal(after, jnp.clip(before, low, high))
        assert (low >= lo).all() and (high <= hi).all() and (high < 0.9 * hi).any()
    assert_same(arrays(clipped.blocks[0]), arrays(NET.blocks[0]))


@pytest.mark.slow
def test_blocks_that_gain_nothing_stay_as_they_are() -> None:
    """Four levels hold these weights exactly."""
    model = nnx.Dict(a=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    model.a.kernel.set_value(jnp.asarray(RNG.integers(-1, 3, (8, 4)), jnp.float32).at[0].set(-1).at[1].set(2))
    same = lwc(model, lb.uniform(2), [X[0][:, :8]], blocks=["a"], call=lambda m, x: m.a(x), epochs=2)
    assert_same(arrays(same), arrays(model))


@pytest.mark.slow
def test_blocks_learn_after_rounded_ones_what_float_ones_make(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    pair = LWC._Job._pair
    note = lambda self, path, *more: seen.setdefault(path, pair(self, path, *more))  # noqa: E731
    monkeypatch.setattr(LWC._Job, "_pair", note)
    clipped = lwc(NET, RULES, X[:1], blocks=["blocks/*"], epochs=2)
    assert list(seen) == ["blocks/1", "blocks/0"]  # as they run
    given, wanted = seen["blocks/0"]
    first = nnx.clone(clipped).blocks[1]
    for layer in (first.up, first.down):
        set_rows(layer, rounded(rows_of(layer), FMT))
    np.testing.assert_array_equal(given.arrays[0], first(X[0], True, shift=jnp.float32(0.5)))
    between = NET.blocks[1](X[0], True, shift=jnp.float32(0.5))
    np.testing.assert_array_equal(wanted, NET.blocks[0](between, False))
    assert ("", False) in given.fixed and len(given.arrays) == 1 and len(seen["blocks/1"][0].arrays) == 2
    np.testing.assert_array_equal(clipped.head.kernel[...], NET.head.kernel[...])  # in no block


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = lwc(NET, RULES, X, blocks=["blocks/*"], epochs=2)
    learned, solved = LWC._Job.learned, []

    def killed(self: Any, path: str, formats: Any) -> Any:
        solved.append(path)
        if solved == ["blocks/1", "blocks/0"]:
            raise KeyboardInterrupt
        return learned(self, path, formats)

    monkeypatch.setattr(LWC._Job, "learned", killed)
    run = partial(lwc, NET, RULES, blocks=["blocks/*"], epochs=2, resume=tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        run(X)
    assert_same(arrays(run(X)), arrays(want))
    assert_same(arrays(run(X)), arrays(want))
    assert solved == ["blocks/1", "blocks/0", "blocks/0"]
    run(X[:1])
    assert solved[3:] == ["blocks/1", "blocks/0"]


# ---------------------------------------------------------------- by the loss


def test_the_loss_never_rises_and_each_layer_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[tuple[str, float]] = []
    best = Q_RATER._Search.best

    def noted(self: Any, path: str, *more: Any) -> Any:
        entered.append((path, self.value()))
        return best(self, path, *more)

    monkeypatch.setattr(Q_RATER._Search, "best", noted)
    found = lb.q_rater(NET, RULES, X, loss)
    order = [f"blocks/{i}/{n}" for i in (1, 0) for n in ("up", "down")] + ["head"]
    losses = [value for _, value in entered] + [of_search(found)]
    assert [path for path, _ in entered] == order
    assert losses[0] == of_search(NET)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert of_rounded(found) < 0.9 * of_rounded(NET)
    np.testing.assert_array_equal(found.spare.kernel[...], NET.spare.kernel[...])


def of_search(model: Any) -> float:
    """The loss that the search has of a model whose layers are all rounded."""
    search = Q_RATER._Search(nnx.clone(NET), loss, X)
    for path, layer in layers(model).items():
        if path != "spare":
            search.put(path, rows_of(layer), FMT)
    return search.value()


@pytest.mark.parametrize(("clip", "shift"), [(1.0, 0.0), (0.7, 0.2), (0.7, -0.2), (1.0, -0.4)])
def test_rounding_to_nearest_finds_the_codes_that_were_meant(clip: float, shift: float) -> None:
    rows = jnp.asarray(RNG.standard_normal((6, 20)), jnp.float32)
    shaped = Q_RATER._shaped(rows, FMT, clip, shift)
    w = np.asarray(rows, np.float64).reshape(6, 2, 10)
    lo, hi = (clip * np.where(f(w, -1, keepdims=True) * sign > 0, f(w, -1, keepdims=True), 0.0)
              for f, sign in ((np.min, -1), (np.max, 1)))  # fmt: skip
    for end, exact in zip(span(grouped(shaped, FMT)), (lo, hi), strict=True):
        np.testing.assert_allclose(end, exact, rtol=gamma(2, "f32"))
    step = (hi - lo) / 3
    zero = np.round(-lo / step)
    # Of what is left of a whole number of steps, away from zero, more than 1/2 - shift goes up; not at the ends.
    steps = np.clip(w, lo, hi) / step
    up = np.floor(np.abs(steps) + 0.5 + np.where((w > lo) & (w < hi), shift, 0.0)) * np.sign(w)
    exact = step * (np.clip(up + zero, 0, 3) - zero)
    # A step is a difference of ends that were rounded once, and a weight a product of it.
    off = np.abs(np.asarray(rounded(shaped, FMT)).reshape(w.shape) - exact)
    assert (off <= 3 * gamma(4, "f32") * (hi - lo)).all()


def test_a_search_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(lb.q_rater, NET, RULES, X, loss, clips=(0.8, 0.6), shifts=(0.1,))
    want, best, solved = run(), Q_RATER._Search.best, []

    def killed(self: Any, path: str, *more: Any) -> Any:
        solved.append(path)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return best(self, path, *more)

    monkeypatch.setattr(Q_RATER._Search, "best", killed)
    with pytest.raises(KeyboardInterrupt):
        run(resume=tmp_path)
    assert_same(arrays(run(resume=tmp_path)), arrays(want))
    assert solved[3:] == ["blocks/0/up", "blocks/0/down", "head"]


def test_bars_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lb.q_rater(NET, {"head": FMT}, X, loss, clips=(0.8,), shifts=(), progress=True)
    assert "searching by the loss" in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_in_half_floats() -> None:
    own = nnx.Linear(20, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    found = lb.q_rater(own, FMT, X, lambda m, x: jnp.square(m(x)).mean().astype(jnp.bfloat16), clips=(0.5,), shifts=())
    assert float(jnp.abs(found.kernel.get_value()).max()) < float(jnp.abs(own.kernel.get_value()).max())


# ---------------------------------------------------------------- what is refused


class Pair(nnx.Module):
    def __init__(self) -> None:
        self.a = nnx.Linear(20, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> Any:
        return self.a(x), x


TWO = nnx.Dict(block=Pair())
CALL = {"call": lambda m, x: m.block(x)[0]}
NAN = jnp.full((2, 20), jnp.nan)


@pytest.mark.parametrize(("call", "message"), [
    (partial(lwc, NET, RULES, X, blocks=["block"]), "^block 'block' matches no module with a layer that gets a form"),
    (partial(lwc, NET, RULES, X, blocks=[]), "^blocks is empty: name the modules whose outputs are compared, such as"),
    (partial(lwc, NET, RULES, X, blocks="blocks/*"), r"^blocks='blocks/\*' is one pattern: give a sequence of them$"),
    (partial(lwc, NET, RULES, X, blocks=["**"]), "^block 'blocks/0/(up|down)' lies within block 'blocks/0': name one"),
    (partial(lwc, NET, FMT, X, blocks=["spare"]), "^'spare' never runs on the first batch: leave it out, or give"),
    (partial(lwc, NET, RULES, [], blocks=["head"]), "^no batches were given: there is nothing to learn from$"),
    (partial(lwc, NET, RULES, X, blocks=["head"], epochs=0), "^epochs must be a positive int, not 0$"),
    (partial(lwc, NET, RULES, X, blocks=["head"], rate=-1.0), "^rate must be above 0, not -1.0$"),
    (partial(lwc, NET, RULES, X, blocks=["head"], call=lambda m, x: m.head(x) + m(x)), "^block 'head' runs more than"),
    (partial(lwc, NET, RULES, [NAN], blocks=["head"]), "^the output of block 'head' is NaN or inf: give batches for"),
    (partial(lwc, TWO, FMT, [0 * X[0]], blocks=["block/a"], **CALL), "^the inputs of block 'block/a' are all zero: t"),
    (partial(lwc, TWO, FMT, X, blocks=["block"], **CALL), "^block 'block' returns a tuple: name blocks that return"),
    (partial(lwc, NET, RULES, X, blocks=["head"], call=nnx.jit(lambda m, x: m(x))), "^block 'head' runs within jax.j"),
    (partial(lwc, NET, lb.bcq(2), X, blocks=["head"]), r"gets bcq\(bits=2\): lb.lwc looks for what rounding to a unif"),
    (partial(lb.q_rater, NET, lb.bcq(2), X, loss), r"gets bcq\(bits=2\): lb.q_rater looks for what rounding to a uni"),
    (partial(lb.q_rater, NET, FMT, X, loss), "^'spare' never runs on the first batch: leave it out, or give "),
    (partial(lb.q_rater, NET, RULES, [], loss), "^no batches were given: there is no loss to search by$"),
    (partial(lb.q_rater, NET, RULES, [X[0], NAN], loss), "^the loss of the rounded model is nan on batch 1: give oth"),
    (partial(lb.q_rater, NET, RULES, X, lambda m, x: m(x)), r"^the loss has shape \(16, 4\): give one that is a "),
    (partial(lb.q_rater, NET, RULES, X, loss, clips=(1.5,)), "^clips are shares of each range, above 0 and below 1"),
    (partial(lb.q_rater, NET, RULES, X, loss, shifts=(0.5,)), "^shifts are parts of a step, above -0.5 and below"),
    (partial(lb.q_rater, nnx.LayerNorm(4, rngs=nnx.Rngs(0)), FMT, X, loss), "there is nothing for lb.q_rater to do$"),
])  # fmt: skip
def test_what_cannot_be_done(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_block_that_some_batch_does_not_reach() -> None:
    def call(model: Any, x: jax.Array) -> jax.Array:
        return model.head(x) if len(x) > 2 else x

    with pytest.raises(ValueError, match=r"^block 'head' never runs on a batch that was given: leave that out$"):
        lwc(NET, {"head": FMT}, [X[0], X[0][:2]], blocks=["head"], call=call)
