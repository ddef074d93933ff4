"""Two levels of scales: decode against an independent reading of the stored bytes, quantizer, options and kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.ir import evaluate
from lowbit.testing import random_array
from lowbit.testing.tolerance import assert_within, unit

PLAIN = lb.k_quant(4)


def weights(k: int, n: int, dtype: type = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((k, n)), dtype)


def sized(fmt: lb.Format, k: int = 512, n: int = 16) -> lb.QuantType:
    return lb.QuantType((("k", k), ("n", n)), "f32", fmt)


def code(planes: np.ndarray, at: tuple[int, ...], t: int) -> int:
    """Entry t of a group, bit by bit from the bytes."""
    return sum((int(planes[(p, *at, t // 8)]) >> t % 8 & 1) << p for p in range(len(planes)))


def decoded(f: dict[str, np.ndarray], row: int, i: int, fmt: lb.Format) -> float:
    """Weight (row, i), exactly, as the docstring of the format has it."""
    o = dict(fmt.options)
    g, t = divmod(i, o["group"])
    q = code(f["planes"], (row, g), t)
    super_group = i // o["super_group"]
    scale, low = (float(f[name][row, super_group]) if name in f else 0.0 for name in ("scale", "min"))
    s, m = (int(f[name][row, g]) if name in f else 1 for name in ("group_scale", "group_min"))
    if o["offset"]:
        return scale * s * q - low * m
    return scale * (s - (1 << o["scale_bits"] >> 1)) * (q - (1 << o["bits"] - 1))


@pytest.mark.parametrize(
    "fmt",
    [
        lb.k_quant(4, 8, 32),
        lb.k_quant(3, 6, 12, 4),
        lb.k_quant(6, 8, 16, 8, offset=False, scale_dtype="float32"),
        lb.k_quant(5, 16, 16, 0),
        lb.k_quant(5, 16, 16, 0, offset=False),
    ],
    ids=str,
)
def test_it_decodes_its_bytes(fmt: lb.Format) -> None:
    w = random_array(sized(fmt, 40, 3))  # padding too: it must not matter
    fields = {name: np.asarray(a) for name, a in w.fields.items()}
    want = [[decoded(fields, row, i, fmt) for i in range(40)] for row in range(3)]
    got = evaluate(w.type.decode, fields)
    # Factors of 24, 8 and 8 bits are exact in float64, and so is a difference of products of 11, 6 and 6 bits.
    assert np.array_equal(got, want) and list(w.type.decode.dims) == ["n", "k"]


@pytest.mark.parametrize(
    "fmt",
    [
        lb.k_quant(4, 16, 64),
        pytest.param(lb.k_quant(3, 8, 24, 4), marks=pytest.mark.slow),
        pytest.param(lb.k_quant(6, 16, 32, 8, offset=False, scale_dtype="float32"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_kit(fmt: lb.Format) -> None:
    passed = lb.testing.check_format(fmt, shapes=[(5, 70)]).passed["n=5 k=70"]
    assert {"product decode", "product table", "product join", "quantizer"} <= set(passed)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (PLAIN, 4.625),
        (lb.k_quant(5), 5.625),
        (lb.k_quant(2, 16, scale_bits=4), 3.125),
        (lb.k_quant(3, 16, offset=False), 3.5625),
        (lb.k_quant(6, 16, scale_bits=8, offset=False), 6.5625),  # that of ggml, which packs the others
        (lb.k_quant(4, 32, 32, 0), 5),
    ],
    ids=str,
)
def test_bits_per_weight(fmt: lb.Format, bits: float) -> None:
    assert sized(fmt).bits_per_weight == bits


@pytest.mark.parametrize(
    "fmt",
    [PLAIN, lb.k_quant(4, 32, 32, 0), lb.k_quant(6, 16, scale_bits=8, offset=False, scale_dtype="float32")],
    ids=str,
)
def test_round_to_nearest(fmt: lb.Format) -> None:
    """Off by half a step, and by how far the stored step and offset are from those of the group.

    A group's range is cut in `top` steps. Its step is stored in units of the super group's largest over `units`: off by
    half a unit, as many times as the code says; and the unit itself off by the rounding of its dtype.
    """
    w = weights(512, 16)
    off = np.abs(np.asarray(lb.dequantize(lb.quantize_array(w, fmt)) - w)).T.reshape(16, -1, 256)
    groups = np.asarray(w).T.reshape(16, 2, -1, fmt["group"])
    o = dict(fmt.options)
    top = 2 ** o["bits"] - 1
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    rounding = unit("f16" if o["scale_dtype"] == "float16" else "f32")
    if o["offset"]:
        step, offset = (high - low) / top, -low
        units = 2 ** o["scale_bits"] - 1
    else:
        step, offset, units = (
            np.abs(groups).max(-1) / (1 << o["bits"] - 1),
            np.zeros_like(low),
            1 << o["scale_bits"] - 1,
        )
    coarse = 0.5 / units if units else 0.0
    step_off = coarse * step.max(2, keepdims=True) + rounding * step
    low_off = coarse * offset.max(2, keepdims=True) + rounding * offset
    # A code is clipped where the stored range ends before the group's: at most `top` steps and the offset are off. And
    # without offsets codes end one step before the magnitude that the farthest weight has on its own side.
    bound = (step + step_off) * (0.5 if o["offset"] else 1) + top * step_off + low_off
    assert_within(
        off, np.zeros_like(off), np.repeat(bound, fmt["group"], -1).reshape(off.shape) * (1 + 8 * unit("f32"))
    )


@pytest.mark.parametrize(
    "fmt", [PLAIN, lb.k_quant(4, 32, 32, 0), lb.k_quant(6, 16, scale_bits=8, offset=False)], ids=str
)
def test_zero_groups_decode_to_zero(fmt: lb.Format) -> None:
    w = weights(512, 3).at[:64].set(0.0).at[:, 1].set(0.0)
    d = np.asarray(lb.dequantize(lb.quantize_array(w, fmt)))
    assert np.all(d[:64] == 0) and np.all(d[:, 1] == 0) and np.isfinite(d).all()


@pytest.mark.parametrize("value", [0.3, -2.0, 1e3])
def test_constant_groups(value: float) -> None:
    """One step of `top`, or the offset, is the constant; every unit is that of the super group, rounded to float16."""
    w = jnp.full((512, 2), value, jnp.float32)
    for fmt in (PLAIN, lb.k_quant(5, 32, 32, 0), lb.k_quant(6, 16, scale_bits=8, offset=False)):
        d = lb.dequantize(lb.quantize_array(w, fmt))
        assert_within(d, np.full((512, 2), value), (unit("f16") + 4 * unit("f32")) * abs(value))


def test_scales_that_underflow_are_refused() -> None:
    message = "q: 'min' underflows float16; use scale_dtype='float32' or scale the weights up"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(weights(64, 2) * 1e-9, PLAIN, name="q")


def test_the_quantizer_is_for_this_format() -> None:
    with pytest.raises(TypeError, match=r"^TwoLevelRounding\(\) makes k_quant, not uniform\(bits=4\)$"):
        lb.quantize_array(weights(8, 2), lb.uniform(4), lb.quantizers.TwoLevelRounding())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be an int from 1 to 8, not 9"),
        ({"bits": 4, "group": 0}, "group must be a positive int, or None for one group a row, not 0"),
        ({"bits": 4, "group": None}, "super_group must be a multiple of group = None, not 256"),
        ({"bits": 4, "super_group": 100}, "super_group must be a multiple of group = 32, not 100"),
        ({"bits": 4, "scale_bits": 9}, "scale_bits must be an int from 0 to 8, not 9"),
        (
            {"bits": 4, "scale_bits": 0},
            "without integer scales every group has its own: make super_group 32, not 256",
        ),
        ({"bits": 4, "offset": 1}, "offset must be True or False, not 1"),
        ({"bits": 4, "scale_dtype": "f16"}, "scale_dtype must be 'float32', 'float16' or 'bfloat16', not 'f16'"),
    ],
)
def test_options_that_there_are_not(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.k_quant(**options)
