"""`lb.save` and `lb.load` of whole models: bit-exact, into anything of the same structure, and never into another."""

import os
from collections.abc import Callable
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
from lowbit.io import CheckpointError
from tests.models import TOKENS, Dropped, Net, Shared, Tied, arrays, assert_same, fast, inputs

RULES = {"embed": lb.uniform(4, group=8), "head/**": None, "**/up": lb.bcq(3, group=8), "**": lb.bcq(2, offset=True)}


def net(rules: Any = None, seed: int = 0) -> Net:
    return lb.quantize(Net(nnx.Rngs(seed)), fast(rules or RULES))


def pair(fmt: Any = None, **options: Any) -> nnx.Dict:
    """Two small Linears, `up` quantized."""
    up = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    model = nnx.Dict(up=up, down=nnx.Linear(8, 16, rngs=nnx.Rngs(1), **options))
    return lb.quantize(model, fast({"up": fmt or lb.bcq(2, group=8)}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refused(text: str, call: Callable[[], Any], error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == text


# ---- round trips


@pytest.mark.slow
def test_into_an_abstract_model(path: Path) -> None:
    model = net()
    lb.save(model, path)
    abstract = nnx.eval_shape(net)
    back = lb.load(path, into=abstract)
    assert type(back) is Net
    assert_same(arrays(back), arrays(model))
    assert [(p, type(v)) for p, v in nnx.to_flat_state(nnx.state(back))] == [
        (p, type(v)) for p, v in nnx.to_flat_state(nnx.state(model))
    ]
    assert {p: k.type for p, k in lb.nn.kernels(back).items()} == {p: k.type for p, k in lb.nn.kernels(model).items()}
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))
    assert lb.report(back) == lb.report(model)
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(nnx.state(abstract)))


@pytest.mark.slow
def test_into_a_model_with_other_values(path: Path) -> None:
    model, other = net(), net(seed=1)
    lb.save(model, path)
    kept = arrays(other)
    back = lb.load(path, into=other)
    assert_same(arrays(back), arrays(model))
    assert_same(arrays(other), kept)
    back.layers[0].norm.scale[...] += 1
    assert_same(arrays(other), kept)
    assert_same(arrays(lb.load(path, into=other)), arrays(model))


def test_without_a_model(path: Path) -> None:
    model = pair()
    lb.save(model, path)
    entries = lb.load(path)
    assert entries.keys() == {"up/kernel", "up/kernel/stats", "up/bias", "down/kernel", "down/bias"}
    w = entries["up/kernel"]
    assert isinstance(w, QuantArray) and w.type == model.up.kernel.type
    np.testing.assert_array_equal(lb.dequantize(w), lb.dequantize(model.up.kernel.array))
    np.testing.assert_array_equal(entries["down/kernel"], model.down.kernel[...])


def test_a_linear_alone_and_a_dense_model(path: Path) -> None:
    q = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), fast(lb.bcq(2, group=8)))
    lb.save(q, path)
    assert_same(arrays(lb.load(path, into=nnx.clone(q))), arrays(q))
    dense = Net(nnx.Rngs(0))
    lb.save(dense, path)
    back = lb.load(path, into=nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    assert_same(arrays(back), arrays(dense))


@pytest.mark.parametrize("kind", [Shared, Tied])
def test_sharing_is_stored_once_and_restored(path: Path, kind: Any) -> None:
    def make() -> Any:
        return lb.quantize(kind(nnx.Rngs(0)), fast(lb.bcq(2, group=8)))

    model = make()
    lb.save(model, path)
    assert sum(isinstance(v, QuantArray) for v in lb.load(path).values()) == len(lb.nn.kernels(model))
    back = lb.load(path, into=nnx.eval_shape(make))
    assert_same(arrays(back), arrays(model))
    assert back.z is back.sub[0] if kind is Shared else back.a.kernel is back.b.kernel
    np.testing.assert_array_equal(back(inputs(2, 16)), model(inputs(2, 16)))


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_narrow_dtypes(path: Path, dtype: str) -> None:
    model = pair(lb.bcq(2, group=8, scale_dtype=dtype), param_dtype=dtype)
    lb.save(model, path)
    back = lb.load(path, into=nnx.eval_shape(lambda: pair(lb.bcq(2, group=8, scale_dtype=dtype), param_dtype=dtype)))
    assert back.down.kernel.dtype == back.up.kernel.alpha.dtype == dtype
    assert_same(arrays(back), arrays(model))


def test_64_bits_are_not_narrowed(path: Path) -> None:
    model = nnx.Dict(i=nnx.Variable(np.array([2**40 + 7, 5])), f=nnx.Variable(np.array([1e300])))
    lb.save(model, path)
    back = lb.load(path, into=model)
    assert back.i.get_value().tolist() == [2**40 + 7, 5]
    assert back.f.get_value().tolist() == [1e300]


def test_numbers_stay_numbers(path: Path) -> None:
    model = nnx.Dict(step=nnx.Variable(3), rate=nnx.Variable(0.5), on=nnx.Variable(True))
    lb.save(model, path)
    into = nnx.Dict(step=nnx.Variable(0), rate=nnx.Variable(0.0), on=nnx.Variable(False))
    back = lb.load(path, into=into)
    assert [v.get_value() for v in (back.step, back.rate, back.on)] == [3, 0.5, True]
    assert [type(v.get_value()) for v in (back.step, back.rate, back.on)] == [int, float, bool]
    lb.save(nnx.Dict(step=nnx.Variable(jnp.zeros(2))), path)
    refused(
        f"{path}: 'step' is stored as float32[2], but the model's is 0",
        lambda: lb.load(path, into=nnx.Dict(step=nnx.Variable(0))),
    )


@pytest.mark.parametrize(("stored", "want"), [(1.5, 3), (2, True), (1j, 1.0), (float("nan"), 1)], ids=repr)
def test_numbers_of_another_type(path: Path, stored: Any, want: Any) -> None:
    lb.save(nnx.Dict(step=nnx.Variable(stored)), path)
    dtype = np.asarray(stored).dtype
    refused(
        f"{path}: 'step' is stored as {dtype}[], but the model's is {want!r}",
        lambda: lb.load(path, into=nnx.Dict(step=nnx.Variable(want))),
    )


@pytest.mark.parametrize("impl", [None, pytest.param("rbg", marks=pytest.mark.slow)])
def test_random_keys_go_on_where_they_were(path: Path, impl: str | None) -> None:
    def make() -> Dropped:
        rngs = nnx.Rngs(jax.random.key(3, impl=impl))
        return lb.quantize(Dropped(rngs), fast(lb.bcq(2, group=8)))

    model, x = make(), inputs(2, 16)
    model(x)
    lb.save(model, path)
    for into in (make(), nnx.eval_shape(make)):
        back = lb.load(path, into=into)
        assert_same(arrays(back), arrays(model))
        assert jax.random.key_impl(back.dropout.rngs.key[...]) == jax.random.key_impl(model.dropout.rngs.key[...])
        assert int(back.dropout.rngs.count[...]) == 1
    y = model(x)
    np.testing.assert_array_equal(back(x), y)
    assert not np.array_equal(model(x), y)


@pytest.mark.slow
def test_a_model_in_the_middle_of_tuning(path: Path) -> None:
    def make() -> Net:
        return lb.tune.alpha_tuning(net(), offsets=True).model

    tuning = lb.tune.alpha_tuning(net(), offsets=True)
    optimizer = tuning.optimizer(optax.sgd(1.0))

    gradient = nnx.jit(nnx.grad(lambda m: jnp.mean(m(TOKENS) ** 2), argnums=nnx.DiffState(0, lb.Scale)))

    def step(model: Net, optimizer: nnx.Optimizer[Net]) -> None:
        optimizer.update(model, gradient(model))

    step(tuning.model, optimizer)
    lb.save(tuning.model, path)
    back = lb.load(path, into=nnx.eval_shape(make))
    assert_same(arrays(back), arrays(tuning.model))
    again = lb.tune.alpha_tuning(back, offsets=True)
    step(again.model, again.optimizer(optax.sgd(1.0)))
    step(tuning.model, optimizer)
    assert_same(arrays(again.model), arrays(tuning.model))
    assert_same(arrays(lb.tune.fold(back)), arrays(lb.tune.fold(lb.load(path, into=make()))))
    name = "layers/0/mlp/up/kernel"
    plain = lb.nn.kernels(net())[name].type
    with pytest.raises(CheckpointError, match="but the model has f32"):
        lb.load(path, into=net())
    assert lb.nn.kernels(back)[name].type != plain


def test_saving_again_replaces_the_file(path: Path) -> None:
    lb.save(net(), path)
    lb.save(net(seed=1), str(path))
    assert_same(arrays(lb.load(str(path), into=nnx.eval_shape(net))), arrays(net(seed=1)))
    assert os.listdir(path.parent) == [path.name]


# ---- what does not fit


def test_layers_missing_and_extra(path: Path) -> None:
    lb.save(pair(), path)
    more = nnx.Dict(up=pair().up, down=pair().down, top=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    refused(
        f"{path} does not fit Dict: the file lacks 'top/bias', 'top/kernel'; the model lacks nothing",
        lambda: lb.load(path, into=more),
    )
    refused(
        f"{path} does not fit Dict: the file lacks nothing; the model lacks 'down/bias', 'down/kernel'",
        lambda: lb.load(path, into=nnx.Dict(up=pair().up)),
    )
    refused(
        f"{path}: 'up/kernel' is stored as f32[k=16 n=8] as bcq(bits=2, group=8), "
        "but the model has no such quantized weight",
        lambda: lb.load(path, into=nnx.Dict(down=pair().down)),
    )
    plain = nnx.Dict(up=pair().up, down=nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0)))
    refused(
        f"{path} does not fit Dict: the file lacks nothing; the model lacks 'down/bias'",
        lambda: lb.load(path, into=plain),
    )
    lb.save(nnx.Dict(down=pair().down), path)
    refused(
        f"{path} does not fit Dict: the file lacks 'up/bias', 'up/kernel/alpha', 'up/kernel/planes' and 1 more; "
        "the model lacks nothing",
        lambda: lb.load(path, into=pair()),
    )


def test_another_format_or_size(path: Path) -> None:
    lb.save(pair(), path)
    stored = f"{path}: 'up/kernel' is f32[k=16 n=8] as bcq(bits=2, group=8), but the model has"
    refused(
        f"{stored} f32[k=16 n=8] as bcq(bits=3, group=8)",
        lambda: lb.load(path, into=nnx.eval_shape(lambda: pair(lb.bcq(3, group=8)))),
    )
    refused(
        f"{stored} f32[k=16 n=8] as uniform(bits=2, group=8)",
        lambda: lb.load(path, into=nnx.eval_shape(lambda: pair(lb.uniform(2, group=8)))),
    )

    def longer() -> nnx.Dict:
        up = nnx.Linear(24, 8, rngs=nnx.Rngs(0))
        return nnx.Dict(up=lb.quantize(up, fast(lb.bcq(2, group=8))), down=pair().down)

    refused(
        f"{stored} f32[k=24 n=8] as bcq(bits=2, group=8)",
        lambda: lb.load(path, into=nnx.eval_shape(longer)),
    )


def test_dense_against_quantized(path: Path) -> None:
    dense = nnx.Dict(up=nnx.Linear(16, 8, rngs=nnx.Rngs(0)), down=pair().down)
    lb.save(dense, path)
    refused(
        f"{path}: 'up/kernel' is stored dense, but the model has it as f32[k=16 n=8] as bcq(bits=2, group=8)",
        lambda: lb.load(path, into=pair()),
    )
    lb.save(pair(), path)
    refused(
        f"{path}: 'up/kernel' is stored as f32[k=16 n=8] as bcq(bits=2, group=8), "
        "but the model has no such quantized weight",
        lambda: lb.load(path, into=dense),
    )


def test_another_shape_or_dtype(path: Path) -> None:
    lb.save(pair(), path)
    wide, narrow, odd = pair(), pair(), pair()
    wide.down.kernel = nnx.Param(jnp.zeros((8, 17)))
    refused(
        f"{path}: 'down/kernel' is stored as float32[8, 16], but the model's Param is float32[8, 17]",
        lambda: lb.load(path, into=wide),
    )
    narrow.down.bias = nnx.Param(jnp.zeros(16, jnp.bfloat16))
    refused(
        f"{path}: 'down/bias' is stored as float32[16], but the model's Param is bfloat16[16]",
        lambda: lb.load(path, into=narrow),
    )
    odd.down.bias = nnx.BatchStat(jnp.zeros((4, 4)))
    refused(
        f"{path}: 'down/bias' is stored as float32[16], but the model's BatchStat is float32[4, 4]",
        lambda: lb.load(path, into=odd),
    )


def test_what_are_no_random_keys(path: Path) -> None:
    def make(impl: str) -> Dropped:
        return Dropped(nnx.Rngs(jax.random.key(3, impl=impl)))

    lb.save(make("rbg"), path)
    with pytest.raises(CheckpointError) as raised:
        lb.load(path, into=make("threefry2x32"))
    start = f"{path}: 'dropout/rngs/key' is stored as uint32[4], which are no key<fry> keys ("
    assert str(raised.value).startswith(start)
    model = make("threefry2x32")
    model.dropout.rngs.key = nnx.Param(jnp.zeros(2))
    lb.save(model, path)
    with pytest.raises(CheckpointError, match="is stored as float32\\[2\\], which are no key<fry> keys"):
        lb.load(path, into=make("threefry2x32"))


# ---- what cannot be saved


def test_models_that_cannot_be_saved(path: Path) -> None:
    refused("Dict holds no Variables: there is nothing to save", lambda: lb.save(nnx.Dict(), path), ValueError)
    refused(
        "'down/bias' is abstract (float32[16]): only a model with arrays can be saved",
        lambda: lb.save(nnx.eval_shape(lambda: nnx.Dict(down=nnx.Linear(8, 16, rngs=nnx.Rngs(0)))), path),
        ValueError,
    )
    with pytest.raises(ValueError, match=r"is abstract .*: only a model with arrays can be saved"):
        lb.save(nnx.eval_shape(pair), path)
    twice = nnx.Dict({"a/b": nnx.Param(jnp.zeros(1)), "a": nnx.Dict(b=nnx.Param(jnp.ones(1)))})
    refused(
        "two Variables are named 'a/b': rename one, so that a file can tell them apart",
        lambda: lb.save(twice, path),
        ValueError,
    )
    refused(
        "'n' is a str; only numpy or jax arrays and QuantArrays can be stored",
        lambda: lb.save(nnx.Dict(n=nnx.Variable("three")), path),
        TypeError,
    )
    with pytest.raises(TypeError, match=r"is traced: write files outside of jax\.jit"):
        nnx.jit(lambda m: lb.save(m, path))(pair())
    assert not path.exists()


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    model, missing = pair(), tmp_path / "none" / "m.safetensors"
    refused(
        f"cannot write {str(missing)!r}: there is no folder {str(missing.parent)!r}; make it first",
        lambda: lb.save(model, missing),
        FileNotFoundError,
    )
    refused(
        f"cannot write {str(tmp_path)!r}: it is a folder; name a file in it",
        lambda: lb.save(model, tmp_path),
        IsADirectoryError,
    )
    with pytest.raises(FileNotFoundError):
        lb.load(missing, into=model)


def test_a_failed_save_leaves_the_old_file(path: Path) -> None:
    lb.save(pair(), path)
    before = path.read_bytes()
    model = pair()
    model.down.bias = nnx.Variable("three")
    with pytest.raises(TypeError):
        lb.save(model, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
