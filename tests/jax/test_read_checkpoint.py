"""Other projects' checkpoints: goldens made by their own packers, shards, conversion, and what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lowbit as lb
from lowbit.io import checkpoint
from lowbit.io.packing import from_planes, pack, to_planes, unpack
from lowbit.testing.tolerance import assert_within, dot_tolerance
from tests.checkpoints import GOLDEN, Tensors, check_read, expected, stored

GOLDENS = sorted(str(p.parent.relative_to(GOLDEN)) for p in GOLDEN.glob("*/*/model.safetensors"))
MINE = ("gptq", "gptq_v2", "awq", "compressed_tensors")
LAYER = "model.layers.0.up_proj"
Options = dict[str, Any]


# ---------------------------------------------------------------- goldens


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.split("/")[0] in MINE])
def test_a_golden_is_read_to_the_last_code_and_scale(name: str) -> None:
    check_read(GOLDEN / name)


def test_which_formats_the_goldens_are() -> None:
    """Every layout, width and order occurs."""
    found = {str(w.type.format) for n in GOLDENS for _, w in lb.read_checkpoint(GOLDEN / n) if hasattr(w, "type")}
    assert {
        "uniform(bits=2, group=32, scale_dtype=float16)", "act_order(bits=3, group=32, scale_dtype=float16)",
        "uniform(bits=4, scale_dtype=float16)", "act_order(bits=8, group=32, scale_dtype=float16)",
        "uniform(bits=8, scale_dtype=bfloat16)", "scaled_fp8(scale_dtype=bfloat16)", "scaled_fp8(rows=None)",
        "scaled_fp8(group=48, rows=24)",
    } <= found  # fmt: skip


def test_a_product_is_that_with_the_weight_of_torch() -> None:
    w = dict(lb.read_checkpoint(GOLDEN / "gptq/4_ordered"))[f"{LAYER}.weight"]
    want = expected(GOLDEN / "gptq/4_ordered")[LAYER]
    scale, zero = (want[key].astype(np.float64)[:, want["g_idx"]] for key in ("scale", "zero"))
    weight = scale * (want["codes"] - zero)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    # Besides the sum, two roundings of each weight at most: of its difference and of its product with the scale.
    bound = dot_tolerance(64 + 2, "f32", "f32") * (np.abs(x) @ np.abs(weight.T))
    assert_within(lb.matmul(jnp.asarray(x), w), x.astype(np.float64) @ weight.T, bound)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 77])
def test_packing_comes_back(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.int32 and packed.shape == (3, -(-count * bits // 32))
    as_one = sum(int(word) << 32 * i for i, word in enumerate(packed.view(np.uint32)[1]))
    assert [as_one >> bits * i & (1 << bits) - 1 for i in range(count)] == codes[1].tolist()
    assert np.array_equal(unpack(packed, bits, count), codes)
    assert np.array_equal(from_planes(to_planes(codes, bits, 20), count, 20), codes)


# ---------------------------------------------------------------- files


def edited(folder: Path, name: str, change: Callable[[Tensors, Options], Any]) -> Path:
    """A copy of a golden with other tensors or options."""
    tensors = {n: np.array(a) for n, a in stored(GOLDEN / name / "model.safetensors").items()}
    config = json.loads((GOLDEN / name / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(folder: Path, name: str) -> Path:
    """A golden in two files, every layer in both."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    files = {tensor: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, tensor in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({t: a for t, a in tensors.items() if files[t] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text((GOLDEN / name / "config.json").read_text())
    return folder


def write(target: Path, entries: dict[str, Any]) -> bytes:
    lb.io.write(target, entries)
    return target.read_bytes()


@pytest.mark.parametrize("name", ["gptq/3_ordered", "compressed_tensors/packed"])
def test_conversion_is_what_writing_all_of_it_gives(tmp_path: Path, name: str) -> None:
    lb.convert(GOLDEN / name, tmp_path / "a.safetensors")
    whole = write(tmp_path / "b.safetensors", dict(lb.read_checkpoint(GOLDEN / name)))
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    (tmp_path / "shards").mkdir()
    lb.convert(sharded(tmp_path / "shards", name), tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == whole
    with pytest.raises(lb.CheckpointError, match=r"a\.safetensors was written by lowbit: read it with lb\.load"):
        lb.read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    read = checkpoint._quantized

    def watched(*args: Any) -> lb.QuantArray:
        gc.collect()
        assert not [w for w in alive if w() is not None]
        w = read(*args)
        alive.append(weakref.ref(w.fields["planes"]))
        return w

    monkeypatch.setattr(checkpoint, "_quantized", watched)
    lb.convert(GOLDEN / "compressed_tensors/packed", tmp_path / "w.safetensors")
    assert len(alive) == 2 * 3


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["embed.weight", "layers.2.norm.weight", "layers.10.norm.weight", "scale"]
    save_file({name: np.ones(2, np.float32) for name in sorted(names)}, tmp_path / "model.safetensors")
    assert [name for name, _ in lb.read_checkpoint(tmp_path)] == names
    assert [name for name, _ in lb.read_checkpoint(tmp_path / "model.safetensors")] == names


def test_dense_arrays_are_views_that_cannot_be_written_to() -> None:
    norm = dict(lb.read_checkpoint(GOLDEN / "gptq/4_rows"))["model.norm.weight"]
    with pytest.raises(ValueError, match="read-only"):
        norm[0] = 2


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def last_layer(tensors: Tensors, options: Options) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight_scale"][3, 1] = np.nan

    (tmp_path / "source").mkdir()
    source = edited(tmp_path / "source", "compressed_tensors/packed", last_layer)
    with pytest.raises(lb.CheckpointError, match=r"layer '.*q_proj': 'weight_scale' has 1 NaN or inf among"):
        lb.convert(source, tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter((np.ones(3), np.zeros(3)))
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda source: iter([("a", next(versions))]))
    with pytest.raises(lb.CheckpointError, match=r"^there: 'a' changed while it was converted"):
        lb.convert("there", tmp_path / "w.safetensors")
    more = iter(([("a", np.ones(3)), ("b", np.ones(3))], [("a", np.ones(3))]))
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda source: iter(next(more)))
    with pytest.raises(lb.CheckpointError, match=r"^there: 'b' went away while it was converted"):
        lb.convert("there", tmp_path / "w.safetensors")
    twice = [("a/planes", np.ones(3)), ("a/planes", np.ones(3))]
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda source: iter(twice))
    with pytest.raises(ValueError, match=r"^there: two entries would be stored as the tensor 'a/planes'"):
        lb.convert("there", tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(lb.CheckpointError, match=r"holds no safetensors file: convert the checkpoint to safetensors"):
        lb.read_checkpoint(tmp_path)
    folder = sharded(tmp_path, "gptq/4_symmetric")
    with pytest.raises(lb.CheckpointError, match=r"is neither a folder nor one of the files that can be read: \.safet"):
        lb.read_checkpoint(tmp_path / "config.json")
    for gone in ("none", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"'.*{gone}'"):
            lb.read_checkpoint(tmp_path / gone)
    first, second = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    kept = index.read_text()
    index.unlink()
    with pytest.raises(lb.CheckpointError, match=r"holds 2 safetensors files and no model\.safetensors\.index\.json"):
        lb.read_checkpoint(folder)
    index.write_text(kept.replace("norm", "other"))
    with pytest.raises(lb.CheckpointError, match=r"has 'model\.other\.weight' in '.*', and no file holds it"):
        lb.read_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": dict(list(json.loads(kept)["weight_map"].items())[1:])}))
    with pytest.raises(lb.CheckpointError, match=r"holds '.*', which .*index\.json does not name"):
        lb.read_checkpoint(folder)
    for wrong in ("[]", '{"weight_map": {"a": "../b"}}', "{", "{}", "[" * 100_000):
        index.write_text(wrong)
        with pytest.raises(lb.CheckpointError, match=r"is not JSON|has no weight_map|holds a list"):
            lb.read_checkpoint(folder)
    index.write_text(kept)
    second.write_bytes(second.read_bytes()[:-9])
    with pytest.raises(lb.CheckpointError, match=rf"{second.name} is truncated: it has \d+ bytes, and its header"):
        lb.read_checkpoint(folder)
    second.unlink()
    with pytest.raises(
        lb.CheckpointError, match=rf"1 of 2 files that .* names are missing, the first is '{second.name}'"
    ):
        lb.read_checkpoint(folder)
    save_file(load_file(first), second)
    with pytest.raises(lb.CheckpointError, match=r"2 files hold a tensor '.*': get the file again"):
        lb.read_checkpoint(folder)


def test_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    head = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\0")
    with safe_open(tmp_path / "model.safetensors", "np"):
        pass
    with pytest.raises(lb.CheckpointError, match=r"tensor 'a' cannot be read \(its dtype is F8_E8M0\): convert it"):
        list(lb.read_checkpoint(tmp_path))


# ---------------------------------------------------------------- layouts that do not fit


def put(name: str, array: Any, layer: str = LAYER) -> Callable[[Tensors, Options], None]:
    return lambda tensors, options: tensors.update({f"{layer}.{name}": np.asarray(array)})


def drop(name: str, layer: str = LAYER) -> Callable[[Tensors, Options], Any]:
    return lambda tensors, options: tensors.pop(f"{layer}.{name}")


def say(**given: Any) -> Callable[[Tensors, Options], None]:
    return lambda tensors, options: options.update(given)


def in_group(i: int, g: int) -> Callable[[Tensors, Options], None]:
    def change(tensors: Tensors, options: Options) -> None:
        tensors[f"{LAYER}.g_idx"][i] = g

    return change


def nan_scale(tensors: Tensors, options: Options) -> None:
    tensors[f"{LAYER}.scales"][0, 0] = np.inf


G4, G8, A4 = "gptq/4_ordered", "gptq/8_ordered", "awq/group_32"
KEYS = "'bias', 'g_idx', 'qweight', 'qzeros'"
MISFITS: list[tuple[str, Callable[[Tensors, Options], Any], str]] = [
    # names
    (G4, drop("scales"), rf"has {KEYS}, which is no layer of 'gptq', as config\.json states: GPTQ lacks 'scales'$"),
    (G4, put("lut4", [1]), r"GPTQ knows no 'lut4'$"),
    (A4, put("g_idx", [1]), r"AWQ knows no 'g_idx'$"),
    (G4, put("weight_packed", [1], "b"), r"layer 'b' has .*: GPTQ lacks 'qweight', 'qzeros', 'scales' and knows no 'w"),
    (G4, say(quant_method="hqq"), r"states quant_method = 'hqq', and this library reads gptq, awq, compressed-tensors"),
    (G4, lambda t, o: t.clear() or t.update(a=np.ones(1)), r"states 'gptq', but no layer has its tensors"),
    # shapes and dtypes
    (G4, put("qzeros", np.zeros((1, 4), "i4")), r"'qzeros' is int32\[1, 4\], not int32\[2, 4\], as 64 inputs and 32"),
    (G4, put("scales", np.ones((2, 32))), r"'scales' is float64\[2, 32\], not float16 or bfloat16 or float32\[2, 32\]"),
    (G4, put("qweight", np.zeros(8, "i4")), r"'qweight' is int32\[8\], not a matrix of int32"),
    (G4, put("g_idx", np.zeros(64)), r"'g_idx' is float64\[64\], not int32 or int64\[64\]"),
    (A4, put("qzeros", np.zeros((2, 5), "i4")), r"'qzeros' is int32\[2, 5\], not int32\[2, 4\]"),
    # options
    (G4, say(bits=3), r"'qweight' is int32\[8, 32\], not int32\[6, 32\], as 64 inputs"),
    (G4, say(bits=5), r"states bits = 5, and this reader knows 2, 3, 4, 8"),
    (G4, say(group_size=0), r"states group_size = 0, not a size or -1"),
    (G4, say(checkpoint_format="marlin"), r"states checkpoint_format = 'marlin', and .* 'gptq', 'gptq_v2': convert"),
    (G4, say(checkpoint_format=None, bits=None), r"states bits = None, and this reader knows 2, 3, 4, 8"),
    (G4, say(is_marlin_format=True), r"states is_marlin_format = True"),
    (G4, say(quant_method=["gptq"]), r"states quant_method = \['gptq'\], and this library reads gptq"),
    (G4, say(dynamic=[1]), r"config\.json is none of GPTQ \(AttributeError\(.*\): get config\.json again"),
    (G4, say(dynamic={".*": 1}), r"is none of GPTQ \(TypeError"),
    (G4, say(dynamic={"[": {}}), r"is none of GPTQ \(.*rror\('unterminated character set"),
    (G4, say(dynamic={"-:.*up_proj": {}}), r"'-:\.\*up_proj' under `dynamic` says that it is not"),
    (G4, drop("g_idx"), r"the config states desc_act, but the layer has no 'g_idx'"),
    (A4, say(version="gemv"), r"states version = 'gemv', and this reader knows 'gemm'"),
    (A4, say(group_size=48), r"groups of 48 do not divide its 64 inputs"),
    # values
    (G4, nan_scale, r"up_proj': 'scales' has 1 NaN or inf among its 64 numbers: get the file again"),
    (G4, in_group(0, 7), r"'g_idx' holds the group 7, but 64 inputs in groups of 32 have the groups 0 to 1"),
    (G4, in_group(0, -1), r"'g_idx' holds the group -1"),
    (G4, put("g_idx", np.arange(64, dtype="i4") // 40), r"by 'g_idx' the group 0 has 40 inputs, not 32: only groups"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), MISFITS, ids=[m[:40] for _, _, m in MISFITS])
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    with pytest.raises(lb.CheckpointError, match=message):
        list(lb.read_checkpoint(edited(tmp_path, name, change)))


def test_without_a_config_layers_are_not_guessed(tmp_path: Path) -> None:
    save_file(load_file(GOLDEN / "gptq/4_ordered/model.safetensors"), tmp_path / "a.safetensors")
    message = (
        r"a\.safetensors: layer 'model\.layers\.0\.up_proj' has .*'qweight'.*, but there is no quantization_config in"
    )
    with pytest.raises(lb.CheckpointError, match=message):
        lb.read_checkpoint(tmp_path / "a.safetensors")


def test_options_of_one_layer(tmp_path: Path) -> None:
    folder = edited(
        tmp_path, "gptq/4_ordered", say(bits=8, group_size=64, dynamic={"+:.*up": {"bits": 4, "group_size": 32}})
    )
    again = dict(lb.read_checkpoint(folder))[f"{LAYER}.weight"]
    assert np.array_equal(lb.dequantize(again).T, expected(GOLDEN / "gptq/4_ordered")[LAYER]["weight"])


@pytest.mark.parametrize(
    ("name", "bits"), [("2_asymmetric", 2), ("3_ordered", 3), ("4_symmetric", 4), ("8_ordered", 8)]
)
def test_the_first_version_stores_a_zero_point_of_0_as_all_ones(tmp_path: Path, name: str, bits: int) -> None:
    zero = np.random.default_rng(0).integers(0, 1 << bits, (2, 32)).astype(np.uint8)
    zero[:, ::3] = 0
    less = (zero - np.uint8(1)) & np.uint8((1 << bits) - 1)
    folder = edited(tmp_path, f"gptq/{name}", put("qzeros", pack(less, bits)))
    assert np.array_equal(dict(lb.read_checkpoint(folder))[f"{LAYER}.weight"].fields["zero"].T, zero)


# ---------------------------------------------------------------- compressed-tensors

ATTENTION, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def regroup(**groups: Any) -> Callable[[Tensors, Options], None]:
    return lambda tensors, options: options.update(config_groups=groups)


def of_weights(group: str, **given: Any) -> Callable[[Tensors, Options], None]:
    return lambda tensors, options: options["config_groups"][group]["weights"].update(given)


PACKED, FLOAT, INT8 = "compressed_tensors/packed", "compressed_tensors/float", "compressed_tensors/int8"
CT_MISFITS: list[tuple[str, Callable[[Tensors, Options], Any], str]] = [
    (PACKED, say(ignore=[UP]), r"up_proj': it is quantized, but `ignore` names it"),
    (PACKED, say(ignore=["re:.*up"]), r"up_proj': it is quantized, but `ignore` names it"),
    (PACKED, regroup(a={"targets": ["re:x"], "weights": {}}), r"no target of a group in .* fits it"),
    (PACKED, regroup(W8A8=["Linear"]), r"a group of .* does not say how weights are quantized: \['Linear'\]"),
    (PACKED, regroup(a={"weights": {}}), r"is none of compressed-tensors \(packed\) \(KeyError\('targets'\)\): get"),
    (PACKED, say(sparsity_config={"format": "sparse-24-bitmask"}), r"it is sparse, 'sparse-24-bitmask'"),
    (PACKED, say(transform_config={"config_groups": {}}), r"has a transform_config, so weights are rotated"),
    (PACKED, say(format="marlin-24"), r"states format = 'marlin-24', and this reader knows 'pack-q"),
    (PACKED, of_weights("group_0", num_bits=3), r"states num_bits = 3, and this reader knows 2, 4, 8"),
    (PACKED, of_weights("group_0", type="float"), r"states type = 'float', and this reader knows 'int'"),
    (PACKED, of_weights("group_0", strategy="token"), r"states strategy = 'token'"),
    (PACKED, of_weights("group_0", actorder="group"), r"states actorder, but the layer has no 'weight_g_idx'"),
    (PACKED, drop("weight_zero_point", UP), r"states symmetric = False, but it has no 'weight_zero_"),
    (PACKED, drop("weight_shape", UP), r"compressed-tensors \(packed\) lacks 'weight_shape'; compressed-tensors \(pl"),
    (PACKED, put("weight_shape", [64, 32], UP), r"'weight_shape' is \[64, 32\] of 32 outputs"),
    (PACKED, put("weight_shape", [32, 128], UP), r"'weight_packed' is int32\[32, 16\], not int32\[32, 32\], as 128"),
    (PACKED, put("weight_zero_point", np.zeros((1, 1), "i4"), UP), r"'weight_zero_point' is int32\[1, 1\], not int32"),
    (FLOAT, say(format="pack-quantized"), r"states format = 'pack-quantized', and this reader knows 'float-quantized'"),
    (FLOAT, drop("weight_scale", UP), r"up_proj': 'weight' is float8_e4m3fn, and it has no scale: get the file again"),
    (FLOAT, of_weights("group_0", num_bits=4), r"states num_bits = 4, and this reader knows 8"),
    (FLOAT, of_weights("group_2", block_structure=[24]), r"states block_structure = \[24\], not two sizes"),
    (FLOAT, put("weight_scale", np.ones((32, 1)), UP), r"'weight_scale' is float64, not float16 or bfloat16 or"),
    (FLOAT, put("weight_scale", np.ones((4, 1), "f4"), UP), r"'weight_scale' is float32\[4, 1\], not .*\[32, 1\], as"),
    (FLOAT, put("weight_scale", np.full((32, 1), np.nan, "f4"), UP), r"'weight_scale' has 32 NaN or inf among its 32"),
    (INT8, of_weights("group_0", num_bits=4), r"'weight' holds -\d+\.\.\d+, and 4 bits hold -8\.\.7"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), CT_MISFITS, ids=[m[:40] for _, _, m in CT_MISFITS])
def test_compressed_tensors_that_do_not_fit(tmp_path: Path, name: str, change: Any, message: str) -> None:
    def edit(tensors: Tensors, options: Options) -> None:
        change(tensors, options)
        if name == FLOAT:  # which the numpy side of safetensors writes
            tensors.update({n: a.view(ml_dtypes.float8_e4m3fn) for n, a in tensors.items() if a.itemsize == 1})

    with pytest.raises(lb.CheckpointError, match=message):
        list(lb.read_checkpoint(edited(tmp_path, name, edit)))


def test_codes_that_are_nan_are_refused_by_name(tmp_path: Path) -> None:
    def nan(tensors: Tensors, options: Options) -> None:
        tensors[f"{UP}.weight"].view(np.uint8)[3, 4] = 0x7F

    with pytest.raises(
        lb.CheckpointError, match=r"up_proj' is no compressed-tensors \(plain\) layer .*'code' holds 1 codes"
    ):
        list(lb.read_checkpoint(edited(tmp_path, FLOAT, nan)))
