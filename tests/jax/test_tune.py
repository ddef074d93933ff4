"""AlphaTuning: what trains, what its optimizer holds, the scaling of its gradients, and folding it back."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from lowbit.testing.tolerance import assert_within, gamma, unit
from tests.models import TOKENS, Net, Shared, arrays, assert_same, fast, inputs, product_bound

RULES = fast(
    {"embed": lb.uniform(4, group=8), "head/**": None, "**/up": lb.bcq(3, group=8), "**": lb.bcq(2, offset=True)}
)
"""Of a Net: two `up` [16, 32] in groups of 8, two `down` [32, 16] row-wise with offsets."""


def net() -> Net:
    return lb.quantize(Net(nnx.Rngs(0)), RULES)


def loss(model: Net) -> jax.Array:
    return jnp.mean(model(TOKENS) ** 2)


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer[Net]) -> jax.Array:
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lb.Scale))(model)
    optimizer.update(model, grads)
    return value


def names(model: nnx.Module, *types: type) -> set[str]:
    return {"/".join(map(str, p)) for p, v in nnx.to_flat_state(nnx.state(model)) if type(v) in types}


UP, DOWN = ([f"layers/{i}/mlp/{name}/kernel" for i in (0, 1)] for name in ("up", "down"))
CASES = [
    # which, offsets, the fields that train of up and of down, how many numbers
    ("first", False, ["alpha_first"], ["alpha_first"], 2 * (32 * 2 + 16)),
    ("all", False, ["alpha_first"], ["alpha_first"], 2 * (3 * 32 * 2 + 2 * 16)),
    ("first", True, ["alpha_first"], ["alpha_first", "beta_first"], 2 * (32 * 2 + 16 + 16)),
    ("all", True, ["alpha_first"], ["alpha_first", "beta_first"], 2 * (3 * 32 * 2 + 2 * 16 + 16)),
]


@pytest.mark.parametrize(
    ("which", "offsets", "up", "down", "count"), CASES, ids=["first", "all", "first+beta", "all+beta"]
)
def test_what_trains(which: Any, offsets: bool, up: list[str], down: list[str], count: int) -> None:
    model = net()
    before = arrays(model)
    tuning = lb.tune.alpha_tuning(model, which, offsets)
    trained = {f"{k}/{f}" for k in UP for f in up} | {f"{k}/{f}" for k in DOWN for f in down}
    assert names(tuning.model, lb.Scale) == trained
    assert tuning.trainable == count
    assert all(v.dtype == np.float32 for v in jax.tree.leaves(nnx.state(tuning.model, lb.Scale)))
    assert "embed/embedding/scale" in names(tuning.model, lb.nn.Frozen)
    assert_same(arrays(model), before)
    assert_same(arrays(lb.tune.fold(tuning.model)), before)
    np.testing.assert_array_equal(lb.tune.fold(tuning.model)(TOKENS), model(TOKENS))


def test_only_those_train_and_their_state_is_all_there_is() -> None:
    model = net()
    tuning = lb.tune.alpha_tuning(model)
    optimizer = tuning.optimizer(optax.adam(1e-2))
    held = sum(v.nbytes for v in jax.tree.leaves(nnx.state(optimizer.opt_state)))
    assert held == 2 * 4 * tuning.trainable + 4  # two float32 moments of each, and adam's count
    before, old = arrays(tuning.model), arrays(model)
    losses = [float(step(tuning.model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    after = arrays(tuning.model)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {f"{k}/alpha_first" for k in UP + DOWN}
    assert_same(arrays(model), old)


@pytest.mark.slow
def test_the_shared_rest_is_no_variable_of_the_old_model() -> None:
    model = net()
    tuning = lb.tune.alpha_tuning(model)
    old = arrays(model)
    for v in jax.tree.leaves(nnx.state(tuning.model), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        if jnp.issubdtype(v.dtype, jnp.floating):
            v[...] += 1
    assert_same(arrays(model), old)
    tuned = arrays(tuning.model)
    folded = lb.tune.fold(tuning.model)
    folded.layers[0].norm.scale[...] += 1
    assert_same(arrays(tuning.model), tuned)


@pytest.mark.slow
def test_gradients_are_those_of_the_scales_by_hand() -> None:
    q = lb.quantize(nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0)), fast(lb.bcq(3, group=8, offset=True)))
    x, dy = inputs(4, 16), inputs(4, 8, seed=1)

    def objective(m: lb.nn.Linear) -> jax.Array:
        return jnp.sum(m(x) * dy)

    planes = np.asarray(q.kernel.planes[...])  # [p, n, g, 1]: a byte is a group
    signs = 2 * np.unpackbits(planes, axis=-1, bitorder="little").astype(np.float64) - 1
    groups = np.asarray(x, np.float64).reshape(4, 2, 8)
    alpha = np.einsum("mgt,mn,pngt->png", groups, np.asarray(dy, np.float64), signs)
    beta = np.einsum("mgt,mn->ng", groups, np.asarray(dy, np.float64))
    # 32 products, summed in any order, perhaps from b = (s + 1) / 2 and its affine: three times the magnitudes.
    size = np.einsum("mgt,mn->ng", np.abs(groups), np.abs(np.asarray(dy, np.float64)))
    bound = 3 * gamma(32 + 8, "float32") * size
    for which, offsets, planes_trained in (("first", True, 1), ("all", False, 3)):
        tuning = lb.tune.alpha_tuning(q, which, offsets)
        grads = nnx.jit(nnx.grad(objective, argnums=nnx.DiffState(0, lb.Scale)))(tuning.model)
        assert_within(grads.kernel.alpha_first[...], alpha[:planes_trained], np.stack([bound] * planes_trained))
        assert ("beta_first" in grads.kernel) == offsets
        if offsets:
            assert_within(grads.kernel.beta_first[...], beta, bound)


@pytest.mark.slow
def test_an_sgd_step_divides_by_the_group() -> None:
    tuning = lb.tune.alpha_tuning(net(), offsets=True)
    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, lb.Scale)))(tuning.model)
    before = arrays(tuning.model)
    raw = {"/".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(grads)}
    optimizer = tuning.optimizer(optax.sgd(0.5))
    optimizer.update(tuning.model, grads)
    after = arrays(tuning.model)
    assert raw.keys() == names(tuning.model, lb.Scale)
    for name, gradient in raw.items():
        group = 8 if "/up/" in name else 32  # down is row-wise over its 32 inputs
        # Division by 8 and 32 and the product with a half are exact; the sum rounds once, as numpy's does.
        np.testing.assert_array_equal(after[name], before[name] - np.float32(0.5) * gradient / np.float32(group))
        assert np.any(gradient)


@pytest.mark.slow
def test_names_that_end_like_a_field_do_not_matter() -> None:
    class Named(nnx.Module):
        def __init__(self) -> None:
            self.proj_first = nnx.Linear(16, 8, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.proj_first(x)

    for model, group in (
        (Named(), 16),
        (nnx.Linear(16, 8, rngs=nnx.Rngs(0)), 16),  # its path is empty
        (Shared(nnx.Rngs(0)), 16),
    ):
        tuning = lb.tune.alpha_tuning(lb.quantize(model, fast(lb.bcq(2, group=64))))
        gradient = nnx.grad(lambda m: jnp.mean(m(inputs(3, 16)) ** 2), argnums=nnx.DiffState(0, lb.Scale))
        grads = nnx.jit(gradient)(tuning.model)
        updates, _ = tuning.scaling.update(grads, tuning.scaling.init(grads))
        for scaled, raw in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_array_equal(scaled, raw / group)  # a power of two: exact


# ---- folding and going on


def test_fold_joins_what_was_tuned() -> None:
    tuning = lb.tune.alpha_tuning(net(), offsets=True)
    optimizer = tuning.optimizer(optax.adam(1e-2))
    for _ in range(3):
        step(tuning.model, optimizer)
    folded = lb.tune.fold(tuning.model)
    assert names(folded, lb.nn.Frozen) == set()
    assert {p: k.type for p, k in lb.nn.kernels(folded).items()} == {p: k.type for p, k in lb.nn.kernels(net()).items()}
    for path in UP:
        split, whole = lb.nn.kernels(tuning.model)[path], lb.nn.kernels(folded)[path]
        want = np.concatenate([split.alpha_first[...], split.alpha_rest[...]])
        np.testing.assert_array_equal(whole.alpha[...], want)
        np.testing.assert_array_equal(lb.dequantize(whole.array), lb.dequantize(split.array))
    assert_same(arrays(lb.tune.fold(folded)), arrays(folded))


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_narrow_scales_train_in_float32(dtype: str) -> None:
    fmt = lb.bcq(3, group=8, offset=True, scale_dtype=dtype)
    q = lb.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), fast(fmt))
    x = inputs(4, 32)
    tuning = lb.tune.alpha_tuning(q, offsets=True)
    assert tuning.model.kernel.alpha_first.dtype == tuning.model.kernel.beta_first.dtype == np.float32
    assert tuning.model.kernel.alpha_rest.dtype == dtype
    # Nothing was rounded yet: float32 holds every narrow scale.
    np.testing.assert_array_equal(lb.dequantize(tuning.model.kernel.array), lb.dequantize(q.kernel.array))

    optimizer = tuning.optimizer(optax.adam(1e-4))
    target = inputs(4, 8, seed=1)
    f = nnx.jit(nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2), argnums=nnx.DiffState(0, lb.Scale)))
    losses = []
    for _ in range(5):
        value, grads = f(tuning.model)
        optimizer.update(tuning.model, grads)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True) and losses[4] < losses[0]
    folded = lb.tune.fold(tuning.model)
    assert folded.kernel.type == q.kernel.type and folded.kernel.alpha.dtype == dtype
    # alpha and beta are each rounded once to the narrow dtype, relative to themselves.
    rounding = product_bound(x, folded.kernel.array, "float32") * 2
    rounding += np.abs(np.asarray(x)) @ (np.full((32, 8), 1) * magnitude(folded)) * unit(dtype) * 1.01
    difference = np.abs(np.asarray(folded(x)) - np.asarray(tuning.model(x)))
    assert (difference <= rounding).all()
    assert np.any(difference > 0)


def magnitude(layer: lb.nn.Linear) -> np.ndarray:
    """For each output, the largest sum of scales over its groups."""
    alpha = np.abs(np.asarray(layer.kernel.alpha[...], np.float64)).sum(0)
    return np.asarray((alpha + np.abs(np.asarray(layer.kernel.beta[...], np.float64))).max(1))[None, :]


@pytest.mark.slow
def test_adam_in_float16_would_not() -> None:
    """Why scales are split off in float32: Adam's epsilon of 1e-8 is zero in float16."""
    q = lb.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), fast(lb.bcq(3, group=8, scale_dtype="float16")))
    q_again = nnx.clone(q)
    tiny = nnx.grad(lambda m: 1e-6 * jnp.mean(m(inputs(4, 32)) ** 2), argnums=nnx.DiffState(0, lb.Scale))
    gradient = nnx.jit(tiny)
    nnx.Optimizer(q, optax.adam(1e-4), wrt=lb.Scale).update(q, gradient(q))
    assert not np.isfinite(np.asarray(q.kernel.alpha[...], np.float32)).all()
    tuning = lb.tune.alpha_tuning(q_again)
    tuning.optimizer(optax.adam(1e-4)).update(tuning.model, gradient(tuning.model))
    assert np.isfinite(np.asarray(tuning.model.kernel.alpha_first[...])).all()


@pytest.mark.slow
def test_tuning_goes_on_from_a_tuned_model() -> None:
    first = lb.tune.alpha_tuning(net(), offsets=True)
    optimizer = first.optimizer(optax.sgd(1.0))
    step(first.model, optimizer)
    again = lb.tune.alpha_tuning(first.model, offsets=True)
    assert again.trainable == first.trainable
    assert_same(arrays(again.model), arrays(first.model))
    assert names(again.model, lb.Scale) == names(first.model, lb.Scale)
    other = lb.tune.alpha_tuning(first.model, "all")
    assert other.trainable == 2 * (3 * 32 * 2 + 2 * 16)
    assert_same(arrays(lb.tune.fold(other.model)), arrays(lb.tune.fold(first.model)))
    step(other.model, other.optimizer(optax.sgd(1.0)))


def test_what_cannot_be_tuned() -> None:
    with pytest.raises(ValueError, match=r"^which must be 'first' or 'all', not 'second'$"):
        lb.tune.alpha_tuning(net(), "second")  # type: ignore[arg-type]
    text = "Net has no layer with a field 'alpha' of planes p: quantize it with lb.bcq(...) first"
    for model in (Net(nnx.Rngs(0)), lb.quantize(Net(nnx.Rngs(0)), {"embed": lb.uniform(4, group=8)})):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            lb.tune.alpha_tuning(model)


# ---- the paper's counts, from the real architectures


class GPT2Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.Dict(
            c_attn=nnx.Linear(width, 3 * width, rngs=rngs),
            c_proj=nnx.Linear(width, width, rngs=rngs),
        )
        self.ln_2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Dict(
            c_fc=nnx.Linear(width, 4 * width, rngs=rngs),
            c_proj=nnx.Linear(4 * width, width, rngs=rngs),
        )


class OPTBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nnx.Dict({name: nnx.Linear(width, width, rngs=rngs) for name in names})
        self.self_attn_layer_norm = nnx.LayerNorm(width, rngs=rngs)
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)
        self.final_layer_norm = nnx.LayerNorm(width, rngs=rngs)


class Transformer(nnx.Module):
    """The parameters of a decoder with learned positions and a head tied to the embedding."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        rngs = nnx.Rngs(0)
        self.wte = nnx.Embed(vocabulary, width, rngs=rngs)
        self.wpe = nnx.Embed(positions, width, rngs=rngs)
        self.h = nnx.List([])
        self.ln_f = nnx.LayerNorm(width, rngs=rngs)


def abstract(vocabulary: int, positions: int, width: int, layers: int, block: type[nnx.Module]) -> Transformer:
    """Nothing is allocated. A trace for each block: the time of one trace over all grows with its square."""

    model = nnx.eval_shape(lambda: Transformer(vocabulary, positions, width))
    model.h = nnx.List([nnx.eval_shape(lambda: block(width, nnx.Rngs(0))) for _ in range(layers)])
    return model


@pytest.mark.parametrize(
    ("sizes", "block", "parameters", "count"),
    [
        pytest.param((50257, 1024, 1024, 24), GPT2Block, 354_823_168, 221_184, marks=pytest.mark.slow),
        pytest.param((50257, 1024, 1280, 36), GPT2Block, 774_030_080, 414_720, marks=pytest.mark.slow),
        pytest.param((50272, 2050, 2048, 24), OPTBlock, 1_315_758_080, 442_368, marks=pytest.mark.slow),
    ],
    ids=["GPT-2 medium", "GPT-2 large", "OPT-1.3B"],
)
def test_trainable_counts_of_the_papers(
    sizes: tuple[int, int, int, int], block: type[nnx.Module], parameters: int, count: int
) -> None:
    width, layers = sizes[2:]
    model = abstract(*sizes, block)
    assert sum(v.size for v in jax.tree.leaves(nnx.state(model))) == parameters
    said: list[int] = []

    def prepare(model: Transformer) -> Transformer:
        tuning = lb.tune.alpha_tuning(lb.quantize(model, {"h/**": lb.bcq(3), "wte": None, "wpe": None}))
        said.append(tuning.trainable)
        return tuning.model

    tuned = nnx.eval_shape(prepare, model)
    assert said == [count] and count == 9 * width * layers
    scales = jax.tree.leaves(nnx.state(tuned, lb.Scale))
    assert sum(v.size for v in scales) == count and {v.dtype for v in scales} == {np.dtype("float32")}
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(nnx.state(tuned)))
    optimizer = nnx.eval_shape(lambda m: nnx.Optimizer(m, optax.adam(1e-4), wrt=lb.Scale), tuned)
    state = jax.tree.leaves(nnx.state(optimizer.opt_state))
    assert sum(v.size * v.dtype.itemsize for v in state) == 8 * count + 4
