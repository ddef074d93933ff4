"""Inputs stored in another order: the decode, products that take the activations in that order, and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.ir import Bucket, Gather, topo
from lowbit.planning import cotangent_forms
from lowbit.quantizers.quantizer import has_default
from lowbit.testing.tolerance import assert_within, dot_tolerance

N, K = 6, 70
FORMAT = lb.act_order(3, group=32, scale_dtype="bfloat16")
TYPE = lb.QuantType((("k", K), ("n", N)), "f32", FORMAT)


@pytest.mark.parametrize("fmt", [FORMAT, pytest.param(lb.act_order(4), marks=pytest.mark.slow)])
def test_the_kit(fmt: lb.Format) -> None:
    done = lb.testing.check_format(fmt, shapes=[(2, 141)])
    assert {"product apart", "product planes", "gradients"} <= set(done.passed["n=2 k=141"])


@pytest.fixture
def w() -> lb.QuantArray:
    random = lb.testing.random_array(TYPE)
    place = np.random.default_rng(1).permutation(K).astype(np.uint16)
    return lb.QuantArray.of({**random.fields, "place": place}, TYPE)


def in_place(w: lb.QuantArray) -> np.ndarray[Any, Any]:
    """The weights [k, n] of the plain format, in the order of the inputs."""
    plain = lb.uniform(3, group=32, scale_dtype="bfloat16")
    stored = {name: a for name, a in w.fields.items() if name != "place"}
    rows = lb.dequantize(lb.QuantArray(stored, lb.QuantType(w.type.dims, "f32", plain)))
    return np.asarray(rows)[np.asarray(w.fields["place"])]


def test_an_input_has_the_weights_of_its_place(w: lb.QuantArray) -> None:
    assert np.array_equal(lb.dequantize(w), in_place(w))
    assert w.type.role("place") == "code" and w.type.role("scale") == "scale"


@pytest.mark.parametrize(("inputs", "dtype"), [(1 << 16, "u16"), (1 << 16 | 1, "u32")])
def test_places_are_stored_in_as_few_bits_as_do(inputs: int, dtype: str) -> None:
    fields = lb.QuantType((("k", inputs), ("n", 1)), "f32", FORMAT).fields
    assert fields["place"].dtype == dtype and fields["place"].within == (0, inputs - 1)


def test_a_place_that_there_is_not(w: lb.QuantArray) -> None:
    with pytest.raises(ValueError, match=r"^'place' holds 0\.\.70, outside its range 0\.\.69"):
        lb.QuantArray.of({**w.fields, "place": w.fields["place"].at[3].set(70)}, TYPE)


def test_products_take_activations_in_the_order_of_the_weight() -> None:
    """Nothing as large as the weight is looked up, in the product or in its gradients."""
    t = lb.QuantType((("k", 1024), ("n", 512)), "f32", lb.act_order(4, group=128))
    for form in lb.plan((4, 1024), t, "cpu").forms[:1]:
        moved = [e for e in topo(form.term) if isinstance(e, Gather | Bucket) and "place" in str(e)]
        assert [set(e.dims) for e in moved if isinstance(e, Bucket)] == [{"m", "place"}]
        assert not [e for e in moved if isinstance(e, Gather) and e.dims.keys() >= {"n", "k"}]
    for name, dims in (("x", {"m", "k"}), ("scale", {"m", "place"})):
        best = cotangent_forms(4, t, "f32", "f32", name, "cpu")[0][0]
        moved = [e for e in topo(best.term) if isinstance(e, Gather | Bucket) and "place" in str(e.index)]
        assert [set(e.dims) for e in moved] == [dims]


def test_gradients_of_scales_are_those_of_the_plain_format(w: lb.QuantArray) -> None:
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, K), (5, N)))
    dx, dw = jax.vjp(lb.matmul, jnp.asarray(x), w)[1](jnp.asarray(dy))
    dense = in_place(w).astype(np.float64)
    bound = dot_tolerance(N + 2, "f32", "f32") * (np.abs(dy) @ np.abs(dense.T))
    assert_within(dx, dy.astype(np.float64) @ dense.T, bound)
    assert dw.fields["place"].dtype == jax.dtypes.float0 and dw.fields["scale"].dtype == jnp.bfloat16


def test_kernels_refuse_it_and_say_why() -> None:
    t = lb.QuantType((("k", 256), ("n", 64)), "bf16", lb.act_order(4, group=128))
    table = str(lb.plan((16, 256), t, "gpu", "bfloat16"))
    assert "mma      refused: its inputs are stored in an order of their own, 'place'" in table


def test_there_are_no_products_in_integers(w: lb.QuantArray) -> None:
    """Its rows are no small tables, of which each could be rounded."""
    message = r"^act_order\(.*\) has no products in int8x2: its inputs are stored in an order of their own"
    with pytest.raises(ValueError, match=message):
        lb.matmul(jnp.ones((2, K)), w, numerics="int8x2")


def test_it_has_no_quantizer() -> None:
    assert not has_default(FORMAT)
    with pytest.raises(ValueError, match=r"^format 'act_order' has no default quantizer"):
        lb.quantize_array(jnp.ones((8, 4)), lb.act_order(2))
