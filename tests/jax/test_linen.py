"""Linen models through `nnx.bridge.ToNNX`: the same rules, reports, files and gradients as NNX layers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lowbit as lb
from lowbit.testing.tolerance import gamma
from tests.models import arrays, assert_same, fast, inputs

TOKENS = jnp.array([[3, 1, 4], [1, 5, 9]])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(16)(nn.LayerNorm()(x))
        h = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(nn.relu(h))
        return x + nn.remat(nn.Dense)(8, use_bias=False, name="Dense_1")(h)


class Model(nn.Module):
    """Layers made in setup and in compact methods, remat, jit, a tied head, running statistics and a second method."""

    def setup(self) -> None:
        self.embed = nn.Embed(20, 8)
        self.blocks = [nn.remat(Block)(), nn.jit(Block)()]
        self.norm = nn.BatchNorm(momentum=0.5)

    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        return self.embed.attend(self.norm(self.encode(tokens), use_running_average=not train))

    def encode(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


COUNT = "to_nnx__rngs/default/count"  # of the keys that ToNNX has drawn
LAYERS = [f"blocks_{i}/Dense_{j}" for i in range(2) for j in range(2)] + ["embed"]


def wrapped(module: nn.Module, *args: Any) -> Any:
    return nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(*args)


@pytest.fixture(scope="module")
def model() -> Any:
    return nnx.jit(lambda: wrapped(Model(), TOKENS))()


@pytest.fixture(scope="module")
def small(model: Any) -> Any:
    return lb.quantize(model, lb.uniform(4))


def decoded(model: Any, small: Any) -> Any:
    """The dense model with the weights that the quantized one stands for."""
    out = nnx.clone(model)
    for path, kernel in lb.nn.kernels(small).items():
        *holders, name = path.split("/")
        held: Any = vars(out)[holders[0]] if holders else vars(out)
        for key in holders[1:]:
            held = held[key]
        held[name][...] = lb.dequantize(kernel.array)
    return out


def assert_close(a: jax.Array, b: jax.Array) -> None:
    # The longest path: five products of at most 20 terms and three norms over 8, below 250 roundings; a norm divides by
    # a deviation no smaller than half of what it is given, which doubles them.
    np.testing.assert_allclose(a, b, rtol=0, atol=gamma(500, "float32") * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_every_layer_is_found_under_the_path_of_its_parameters(model: Any, small: Any) -> None:
    assert sorted(lb.nn.kernels(small)) == [f"{p}/kernel" for p in LAYERS[:-1]] + ["embed/embedding"]
    assert [r.layer for r in lb.report(small).rows] == [r.layer for r in lb.report(model).rows] == LAYERS
    assert {r.format for r in lb.report(small).rows} == {"uniform(bits=4)"}
    assert {name for name, v in arrays(small).items() if v.ndim == 2 and v.dtype == np.float32} == {
        f"{name}/scale" for name in lb.nn.kernels(small)
    }


@pytest.mark.slow
def test_it_computes_what_the_dense_model_computes_with_the_decoded_weights(model: Any) -> None:
    small = lb.quantize(model, {"blocks_0/Dense_0": None, "**": lb.uniform(4)})

    @nnx.jit
    def call(m: Any, tokens: jax.Array) -> tuple[jax.Array, ...]:
        return m(tokens), m.encode(tokens), m.encode(tokens, rngs=nnx.Rngs(dropout=7))

    got, want = call(small, TOKENS), call(decoded(model, small), TOKENS)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    assert float(jnp.abs(got[1] - got[2]).max()) > 0.01  # what is dropped
    assert_close(small.encode(TOKENS), want[1])


@pytest.mark.slow
def test_mutable_collections_move_and_the_weights_stay(model: Any, small: Any) -> None:
    small = nnx.clone(small)
    dense, before = decoded(model, small), arrays(small)
    call = nnx.jit(lambda m, t, mutable: m(t, train=True, mutable=mutable), static_argnums=2)
    for m in (small, dense):
        call(m, TOKENS, ("batch_stats",))
    moved = {name for name, v in arrays(small).items() if v.tobytes() != before[name].tobytes()}
    assert moved == {"norm/mean", "norm/var", COUNT}
    assert_close(small.norm["mean"][...], dense.norm["mean"][...])
    call(small, TOKENS, True)
    assert arrays(small).keys() == before.keys()
    with pytest.raises(ValueError, match=r"layer '.*' has no place for the variables \['__call__'\] of a mutable"):
        small(TOKENS, mutable=["intermediates"], capture_intermediates=True)


@pytest.mark.slow
def test_scales_train_and_a_compiled_submodule_sees_it(model: Any) -> None:
    tuning = lb.tune.alpha_tuning(lb.quantize(model, fast({"blocks_*/*": lb.bcq(2), "embed": None})))
    optimizer = tuning.optimizer(optax.sgd(0.1))

    def loss(m: Any) -> jax.Array:
        return jnp.mean((m(TOKENS) - 1) ** 2)

    before, first = arrays(tuning.model), loss(tuning.model)
    optimizer.update(tuning.model, nnx.grad(loss, argnums=nnx.DiffState(0, lb.Scale))(tuning.model))
    after = arrays(tuning.model)
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert moved - {COUNT} == {f"{layer}/kernel/alpha_first" for layer in LAYERS[:-1]}
    assert loss(tuning.model) < first
    assert_close(tuning.model(TOKENS), decoded(model, lb.tune.fold(tuning.model))(TOKENS))


@pytest.mark.slow
def test_adapters(small: Any) -> None:
    adapted = lb.nn.lora(small, rank=2, rules="blocks_1/*", rngs=nnx.Rngs(1))
    gradient = nnx.grad(lambda m: (m(TOKENS) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))
    grads = nnx.jit(gradient)(adapted)
    assert len(jax.tree.leaves(grads)) == 4
    assert all(float(jnp.abs(g).max()) > 0 for p, g in nnx.to_flat_state(grads) if p[-1] == "lora_b")


def test_save_and_load(small: Any, tmp_path: Path) -> None:
    lb.save(small, tmp_path / "m.safetensors")
    into = nnx.eval_shape(lambda: lb.quantize(wrapped(Model(), TOKENS), lb.uniform(4)))
    again = lb.load(tmp_path / "m.safetensors", into=into)
    assert_same(arrays(again), arrays(small))
    assert nnx.graphdef(again) == nnx.graphdef(small)


@pytest.mark.slow
def test_calibrate_and_compare() -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            h = nn.relu(nn.Dense(16, name="up")(inputs=x))
            return nn.Dense(4, dtype=jnp.bfloat16)(h)

    x = inputs(5, 8)
    model = wrapped(Plain(), x)
    stats = lb.calibrate(model, [x, 2 * x])
    assert {p: s.rows for p, s in stats.items()} == {"Dense_0": 10, "up": 10}
    # A mean of ten squares, moved twice: at most 13 roundings.
    np.testing.assert_allclose(stats["up"].second_moment, 2.5 * (x**2).mean(0), rtol=13 * 6e-8)
    small = lb.quantize(model, lb.uniform(4), stats=stats)
    assert small(x).dtype == jnp.bfloat16
    assert [r.layer for r in lb.compare(model, small, x).rows] == ["up", "Dense_0", "(output)"]


def test_what_cannot_be_measured_says_so(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"layer 'blocks_0/Dense_0' runs within nn.remat, nn.jit or nn.scan: it cannot"
    ):
        lb.calibrate(model, [TOKENS])


@pytest.mark.slow
def test_partitioned_parameters() -> None:
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            normal = nn.initializers.normal()
            kernel, bias = nn.with_partitioning(normal, (None, "x")), nn.with_partitioning(normal, ("x",))
            return nn.Dense(16, kernel_init=kernel, bias_init=bias)(x)

    x = inputs(5, 8)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        model = wrapped(Boxed(), x)
        small = lb.quantize(model, lb.uniform(4))
        assert_close(small(x), decoded(model, small)(x))


@pytest.mark.slow
def test_donated_weights_are_freed() -> None:
    model = wrapped(Block(), inputs(1, 8))
    weight = model.Dense_0["kernel"].get_value()
    lb.quantize(model, lb.uniform(4), donate=True)
    assert weight.is_deleted()


@pytest.mark.slow
def test_within_a_larger_model_and_alone() -> None:
    class Mixed(nnx.Module):
        def __init__(self) -> None:
            self.body = wrapped(Block(), inputs(1, 8))
            self.head = wrapped(nn.Dense(4, dtype=jnp.bfloat16), inputs(1, 8))
            self.last = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(self.head(self.body(x)))

    model, x = Mixed(), inputs(3, 8)
    small = lb.quantize(model, lb.uniform(4))
    assert sorted(lb.nn.kernels(small)) == [f"{p}/kernel" for p in ("body/Dense_0", "body/Dense_1", "head", "last")]
    assert type(small.head) is lb.nn.Linear and small.head(x).dtype == jnp.bfloat16
    assert type(model.body) is nnx.bridge.ToNNX
    table = lb.quantize(wrapped(nn.Embed(20, 8), TOKENS), lb.uniform(4))
    np.testing.assert_array_equal(table(TOKENS), lb.dequantize(table.embedding.array)[TOKENS])


class Scanned(nn.Module):
    """A stacked layer, one that is scanned with the same weight, and the parameters of an LSTM."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
                return nn.relu(nn.Dense(8)(x)), None

        over = {"split_rngs": {"params": True}, "length": 3}
        x, _ = nn.scan(Step, variable_axes={"params": 0}, **over)(name="stack")(x, None)
        x, _ = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, length=3)(name="loop")(x, None)
        return x


def test_a_scanned_layer_runs_and_a_stacked_one_stays_dense() -> None:
    x = inputs(2, 8)
    model = wrapped(Scanned(), x)
    small = lb.quantize(model, lb.uniform(4))
    assert list(lb.nn.kernels(small)) == ["loop/Dense_0/kernel"]
    assert_close(small(x), decoded(model, small)(x))
    message = r"'stack/Dense_0' holds float32\[3, 8, 8\] in a Linen model; only two-dimensional weights of nn.Dense and"
    with pytest.raises(ValueError, match=message):
        lb.quantize(model, {"stack/*": lb.uniform(4)})


class Odd(nn.Module):
    """Matrices that look like a Dense layer's."""

    which: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.which == "einsum":
            return nn.Einsum((8, 8), "...k,nk->...n", name="odd")(x)
        if self.which == "option":
            return nn.Dense(8, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), name="odd")(x)

        class Twice(nn.Dense):
            def __call__(self, x: jax.Array) -> jax.Array:
                return 2 * super().__call__(x)

        return Twice(8, name="odd")(x)


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        (
            "einsum",
            TypeError,
            r"layer 'odd' is a Einsum; only nn.Dense and nn.Embed themselves run quantized: leave it",
        ),
        (
            "subclass",
            TypeError,
            r"layer 'odd' is a Twice; only nn.Dense and nn.Embed themselves run quantized: leave it",
        ),
        ("option", ValueError, r"layer 'odd' cannot run quantized: its dot_general is not the default one; leave it"),
    ],
)
def test_a_matrix_of_another_module_is_refused_when_it_runs(which: str, error: Any, message: str) -> None:
    model = wrapped(Odd(which), inputs(1, 8))
    small = lb.quantize(model, lb.uniform(4))
    with pytest.raises(error, match=message):
        small(inputs(1, 8))


def test_a_model_without_variables_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the Linen model Block at '' has no variables: call lazy_init first"):
        lb.quantize(nnx.bridge.ToNNX(Block()), lb.uniform(4))
