"""`lb.tune.reconstruct`: how a model is cut at its blocks, what trains in them, and that nothing gets worse."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from examples.tinylm import corpus, weights
from examples.tinylm.batches import Windows
from examples.tinylm.evaluate import bits_per_byte
from lowbit.tune import reconstruction
from lowbit.tune.blocks import Cut, Inputs, Stream
from lowbit.tune.training import _mixed, _step
from tests.models import arrays, assert_same, fast, inputs

WIDTH, ROWS = 8, 64


class Block(nnx.Module):
    """Called with a mask, a keyword and a choice that is no array; returns what is added, and the sizes of rows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, *, shift: jax.Array, act: str = "tanh") -> dict[str, jax.Array]:
        y = getattr(jnp, act)(self.linear(self.norm(x))) + shift
        return {"sum": x + jnp.where(mask, y, 0), "count": mask.sum(-1)}


class Net(nnx.Module):
    """Blocks in a row; the last one is also given what the first one returned."""

    def __init__(self, blocks: int = 3, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(blocks)])

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        x = first = self.first(batch["x"])
        for i, layer in enumerate(self.layers):
            if i == len(self.layers) - 1:
                x = x + 0.5 * first
            x = layer(x, batch["mask"], shift=jnp.float32(0.25 * i))["sum"]
            first = x if i == 0 else first
        return x


BATCHES = [{"x": inputs(ROWS, WIDTH, seed=i), "mask": inputs(ROWS, WIDTH, seed=9 + i) > -1} for i in range(4)]
DENSE = Net()
run = partial(lb.tune.reconstruct, dense=DENSE, batches=BATCHES, blocks="layers/*", epochs=4, rate=3e-2)


@cache
def small() -> Net:
    return lb.quantize(DENSE, fast({"layers/**": lb.bcq(2), "first": None}))


def called(model: Net, batch: dict[str, jax.Array], until: int) -> tuple[Any, ...]:
    """The arguments of a block, by running the blocks before it."""
    outs = [model.first(batch["x"])]
    for i in range(until + 1):
        x = outs[-1] + 0.5 * outs[1] if i == len(model.layers) - 1 else outs[-1]
        if i < until:
            outs.append(model.layers[i](x, batch["mask"], shift=jnp.float32(0.25 * i))["sum"])
    return x, batch["mask"]


def error(block: Any, model: Net, i: int) -> float:
    """Of a block in place of the i-th of a model, on the batch held out, as it is stated to be minimized."""
    made = block(*called(model, BATCHES[-1], i), shift=jnp.float32(0.25 * i))["sum"]
    target = DENSE.layers[i](*called(DENSE, BATCHES[-1], i), shift=jnp.float32(0.25 * i))["sum"]
    return float(jnp.square(made - target).mean())


def test_each_block_is_better_with_the_inputs_that_tuned_blocks_give_it() -> None:
    before = arrays(small()), arrays(DENSE)
    compiled = _step._cache_size()
    tuned = run(small())
    assert _step._cache_size() == compiled + 1  # blocks alike share it
    for i in range(3):
        assert error(tuned.layers[i], tuned, i) < 0.98 * error(small().layers[i], tuned, i)
    assert_same(arrays(small()), before[0])
    assert_same(arrays(DENSE), before[1])
    after = arrays(tuned)
    changed = {name for name in after if after[name].tobytes() != before[0][name].tobytes()}
    assert changed == {f"layers/{i}/linear/kernel/alpha" for i in range(3)}


@pytest.mark.slow
def test_the_best_is_kept_even_if_it_is_the_start() -> None:
    assert_same(arrays(run(small(), rate=1e9, epochs=2)), arrays(small()))


@pytest.mark.slow
def test_what_trains_is_rounded_as_it_is_stored_before_it_is_measured() -> None:
    """Codebooks and scales in 16 bits, as AQLM has them, and norms too: the error kept is that of the result."""
    fmt = lb.codebook(1, 4, vec=2, scale_dtype="float16")
    coarse = lb.quantize(DENSE, [lb.Rule("layers/0/**", fmt, lb.residual_kmeans(1)), lb.Rule("**", None)])
    tuned = run(coarse, blocks="layers/0", wrt=nnx.Param, rate=1e-2)
    kernel = tuned.layers[0].linear.kernel
    assert kernel.type == coarse.layers[0].linear.kernel.type and kernel.codebooks.dtype == np.float16
    after, before = arrays(tuned), arrays(coarse)
    changed = {name for name in after if after[name].tobytes() != before[name].tobytes()}
    names = ("linear/kernel/codebooks", "linear/kernel/scale", "linear/bias", "norm/scale")
    assert changed == {f"layers/0/{name}" for name in names}
    assert error(tuned.layers[0], tuned, 0) < 0.9 * error(coarse.layers[0], coarse, 0)


@pytest.mark.slow
def test_a_change_that_is_rounded_off_is_none(caplog: pytest.LogCaptureFixture) -> None:
    coarse = lb.quantize(DENSE, fast({"layers/0/**": lb.bcq(2, scale_dtype="float16"), "**": None}))
    with caplog.at_level(logging.INFO, logger="absl"):
        assert_same(arrays(run(coarse, blocks="layers/0", rate=1e-7, patience=2)), arrays(coarse))
    ((before, after, steps),) = re.findall(r"'layers/0': mean squared error (\S+) -> (\S+) in (\d+) steps", caplog.text)
    assert before == after and steps == "6"  # two epochs of three batches


@pytest.mark.slow
def test_each_width_has_scales_tuned_for_it() -> None:
    coarse = lb.quantize(DENSE, {"layers/**": lb.any_bcq(1, 2, scale_dtype="bfloat16"), "first": None})
    tuned = coarse
    for width in (1, 2):
        tuned = run(lb.at_width(tuned, width), blocks="layers/0")
        fields = [m.layers[0].linear.kernel.array.fields for m in (coarse, tuned)]
        assert [bool((fields[0][f"alpha{b}"] != fields[1][f"alpha{b}"]).any()) for b in (1, 2)] == [True, width == 2]
        before, after = (error(lb.at_width(m, width).layers[0], coarse, 0) for m in (coarse, tuned))
        assert after < before


@pytest.mark.slow
def test_weights_that_kernels_read_come_back_in_their_own_layout() -> None:
    model, x = nnx.Sequential(nnx.Linear(128, 64, use_bias=False, rngs=nnx.Rngs(0))), inputs(8, 128)
    prepared = lb.prepare(lb.quantize(model, fast(lb.bcq(1, group=128))), "hopper")
    assert prepared.layers[0].kernel.type.layout == "mma"
    tuned = lb.tune.reconstruct(prepared, model, [x, x], "layers/*", epochs=1)
    assert tuned.layers[0].kernel.type.layout == "own"
    assert jnp.square(tuned(x) - model(x)).mean() < jnp.square(prepared(x) - model(x)).mean()


def test_inputs_without_any_signal_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = jax.tree.map(jnp.zeros_like, BATCHES)
    assert_same(arrays(run(small(), batches=nothing, epochs=1, progress=True)), arrays(small()))
    assert "reconstructing" in capsys.readouterr().err


# ---------------------------------------------------------------- cutting


def test_inputs_are_those_of_the_model_and_outputs_are_held_while_they_are_needed() -> None:
    stream = Stream(Cut(DENSE, "layers/*", lambda m, b: m(b)), BATCHES[:2])
    survey = stream.cut.survey(BATCHES[0])
    first, second, third = survey.returned
    assert survey.needs == {first: set(), second: {first}, third: {first, second}}
    for i, path in enumerate(survey.returned):
        made = [stream.inputs(path, at) for at in range(2)]
        for own, batch in zip(made, BATCHES, strict=False):
            x, mask, shift = own.arrays
            np.testing.assert_array_equal(mask, batch["mask"])
            np.testing.assert_allclose(x, called(DENSE, batch, i)[0], rtol=1e-5, atol=1e-5)
            assert shift == 0.25 * i
        stream.go_on(path, [own.call(DENSE.layers[i]) for own in made])
        assert [set(held) for held in stream.outputs] == [[{first}, {first, second}, set()][i]] * 2


def test_batches_of_two_shapes_and_arguments_that_are_no_arrays() -> None:
    short = {name: value[:3] for name, value in BATCHES[0].items()}
    cut = Cut(DENSE, "layers/1", lambda m, b: m(b))
    for batch in (short, BATCHES[0]):
        assert cut.inputs("layers/1", batch, {}).arrays[0].shape == batch["x"].shape
    given = Inputs.of((1, None), {"a": jnp.ones(2), "b": "same"})
    assert len(given.arrays) == 1
    args, kwargs = jax.jit(lambda g: g)(given).call(lambda *args, **kwargs: (args, kwargs))
    assert args == (1, None) and kwargs["b"] == "same" and kwargs["a"].shape == (2,)


def test_the_share_of_inputs_of_quantized_blocks_is_the_one_given() -> None:
    own, dense = (Inputs.of((jnp.full(10_000, v), jnp.full(3, int(v))), {}) for v in (1.0, 2.0))
    floats, integers = _mixed(jax.random.key(0), 0.25, own, dense).arrays
    assert set(np.unique(floats)) == {1, 2} and (integers == 1).all()
    # Five standard deviations of a share of so many draws.
    assert abs(float((floats == 1).mean()) - 0.25) < 5 * (0.25 * 0.75 / 10_000) ** 0.5


@pytest.mark.slow
def test_a_share_of_the_inputs_is_of_quantized_blocks() -> None:
    mixed, plain = run(small(), quantized_inputs=0.5), run(small())
    assert (mixed.layers[0].linear.kernel.alpha[...] == plain.layers[0].linear.kernel.alpha[...]).all()  # one input
    assert (mixed.layers[1].linear.kernel.alpha[...] != plain.layers[1].linear.kernel.alpha[...]).any()
    assert error(mixed.layers[1], mixed, 1) < error(small().layers[1], mixed, 1)


# ---------------------------------------------------------------- going on after a kill


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[str]
    want, solve, solved = arrays(run(small())), reconstruction.tuned, []

    def noted(block: Any, path: str, *rest: Any) -> Any:
        if len(solved) == 2:
            raise KilledError
        solved.append(path)
        return solve(block, path, *rest)

    monkeypatch.setattr(reconstruction, "tuned", noted)
    with pytest.raises(KilledError):
        run(small(), resume=tmp_path)
    assert solved == ["layers/0", "layers/1"]
    solved.clear()
    assert_same(arrays(run(small(), resume=tmp_path)), want)
    assert solved == ["layers/2"]
    assert_same(arrays(run(small(), resume=tmp_path)), want)
    assert solved == ["layers/2"]
    for changes in ({"rate": 1e-2}, {"batches": BATCHES[1:]}, {"dense": Net(seed=1)}, {"wrt": nnx.Param}):
        solved[:] = ["", ""]
        with pytest.raises(KilledError):  # as soon as it solves something
            run(small(), resume=tmp_path, **changes)


# ---------------------------------------------------------------- what is refused


class Twice(Net):
    def __call__(self, batch: Any) -> jax.Array:
        x = batch["x"]
        for layer in (self.layers[0], self.layers[1], self.layers[0]):
            x = layer(x, batch["mask"], shift=jnp.float32(0))["sum"]
        return x


class Jitted(Net):
    def __call__(self, batch: Any) -> jax.Array:
        layer = nnx.jit(lambda m, x, mask: m(x, mask, shift=jnp.float32(0))["sum"])
        return layer(self.layers[0], batch["x"], batch["mask"])


class Some(Net):
    def __call__(self, batch: Any) -> jax.Array:
        return self.layers[1](batch["x"], batch["mask"], shift=jnp.float32(0))["sum"]


class Counts(nnx.Module):
    def __init__(self) -> None:
        self.block = nnx.Dict(rows=nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)))
        self.counter = Counter()

    def __call__(self, batch: Any) -> jax.Array:
        return self.counter(self.block["rows"](batch["x"]))


class Counter(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return (x > 0).sum()


def sharing() -> Net:
    model = nnx.clone(small())
    model.layers[1].norm = model.layers[0].norm
    return model


def broken(value: float) -> Net:
    model = nnx.clone(small())
    model.layers[0].linear.kernel.alpha[...] = model.layers[0].linear.kernel.alpha[...] * value
    return model


def of(kind: type[Net]) -> dict[str, Any]:
    dense = kind()
    return {"model": lb.quantize(dense, fast({"layers/**": lb.bcq(2), "first": None})), "dense": dense}


REFUSALS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"blocks": "blocks/*"}, "rule 'blocks/*' matches none of the 14 modules of the model, such as "),
    (lambda: {"blocks": []}, "no blocks were named: give patterns over the paths of modules, such as 'layers/*'"),
    (lambda: {"blocks": ["layers/0", "layers/*/norm"]}, "block 'layers/0/norm' lies within block 'layers/0': "),
    (lambda: {"model": sharing()}, "'layers/0/norm' of block 'layers/0' is 'layers/1/norm' too, outside of "),
    (lambda: of(Twice) | {"blocks": "layers/0"}, "block 'layers/0' runs twice for a batch: it has no one "),
    (lambda: of(Jitted) | {"blocks": "layers/0"}, "block 'layers/0' runs within a transformation, such as nnx.scan "),
    (lambda: of(Some), "block 'layers/0' does not run: leave it out of blocks=, or give another call="),
    (lambda: {"dense": Net(2)}, "blocks='layers/*' are ['layers/0', 'layers/1', 'layers/2'], but in the dense model ["),
    (lambda: {"dense": Counts(), "model": Counts(), "blocks": "counter"}, "block 'counter' returns no floats: "),
    (lambda: {"model": DENSE}, "no block of 'layers/*' has anything of (<class 'lowbit.nn.kernel.Scale'>, "),
    (lambda: {"wrt": lb.Code}, "wrt=<class 'lowbit.nn.kernel.Code'> selects uint8: only floats can be trained"),
    (lambda: {"batches": BATCHES[:1]}, "1 batches were given, and 1 are held out: give more, to train on"),
    (lambda: {"batches": [{"x": b["x"] * jnp.nan, "mask": b["mask"]} for b in BATCHES]},
     "block 'layers/0' of the dense model returns 512 NaN or inf for batch 0: give batches for "),
    (lambda: {"model": broken(np.nan)}, "block 'layers/0' returns NaN or inf: repair the quantized model, or give "),
    (lambda: {"model": lb.at_width(lb.quantize(DENSE, lb.any_bcq(1, 2)), jnp.int32(2))},
     "layer 'first' is read at a width that may change: choose the one to tune, lb.at_width(model, 3)"),
    (lambda: {"model": nnx.eval_shape(lambda: nnx.clone(small()))}, "cannot reconstruct an abstract model, as "),
    (lambda: {"dense": 3}, "cannot reconstruct from a int: give an nnx.Module"),
    (lambda: {"epochs": 0}, "epochs must be an int, 1 or more, not 0"),
    (lambda: {"rate": 0}, "rate must be above 0, not 0"),
    (lambda: {"quantized_inputs": 1.5}, "quantized_inputs is a share, from 0 to 1, not 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_what_cannot_be_done(options: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        run(**{"model": small(), **options()})


class Other(Net):
    def __call__(self, batch: Any) -> jax.Array:
        return self.layers[0](batch["x"], batch["mask"], shift=jnp.float32(0), act="sin")["sum"]


class Backwards(Net):
    def __call__(self, batch: Any) -> jax.Array:
        x = batch["x"]
        for layer in reversed(self.layers):
            x = layer(x, batch["mask"], shift=jnp.float32(0))["sum"]
        return x


def test_models_that_do_not_go_together() -> None:
    call = "block 'layers/0' is called with other arguments in the dense model: quantized_inputs=1.0 mixes none"
    with pytest.raises(ValueError, match=f"^{re.escape(call)}$"):
        run(small(), dense=Other(), blocks="layers/0", quantized_inputs=0.5)
    wide, narrow = (nnx.Sequential(nnx.Linear(WIDTH, n, rngs=nnx.Rngs(0))) for n in (8, 4))
    shapes = r"block 'layers/0' returns \[\(64, 8\)\], but in the dense model \[\(64, 4\)\]: give the model that "
    with pytest.raises(ValueError, match=f"^{shapes}"):
        run(lb.quantize(wide, fast(lb.bcq(1))), dense=narrow, call=lambda m, b: m(b["x"]))
    order = (
        "blocks run in the order ['layers/0', 'layers/1', 'layers/2'], and also ['layers/2', 'layers/1', 'layers/0']: "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(order)}both models must run alike for all batches$"):
        run(small(), dense=Backwards())


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "quantizer"), [
    (lb.bcq(2, group=128), lb.greedy()), (lb.codebook(1, 8, vec=4, group=128), lb.residual_kmeans(3))
], ids=str)  # fmt: skip
def test_the_shipped_model_predicts_better(fmt: lb.Format, quantizer: Any) -> None:
    """Of what quantization costs in bits a byte, two epochs of eight batches give back a fifth and more."""
    model = weights.load()
    text = b"".join([*corpus.train_code().values()][:40])
    windows = Windows(np.frombuffer(text, np.uint8), 128, 0)
    batches = [jnp.asarray(windows.batch(i, 8).astype(np.int32)) for i in range(9)]
    coarse = lb.quantize(model, [lb.Rule("**", fmt, quantizer)])
    tuned = lb.tune.reconstruct(coarse, model, batches, "layers/*", epochs=2, rate=1e-3)
    held = corpus.match_listed("code").text[: 1 << 13]
    dense, before, after = (bits_per_byte(m, held) for m in (model, coarse, tuned))
    assert after - dense < 0.8 * (before - dense)
