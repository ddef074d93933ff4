"""Wrong input to layers and models: each message names the thing, both sizes, and what to do."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from tests.models import Net, fast, inputs

BCQ = lb.bcq(2, group=8)


def raises(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == text


def pair() -> nnx.Dict:
    return nnx.Dict(up=nnx.Linear(16, 8, rngs=nnx.Rngs(0)), down=nnx.Linear(8, 16, rngs=nnx.Rngs(1)))


def test_a_rule_that_matches_nothing() -> None:
    raises(
        ValueError,
        "rule 'mlp/**' matches none of the 2 layers that can be quantized, such as 'down', 'up'",
        lambda: lb.quantize(pair(), {"up": BCQ, "mlp/**": BCQ}),
    )
    raises(
        ValueError,
        "rule 'layers/0/mlp/upp' matches none of the 7 layers that can be quantized, such as "
        "'layers/0/mlp/up', 'layers/1/mlp/up', 'layers/0/mlp/down'",
        lambda: lb.quantize(Net(nnx.Rngs(0)), {"layers/0/mlp/upp": BCQ}),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite(bad: float, dtype: str) -> None:
    model = pair()
    w = jnp.asarray(inputs(8, 16), dtype)
    model.down.kernel = nnx.Param(w.at[0, 3].set(bad).at[7, 15].set(bad))
    raises(
        ValueError,
        "layer 'down' has 2 NaN or inf among its 128 entries: it cannot be quantized",
        lambda: lb.quantize(model, fast(BCQ)),
    )
    lb.quantize(model, fast({"up": BCQ}))
    raises(
        ValueError,
        "the weight has 2 NaN or inf among its 128 entries: it cannot be quantized",
        lambda: lb.quantize_array(model.down.kernel[...], BCQ),
    )


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool"])
def test_weights_that_are_integers(dtype: str) -> None:
    model = pair()
    model.up.kernel = nnx.Param(jnp.ones((16, 8), dtype))
    raises(
        TypeError,
        f"layer 'up' is {dtype}[16, 8]: only floating weights can be quantized",
        lambda: lb.quantize(model, fast({"up": BCQ})),
    )


def test_weights_that_are_no_matrices() -> None:
    model = pair()
    model.up.kernel = nnx.Param(jnp.ones((0, 8)))
    raises(
        ValueError,
        "layer 'up' has shape (0, 8): a matrix with at least one entry is needed",
        lambda: lb.quantize(model, fast({"up": BCQ})),
    )
    raises(
        ValueError,
        "the weight has shape (4,): a matrix with at least one entry is needed",
        lambda: lb.quantize_array(jnp.ones(4), BCQ),
    )


def test_weights_whose_scales_overflow() -> None:
    model = pair()
    model.up.kernel[...] = jnp.full((16, 8), 1e6)
    raises(
        ValueError,
        "layer 'up': 'alpha' overflows float16; use scale_dtype='float32' or 'bfloat16'",
        lambda: lb.quantize(model, fast({"up": lb.bcq(2, group=8, scale_dtype="float16")})),
    )


def test_inputs_of_the_wrong_size() -> None:
    q = lb.quantize(pair(), fast(BCQ))
    says = "but w is f32[k=16 n=8] as bcq(bits=2, group=8): x's last dim must be k = 16"
    for shape in ((3, 15), (16, 17), (1,), (16, 0)):
        raises(ValueError, f"x has shape {shape}, {says}", lambda shape=shape: q.up(jnp.ones(shape)))
    raises(ValueError, f"x has shape (), {says}", lambda: lb.matmul(jnp.float32(1), q.up.kernel.array))
    raises(ValueError, f"x has shape (3, 15), {says}", lambda: nnx.jit(lambda m, x: m(x))(q.up, jnp.ones((3, 15))))
    table = lb.quantize(nnx.Embed(8, 16, rngs=nnx.Rngs(0)), fast(BCQ))
    says = "but w is f32[n=8 k=16] as bcq(bits=2, group=8): x's last dim must be k = 16"
    raises(ValueError, f"x has shape (3, 8), {says}", lambda: table.attend(jnp.ones((3, 8))))


def test_inputs_of_the_wrong_kind() -> None:
    q = lb.quantize(pair(), fast(BCQ))
    raises(
        TypeError,
        "x is int32[2, 16]; matmul takes floating activations: cast it",
        lambda: lb.matmul(jnp.ones((2, 16), jnp.int32), q.up.kernel.array),
    )
    table = lb.quantize(nnx.Embed(8, 16, rngs=nnx.Rngs(0)), fast(BCQ))
    raises(
        TypeError,
        "ids are float32[3]; rows are taken by integer ids",
        lambda: table(jnp.ones(3)),
    )
    rows = table(jnp.array([7, -1, 8, -9]))  # as jnp.take: the last row twice, then two that do not exist
    assert np.isfinite(rows[:2]).all() and np.isnan(rows[2:]).all()
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize("make", [lb.bcq, lb.uniform], ids=["bcq", "uniform"])
def test_bits_and_groups_that_do_not_exist(make: Callable[..., Any]) -> None:
    for bits in (0, 9, -1, 3.0, "3", True, None):
        raises(ValueError, f"bits must be an int from 1 to 8, not {bits!r}", lambda bits=bits: make(bits))
    for group in (0, -8, 8.0, "8", True):
        text = f"group must be a positive int, or None for one group a row, not {group!r}"
        raises(ValueError, text, lambda group=group: make(2, group=group))
    for bits in range(1, 9):
        assert make(bits)["bits"] == bits


def test_formats_and_quantizers_that_do_not_go_together() -> None:
    w = inputs(16, 8)
    raises(
        ValueError,
        "RoundToNearest() gives levels that are not symmetric about zero: use bcq(..., offset=True)",
        lambda: lb.quantize_array(w, BCQ, lb.round_to_nearest()),
    )
    raises(
        TypeError,
        "BinarySolver(rounds=0) makes bcq, not uniform(bits=4)",
        lambda: lb.quantize_array(w, lb.uniform(4), lb.greedy()),
    )


def test_models_with_nothing_to_quantize() -> None:
    text = "holds no nnx.Linear or nnx.Embed: there is nothing to quantize"
    raises(ValueError, f"Dict {text}", lambda: lb.quantize(nnx.Dict(), BCQ))
    raises(ValueError, f"LayerNorm {text}", lambda: lb.quantize(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), BCQ))
    raises(ValueError, f"Linear {text}", lambda: lb.quantize(lb.quantize(pair(), fast(BCQ)).up, BCQ))
    raises(ValueError, f"Dict {text}", lambda: lb.quantize(lb.quantize(pair(), fast(BCQ)), BCQ))


def test_models_without_arrays() -> None:
    abstract = nnx.eval_shape(pair)
    raises(
        ValueError,
        "layer 'down' cannot be quantized: its weight is abstract; for an abstract result call "
        "nnx.eval_shape(lambda: lb.quantize(model, rules))",
        lambda: lb.quantize(abstract, BCQ),
    )
    result = nnx.eval_shape(lambda model: lb.quantize(model, BCQ), abstract)
    assert lb.nn.kernels(result)["up/kernel"].type.bits_per_weight == 10
