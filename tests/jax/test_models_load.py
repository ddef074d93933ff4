"""Checkpoint folders become models, their layers dense or quantized as they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lowbit as lb
from lowbit.nn.kernel import error_stats
from tests.llama_folder import CONFIG, H, W, assert_same, tensors, written

TOKENS = jnp.arange(10).reshape(2, 5)
RULES = {"layers/*/mlp/*": lb.uniform(4, group=16), "embed": lb.uniform(4, group=16)}
SOLVING = import_module("lowbit.nn.resume")
GOLDEN = Path(__file__).parents[1] / "golden/models"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "llama", tensors())


@pytest.mark.slow
def test_every_weight_is_where_it_belongs(tmp_path: Path) -> None:
    stored = tensors()
    model = lb.models.load(written(tmp_path / "llama", stored, shards=3))
    block = model.layers[1]
    for tensor, param in {
        "model.embed_tokens": model.embed.embedding,
        "model.norm": model.norm.scale,
        "model.layers.1.input_layernorm": block.attn_norm.scale,
        "model.layers.1.post_attention_layernorm": block.mlp_norm.scale,
    }.items():
        np.testing.assert_array_equal(param[...], stored[f"{tensor}.weight"])
    for tensor, layer in {"self_attn.k_proj": block.attn.k, "mlp.down_proj": block.mlp.down}.items():
        np.testing.assert_array_equal(layer.kernel[...], stored[f"model.layers.1.{tensor}.weight"].T)
    np.testing.assert_array_equal(model.head.kernel[...], stored["lm_head.weight"].T)
    assert jnp.isfinite(model(TOKENS)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_weights_have_the_dtype_of_the_checkpoint_unless_told(tmp_path: Path, dtype: Any) -> None:
    at = written(tmp_path / "llama", tensors(dtype=dtype))
    model, wide = lb.models.load(at), lb.models.load(at, dtype=jnp.float32)
    assert model.embed.embedding.dtype == model.layers[0].mlp.up.kernel.dtype == dtype
    assert model.layers[0].mlp.up.dtype == dtype and model.norm.scale.dtype == np.float32
    assert wide.embed.embedding.dtype == wide.layers[0].mlp.up.dtype == np.float32


def test_float64_becomes_float32(tmp_path: Path) -> None:
    at = written(tmp_path / "llama", tensors(dtype=np.float64))
    assert lb.models.load(at).embed.embedding.dtype == lb.models.load(at, dtype=np.float64).embed.dtype == np.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_filled(name: str) -> None:
    model = lb.models.load(GOLDEN / name)
    assert all(isinstance(x, jax.Array) and jnp.isfinite(x).all() for x in jax.tree.leaves(nnx.state(model)))


# Tensors that hold several layers, and layers of several tensors.
@pytest.mark.parametrize("name", ["phi3", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_loaded_model_computes_what_transformers_does(name: str) -> None:
    want = load_file(GOLDEN / name / "expected.safetensors")
    logits = lb.models.load(GOLDEN / name)(jnp.asarray(want["tokens"]), jnp.asarray(want["mask"]))
    # As in test_families: float32 in another order; a wrong weight is off by far more than 1e-2.
    difference = np.abs(logits - want["logits"])[want["mask"]].max()
    assert difference < 1e-4 * np.abs(want["logits"])[want["mask"]].max()


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "mixtral"])
def test_loading_with_rules_is_quantizing_what_is_loaded(name: str) -> None:
    rules = {"layers/1/mlp/*": lb.uniform(4, group=16), "embed": lb.uniform(4, group=16)}
    at = GOLDEN / name
    assert_same(lb.models.load(at, rules), lb.quantize(lb.models.load(at), rules))


def test_a_layer_that_a_format_cannot_hold_stays_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = tensors(dtype=np.float16)
    stored["model.layers.0.mlp.up_proj.weight"][0, 0] = 3.0
    at = written(tmp_path / "llama", stored)
    rules = {"layers/0/mlp/up": lb.nested_fp(), "**": None}
    with caplog.at_level("WARNING"):
        model = lb.models.load(at, rules)
    assert "layer 'layers/0/mlp/up'" in caplog.text
    assert_same(model, lb.models.load(at))


@pytest.mark.slow
def test_statistics_weigh_what_is_loaded(folder: Path) -> None:
    rules = {"layers/0/mlp/up": lb.bcq(1, group=32)}
    model = lb.models.load(folder)
    stats = lb.calibrate(model, [TOKENS])
    assert_same(lb.models.load(folder, rules, stats=stats), lb.quantize(model, rules, stats=stats))


def test_a_run_that_was_killed_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"layers/*/mlp/up": lb.uniform(4, group=16)}
    made: list[str] = []
    solve = SOLVING.quantize_array

    def counted(*args: Any, name: str, **kwargs: Any) -> lb.QuantArray:
        if made and len(made) < 2:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(name)
        return solve(*args, name=name, **kwargs)

    monkeypatch.setattr(SOLVING, "quantize_array", counted)
    with pytest.raises(KeyboardInterrupt):
        lb.models.load(folder, rules, resume=tmp_path / "resume")
    again = lb.models.load(folder, rules, resume=tmp_path / "resume")
    assert made == ["layer 'layers/0/mlp/up'", "killed", "layer 'layers/1/mlp/up'"]
    assert_same(again, lb.models.load(folder, rules))


def test_one_dense_layer_at_a_time_is_held(folder: Path) -> None:
    """The arrays that live while a layer is quantized, beside what is kept, are those of that layer alone."""
    seen: list[int] = []

    class Watching:
        def __call__(self, w: jax.Array, fmt: lb.Format) -> Mapping[str, jax.Array]:
            seen.append(sum(a.nbytes for a in jax.live_arrays()))
            return lb.round_to_nearest()(w, fmt)

    before = sum(a.nbytes for a in jax.live_arrays())
    model = lb.models.load(
        folder, [lb.Rule("layers/*/mlp/*", lb.uniform(4, group=16), Watching()), lb.Rule("**", None)]
    )
    kept = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
    assert max(seen) - before <= kept + 2 * H * W * 4


# ---------------------------------------------------------------- checkpoints that are quantized already


def quantized_folder(tmp_path: Path, layer: str = "model.layers.0.mlp.up_proj", bits: int = 4) -> tuple[Path, Any]:
    """A llama of which one layer is stored as compressed-tensors, and that layer."""
    dense = tensors()
    weight = lb.quantize_array(jnp.asarray(dense[f"{layer}.weight"].T), lb.uniform(bits, group=16))
    entries = {name: weight if name == f"{layer}.weight" else array for name, array in dense.items()}
    (tmp_path / "packed").mkdir()
    lb.export_checkpoint(entries, tmp_path / "packed", CONFIG)
    return tmp_path / "packed", weight


def test_layers_that_are_stored_quantized_stay_so(tmp_path: Path, folder: Path) -> None:
    at, weight = quantized_folder(tmp_path)
    model, dense = lb.models.load(at), lb.models.load(folder)
    layer = model.layers[0].mlp.up
    assert isinstance(layer, lb.nn.Linear) and layer.dtype == jnp.float32
    np.testing.assert_array_equal(lb.dequantize(layer.kernel.array), lb.dequantize(weight))
    assert jnp.isnan(layer.kernel.stats[...]).all()
    np.testing.assert_array_equal(model.layers[1].mlp.up.kernel[...], dense.layers[1].mlp.up.kernel[...])
    assert jnp.isfinite(model(TOKENS)).all()
    more = lb.models.load(at, {"layers/1/mlp/up": lb.uniform(4, group=16)})
    assert isinstance(more.layers[1].mlp.up, lb.nn.Linear) and isinstance(more.layers[0].mlp.up, lb.nn.Linear)


def test_tables_that_are_stored_quantized_are_refused(tmp_path: Path) -> None:
    at, _ = quantized_folder(tmp_path, "model.embed_tokens")
    with pytest.raises(
        lb.CheckpointError, match=r"'model\.embed_tokens\.weight' is quantized, and it is no single lin"
    ):
        lb.models.load(at)


def test_a_quantized_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    at, _ = quantized_folder(tmp_path)
    j = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**j, "intermediate_size": 80}))
    with pytest.raises(
        lb.CheckpointError, match=r"gate_proj\.weight' is float32\[64, 32\], but config\.json makes it \[80"
    ):
        lb.models.load(at)


# ---------------------------------------------------------------- large matrices


@pytest.mark.parametrize("fmt", [lb.uniform(4, group=16), pytest.param(lb.bcq(3, offset=True), marks=pytest.mark.slow)])
def test_a_large_matrix_is_rounded_in_parts_to_the_same_bits(fmt: lb.Format, monkeypatch: pytest.MonkeyPatch) -> None:
    w = jax.random.normal(jax.random.key(0), (37, 48))
    whole = lb.round_to_nearest()(w, fmt)
    monkeypatch.setattr(import_module("lowbit.quantizers.quantizer"), "_AT_ONCE", 10 * 48)
    parts = lb.round_to_nearest()(w, fmt)
    assert whole.keys() == parts.keys()
    for name, field in whole.items():
        np.testing.assert_array_equal(parts[name], field)


@pytest.mark.slow
def test_the_error_of_a_large_matrix_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = jax.random.normal(jax.random.key(0), (48, 37))
    array = lb.quantize_array(w, lb.uniform(4))
    whole = error_stats(w, array)
    monkeypatch.setattr(import_module("lowbit.nn.kernel"), "_AT_ONCE", 10 * 37)
    # Sums of 48 * 37 positive numbers in another order.
    np.testing.assert_allclose(error_stats(w, array), whole, rtol=48 * 37 * 2**-24)
