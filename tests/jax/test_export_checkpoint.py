"""Export to compressed-tensors: the same arrays come back, the library itself reads them, and what it lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.io.mapped import Mapped

SIZES = (("k", 64), ("n", 24))
FORMATS = {
    "asymmetric": lb.uniform(4, group=32, scale_dtype="bfloat16"),
    "rows": lb.uniform(8, scale_dtype="float16"),
    "symmetric": lb.uniform(4, group=16),
    "float_rows": lb.scaled_fp8(scale_dtype="bfloat16"),
    "float_whole": lb.scaled_fp8(rows=None),
    "float_groups": lb.scaled_fp8(group=32),
    "float_blocks": lb.scaled_fp8(16, 48),
}


def arrays() -> dict[str, Any]:
    """An array of each format, and dense ones; their dtype is that of the scales, as a checkpoint has it."""
    out: dict[str, Any] = {"norm.weight": jnp.ones(8, jnp.bfloat16), "up.bias": np.arange(3.0, dtype=np.float32)}
    for i, (name, fmt) in enumerate(FORMATS.items()):
        t = lb.QuantType(SIZES, "f32", fmt)
        w = lb.testing.random_array(replace(t, dtype=t.fields["scale"].dtype), i)
        if fmt.name == "uniform":
            zero = np.random.default_rng(i).integers(0, 1 << fmt["bits"], w.fields["zero"].shape).astype(np.uint8)
            w = lb.QuantArray({**w.fields, "zero": jnp.full_like(zero, 8) if name == "symmetric" else zero}, w.type)
        out[f"layers.{name}.weight"] = w
    return out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, lb.QuantArray):
        return a.type == b.type and all(np.array_equal(a.fields[f], b.fields[f]) for f in a.type.fields)
    return a.dtype == b.dtype and np.array_equal(a, b)


def test_what_is_exported_comes_back(tmp_path: Path) -> None:
    entries = arrays()
    lb.export_checkpoint(entries, tmp_path, {"model_type": "llama"})
    back = dict(lb.read_checkpoint(tmp_path))
    assert back.keys() == entries.keys() and all(same(entries[name], back[name]) for name in entries)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["format"] == "mixed-precision"
    names = set(Mapped(tmp_path / "model.safetensors").names)
    assert "layers.asymmetric.weight_zero_point" in names and "layers.symmetric.weight_zero_point" not in names
    by_name = {g["targets"][0]: g["weights"] for g in config["quantization_config"]["config_groups"].values()}
    assert by_name["layers.float_blocks"]["block_structure"] == [16, 48]
    assert by_name["layers.symmetric"]["symmetric"] and not by_name["layers.rows"]["symmetric"]


def test_layers_that_are_alike_are_one_group(tmp_path: Path) -> None:
    w = arrays()["layers.rows.weight"]
    lb.export_checkpoint({"a.weight": w, "b.weight": w}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "b"]]
    assert config["format"] == "pack-quantized"


def of(fmt: lb.Format, dims: Any = SIZES, **fields: Any) -> lb.QuantArray:
    w = lb.testing.random_array(lb.QuantType(dims, "f32", fmt))
    return lb.QuantArray({**w.fields, **fields}, w.type)


def stack() -> lb.QuantArray:
    return lb.quantize_array(jnp.ones((2, 32, 4)), lb.uniform(4))


@pytest.mark.parametrize(
    ("name", "w", "error", "message"),
    [
        ("a.weight", lambda: of(lb.bcq(3)), ValueError, r"^'a\.weight' \(bcq\(bits=3\)\) cannot be exported .*no such"),
        ("a.weight", lambda: of(lb.uniform(3)), ValueError, r"integers have 4 or 8 bits there"),
        ("a.weight", lambda: of(lb.act_order(4)), ValueError, r"has no groups of inputs in another order"),
        ("a.weight", lambda: of(lb.uniform(4, group=48)), ValueError, r"groups of 48 do not divide its 64 inputs"),
        ("a.weight", lambda: of(lb.uniform(4), zero=jnp.full((24, 1), 16, "u1")), ValueError, r"a zero point is no"),
        ("a.weight", lambda: of(lb.uniform(4), scale=jnp.full((24, 1), jnp.nan)), ValueError, r"a scale is NaN or"),
        ("a.weight", stack, ValueError, r"it is a stack \[2\]; export each slice"),
        ("a", lambda: of(lb.uniform(4)), ValueError, r"^'a' is quantized, and its name does not end in '\.weight'"),
        ("a", lambda: np.ones(2, "c8"), TypeError, r"^'a' is complex64; safetensors holds bool, .*: cast it"),
        ("__metadata__", lambda: np.ones(2), ValueError, r"^an entry cannot be named '__metadata__'"),
        ("a", lambda: np.ones(2), ValueError, r"^none of the entries is quantized: write dense arrays with"),
        ("a", lambda: [1.0], TypeError, r"^'a' is a list; only arrays and QuantArrays can be written"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart(tmp_path: Path, name: str, w: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        lb.export_checkpoint({name: w()}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_parts_that_train_are_not_exported(tmp_path: Path) -> None:
    w = arrays()["layers.rows.weight"]
    split = lb.QuantArray(w.fields, replace(w.type, numerics="int8x2"))
    with pytest.raises(ValueError, match=r"it has an adapter, parts that train or products in int8; fold or drop them"):
        lb.export_checkpoint({"a.weight": split}, tmp_path)


def test_names_that_clash(tmp_path: Path) -> None:
    entries = {"a.weight": arrays()["layers.rows.weight"], "a.weight_scale": np.ones(1)}
    with pytest.raises(ValueError, match=r"^two entries would be stored as the tensor 'a\.weight_scale'"):
        lb.export_checkpoint(entries, tmp_path)


def test_the_index_of_another_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json' lists the files of another checkpoint: choose an empty folder"):
        lb.export_checkpoint({"a.weight": of(lb.scaled_fp8())}, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lb.export_checkpoint({"a.weight": of(lb.scaled_fp8())}, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("lowbit.io.export.pack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lb.export_checkpoint(arrays(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compressed_tensors_reads_what_is_exported(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    entries = arrays()
    lb.export_checkpoint(entries, tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    tensors = load_file(tmp_path / "model.safetensors")
    for scheme in QuantizationConfig.model_validate(options).config_groups.values():
        for layer in scheme.targets:
            state = {t.removeprefix(f"{layer}."): a for t, a in tensors.items() if t.startswith(f"{layer}.")}
            weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
            ours = np.asarray(lb.dequantize(entries[f"{layer}.weight"])).astype(np.float32)
            assert np.array_equal(weight.to(torch.float32).numpy(), ours.T), layer
