"""AQLM checkpoints: goldens of its own packer, all of its codes, and layers that are refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lowbit as lb
from lowbit.io import aqlm
from lowbit.io.error import CheckpointError
from lowbit.ir import evaluate
from lowbit.quant_type import kernel_layout
from lowbit.testing.tolerance import assert_within, gamma, unit

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "aqlm"
LAYER = "model.layers.0.mlp.up_proj"
OPTIONS = {"nbits_per_codebook": 8, "num_codebooks": 2, "out_group_size": 1, "in_group_size": 8}


def codes_of(w: lb.QuantArray) -> np.ndarray:
    """Codes [n, j, b] as they are stored: words, or planes of bits."""
    if "codes" in w.fields:
        return np.asarray(w.fields["codes"])[:, :, 0].transpose(1, 2, 0)
    planes = np.asarray(w.fields["planes"])[:, :, :, 0]
    count = w.shape[0] // w.type.format["vec"]
    bits = np.unpackbits(planes, axis=-1, count=count, bitorder="little").astype(np.int64)
    return sum(plane << p for p, plane in enumerate(bits)).transpose(1, 2, 0)


@pytest.mark.parametrize("name", ["2x8", "1x8_g8", "1x10", "3x5"])
def test_codes_and_weights_are_those_of_aqlm(name: str) -> None:
    entries = dict(lb.read_checkpoint(GOLDEN / name))
    stored, want = (load_file(GOLDEN / name / f"{file}.safetensors") for file in ("model", "expected"))
    assert list(entries) == [f"{LAYER}.weight", "model.norm.weight"]
    w = entries[f"{LAYER}.weight"]
    m, bits, vec = (w.type.format[option] for option in ("m", "bits", "vec"))
    assert name.startswith(f"{m}x{bits}") and w.shape == (64, 32) and w.dtype == np.float16
    assert np.array_equal(codes_of(w), want["codes"])
    assert np.array_equal(w.fields["codebooks"], stored[f"{LAYER}.codebooks"].reshape(m, 1 << bits, vec))
    assert np.array_equal(np.asarray(w.fields["scale"]).ravel(), stored[f"{LAYER}.scales"].ravel())
    # m products, added up in float32: theirs and the oracle's, which is exact.
    exact = evaluate(w.type.decode, {f: np.asarray(a) for f, a in w.fields.items()})
    assert_within(want["weight"], exact, gamma(m + 1, "f32") * _size(w))
    assert_within(
        lb.dequantize(w), exact.T, unit("f16") * np.abs(exact.T) + (gamma(m + 1, "f32") * _size(w)).T + 2.0**-25
    )


def _size(w: lb.QuantArray) -> np.ndarray:
    """Sums of magnitudes [n, k]."""
    positive = {f: np.abs(np.asarray(a)) if a.dtype == jnp.float16 else np.asarray(a) for f, a in w.fields.items()}
    return evaluate(w.type.decode, positive)


def layer(n: int, count: int, options: dict[str, int]) -> dict[str, np.ndarray]:
    """Random tensors, codes in two's complement, the smallest and the largest among them."""
    bits, m, vec = (options[o] for o in ("nbits_per_codebook", "num_codebooks", "in_group_size"))
    rng, half = np.random.default_rng(0), 1 << bits - 1
    codes = rng.integers(-half, half, (n, count, m)).astype(np.int8 if bits <= 8 else np.int16)
    codes[0, :4, 0] = -half, -1, 0, half - 1
    books = rng.standard_normal((m, 1 << bits, 1, vec)).astype(np.float16)
    return {"codes": codes, "codebooks": books, "scales": rng.uniform(0.5, 2, (n, 1, 1, 1)).astype(np.float16)}


def test_codes_of_sixteen_bits_decode_multiply_and_train() -> None:
    """The published 1x16: a codebook of 65,536 vectors, by XLA; its oracle is numpy's own look-up."""
    options = {**OPTIONS, "nbits_per_codebook": 16, "num_codebooks": 1}
    tensors = layer(512, 128, options)
    w = aqlm.read(tensors, options, "here")
    assert w.type.format == lb.codebook(1, 16, 8, scale_dtype="float16") and w.fields["codes"].dtype == np.uint16
    code = tensors["codes"][:, :, 0].astype(np.int64) % 65536
    vectors = tensors["codebooks"][0, :, 0].astype(np.float64)[code]
    dense = (vectors * tensors["scales"].astype(np.float64)[:, :, 0]).reshape(512, 1024)
    assert_within(lb.dequantize(w), dense.T, unit("f16") * np.abs(dense.T) + 2.0**-25)
    x = np.random.default_rng(1).standard_normal((2, 1024)).astype(np.float32)
    size = np.abs(x) @ np.abs(dense).T
    assert_within(lb.matmul(x, w), x @ dense.T, gamma(1024 + 2, "f32") * size)

    def loss(books: jax.Array) -> jax.Array:
        return lb.matmul(x, lb.QuantArray({**w.fields, "codebooks": books}, w.type)).sum()

    got = np.asarray(jax.grad(loss)(w.fields["codebooks"]))[0].astype(np.float64)
    want, bound, sums = np.zeros_like(got), np.zeros_like(got), x.sum(0, dtype=np.float64).reshape(128, 8)
    each = tensors["scales"].astype(np.float64)[:, :, 0] * sums
    np.add.at(want, code, each)
    np.add.at(bound, code, tensors["scales"].astype(np.float64)[:, :, 0] * np.abs(x).sum(0).reshape(128, 8))
    assert_within(got, want, (gamma(2 * 512 * 128, "f32") + unit("f16")) * bound + 2.0**-25)


def test_kernels_refuse_tables_that_shared_memory_cannot_hold() -> None:
    t = lb.QuantType((("k", 1024), ("n", 512)), "f16", lb.codebook(1, 16, 8, scale_dtype="float16"))
    with pytest.raises(ValueError, match=r"^its tables take 1048576 bytes, and shared memory has 98304 for them$"):
        kernel_layout(t)


def folder(tmp_path: Path, tensors: dict[str, Any], options: dict[str, Any]) -> Path:
    save_file({f"up.{key}": array for key, array in tensors.items()}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "aqlm", **options}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


COMPARE = "compare quantization_config in config.json, or get the file again"


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (
            {"out_group_size": 4},
            {},
            "quantization_config in config.json states out_group_size = 4, and lowbit's codes stand for inputs of one",
        ),
        (
            {"nbits_per_codebook": 17},
            {},
            "quantization_config in config.json states nbits_per_codebook = 17, and this reader knows 1 to 16: convert",
        ),
        (
            {},
            {"scales": np.full((64, 1, 1, 1), np.inf, np.float16)},
            "'scales' has 64 NaN or inf among its 64 numbers: get the file again",
        ),
        (
            {"num_codebooks": 3},
            {},
            f"'codes' is int8[64, 8, 2], not int8[64, 8, 3], as 3 codebooks of 8 bits for 8 inputs has it: {COMPARE}",
        ),
        (
            {},
            {"codebooks": np.ones((2, 256, 1, 4), np.float16)},
            "'codebooks' is float16[2, 256, 1, 4], not float16 or bfloat16 or float32[2, 256, 1, 8], as 2 codebooks",
        ),
        (
            {},
            {"scales": np.ones((64, 1), np.float16)},
            f"'scales' is float16[64, 1], not float16[64, 1, 1, 1], as a layer of 64 outputs has it: {COMPARE}",
        ),
        (
            {},
            {"codes": np.ones((64, 8, 2), np.int16)},
            "'codes' is int16[64, 8, 2], not int8[64, 8, 2], as 2 codebooks",
        ),
        (
            {"nbits_per_codebook": 6},
            {"codes": np.full((64, 8, 2), 64, np.int8), "codebooks": np.ones((2, 64, 1, 8), np.float16)},
            "'codes' holds 64..64, and a codebook of 6 bits has the entries -32..63, negative ones counted from its",
        ),
        (
            {"nbits_per_codebook": 3},
            {"codes": np.ones((64, 8, 2), np.int8), "codebooks": np.ones((2, 8, 1, 8), np.float16)},
            "is no AQLM layer that can be stored (bits must be an int from 4 to 16, not 3)",
        ),
        (
            {},
            {"codes": np.ones((8, 8, 2), np.int8), "scales": np.ones((8, 1, 1, 1), np.float16)},
            "is no AQLM layer that can be stored (2 codebooks of 256 vectors of 8 hold 4096 numbers, more than the",
        ),
    ],
)
def test_layers_that_do_not_fit(options: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = folder(tmp_path, {**layer(64, 8, OPTIONS), **changed}, {**OPTIONS, **options})
    where = f"{path / 'model.safetensors'}: layer 'up'"
    with pytest.raises(CheckpointError, match=f"^{re.escape(where)}:? {re.escape(message)}"):
        list(lb.read_checkpoint(path))


@pytest.mark.slow
def test_the_packages_decoder_gives_the_same_weights() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    utils = pytest.importorskip("aqlm.utils", reason="the aqlm package is not installed, or wants transformers")
    tensors = layer(64, 8, OPTIONS)
    codes, books, scales = (torch.from_numpy(tensors[key]) for key in ("codes", "codebooks", "scales"))
    theirs = utils._dequantize_weight(utils.unpack_int_data(codes, 8), books.float(), scales.float()).numpy()
    w = aqlm.read(tensors, OPTIONS, "here")
    exact = evaluate(w.type.decode, {f: np.asarray(a) for f, a in w.fields.items()})
    assert_within(theirs, exact, gamma(3, "f32") * _size(w))
