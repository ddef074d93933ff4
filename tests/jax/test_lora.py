"""LoRA on a frozen quantized base: the adapter is part of the decode term, and the only thing that trains."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.formats.low_rank import LowRank
from lowbit.ops import take
from lowbit.quant_type import QuantType, type_to_json
from lowbit.testing.tolerance import assert_within, gamma
from tests.models import TOKENS, Net, Shared, arrays, assert_same, dense, fast, inputs, product_bound

K, N, RANK = 24, 10, 3
TYPE = QuantType((("k", K), ("n", N)), "f32", lb.bcq(2, group=16), adapter=LowRank(RANK, 6.0))
RULES = fast({"embed": lb.uniform(4, group=8), "head/**": None, "**": lb.bcq(2, group=8)})


def base() -> nnx.Module:
    linear = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    return lb.quantize(linear, fast(lb.bcq(2, group=16)))


def adapted(dims: tuple[str, str] = ("k", "n")) -> QuantArray:
    """[24, 10] or its transpose, with an adapter that is not zero."""
    w = base().kernel.array
    shape = {"k": K, "n": N}
    t = QuantType(tuple((d, shape[d]) for d in dims), "f32", TYPE.format, adapter=TYPE.adapter)
    return QuantArray.of({**w.fields, "lora_a": inputs(K, RANK), "lora_b": inputs(RANK, N, seed=1)}, t)


def parts(w: QuantArray) -> tuple[QuantArray, np.ndarray, np.ndarray, np.ndarray]:
    """The base of an adapted [k, n] array, and 2 a, b and the sum of their magnitudes in float64."""
    fields = dict(w.fields)
    a, b = (np.asarray(fields.pop(f), np.float64) for f in ("lora_a", "lora_b"))
    whole = QuantArray.of(fields, QuantType(w.type.dims, w.type.dtype, w.type.format))
    return whole, 2 * a, b, np.abs(2 * a) @ np.abs(b)


@pytest.mark.parametrize("rows", [1, 64])
def test_the_product_is_that_of_base_and_adapter(rows: int) -> None:
    w, x = adapted(), inputs(rows, K, seed=2)
    whole, a, b, size = parts(w)
    x64 = np.asarray(x, np.float64)
    low = np.abs(x64) @ size
    # The adapter: k + r + 3 roundings whichever product comes first, and one for the sum of both.
    bound = (product_bound(x, whole, "float32") + low * gamma(K + RANK + 3, "float32")) * (1 + gamma(1, "float32"))
    bound += (np.abs(x64) @ np.abs(dense(whole)) + low) * gamma(1, "float32")
    assert_within(lb.matmul(x, w), x64 @ (dense(whole) + a @ b), bound)


def test_dequantize_merges_the_adapter_and_take_decodes_rows_of_it() -> None:
    w = adapted()
    whole, a, b, size = parts(w)
    bound = size * gamma(RANK + 2, "float32") + (np.abs(dense(whole)) + size) * gamma(4, "float32")
    assert_within(lb.dequantize(w), dense(whole) + a @ b, bound)
    ids = [7, 0, 7]
    rows = take(adapted(("n", "k")), jnp.array(ids))
    assert_within(rows, (dense(whole) + a @ b).T[ids], bound.T[ids])


def test_a_small_batch_goes_through_the_rank_and_the_base_keeps_its_forms() -> None:
    plain = QuantType(TYPE.dims, TYPE.dtype, TYPE.format).resized(k=512, n=512)
    large = TYPE.resized(k=512, n=512)
    without, having = (lb.plan((1, 512), t, "cpu").forms[0] for t in (plain, large))
    assert having.name == without.name == "table"
    # x A, times the scale, then (x A) B, and one addition.
    assert having.cost.fma - without.cost.fma <= (512 + 512 + 1) * RANK + RANK + 512


@pytest.mark.slow
def test_the_model_starts_as_it_was() -> None:
    small = lb.quantize(Net(nnx.Rngs(0)), RULES)
    before = arrays(small)
    model = lb.nn.lora(small, rank=2, rngs=nnx.Rngs(1))
    assert_same(arrays(small), before)
    for path, kernel in lb.nn.kernels(model).items():
        np.testing.assert_array_equal(lb.dequantize(kernel.array), lb.dequantize(lb.nn.kernels(small)[path].array))
        assert type(kernel.lora_a) is type(kernel.lora_b) is nnx.LoRAParam
    assert not nnx.to_flat_state(nnx.state(model, lb.Scale))
    assert lb.nn.kernels(model)["embed/embedding"].lora_b.shape == (2, 20)


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer[Net]) -> jax.Array:
    def loss(m: Net) -> jax.Array:
        return jnp.mean((m(TOKENS) - 1) ** 2)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value


@pytest.mark.slow
def test_training_moves_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    model = lb.nn.lora(
        lb.quantize(Net(nnx.Rngs(0)), RULES), rank=2, rules=["embed", "layers/*/mlp/up"], rngs=nnx.Rngs(1)
    )
    before = arrays(model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    after = arrays(model)
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    layers = ("embed/embedding", "layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel")
    assert moved == {f"{k}/lora_{f}" for k in layers for f in "ab"}
    lb.save(model, tmp_path / "m.safetensors")
    into = nnx.eval_shape(
        lambda: lb.nn.lora(
            lb.quantize(Net(nnx.Rngs(0)), RULES), rank=2, rules=["embed", "layers/*/mlp/up"], rngs=nnx.Rngs(1)
        )
    )
    again = lb.load(tmp_path / "m.safetensors", into=into)
    assert_same(arrays(again), after)
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


def test_the_adapter_alone_moves_to_another_copy() -> None:
    model, other = (lb.nn.lora(base(), rank=2, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    model.kernel.lora_b[...] = inputs(2, N)
    assert arrays(model)["kernel/lora_a"].tobytes() != arrays(other)["kernel/lora_a"].tobytes()
    nnx.update(other, nnx.state(model, nnx.LoRAParam))
    assert_same(arrays(other), arrays(model))


def test_the_gradients_are_those_of_the_dense_sum() -> None:
    w, x, dy = adapted(), inputs(5, K, seed=3), inputs(5, N, seed=4)

    def loss(fields: dict[str, jax.Array]) -> jax.Array:
        return (lb.matmul(x, QuantArray({**w.fields, **fields}, w.type)) * dy).sum()

    got = jax.grad(loss)({f: w.fields[f] for f in ("lora_a", "lora_b")})
    _, a, b, _ = parts(w)
    x64, d = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    want = {"lora_a": 2 * x64.T @ d @ b.T, "lora_b": a.T @ x64.T @ d}
    size = {"lora_a": 2 * np.abs(x64.T) @ np.abs(d) @ np.abs(b.T), "lora_b": np.abs(a.T) @ np.abs(x64.T) @ np.abs(d)}
    for name, value in got.items():  # sums over rows and over inputs or outputs, in either order
        assert_within(value, want[name], size[name] * gamma(5 + K + 4, "float32"), name)


def test_no_gradient_of_an_adapter_writes_an_array_as_large_as_the_weight() -> None:
    k = n = 512
    t = QuantType((("k", k), ("n", n)), "f32", lb.bcq(3, group=128), adapter=LowRank(8, 16.0))
    fields = {f: jax.ShapeDtypeStruct(tuple(p.dims.values()), {"u8": "uint8"}.get(p.dtype, "float32"))
              for f, p in t.fields.items()}  # fmt: skip
    x = dy = jax.ShapeDtypeStruct((64, 512), jnp.float32)

    def gradients(x: Any, dy: Any, a: Any, b: Any, fixed: Any) -> Any:
        def loss(a: Any, b: Any) -> Any:
            return (lb.matmul(x, QuantArray({**fixed, "lora_a": a, "lora_b": b}, t)) * dy).sum()

        return jax.grad(loss, (0, 1))(a, b)

    a, b = fields.pop("lora_a"), fields.pop("lora_b")
    compiled = jax.jit(gradients).lower(x, dy, a, b, fields).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * 8 * 4 * 4  # x A or dy B, in a few copies


def test_the_report_counts_the_adapter() -> None:
    row = lb.report(lb.nn.lora(base(), rank=2, alpha=4.0, rngs=nnx.Rngs(0))).rows[0]
    assert row.format == "bcq(bits=2, group=16) + lora(rank=2, alpha=4)"
    assert row.bytes == lb.report(base()).rows[0].bytes + 4 * 2 * (K + N)


def test_a_type_without_an_adapter_is_stored_as_before() -> None:
    assert "adapter" not in type_to_json(base().kernel.type)
    assert type_to_json(TYPE)["adapter"] == {"rank": RANK, "alpha": 6.0}


def test_shared_layers_share_the_adapter() -> None:
    model = lb.nn.lora(lb.quantize(Shared(nnx.Rngs(0)), fast(lb.uniform(4))), rank=2, rngs=nnx.Rngs(1))
    assert model.z is model.sub[0] and model.a["q"] is model.sub[1]
    assert len(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))) == 4


def test_a_tuned_model_takes_an_adapter_and_folds_with_it() -> None:
    tuned = lb.tune.alpha_tuning(base()).model
    model = lb.nn.lora(tuned, rank=2, rngs=nnx.Rngs(0))
    assert type(model.kernel.alpha_first) is lb.nn.Frozen
    folded = lb.tune.fold(model)
    assert sorted(folded.kernel.type.fields) == ["alpha", "lora_a", "lora_b", "planes"]
    np.testing.assert_array_equal(lb.dequantize(folded.kernel.array), lb.dequantize(base().kernel.array))


def test_what_is_refused(tmp_path: Path) -> None:
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"rank must be an int of at least 1, not 0"):
        lb.nn.lora(base(), rank=0, rngs=rngs)
    with pytest.raises(ValueError, match=r"alpha must be a finite number, not nan"):
        lb.nn.lora(base(), alpha=float("nan"), rngs=rngs)
    with pytest.raises(ValueError, match=r"Linear has no quantized layer to put an adapter on: lb.quantize it first"):
        lb.nn.lora(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
    with pytest.raises(TypeError, match=r"cannot put adapters on a QuantArray: give an nnx.Module"):
        lb.nn.lora(base().kernel.array, rngs=rngs)
    small = lb.quantize(Net(rngs), RULES)
    message = (
        r"rule 'head/\*\*' matches none of the 5 quantized layers, such as .*'head/layers/0' is dense: quantize it"
    )
    with pytest.raises(ValueError, match=message):
        lb.nn.lora(small, rules="head/**", rngs=rngs)
    model = lb.nn.lora(base(), rank=2, rngs=rngs)
    with pytest.raises(ValueError, match=r"layer '' has the adapter lora\(rank=2, alpha=16\) already: start from"):
        lb.nn.lora(model, rngs=rngs)
    with pytest.raises(
        ValueError, match=r"has the adapter lora\(rank=2, alpha=16\), which trains instead of its scales"
    ):
        lb.tune.alpha_tuning(model)
    lb.save(base(), tmp_path / "base.safetensors")
    with pytest.raises(lb.CheckpointError, match=r"group=16\), but the model has .* \+ lora\(rank=2, alpha=16\)"):
        lb.load(tmp_path / "base.safetensors", into=model)


def test_every_slice_of_a_stack_has_an_adapter_of_its_own() -> None:
    make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
    small = lb.quantize(make(nnx.Rngs(0).split(3)), lb.uniform(4))
    model = lb.nn.lora(small, rank=2, rngs=nnx.Rngs(1))
    assert model.kernel.lora_a.shape == (3, 8, 2) and model.kernel.lora_b.shape == (3, 2, 8)
    assert float(jnp.abs(model.kernel.lora_a[0] - model.kernel.lora_a[1]).max()) > 0
    np.testing.assert_array_equal(lb.dequantize(model.kernel.array), lb.dequantize(small.kernel.array))

    def loss(m: nnx.Module) -> jax.Array:
        return nnx.scan(lambda x, layer: (layer(x), None))(inputs(2, 8), m)[0].sum()

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert float(jnp.abs(grads["kernel"]["lora_b"][...]).min()) > 0
