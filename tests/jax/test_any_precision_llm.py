"""Checkpoints of any-precision-llm: a golden of its own packer, its order of bits, and layers that are refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lowbit as lb
from lowbit.io.error import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "any_precision_llm"
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")
OPTIONS = {"seed_precision": 2, "parent_precision": 4, "group_count": 1}


def codes_of(w: lb.QuantArray) -> np.ndarray:
    """Codes [n, k], the first plane the most significant."""
    bits = np.unpackbits(np.asarray(w.fields["planes"])[:, :, 0], axis=-1, count=w.shape[0], bitorder="little")
    return sum(plane << p for p, plane in enumerate(bits[::-1]))


def test_codes_and_tables_are_those_of_the_project() -> None:
    entries = dict(lb.read_checkpoint(GOLDEN))
    stored, codes = (load_file(GOLDEN / f"{file}.safetensors") for file in ("model", "expected"))
    assert list(entries) == [*(f"{layer}.weight" for layer in LAYERS), "model.norm.weight"]
    for layer in LAYERS:
        w = entries[f"{layer}.weight"]
        assert w.type.format == lb.any_precision(2, 4) and w.dtype == np.float16
        assert np.array_equal(codes_of(w), codes[layer])
        for bits in (2, 3, 4):
            table = stored[f"{layer}.lut{bits}"]
            assert np.array_equal(w.fields[f"table{bits}"], table)
            weight = np.take_along_axis(table, (codes[layer] >> 4 - bits).astype(np.int64), 1)
            read = lb.dequantize(lb.QuantArray(w.fields, w.type.at(bits)))
            assert np.array_equal(np.asarray(read).T, weight)


@pytest.mark.parametrize(("column", "word", "bit"), [(0, 0, 31), (7, 0, 24), (8, 1, 31), (256, 0, 23), (1031, 32, 24)])
def test_where_an_input_is(column: int, word: int, bit: int, tmp_path: Path) -> None:
    """Of 1056 inputs: a whole block and 32 more, of which one lane has four runs of 8."""
    words = np.zeros((2, 1, 33), np.uint32)
    words[0, 0, word] = 1 << bit
    tensors = {"qweight": words.view(np.int32), "lut2": np.arange(4, dtype=np.float16)[None]}
    options = {**OPTIONS, "parent_precision": 2}
    ((_, w),) = lb.read_checkpoint(folder(tmp_path, tensors, options))
    assert np.flatnonzero(np.asarray(lb.dequantize(w))[:, 0]).tolist() == [column]
    assert lb.dequantize(w)[column, 0] == 2  # of the first plane


def layer(n: int = 4, words: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 32, (4, n, words)).astype(np.uint32).view(np.int32)
    return {"qweight": codes, **{f"lut{b}": rng.standard_normal((n, 1 << b)).astype(np.float16) for b in (2, 3, 4)}}


def folder(tmp_path: Path, tensors: dict[str, Any], options: dict[str, Any] = OPTIONS) -> Path:
    save_file(
        {f"up.{key}": np.ascontiguousarray(array) for key, array in tensors.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"anyprec": options}))
    return tmp_path


@pytest.mark.parametrize(("lo", "hi"), [(2, 3), (3, 4), (4, 4)])
def test_some_of_the_widths(lo: int, hi: int, tmp_path: Path) -> None:
    """A file with fewer tables has what it is read at; planes beyond its largest width are left out."""
    tensors = layer()
    ((_, whole),) = lb.read_checkpoint(folder(tmp_path, tensors))
    kept = {key: array for key, array in tensors.items() if key == "qweight" or lo <= int(key[3:]) <= hi}
    ((_, w),) = lb.read_checkpoint(folder(tmp_path, kept))
    assert w.type.format == lb.any_precision(lo, hi)
    for bits in range(lo, hi + 1):
        mine, all_of_it = (lb.dequantize(lb.QuantArray(a.fields, a.type.at(bits))) for a in (w, whole))
        assert np.array_equal(mine, all_of_it)


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (
            {"group_count": 2},
            {},
            ": quantization_config in config.json states group_count = 2, and this reader knows 1",
        ),
        (
            {"parent_precision": None},
            {},
            ": quantization_config in config.json states parent_precision = None, and this",
        ),
        (
            {"parent_precision": 3},
            {},
            " has tables of [2, 3, 4] bits, and the config states 2 to 3: keep those of all widths from one to another",
        ),
        (
            {},
            {"lut3": None},
            " has tables of [2, 4] bits, and the config states 2 to 4: keep those of all widths from one",
        ),
        (
            {},
            {"qweight": np.zeros((3, 4, 2), np.int32)},
            ": 'qweight' is int32[3, 4, 2], not int32[4, 4, 2], as 4 outputs and 64 inputs at up to 4 bits has it",
        ),
        (
            {},
            {"lut4": np.zeros((4, 8), np.float16)},
            ": 'lut4' is float16[4, 8], not float16[4, 16], as 4 outputs and 64",
        ),
        ({}, {"lut2": np.full((4, 4), np.nan, np.float16)}, ": 'lut2' has 16 NaN or inf among its 16 numbers: get"),
    ],
)
def test_layers_that_do_not_fit(options: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {key: array for key, array in {**layer(), **changed}.items() if array is not None}
    path = folder(tmp_path, tensors, {**OPTIONS, **options})
    where = f"{path / 'model.safetensors'}: layer 'up'"
    with pytest.raises(CheckpointError, match=f"^{re.escape(where + message)}"):
        list(lb.read_checkpoint(path))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    folder(tmp_path, layer())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(
            CheckpointError, match=r"pytorch_model.bin is a pickle, .* safetensors.torch.save_file\(\{k: v"
        ):
            lb.read_checkpoint(path)
