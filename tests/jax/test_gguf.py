"""GGUF files against ggml's own quantizers and decoders: a golden file, the `gguf` package, and what is refused."""

import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import lowbit as lb
from lowbit.array import laid_out
from lowbit.io import gguf, gguf_metadata
from lowbit.io.error import CheckpointError
from lowbit.io.gguf_blocks import BLOCKS
from lowbit.io.gguf_header import ARRAY, STRING, TYPES, VALUES
from lowbit.testing import random_array

package = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'lowbit[gguf]'")
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "gguf"
NAMED = {"general.architecture": "llama"}


def array(kind: str, k: int = 512, n: int = 3, stack: tuple[int, ...] = ()) -> lb.QuantArray:
    """Random fields, every bit of which is drawn, as a block has them."""
    rng, block = np.random.default_rng(0), BLOCKS[kind]
    rows = rng.integers(0, 256, (*stack, n, k // block.weights, block.size)).astype(np.uint8)
    for byte in block.halves.values():
        rows[..., byte + 1] &= 0xBF  # not the exponent of NaN and inf
    made = [block.unpack(rows[at].reshape(n, -1)) for at in np.ndindex(stack)]
    fields = {f: np.stack([one[f] for one in made]).reshape(*stack, *a.shape) for f, a in made[0].items()}
    return lb.QuantArray.of(fields, lb.QuantType((("k", k), ("n", n)), "f32", block.format))


def equal(a: lb.QuantArray, b: lb.QuantArray) -> bool:
    return a.type == b.type and all(np.array_equal(a.fields[f], b.fields[f]) for f in a.fields)


def written(tmp_path: Path, entries: dict[str, Any], metadata: dict[str, Any] = NAMED) -> Path:
    path = tmp_path / "w.gguf"
    lb.export_gguf(entries, path, metadata)
    return path


# ---------------------------------------------------------------- against ggml


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_has_each_bit_once(kind: str) -> None:
    block = BLOCKS[kind]
    halves = [8 * byte + np.arange(16) for byte in block.halves.values()]
    positions = np.concatenate([a.ravel() for a in (block.planes, *block.integers.values(), *halves)])
    assert np.array_equal(np.sort(positions), np.arange(8 * block.size))
    assert (block.weights, block.size) == package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(lb.read_checkpoint(GOLDEN / "model.gguf"))


def codes_of(w: lb.QuantArray) -> np.ndarray:
    """Codes [n, k] from the planes, all rows being whole groups."""
    bits = np.unpackbits(np.asarray(w.fields["planes"]), axis=-1, bitorder="little").reshape(
        w.type.format["bits"], w.shape[1], -1
    )
    return sum(plane.astype(np.int16) << p for p, plane in enumerate(bits))


@pytest.mark.parametrize("kind", BLOCKS)
def test_codes_and_scales_are_those_of_ggml(kind: str, golden: dict[str, Any]) -> None:
    name = f"blk.0.{kind}.weight"
    want = {
        key.partition("/")[2]: a
        for key, a in load_file(GOLDEN / "expected.safetensors").items()
        if key.startswith(name)
    }
    w = golden[name]
    fields = {f: np.asarray(a) for f, a in w.fields.items()}
    centred = "min" not in fields
    assert np.array_equal(codes_of(w) - (centred << w.type.format["bits"] - 1), want["codes"])
    assert np.array_equal(fields["scale"], want["scale"])
    if not centred:
        assert np.array_equal(fields["min"], -want["min"] if kind in ("Q4_1", "Q5_1") else want["min"])
    if "group_scale" in fields:
        middle = 1 << w.type.format["scale_bits"] - 1 if centred else 0
        assert np.array_equal(fields["group_scale"].astype(np.int16) - middle, want["group_scale"])
        assert centred or np.array_equal(fields["group_min"], want["group_min"])
    if "zero" in fields:
        assert (fields["zero"] == 1 << w.type.format["bits"] - 1).all()
    assert np.array_equal(np.asarray(lb.dequantize(w)).T, want["weight"])  # products of at most 24 bits, one rounding


def test_dense_tensors_and_metadata(golden: dict[str, Any]) -> None:
    assert list(golden) == [f"blk.0.{kind}.weight" for kind in BLOCKS] + ["blk.0.attn_norm.weight", "output.weight"]
    assert np.array_equal(golden["blk.0.attn_norm.weight"], np.arange(8, dtype=np.float32))
    assert golden["output.weight"].dtype == np.float16 and golden["output.weight"].shape == (2, 4)
    said = gguf_metadata(GOLDEN / "model.gguf")
    assert said["general.architecture"] == "llama" and said["tokenizer.ggml.tokens"] == ["<unk>", "é"]
    assert said["llama.block_count"] == 1 and said["llama.block_count"].dtype == np.uint32
    assert said["tokenizer.ggml.token_type"].dtype == np.int32 and said["tokenizer.ggml.add_bos_token"] is np.True_


def test_a_file_is_written_as_ggml_had_it(golden: dict[str, Any], tmp_path: Path) -> None:
    said = gguf_metadata(GOLDEN / "model.gguf")
    again = written(tmp_path, golden, said)
    a, b = package.GGUFReader(GOLDEN / "model.gguf"), package.GGUFReader(again)
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert (x.name, x.tensor_type, list(x.shape)) == (y.name, y.tensor_type, list(y.shape))
        assert np.array_equal(x.data, y.data)
    back = gguf_metadata(again)
    assert back.pop("general.quantization_version") == 2
    assert list(back) == list(said)
    for key, value in said.items():
        assert type(back[key]) is type(value) and np.array_equal(back[key], value)


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_bits_are_read_as_the_package_reads_them(kind: str, tmp_path: Path) -> None:
    w = array(kind)
    path = written(tmp_path, {"w": w})
    (tensor,) = package.GGUFReader(path).tensors
    assert tensor.tensor_type.name == kind and list(tensor.shape) == [512, 3]
    theirs = package.quants.dequantize(tensor.data, tensor.tensor_type)
    ((_, back),) = gguf.tensors(path)
    assert equal(back, w) and np.array_equal(np.asarray(lb.dequantize(back)).T, theirs)


# ---------------------------------------------------------------- arrays of our own


@pytest.mark.parametrize(
    "fmt", [lb.k_quant(4), pytest.param(lb.k_quant(5, 32, 32, 0), marks=pytest.mark.slow)], ids=str
)
def test_what_is_quantized_here_comes_back(fmt: lb.Format, tmp_path: Path) -> None:
    w = lb.quantize_array(jax.random.normal(jax.random.key(0), (256, 4)), fmt)
    ((_, back),) = gguf.tensors(written(tmp_path, {"w": w}))
    assert equal(back, w)


def test_stacks_embeddings_and_dense_arrays(tmp_path: Path) -> None:
    experts, rows = array("Q4_K", 256, 3, (2,)), array("Q8_0", 64, 5)
    embedding = lb.QuantArray(rows.fields, lb.QuantType((("n", 5), ("k", 64)), "f16", rows.type.format))
    dense = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": np.arange(4, dtype=np.int32), "c": np.ones((1, 2, 3, 4))}
    back = dict(gguf.tensors(written(tmp_path, {"experts": experts, "embedding": embedding, **dense})))
    assert equal(back["experts"], experts) and back["experts"].stack == (2,)
    assert equal(back["embedding"], rows)
    for name, value in dense.items():
        assert back[name].dtype == value.dtype and np.array_equal(back[name], value)
    assert back["a"].dtype == ml_dtypes.bfloat16


def test_what_kernels_read_is_stored_as_it_was(tmp_path: Path) -> None:
    w = array("Q4_0", 256, 64)
    assert equal(dict(lb.read_checkpoint(written(tmp_path, {"w": laid_out(w)})))["w"], w)


def test_rows_are_taken_apart_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = array("Q5_K", 256, 5)
    whole = written(tmp_path, {"w": w}).read_bytes()
    monkeypatch.setattr(gguf, "SCRATCH", 2 * BLOCKS["Q5_K"].size)  # two rows
    path = written(tmp_path, {"w": w})
    assert path.read_bytes() == whole
    assert equal(dict(gguf.tensors(path))["w"], w)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    given = {
        **NAMED,
        "general.alignment": 64,
        "a.size": 7,
        "a.rate": 0.5,
        "a.flag": False,
        "a.flags": [True, False],
        "a.nothing": [],
        "a.scores": np.array([1.5, 2], np.float32),
        **{f"a.{d}": np.dtype(d).type(3) for d in ("int8", "uint8", "int16", "uint16", "int64", "uint64", "float64")},
    }
    path = written(tmp_path, {"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)}, given)
    back = gguf_metadata(path)
    assert all(t.data_offset % 64 == 0 for t in package.GGUFReader(path).tensors)
    assert back["a.size"].dtype == np.uint32 and back["a.rate"].dtype == np.float32
    assert "a.nothing" not in back  # GGUF has no empty lists
    for key, value in given.items():
        assert key == "a.nothing" or np.array_equal(back[key], value)


def test_a_gguf_file_is_converted(tmp_path: Path, golden: dict[str, Any]) -> None:
    lb.convert(GOLDEN / "model.gguf", tmp_path / "w.safetensors")
    back = lb.load(tmp_path / "w.safetensors")
    assert list(back) == list(golden) and equal(back["blk.0.Q4_K.weight"], golden["blk.0.Q4_K.weight"])


# ---------------------------------------------------------------- refusals


def refused(entries: dict[str, Any], path: Path, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        lb.export_gguf(entries, path / "w.gguf", NAMED)
    assert not list(path.iterdir())


def test_what_gguf_cannot_hold(tmp_path: Path) -> None:
    def drawn(fmt: lb.Format, k: int) -> lb.QuantArray:
        return random_array(lb.QuantType((("k", k), ("n", 2)), "f32", fmt))

    message = (
        "'w' is uniform(bits=4, group=64), for which GGUF has no type: quantize it to one of uniform(bits=4, group=32"
    )
    refused({"w": drawn(lb.uniform(4, group=64), 64)}, tmp_path, message)
    message = "'w' has 250 inputs, and Q4_K has blocks of 256: quantize it to a format with groups that divide them, or"
    refused({"w": drawn(lb.k_quant(4), 250)}, tmp_path, message)
    uneven = array("Q4_0", 64, 2)
    zero = uneven.fields["zero"].at[1, 1].set(7)
    message = (
        "'w' has 1 of 4 zero points that are not 8, and Q4_0 has that one for all: quantize it to "
        "k_quant(bits=4, scale_bits=0, super_group=32) (Q4_1) or k_quant(bits=4) (Q4_K)"
    )
    refused({"w": lb.QuantArray({**uneven.fields, "zero": zero}, uneven.type)}, tmp_path, message)
    whole = array("Q4_0", 32, 2)
    parts = lb.QuantType(whole.type.dims, "f32", whole.type.format, splits=(("scale", "n", 1),))
    message = "; GGUF has no adapters, parts that train or products in int8: fold or drop them"
    refused({"w": lb.QuantArray(whole.fields, parts)}, tmp_path, f"'w' is {whole.type.format}{message}")
    in_int8 = lb.QuantArray(whole.fields, replace(whole.type, numerics="int8"))
    refused({"w": in_int8}, tmp_path, f"'w' is {whole.type.format} in int8{message}")
    endless = {**whole.fields, "scale": whole.fields["scale"].at[0, 0].set(np.inf)}
    refused({"w": lb.QuantArray(endless, whole.type)}, tmp_path, "'w' has NaN or inf in 'scale': quantize the weight")
    deep = lb.QuantArray({field: a[None, None, None] for field, a in whole.fields.items()}, whole.type)
    refused({"w": deep}, tmp_path, "'w' is a stack [1, 1, 1] of matrices, and GGUF has 4 dims at most: export slices")
    refused({"w" * 64: whole}, tmp_path, f"'{'w' * 64}' has 64 bytes, and ggml reads names of up to 63: shorten it")
    refused({1: whole}, tmp_path, "an entry's name must be a string, not 1", TypeError)
    message = "'w' is uint8[2]; GGUF holds 1 to 4 dims of float32, float16, "
    refused({"w": np.zeros(2, np.uint8)}, tmp_path, message, TypeError)
    refused({"w": np.float32(2) * np.ones(())}, tmp_path, "'w' is a float64; only numpy or jax", TypeError)
    refused({"w": np.ones((), np.float32)}, tmp_path, "'w' is float32[]; GGUF holds 1 to 4 dims", TypeError)


def test_metadata_that_is_refused(tmp_path: Path) -> None:
    w = {"w": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"^a GGUF file names its model: give metadata=\{\"general.architecture\""):
        lb.export_gguf(w, tmp_path / "w.gguf", {})
    for value in (0, 24, "x", -1):
        with pytest.raises(ValueError, match=r"^metadata 'general\.alignment' is .*: give a power of two"):
            lb.export_gguf(w, tmp_path / "w.gguf", {**NAMED, "general.alignment": value})
    for value, message in [
        (-1, "metadata 'a' is -1: give strings, numpy scalars, bools, ints below 2**32 or floats"),
        (None, "metadata 'a' is None: give strings"),
        ([1, "b"], "metadata 'a' is a list of STRING and UINT32: give one type"),
    ]:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            lb.export_gguf(w, tmp_path / "w.gguf", {**NAMED, "a": value})
    assert not list(tmp_path.iterdir())


def test_types_that_no_format_has(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", np.zeros((2, 18), np.uint8), raw_dtype=package.GGMLQuantizationType.IQ4_NL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = (
        f"{tmp_path / 'w.gguf'}: tensor 'w' is IQ4_NL, and lowbit reads F32, F16, BF16, F64, I8, I16, I32, I64, Q4_0,"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        lb.read_checkpoint(tmp_path / "w.gguf")


DATA = (GOLDEN / "model.gguf").read_bytes()
HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
ALIGNMENT = HEADER + struct.pack("<Q17sIf", 17, b"general.alignment", 6, float("inf"))
COUNTS = HEADER + struct.pack("<Q11sIIQHH", 11, b"split.count", 9, 2, 2, 1, 1)
NESTED = struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 10_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: get the file again"),
        (b"no", "is no whole GGUF file (it ends within its header): get the file again"),
        (b"GGML" + DATA[4:], "is no whole GGUF file (it begins with b'GGML'): get the file again"),
        (DATA[:4] + b"\x01" + DATA[5:], "is no whole GGUF file (its version is 1, and 2 and 3 are read; "),
        (DATA[:100], "is no whole GGUF file (it ends within its header)"),
        (DATA[:8] + b"\xff" * 8 + DATA[16:], "is no whole GGUF file ("),
        (DATA[:32] + b"\xff" + DATA[33:], "is no whole GGUF file ('utf-8' codec can't decode byte 0xff in position 0"),
        (
            DATA.replace(b"\x09\x00\x00\x00\x08", b"\x09\x00\x00\x00\x63"),
            "is no whole GGUF file (it has a value of type 99)",
        ),
        (
            DATA.replace(b"Q4_1.weight", b"Q4_0.weight"),
            "is no whole GGUF file (two of its tensors or keys have one name)",
        ),
        (ALIGNMENT, "is no whole GGUF file (its general.alignment is "),
        (COUNTS, "is no whole GGUF file (its split.count is array([1, 1], dtype=uint16)): get the file again"),
        (NESTED, "is no whole GGUF file (maximum recursion depth exceeded"),
        (DATA[:-20], "is truncated: it has 7788 bytes, and tensor 'output.weight' ends after 7792: get the file again"),
    ],
)
def test_files_that_are_damaged(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path} {message}')}"):
        lb.read_checkpoint(path)


def test_one_of_several_files(tmp_path: Path) -> None:
    path = written(tmp_path, {"w": np.ones(2, np.float32)}, {**NAMED, "split.count": np.uint16(3)})
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))} is one of 3 files of a model: join them with"):
        lb.read_checkpoint(path)
    assert gguf_metadata(path)["split.count"] == 3


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lb.read_checkpoint(tmp_path / "none.gguf")


def test_scales_that_are_inf(tmp_path: Path) -> None:
    begin, path = package.GGUFReader(GOLDEN / "model.gguf").tensors[0].data_offset, tmp_path / "w.gguf"
    path.write_bytes(DATA[:begin] + b"\x00\x7c" + DATA[begin + 2 :])
    message = f"{path}: tensor 'blk.0.Q4_0.weight' has 1 NaN or inf among the 32 of 'scale': get the file again"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        next(gguf.tensors(path))


def test_types_have_the_numbers_of_ggml() -> None:
    theirs = {kind.value: kind.name for kind in package.GGMLQuantizationType}
    for number, name in enumerate(TYPES):
        assert theirs.get(number, name) == name
    kinds = {kind.value: kind.name for kind in package.GGUFValueType}
    assert [kinds[i] for i, name in enumerate(VALUES) if name] == [name for name in VALUES if name]
    assert (kinds[STRING], kinds[ARRAY]) == ("STRING", "ARRAY")


def test_a_quantized_vector(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", np.zeros(18, np.uint8), raw_dtype=package.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"tensor 'w' is Q4_0\[32\]: what is quantized has rows of whole blocks of"
    ):
        gguf.tensors(tmp_path / "w.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert len(list(lb.read_checkpoint(GOLDEN / "model.gguf"))) == len(golden)  # it is not needed to read
    with pytest.raises(ImportError, match=r"^writing GGUF needs the gguf package: pip install 'lowbit\[gguf\]'$"):
        lb.export_gguf({}, tmp_path / "w.gguf", NAMED)


def test_files_of_the_other_byte_order(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "w.gguf", "llama", endianess=package.GGUFEndian.BIG)
    writer.add_tensor("w", np.zeros(18, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"its version is 50331648, and .*; 50331648 is the other order of bytes"):
        gguf.tensors(tmp_path / "w.gguf")
