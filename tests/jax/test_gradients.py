"""Statistics of gradients in `lb.calibrate`, what may be asked for, and calibrations that go on after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.nn import LayerStats
from lowbit.nn.calibrate import _probed, _wanted
from lowbit.nn.gradients import Means, differentiated
from lowbit.nn.importance import importance
from lowbit.nn.kinds import layers
from lowbit.nn.probe import probes
from tests.models import Shared

FISHER = lb.alternating(weighs_by=("gradient_square",))


class Whole(nnx.Module):
    """Small whole numbers: sums, and means over powers of two, are exact in float32. One layer runs twice."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def init(key: Any, shape: Any, dtype: Any) -> jax.Array:
            return jnp.asarray(rng.integers(-1, 2, shape), dtype)

        self.up = nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))
        self.table = nnx.Embed(4, 4, embedding_init=init, rngs=nnx.Rngs(0))
        self.idle = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(self.down(self.up(self.up(x))) + self.table(jnp.arange(4))[None])


def cost(model: Any, x: jax.Array) -> jax.Array:
    return model(x).sum() * 2


def batches(count: int) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.integers(-1, 2, (2, 4, 8)), jnp.float32) for _ in range(count)]


def same(a: dict[str, LayerStats], b: dict[str, LayerStats]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for path in a:
        for name, value in vars(a[path]).items():
            np.testing.assert_array_equal(value, getattr(b[path], name), strict=True)


@pytest.mark.parametrize("folder", [pytest.param(False, marks=pytest.mark.slow), True], ids=["memory", "folder"])
def test_gradients_are_those_of_jax(tmp_path: Path, folder: bool) -> None:
    model, data = Whole(), batches(2)
    stats = lb.calibrate(
        model,
        data,
        statistics=("gradient_square", "output_gradient"),
        loss=cost,
        resume=tmp_path if folder else None,
    )
    want: dict[str, Any] = {"up": 0, "down": 0, "table": 0}
    for x in data:
        g = nnx.grad(cost)(model, x)
        for name, dw in (("up", g.up.kernel), ("down", g.down.kernel), ("table", g.table.embedding)):
            want[name] += np.asarray(dw[...], np.float64) ** 2 / len(data)
    assert stats.keys() == want.keys()  # what never ran is left out
    for name, square in want.items():
        assert square.any()
        np.testing.assert_array_equal(stats[name].gradient_square, square.astype(np.float32), strict=True)
        assert stats[name].second_moment is stats[name].largest is None
    # The loss is twice the sum of what attend gives; through its table that reaches `down`, in every row alike.
    of_table, of_down = np.full(4, 2.0), 2 * np.asarray(model.table.embedding[...]).sum(0)
    np.testing.assert_array_equal(stats["table"].output_gradient, of_table**2)
    np.testing.assert_array_equal(stats["down"].output_gradient, of_down**2)
    # `up` runs twice: half of its rows are seen by `down`, the other half by itself.
    late = np.asarray(model.down.kernel[...]) @ of_down
    early = np.asarray(model.up.kernel[...]) @ late
    np.testing.assert_array_equal(stats["up"].output_gradient, (late**2 + early**2) / 2)
    assert (stats["up"].rows, stats["down"].rows) == (32, 16)


def test_two_layers_with_one_weight_share_its_gradient() -> None:
    model = nnx.Dict(a=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), b=nnx.Linear(8, 8, rngs=nnx.Rngs(1)))
    model.b.kernel = model.a.kernel
    stats = lb.calibrate(
        model, batches(1), statistics=["gradient_square"], loss=lambda m, x: m.a(x).sum() + 2 * m.b(x).sum()
    )
    want = 9 * np.square(np.asarray(batches(1)[0].sum((0, 1))))
    for s in stats.values():
        np.testing.assert_array_equal(s.gradient_square, np.broadcast_to(want[:, None], (8, 8)))


@pytest.mark.slow
def test_the_rules_choose() -> None:
    model = Whole()
    rules = [
        lb.Rule("up", lb.bcq(2), lb.alternating(0, weighs_by=("gradient_square",))),
        lb.Rule("down", lb.bcq(2), lb.greedy()),
        lb.Rule("table", lb.uniform(2)),
        lb.Rule("idle", None),
    ]
    stats = lb.calibrate(model, batches(1), rules=rules, loss=cost)
    assert {p: {n for n, v in vars(s).items() if v is not None} for p, s in stats.items()} == {
        "up": {"gradient_square", "rows"},
        "down": {"second_moment", "rows"},
    }
    lb.quantize(model, rules, stats=stats)
    with pytest.raises(
        ValueError, match=r"^no quantizer of these rules weighs errors by anything: there is nothing to"
    ):
        lb.calibrate(model, batches(1), rules=lb.uniform(2))


def test_shared_layers_go_by_the_path_that_rules_know() -> None:
    model = Shared(nnx.Rngs(0))
    stats = lb.calibrate(model, [jnp.ones((2, 16))])
    assert {path: s.rows for path, s in stats.items()} == dict.fromkeys(layers(model), 4)


def weighted_error(model: Any, quantized: Any, square: Any) -> float:
    return float(np.sum(square * np.square(model.up.kernel[...] - lb.dequantize(quantized.up.kernel.array))))


@pytest.mark.slow
def test_weighing_by_squared_gradients_lowers_the_error_that_they_expect() -> None:
    model = nnx.Dict(up=nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    scales = jnp.asarray(np.geomspace(0.01, 3, 32), jnp.float32)
    data = [jax.random.normal(jax.random.key(i), (8, 32)) * scales[None] for i in range(4)]
    stats = lb.calibrate(model, data, statistics=["gradient_square"], loss=lambda m, x: jnp.tanh(m.up(x)).sum())
    fmt = lb.bcq(2, group=16)
    fisher = lb.quantize(model, [lb.Rule("up", fmt, FISHER)], stats=stats)
    plain = lb.quantize(model, [lb.Rule("up", fmt)])
    square = stats["up"].gradient_square
    assert weighted_error(model, fisher, square) < weighted_error(model, plain, square)


def test_importance_is_the_product_of_the_statistics() -> None:
    k, n, square = jnp.arange(3.0), jnp.arange(1, 3.0), np.arange(6, dtype=np.float32).reshape(3, 2)
    stats = {"a": LayerStats(k, k + 1, 1, square, n)}

    linear, table = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Embed(2, 3, rngs=nnx.Rngs(0))

    def of(*names: str, layer: Any = linear) -> Any:
        return importance(stats, "a", lb.Rule("a", lb.bcq(2), lb.alternating(weighs_by=names)), layer)

    assert of() is None
    np.testing.assert_array_equal(of("second_moment", "largest"), k * (k + 1))
    np.testing.assert_array_equal(of("second_moment", "output_gradient"), np.outer(k, n))
    np.testing.assert_array_equal(of("second_moment", "output_gradient", layer=table), np.outer(n, k))
    np.testing.assert_array_equal(of("output_gradient"), np.broadcast_to(n, (3, 2)))
    np.testing.assert_array_equal(of("gradient_square", "largest"), square * np.asarray(k + 1)[:, None])


def test_a_statistic_that_was_not_measured() -> None:
    model = Whole()
    stats = lb.calibrate(model, batches(1), statistics=["largest"])
    assert stats["up"].second_moment is None
    with pytest.raises(ValueError) as err:
        lb.quantize(model, [lb.Rule("up", lb.bcq(2), FISHER)], stats=stats)
    assert str(err.value) == (
        "the quantizer of layer 'up' weighs errors by 'gradient_square', which stats does not have: "
        "lb.calibrate(..., rules=rules) measures what the rules need"
    )
    lb.quantize(model, {"up": lb.uniform(2)}, stats=stats)  # which needs none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"statistics": ["moment"]},
            r"statistics=\('moment',\) must be some of second_moment, largest, magnitude, gradient_square, ",
        ),
        ({"statistics": []}, r"statistics=\(\) must be some of second_moment"),
        ({"statistics": ["largest"], "rules": lb.bcq(2)}, "both statistics= and rules= were given: leave one out"),
        (
            {"statistics": ["output_gradient"]},
            r"'output_gradient' is of the loss's derivatives: give loss=, a function of \(model, ",
        ),
        ({"loss": cost, "call": cost}, "both call= and loss= were given: leave out call, the loss runs the model"),
        ({"rules": {"nothing": lb.bcq(2)}}, "rule 'nothing' matches none of the 4 layers"),
        (
            {"loss": lambda m, x: m(x), "statistics": ["gradient_square"]},
            r"the loss has shape \(2, 4, 4\): give one that is a scalar, such as a mean",
        ),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        lb.calibrate(Whole(), batches(1), **options)


# ---------------------------------------------------------------- memory


def test_the_device_holds_the_gradient_of_one_layer() -> None:
    width, depth, rows = 256, 8, 2

    class Deep(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Linear(width, width, rngs=nnx.Rngs(i)) for i in range(depth)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    model, x = Deep(), jnp.ones((rows, width))
    probed = _probed(model, _wanted(layers(model), ("gradient_square", "output_gradient"), None))
    means = Means({path: p.weight.shape for path, p in probes(probed).items()}, None)
    graph, state = nnx.split(probed)
    step = differentiated(lambda m, x: jnp.mean(m(x) ** 2), means)

    @jax.jit
    def run(state: Any, x: jax.Array) -> Any:
        merged = nnx.merge(graph, state)
        step(merged, x)
        return nnx.state(merged, nnx.Not(nnx.Param))

    temp = run.lower(state, x).compile().memory_analysis().temp_size_in_bytes
    # dL/dw, perhaps its square apart, and for each layer no more than its input, output and their gradients.
    layer, activations = 4 * width**2, 4 * depth * rows * 4 * width
    assert layer <= temp <= 2 * layer + activations


# ---------------------------------------------------------------- resume


class Stateful(nnx.Module):
    """Random masks and running means: what a run changes besides the statistics."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(self.norm(self.up(x))))


def stop() -> None:
    raise KeyboardInterrupt


def stopping(data: list[jax.Array], after: int) -> Iterator[jax.Array]:
    yield from data[:after]
    stop()


EVERYTHING: dict[str, Any] = {
    "statistics": ("second_moment", "largest", "gradient_square", "output_gradient"),
    "loss": lambda m, x: jnp.mean(m(x) ** 2),
}


@pytest.mark.slow
def test_a_stopped_calibration_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(4)
    whole = lb.calibrate(Stateful(), data, **EVERYTHING)
    with pytest.raises(KeyboardInterrupt):
        lb.calibrate(Stateful(), stopping(data, 2), resume=tmp_path, **EVERYTHING)
    # As a kill between the files of one batch leaves it: some layers' squares are of the next batch already.
    finish = Means.finish
    monkeypatch.setattr(Means, "finish", lambda means: finish(means) if means.count < 3 else stop())
    with pytest.raises(KeyboardInterrupt):
        lb.calibrate(Stateful(), data, resume=tmp_path, **EVERYTHING)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=f"^{tmp_path} holds statistics of 3 batches, 2 were given: give the same batches"
    ):
        lb.calibrate(Stateful(), data[:2], resume=tmp_path, **EVERYTHING)
    with pytest.raises(
        ValueError, match=f"^{tmp_path} holds statistics of 3 other batches: give the same batches again"
    ):
        lb.calibrate(Stateful(), data[::-1], resume=tmp_path, **EVERYTHING)
    with pytest.raises(
        ValueError, match=f"^{tmp_path} holds statistics of another model or other statistics: give anot"
    ):
        lb.calibrate(Stateful(), data, resume=tmp_path)
    same(lb.calibrate(Stateful(), data, resume=tmp_path, **EVERYTHING), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "calibration.safetensors", *(f"gradient_square-{i}-{turn}.npy" for i in (0, 1) for turn in (0, 1))
    ]  # fmt: skip
    for square in tmp_path.glob("gradient_square-*"):
        whole_file = square.read_bytes()
        square.write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
    with pytest.raises(lb.CheckpointError, match=r"gradient_square-0-0.npy is damaged: delete its folder and calibr"):
        lb.calibrate(Stateful(), data, resume=tmp_path, **EVERYTHING)
    for square in tmp_path.glob("gradient_square-*"):
        square.write_bytes(square.read_bytes()[:-1])
    with pytest.raises(
        lb.CheckpointError, match=r"gradient_square-0-0.npy cannot be read \(.*\): delete its folder and"
    ):
        lb.calibrate(Stateful(), data, resume=tmp_path, **EVERYTHING)


def test_a_batch_with_a_number_and_a_folder_of_another_file(tmp_path: Path) -> None:
    model, batch = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), (jnp.ones((3, 4)), np.float32(2))
    stats = lb.calibrate(model, [batch], lambda m, b: m(b[0] * b[1]), resume=tmp_path)
    assert stats[""].second_moment.tolist() == [4.0] * 4
    lb.save(model, tmp_path / "calibration.safetensors")
    with pytest.raises(ValueError, match=f"^{tmp_path} holds statistics of another model or other statistics: give an"):
        lb.calibrate(model, [batch], resume=tmp_path)
