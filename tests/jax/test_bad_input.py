"""Wrong input to layers and models: each message names the thing, both sizes, and what to do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.ir import Expr, param
from lowbit.nn.kinds import NAMES
from tests.models import Net, fast, inputs

BCQ = lb.bcq(2, group=8)
DENSE = "or leave it dense, in a model by a rule with the format None"


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
        f"layer 'down' has 2 NaN or inf among its 128 entries: repair it, {DENSE}",
        lambda: lb.quantize(model, fast(BCQ)),
    )
    lb.quantize(model, fast({"up": BCQ}))
    raises(
        ValueError,
        f"the weight has 2 NaN or inf among its 128 entries: repair it, {DENSE}",
        lambda: lb.quantize_array(model.down.kernel[...], BCQ),
    )


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool"])
def test_weights_that_are_integers(dtype: str) -> None:
    model = pair()
    model.up.kernel = nnx.Param(jnp.ones((16, 8), dtype))
    raises(
        TypeError,
        f"layer 'up' is {dtype}[16, 8]: cast it to a floating type, {DENSE}",
        lambda: lb.quantize(model, fast({"up": BCQ})),
    )


def test_weights_that_are_no_matrices() -> None:
    model = pair()
    model.up.kernel = nnx.Param(jnp.ones((0, 8)))
    raises(
        ValueError,
        f"layer 'up' has shape (0, 8): give a matrix with at least one entry, {DENSE}",
        lambda: lb.quantize(model, fast({"up": BCQ})),
    )
    raises(
        ValueError,
        f"the weight has shape (4,): give a matrix with at least one entry, {DENSE}",
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


def test_weights_whose_scales_underflow() -> None:
    model = pair()
    tiny = lb.bcq(2, group=8, scale_dtype="float16")
    model.up.kernel[...] = jnp.full((16, 8), 1e-6)
    raises(
        ValueError,
        "layer 'up': 'alpha' underflows float16; use scale_dtype='float32' or scale the weights up",
        lambda: lb.quantize(model, fast({"up": tiny})),
    )
    model.up.kernel[...] = jnp.full((16, 8), 1e-6).at[0].set(1.0)  # one group of normal size, and the rest is nothing
    lb.quantize(model, fast({"up": tiny}))
    model.up.kernel[...] = jnp.zeros((16, 8))
    lb.quantize(model, fast({"up": tiny}))


@pytest.mark.parametrize(
    "fmt", [pytest.param(lb.bcq(2), marks=pytest.mark.slow), lb.bcq(2, offset=True), lb.uniform(8)], ids=str
)
@pytest.mark.parametrize("size", [2e38, 1e-35])
def test_weights_at_the_ends_of_float32_are_not_lost(fmt: lb.Format, size: float) -> None:
    w = size * jnp.array([[1.0], [-0.5], [0.5], [0.25]])
    if fmt.name == "uniform" and size > 1:
        w = jnp.abs(w)  # the range of a group must be a float32 too
    rows = lb.report(lb.quantize(nnx.Dict(a=linear(w)), fmt)).rows
    assert rows[0].relative_error is not None
    assert 0 < rows[0].relative_error < 0.3
    assert jnp.abs(lb.dequantize(lb.quantize_array(w, fmt))).max() > size / 2


def linear(w: jax.Array) -> nnx.Linear:
    layer = nnx.Linear(*w.shape, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = w
    return layer


def test_donated_models_survive_weights_that_cannot_be_quantized() -> None:
    model = pair()
    model.up.kernel[...] = jnp.full((16, 8), jnp.nan)
    with pytest.raises(ValueError, match="layer 'up' has 128 NaN"):
        lb.quantize(model, BCQ, donate=True)
    assert not model.down.kernel.get_value().is_deleted()


def test_layers_that_cannot_be_replaced_where_they_are() -> None:
    class Tuple(nnx.Module):
        def __init__(self) -> None:
            self.both = nnx.data(tuple(pair().values()))

    says = "it sits in a tuple, which takes no new items; use nnx.List or nnx.Dict"
    raises(ValueError, f"layer 'both/0' cannot be quantized: {says}", lambda: lb.quantize(Tuple(), BCQ))


def test_what_is_no_model() -> None:
    q = lb.quantize(pair(), fast(BCQ))
    array = q.up.kernel.array
    raises(TypeError, "cannot quantize the class Linear: give an nnx.Module", lambda: lb.quantize(nnx.Linear, BCQ))
    raises(TypeError, "cannot report on a QuantArray: give an nnx.Module", lambda: lb.report(array))
    raises(TypeError, "cannot save a dict: give an nnx.Module", lambda: lb.save({"w": array}, "unused"))
    raises(TypeError, "cannot load into the class Linear: give an nnx.Module", lambda: lb.load("unused", nnx.Linear))


def test_what_is_no_quantized_array() -> None:
    kernel = lb.quantize(pair(), fast(BCQ)).up.kernel
    for name, call in (("matmul", lambda w: lb.matmul(jnp.ones((2, 16)), w)), ("dequantize", lb.dequantize)):
        raises(TypeError, f"{name} takes a QuantArray, not a Kernel: pass its .array", lambda call=call: call(kernel))
        text = f"{name} takes a QuantArray, not a ndarray: see lb.quantize_array"
        raises(TypeError, text, lambda call=call: call(np.ones((16, 8))))
    raises(
        TypeError,
        "to_bcq converts uniform arrays; this one is bcq(bits=2, group=8)",
        lambda: lb.to_bcq(kernel.array),
    )
    raises(
        TypeError,
        "'bcq' is not a format such as lb.bcq(3, group=128)",
        lambda: lb.quantize_array(inputs(16, 8), "bcq"),
    )


def test_what_is_no_rule() -> None:
    many = "is not a list of rules: give a format, a dict of path to format, or [lb.Rule(...)]"
    one = "is not a rule: give lb.Rule(path, format), or a dict of path to format or None"
    for rules in (None, 3, lb.Rule("up", BCQ)):
        raises(TypeError, f"{rules!r} {many}", lambda rules=rules: lb.quantize(pair(), rules))
    for rule in ("up", lb.Rule(3, BCQ), lb.Rule("up", "bcq")):
        raises(TypeError, f"{rule!r} {one}", lambda rule=rule: lb.quantize(pair(), [rule]))
    rule = lb.Rule("up", BCQ, "greedy")
    text = f"{rule!r}: 'greedy' is not a quantizer such as lb.greedy()"
    raises(TypeError, text, lambda: lb.quantize(pair(), [rule]))


def test_plans_that_cannot_be() -> None:
    t = lb.quantize(pair(), fast(BCQ)).up.kernel.type
    text = f"x has shape (1, 999), but w is {t}: x's last dim must be k = 16"
    raises(ValueError, text, lambda: lb.plan((1, 999), t))
    raises(ValueError, "x has shape (0, 16): a plan needs at least one row", lambda: lb.plan((0, 16), t))
    text = "platform 'abacus' has no costs here: use one of cpu, gpu, tpu"
    raises(ValueError, text, lambda: lb.plan((1, 16), t, "abacus"))
    assert lb.plan((1, 16), t, "cuda") is lb.plan((1, 16), t, "gpu")


def test_fields_that_a_kernel_has_already() -> None:
    @lb.register_format("test_has_stats")
    def has_stats(n: int, k: int) -> Expr:
        return param("stats", "f32", n=n) * param("codes", "i8", n=n, k=k)

    def quantizer(w: jax.Array, _: lb.Format) -> dict[str, jax.Array]:
        return {"stats": jnp.ones(w.shape[0]), "codes": jnp.round(w).astype(jnp.int8)}

    raises(
        ValueError,
        "format test_has_stats() stores 'stats', an attribute of Kernel: rename the field",
        lambda: lb.quantize(pair(), [lb.Rule("**", has_stats(), quantizer)]),
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


def test_an_offset_is_a_bool() -> None:
    raises(ValueError, "offset must be True or False, not 'yes'", lambda: lb.bcq(3, offset="yes"))


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
    text = f"holds no {NAMES}: there is nothing to quantize"
    raises(ValueError, f"Dict {text}", lambda: lb.quantize(nnx.Dict(), BCQ))
    raises(ValueError, f"LayerNorm {text}", lambda: lb.quantize(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), BCQ))
    raises(ValueError, f"Linear {text}", lambda: lb.quantize(lb.quantize(pair(), fast(BCQ)).up, BCQ))
    raises(ValueError, f"Dict {text}", lambda: lb.quantize(lb.quantize(pair(), fast(BCQ)), BCQ))


def test_models_without_arrays() -> None:
    abstract = nnx.eval_shape(pair)
    raises(
        ValueError,
        "layer 'down' cannot be quantized: its weight is abstract; "
        "nnx.eval_shape(lambda m: lb.quantize(m, rules), model) gives an abstract result",
        lambda: lb.quantize(abstract, BCQ),
    )
    model, rules = abstract, BCQ
    result = nnx.eval_shape(lambda m: lb.quantize(m, rules), model)  # as it says
    assert lb.nn.kernels(result)["up/kernel"].type.bits_per_weight == 10


def test_abstract_models_have_nothing_to_train() -> None:
    small = nnx.eval_shape(lambda: lb.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), lb.bcq(2)))
    why = (
        "an abstract model, as 'kernel' is: load or quantize it first, or do this within nnx.eval_shape for an "
        "abstract result"
    )
    raises(ValueError, f"cannot tune {why}", lambda: lb.tune.alpha_tuning(small))
    raises(ValueError, f"cannot put adapters on {why}", lambda: lb.nn.lora(small, rngs=nnx.Rngs(0)))
