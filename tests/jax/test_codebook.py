"""Additive codebooks: what the bytes mean, the forms of their products, and residual k-means."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import lowbit as lb
from lowbit import io
from lowbit.ir import Contract, Gather, evaluate, text, topo
from lowbit.quant_type import QuantType
from lowbit.testing.checks import random_rows
from lowbit.testing.tolerance import assert_within, gamma


def type_of(fmt: lb.Format, n: int, k: int) -> QuantType:
    return QuantType((("k", k), ("n", n)), "f32", fmt)


def weights(k: int, n: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((k, n)), np.float32)


# ---------------------------------------------------------------- what the bytes mean


def stored_codes(w: lb.QuantArray) -> np.ndarray:
    """Integer codes [b, n, g, j], of planes bit by bit: vector j is bit j % 8 of byte j // 8."""
    if "codes" in w.fields:
        return np.asarray(w.fields["codes"]).astype(np.int64)
    bits = np.unpackbits(np.asarray(w.fields["planes"]), axis=-1, bitorder="little").astype(np.int64)
    return sum(plane << p for p, plane in enumerate(bits))


@pytest.mark.parametrize(
    "fmt",
    [lb.codebook(2, 8, vec=4, group=32), lb.codebook(1, 4, vec=3), lb.codebook(3, 5, vec=2, group=6)],
    ids=str,
)
def test_decodes_its_bytes(fmt):
    n, k = 31, 71
    w = lb.testing.random_array(type_of(fmt, n, k))
    codes, books = stored_codes(w), np.asarray(w.fields["codebooks"], np.float64)
    size = k if fmt["group"] is None else fmt["group"]
    want = np.zeros((n, k))
    for i in range(k):
        g, t = divmod(i, size)
        j, v = divmod(t, fmt["vec"])
        entries = [books[b, codes[b, :, g, j], v] for b in range(fmt["m"])]
        want[:, i] = np.asarray(w.fields["scale"], np.float64)[:, g] * sum(entries)
    exact = evaluate(w.type.decode, {name: np.asarray(a) for name, a in w.fields.items()})
    got = exact.transpose([list(w.type.decode.dims).index(d) for d in ("n", "k")])
    largest = fmt["m"] * np.abs(books).max() * np.abs(np.asarray(w.fields["scale"])).max()
    assert_within(got, want, np.full((n, k), gamma(fmt["m"] + 1, "f64") * largest))


@pytest.mark.parametrize("bits", range(4, 17))
def test_codes_of_every_width_are_stored_without_waste(bits):
    fmt = lb.codebook(2, bits, vec=8, group=128)
    fields = type_of(fmt, 4096, 4096).fields
    words = fields["codes" if bits in (8, 16) else "planes"]
    stored = np.prod(list(words.dims.values())) * (16 if words.dtype == "u16" else 8)
    assert stored == 2 * bits * 4096 * 4096 // 8
    assert list(fields["codebooks"].dims.values()) == [2, 2**bits, 8]


def test_roles():
    t = type_of(lb.codebook(2, 8, vec=8, group=32), 64, 256)
    assert {f: t.role(f) for f in t.fields} == {"codebooks": "codebook", "codes": "code", "scale": "scale"}


@pytest.mark.parametrize(
    ("fmt", "n", "k"),
    [
        (lb.codebook(2, 5, vec=2, group=16, scale_dtype="float16"), 5, 70),
        pytest.param(lb.codebook(2, 8, vec=8, group=32), 40, 141, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_kit(fmt, n, k):
    passed = lb.testing.check_format(fmt, shapes=[(n, k)]).passed[f"n={n} k={k}"]
    assert {"product decode", "product table", "gradients", "vmap", "export", "quantizer"} <= set(passed)


def of_width(bits: int) -> tuple[lb.Format, int, int]:
    """A format, and a size (n, k) that is as large as its codebook."""
    return lb.codebook(1, bits, vec=2), 1 << (bits + 1) // 2, 1 << (bits + 2) // 2


@pytest.mark.parametrize("bits", range(4, 17))
def test_every_width_against_the_oracle(bits):
    fmt, n, k = of_width(bits)
    w = lb.testing.random_array(type_of(fmt, n, k))
    lb.testing.check_decode(w)
    lb.testing.check_product(random_rows(1, k), w)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 6, 7, *range(9, 17)])
def test_the_kit_at_every_width(bits):
    fmt, n, k = of_width(bits)
    assert "quantizer" in lb.testing.check_format(fmt, shapes=[(n, k)]).passed[f"n={n} k={k}"]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("bits", range(4, 17))
def test_no_stored_code_selects_what_is_not_there(bits):
    """Words and planes hold exactly the codes from 0 to 2**bits - 1, so no file can hold another one."""
    codes = type_of(*of_width(bits)).fields
    (leaf,) = (f for name, f in codes.items() if name in ("codes", "planes"))
    width = {"u8": 8, "u16": 16}[leaf.dtype]
    assert leaf.within is None and (leaf.dims.get("p", width) == bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.astype(np.int32),
            r"'w/codes' of layer 'w' is int32\[1, 8, 1, 64\], but was saved as uint8\[",
        ),
        (lambda a: a[..., 1:], r"'w/codes' of layer 'w' is uint8\[1, 8, 1, 63\], but was saved as uint8\["),
    ],
    ids=["dtype", "shape"],
)
def test_a_file_with_other_codes(tmp_path, change, message):
    path = tmp_path / "w.safetensors"
    io.write(path, {"w": lb.testing.random_array(type_of(lb.codebook(1, 8, vec=2), 8, 128))})
    with safe_open(path, framework="np") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    save_file({**tensors, "w/codes": np.ascontiguousarray(change(tensors["w/codes"]))}, path, metadata)
    with pytest.raises(lb.CheckpointError, match=message):
        io.read(path)


# ---------------------------------------------------------------- forms


FORMS = {
    "m1v4": lb.codebook(1, 8, vec=4, group=128),
    "m2v8": lb.codebook(2, 8, vec=8, group=128),
    "planes": lb.codebook(2, 6, vec=8, group=128),
    "ragged": lb.codebook(1, 8, vec=8),
}


@pytest.mark.parametrize("name", FORMS)
def test_ends_as_a_psumbook(name, golden):
    """Partial sums of x with every entry of every codebook, looked up by the code itself."""
    fmt, k = FORMS[name], 4099 if name == "ragged" else 4096
    forms = {f.name: f.term for f in lb.plan((1, k), type_of(fmt, 4096, k), "cpu").forms}
    term = forms["join" if name == "planes" else "table"]
    (look_up,) = [e for e in topo(term) if isinstance(e, Gather)]
    assert isinstance(look_up.table, Contract) and look_up.table.over == {"v"}
    groups = 1 if name == "ragged" else 32
    vectors = -(-k // groups // fmt["vec"])
    sizes = {"m": 1, "g": groups, "j": vectors, "b": fmt["m"], look_up.dim: 1 << fmt["bits"]}
    assert look_up.table.dims == sizes
    golden(text(term, short=True))


@pytest.mark.parametrize(
    ("fmt", "rows", "name"),
    [
        (FORMS["m1v4"], 1, "table"),
        (FORMS["m2v8"], 1, "table"),
        (FORMS["m1v4"], 256, "decode"),  # partial sums are made and looked up for each row of x
        (lb.codebook(1, 16, vec=8), 1, "decode"),  # the partial sums are 128 MiB
    ],
)
def test_the_form_that_is_cheaper_runs(fmt, rows, name):
    assert lb.plan((rows, 4096), type_of(fmt, 4096, 4096), "cpu").forms[0].name == name


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 8, 4), "m must be a positive int, the number of codebooks, not 0"),
        ((1, 3, 4), "bits must be an int from 4 to 16, not 3"),
        ((1, 17, 4), "bits must be an int from 4 to 16, not 17"),
        ((1, 8.0, 4), "bits must be an int from 4 to 16, not 8.0"),
        ((1, 8, 1), "vec must be an int from 2 to 16, not 1"),
        ((1, 8, 17), "vec must be an int from 2 to 16, not 17"),
        ((1, 8, 4, 0), "group must be a positive int, or None for one group a row, not 0"),
        ((1, 8, 4, 30), "a group of 30 inputs is no number of vectors of 4: make group a multiple of vec"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.codebook(*options)


def test_codebooks_larger_than_the_weight():
    message = (
        "2 codebooks of 256 vectors of 8 hold 4096 numbers, more than the weight's 30 x 64 = 1920: use fewer bits, or "
        "leave the layer dense"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(weights(64, 30), lb.codebook(2, 8, vec=8))
    with pytest.raises(ValueError, match=f"^layer 'up' cannot be quantized: {re.escape(message)}$"):
        lb.quantize(nnx.Dict(up=nnx.Linear(64, 30, rngs=nnx.Rngs(0))), lb.codebook(2, 8, vec=8))


@pytest.mark.parametrize("quantizer", [lb.residual_kmeans(), lb.additive_codebooks()], ids=repr)
def test_weights_that_are_not_finite(quantizer):
    with pytest.raises(ValueError, match=r"^the weight has 1 NaN or inf among its 3840 entries: repair it, or "):
        lb.quantize_array(W.at[3, 4].set(jnp.nan), lb.codebook(1, 4, vec=4), quantizer)


# ---------------------------------------------------------------- residual k-means


def error(w: jax.Array, q: lb.QuantArray, importance: np.ndarray | float = 1.0) -> float:
    return float((importance * np.square(np.asarray(lb.dequantize(q), np.float64) - np.asarray(w))).mean())


W = weights(96, 40)


@cache
def quantized(m: int, bits: int) -> lb.QuantArray:
    return lb.quantize_array(W, lb.codebook(m, bits, vec=4, group=32))


@pytest.mark.slow
def test_error_falls_with_codebooks_and_bits():
    assert error(W, quantized(2, 4)) < error(W, quantized(1, 4)) > error(W, quantized(1, 6))


@pytest.mark.slow
def test_beats_the_nearest_of_random_codebooks():
    """Entries drawn from the weights themselves: what no round of Lloyd's algorithm has moved."""
    drawn = lb.quantize_array(W, lb.codebook(1, 6, vec=4, group=32), lb.residual_kmeans(rounds=0))
    assert error(W, quantized(1, 6)) < 0.9 * error(W, drawn)


@pytest.mark.slow
def test_is_deterministic():
    again = lb.quantize_array(W, quantized(2, 4).type.format)
    assert all(np.array_equal(again.fields[name], a) for name, a in quantized(2, 4).fields.items())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(96,), (96, 40)])
def test_importance_weighs_errors(shape):
    f = np.exp(2 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    weighed = f if len(shape) == 2 else f[:, None]
    given = lb.quantize_array(W, quantized(1, 6).type.format, importance=jnp.asarray(f))
    assert error(W, given, weighed) < error(W, quantized(1, 6), weighed)


def test_groups_of_zeros_decode_to_zeros():
    w = W.at[:32].set(0.0).at[:, 3].set(0.0)
    decoded = np.asarray(lb.dequantize(lb.quantize_array(w, lb.codebook(1, 6, vec=4, group=32))))
    assert not decoded[:32].any() and not decoded[:, 3].any() and np.isfinite(decoded).all()


@pytest.mark.slow
def test_padding_weighs_nothing():
    """All weights equal, in vectors of 16 of which the last holds one weight and 15 zeros that are none."""
    w = jnp.full((17, 64), 2.0)
    assert error(w, lb.quantize_array(w, lb.codebook(1, 4, vec=16))) == 0


def test_other_formats_are_refused():
    message = "ResidualKMeans(rounds=25) makes codebook, not bcq(bits=2)"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        lb.quantize_array(W, lb.bcq(2), lb.residual_kmeans())


@pytest.mark.parametrize("rounds", [-1, 1.5])
def test_rounds_that_cannot_be(rounds: float):
    with pytest.raises(ValueError, match=f"^rounds must be an int, 0 or more, not {rounds}$"):
        lb.residual_kmeans(rounds)
