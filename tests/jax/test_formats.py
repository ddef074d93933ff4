"""Formats and quantizers: decode against an independent reading of the stored bytes, conversions, and bad input."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.formats import Format, UnknownFormatError
from lowbit.formats.format import definition
from lowbit.formats.planes import groups, pack_planes
from lowbit.ir import Unpack, cast, evaluate, merge, param
from lowbit.quantizers.quantizer import RoundToNearest, set_default_quantizer
from lowbit.testing.tolerance import assert_within, dot_tolerance, gamma, unit

GROUPS = [33, 8, 1, None]


def weights(k: int, n: int, dtype: Any = np.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((k, n)), dtype)


@cache
def compiled(fmt: Format) -> Callable[[jax.Array], QuantArray]:
    """Round to nearest in one piece: faster than op by op for shapes that are used once."""
    return jax.jit(lambda w: lb.quantize_array(w, fmt, RoundToNearest()))


def stored_code(planes: np.ndarray, n: int, k: int, group: int | None) -> np.ndarray:
    """Integer codes [n, k], bit by bit from the bytes: weight t of group g is bit t % 8 of byte t // 8."""
    size = k if group is None else min(group, k)
    out = np.zeros((n, k), np.int64)
    for row in range(n):
        for i in range(k):
            g, t = divmod(i, size)
            for p in range(planes.shape[0]):
                out[row, i] |= (int(planes[p, row, g, t // 8]) >> (t % 8) & 1) << p
    return out


def spread(scales: np.ndarray, k: int, group: int | None) -> np.ndarray:
    """Scales [..., n, g] to one for each weight, [..., n, k]."""
    size = k if group is None else min(group, k)
    return np.repeat(scales.astype(np.float64), size, axis=-1)[..., :k]


def decoded(w: QuantArray) -> np.ndarray:
    """The oracle's exact weights, [n, k]."""
    t = w.type.decode
    value = evaluate(t, {name: np.asarray(a) for name, a in w.fields.items()})
    return value if list(t.dims) == ["n", "k"] else value.T


# ---------------------------------------------------------------- what the bytes mean


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("bits", "offset"), [(1, True), (3, False), (8, True)])
def test_bcq_decodes_its_bytes(bits, offset, group):
    k, n = 70, 3
    fmt = lb.bcq(bits, group=group, offset=offset)
    rng = np.random.default_rng(bits)
    shape = {
        name: list(leaf.dims.values()) for name, leaf in lb.QuantType((("k", k), ("n", n)), "f32", fmt).fields.items()
    }
    fields = {name: rng.standard_normal(s).astype(np.float32) for name, s in shape.items()}
    fields["planes"] = rng.integers(0, 256, shape["planes"]).astype(np.uint8)  # padding too: it must not matter
    w = QuantArray.of(fields, lb.QuantType((("k", k), ("n", n)), "f32", fmt))

    code = stored_code(fields["planes"], n, k, group)
    signs = np.stack([2 * (code >> p & 1) - 1 for p in range(bits)])
    want = (spread(fields["alpha"], k, group) * signs).sum(0)
    size = np.abs(spread(fields["alpha"], k, group)).sum(0)
    if offset:
        want, size = want + spread(fields["beta"], k, group), size + np.abs(spread(fields["beta"], k, group))
    assert_within(decoded(w), want, gamma(bits + 1, "f64") * size)
    assert_within(lb.dequantize(w), want.T, gamma(bits + 1, "f32") * size.T)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [1, 8])
def test_uniform_decodes_its_bytes(bits, group):
    k, n = 70, 3
    w = compiled(lb.uniform(bits, group=group))(weights(k, n))
    f = {name: np.asarray(a) for name, a in w.fields.items()}
    code = stored_code(f["planes"], n, k, group)
    want = spread(f["scale"], k, group) * (code - spread(f["zero"], k, group))
    assert np.array_equal(decoded(w), want)  # one product of 24 by 9 bits
    assert_within(lb.dequantize(w), want.T, unit("f32") * np.abs(want.T))


@pytest.mark.parametrize("t", [1, 7, 8, 9, 33])
@given(data=st.data())
@settings(max_examples=20)
def test_packing_is_that_of_numpy(t, data):
    bits = data.draw(hnp.arrays(np.uint8, (3, 2, 2, t), elements=st.integers(0, 1)))
    packed = pack_planes(jnp.asarray(bits))
    assert packed.shape == (3, 2, 2, -(-t // 8)) and packed.dtype == np.uint8
    assert np.array_equal(packed, np.packbits(bits, axis=-1, bitorder="little"))  # and padding is zero


@pytest.mark.parametrize(("k", "group", "count"), [(70, 128, 1), (70, 33, 3), (70, 1, 70), (70, None, 1), (64, 32, 2)])
def test_groups_count_the_ragged_one(k, group, count):
    assert groups(k, group) == count


# ---------------------------------------------------------------- all that the library does with a format


@pytest.mark.parametrize(
    "fmt",
    [
        lb.bcq(3, 16),
        pytest.param(lb.bcq(2, 33, offset=True), marks=pytest.mark.slow),
        pytest.param(lb.bcq(1, None, offset=True, scale_dtype="float16"), marks=pytest.mark.slow),
        pytest.param(lb.uniform(4, 16), marks=pytest.mark.slow),
        pytest.param(lb.uniform(3, 33, scale_dtype="float16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_kit(fmt):
    quantizer = lb.greedy() if fmt.name == "bcq" else None
    passed = lb.testing.check_format(fmt, shapes=[(5, 70)], quantizer=quantizer).passed["n=5 k=70"]
    assert {"product decode", "product table", "product join", "quantizer"} <= set(passed) or fmt["bits"] == 1


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("make", [lb.bcq, lb.uniform])
@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "3", None])
def test_bits_outside_1_to_8(make, bits):
    with pytest.raises(ValueError, match=f"^bits must be an int from 1 to 8, not {re.escape(repr(bits))}$"):
        make(bits)


@pytest.mark.parametrize("make", [lb.bcq, lb.uniform])
@pytest.mark.parametrize("group", [0, -8, 1.5, True, "128"])
def test_bad_group(make, group):
    message = f"group must be a positive int, or None for one group a row, not {group!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(3, group=group)


@pytest.mark.parametrize("make", [lb.bcq, lb.uniform])
@pytest.mark.parametrize("dtype", ["float12", "int8", "f16", "float64", jnp.float16, None])
def test_bad_scale_dtype(make, dtype):
    message = f"scale_dtype must be 'float32', 'float16' or 'bfloat16', not {dtype!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(3, scale_dtype=dtype)


def test_a_bad_dtype_is_named_by_its_option():
    with pytest.raises(ValueError, match=r"^table_dtype must be 'float32', 'float16' or 'bfloat16', not 'f16'$"):
        lb.any_precision(3, 4, table_dtype="f16")


def test_unknown_and_missing_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'bites'"):
        lb.bcq(3, bites=3)
    with pytest.raises(TypeError, match="missing a required argument: 'bits'"):
        lb.bcq()


def test_str_shows_what_is_not_usual():
    assert str(lb.bcq(3, group=128)) == "bcq(bits=3, group=128)"
    assert str(lb.bcq(3, offset=True, scale_dtype="float16")) == "bcq(bits=3, offset=True, scale_dtype=float16)"
    assert lb.bcq(3, 128) == lb.bcq(bits=3, group=128) and hash(lb.bcq(3, 128)) == hash(lb.bcq(bits=3, group=128))


# ---------------------------------------------------------------- a format of one's own


@lb.register_format("nf2")
def nf2(n: int, k: int):
    """Two-bit codes into four fixed levels, times a scale for each row."""
    codes = merge(Unpack(param("codes", "u8", n=n, j=k // 4), 2, "v", 4), "j", "v", into="k")
    return param("scale", "f32", n=n) * (cast(codes, "i32") * 2 - 3)


def quantize_nf2(w: jax.Array, fmt: Format) -> dict[str, jax.Array]:
    scale = jnp.abs(w).max(1) / 3
    code = jnp.clip(jnp.round((w / scale[:, None] + 3) / 2), 0, 3).astype(jnp.uint8)
    shifts = jnp.array([[[0, 2, 4, 6]]], jnp.uint8)
    return {"scale": scale, "codes": (code.reshape(len(w), -1, 4) << shifts).sum(-1, dtype=jnp.uint8)}


def test_own_format_end_to_end():
    k, n, m = 64, 5, 3
    w, x = weights(k, n), weights(m, k, seed=1)
    q = lb.quantize_array(w, nf2(), quantize_nf2)
    assert q.type.bits_per_weight == 2 + 32 / k and {f: q.type.role(f) for f in q.fields} == {
        "codes": "code",
        "scale": "scale",
    }
    code = np.stack([np.asarray(q.fields["codes"]) >> 2 * v & 3 for v in range(4)], -1).reshape(n, k)
    levels, scale = 2.0 * code - 3, np.asarray(q.fields["scale"], np.float64)
    assert np.abs(decoded(q) - w.T).max() <= np.asarray(scale).max() * (1 + 8 * unit("f32"))  # half a step of 2 scales
    wide, weight = np.asarray(x, np.float64), levels * scale[:, None]
    bound = dot_tolerance(k + 2, "f32", "f32") * (np.abs(wide) @ np.abs(weight).T)
    assert_within(lb.matmul(x, q), wide @ weight.T, bound)

    def loss(scale: jax.Array) -> jax.Array:
        return lb.matmul(x, QuantArray({**q.fields, "scale": scale}, q.type)).sum()

    bound = dot_tolerance(m * k + 2, "f32", "f32") * (np.abs(wide).sum(0) * np.abs(levels)).sum(1)
    assert_within(jax.grad(loss)(q.fields["scale"]), (wide.sum(0) * levels).sum(1), bound)


def test_own_format_needs_a_quantizer_until_it_has_a_default():
    @lb.register_format("nf2_again")
    def fmt(n: int, k: int):
        return definition("nf2").decode(n, k)

    with pytest.raises(
        ValueError, match=r"^format 'nf2_again' has no default quantizer: name one, or use lb.set_default_quantizer$"
    ):
        lb.quantize_array(weights(8, 2), fmt())
    set_default_quantizer("nf2_again", quantize_nf2)
    assert lb.quantize_array(weights(8, 2), fmt()).fields["codes"].shape == (2, 2)


def test_registering_twice():
    with pytest.raises(ValueError, match=r"^format 'bcq' is already registered$"):
        lb.register_format("bcq")(lambda n, k: param("w", "f32", n=n, k=k))


def test_options_that_no_file_can_hold():
    @lb.register_format("test_levels")
    def levels(n: int, k: int, values=(0.0, 1.0)):
        return param("codes", "u8", n=n, k=k) * values[0]

    message = (
        "option values of format 'test_levels' is (0.5, 1.0), a tuple: files hold ints, floats, bools, strings and"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)} None$"):
        levels((0.5, 1.0))


def test_names_of_what_a_weight_meets():
    @lb.register_format("test_x")
    def named_x(n: int, k: int):
        return param("x", "f32", n=n, k=k)

    with pytest.raises(
        ValueError, match=r"^format 'test_x' stores \['x'\]: x and dy name what weights meet, so rename"
    ):
        named_x()


def test_a_format_that_gives_no_expression_is_refused():
    @lb.register_format("test_no_term")
    def fmt(n, k):
        return np.zeros((n, k))

    with pytest.raises(TypeError, match=r"^format 'test_no_term' decodes to a ndarray, not an expression of "):
        fmt()


def test_unknown_format():
    with pytest.raises(UnknownFormatError) as err:
        Format("no_such").decode(8, 8)
    text = str(err.value)
    assert text.startswith("format 'no_such' is not registered (known: act_order, any_bcq, any_precision, ")
    assert ", uniform" in text
    assert text.endswith("): import the module that defines it")


# ---------------------------------------------------------------- uniform as binary coding


@pytest.mark.parametrize(("group", "scale_dtype"), [(33, "float32"), (33, "float16"), (None, "bfloat16")])
@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_to_bcq_is_exact(bits, group, scale_dtype):
    """alpha is exact; beta too if the scale has at most 15 bits (24 less the 9 of 2 beta / scale), else rounded once.

    The planes are the same bytes, so the two decode to the same weights up to that one rounding.
    """
    u = compiled(lb.uniform(bits, group=group, scale_dtype=scale_dtype))(weights(70, 4))
    b = lb.to_bcq(u)
    assert b.type.format == lb.bcq(bits, group, offset=True, scale_dtype="float32")
    assert np.array_equal(b.fields["planes"], u.fields["planes"])
    if scale_dtype == "float32":
        beta = spread(np.abs(np.asarray(b.fields["beta"])), 70, group)
        assert_within(decoded(b), decoded(u), unit("f32") * beta)
    else:
        assert np.array_equal(decoded(b), decoded(u))
        if bits == 3:  # and no partial sum of the planes rounds, so nor does float32
            assert np.array_equal(lb.dequantize(b), lb.dequantize(u))


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_to_nearest_makes_bcq_directly(bits):
    w = weights(70, 4)
    direct = compiled(lb.bcq(bits, 33, offset=True, scale_dtype="float32"))(w)
    via = lb.to_bcq(compiled(lb.uniform(bits, 33))(w))
    assert direct.type == via.type
    for name in direct.fields:
        assert np.array_equal(direct.fields[name], via.fields[name]), name


def test_conversion_errors():
    with pytest.raises(TypeError, match=r"^to_bcq converts uniform arrays; this one is bcq\(bits=2\)$"):
        lb.to_bcq(lb.quantize_array(weights(8, 2), lb.bcq(2), lb.greedy()))
    with pytest.raises(ValueError, match=r"not symmetric about zero: use bcq\(\.\.\., offset=True\)$"):
        lb.quantize_array(weights(8, 2), lb.bcq(2), RoundToNearest())
    with pytest.raises(TypeError, match=r"^BinarySolver\(rounds=0\) makes bcq, not uniform\(bits=2\)$"):
        lb.quantize_array(weights(8, 2), lb.uniform(2), lb.greedy())


# ---------------------------------------------------------------- weights that are not as they should be

ALL = [
    lb.bcq(3, group=16),
    pytest.param(lb.bcq(2, group=16, offset=True), marks=pytest.mark.slow),
    lb.uniform(4, group=16),
]


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(fmt, bad):
    w = weights(40, 3).at[7, 1].set(bad).at[8, 2].set(bad)
    with pytest.raises(
        ValueError, match=r"^layers/0/kernel has 2 NaN or inf among its 120 entries: repair it, or leave it dense"
    ):
        lb.quantize_array(w, fmt, name="layers/0/kernel")


DENSE = "or leave it dense, in a model by a rule with the format None"


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_not_floating(dtype):
    message = f"the weight is {dtype}[4, 4]: cast it to a floating type, {DENSE}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(np.ones((4, 4), dtype), lb.bcq(2))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0)])
def test_not_a_matrix(shape):
    message = f"the weight has shape {shape}: give a matrix with at least one entry, {DENSE}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(np.ones(shape, np.float32), lb.bcq(2))


@pytest.mark.parametrize(
    ("fmt", "field", "quantizer"),
    [
        (lb.bcq(2, scale_dtype="float16"), "alpha", lb.greedy()),
        (lb.uniform(2, scale_dtype="float16"), "scale", None),
    ],
)
def test_scales_that_overflow(fmt, field, quantizer):
    message = f"q: '{field}' overflows float16; use scale_dtype='float32' or 'bfloat16'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(weights(16, 2) * 1e6, fmt, quantizer, name="q")


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_zero_groups_decode_to_zero(fmt):
    w = weights(40, 3).at[16:32].set(0.0).at[:, 1].set(0.0)
    d = np.asarray(lb.dequantize(lb.quantize_array(w, fmt)))
    assert np.all(d[16:32] == 0) and np.all(d[:, 1] == 0) and np.isfinite(d).all()


@pytest.mark.parametrize("value", [0.3, -2.0, 1e-30, 1e29])
def test_constant_groups(value):
    """An offset holds the constant exactly; RTN has a step of value / 15; one alpha is the mean of 16 equal numbers."""
    group = 16
    w = jnp.full((40, 3), value, jnp.float32)
    exact = np.float64(np.float32(value))
    # beta is the constant, and the alphas are zero
    assert np.array_equal(lb.dequantize(lb.quantize_array(w, lb.bcq(2, group, offset=True))), w)
    rtn = lb.dequantize(lb.quantize_array(w, lb.uniform(4, group)))
    assert_within(rtn, np.full((40, 3), exact), gamma(3, "f32") * abs(exact))
    one = lb.dequantize(lb.quantize_array(w, lb.bcq(1, group)))
    assert_within(one, np.full((40, 3), exact), gamma(group + 2, "f32") * abs(exact))


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.float32])
def test_input_dtypes(fmt, dtype):
    """Narrow weights give what the same numbers give in float32, and decode to their own dtype."""
    w = weights(40, 3, dtype)
    quantizer = lb.greedy() if fmt.name == "bcq" else None  # compiles fast; what every solver sees is float32
    narrow, wide = (lb.quantize_array(a, fmt, quantizer) for a in (w, w.astype(jnp.float32)))
    assert narrow.dtype == dtype and lb.dequantize(narrow).dtype == dtype
    for name in wide.fields:
        assert np.array_equal(narrow.fields[name], wide.fields[name]), name


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("dims", [("k", "n"), ("n", "k")])
def test_quantizers_trace(fmt, dims):
    """`QuantArray.of` checks what the solver returns against the type, also under a trace."""
    traced = jax.eval_shape(lambda w: lb.quantize_array(w, fmt, dims=dims), jax.ShapeDtypeStruct((40, 3), jnp.float32))
    assert traced.type == lb.QuantType(tuple(zip(dims, (40, 3), strict=True)), "f32", fmt)
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in traced.fields.values())


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_dims_order(fmt):
    w = weights(40, 3)
    quantizer = lb.greedy() if fmt.name == "bcq" else None
    a, b = lb.quantize_array(w, fmt, quantizer), lb.quantize_array(w.T, fmt, quantizer, dims=("n", "k"))
    assert a.shape == (40, 3) and b.shape == (3, 40)
    assert np.array_equal(lb.dequantize(a).T, lb.dequantize(b))
