"""Checkpoint folders become models, dense or quantized as they are read, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lowbit as lb
from lowbit.io.shards import INDEX

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
W, H, KV = 32, 64, 16
RULES = {"layers/*/mlp/*": lb.uniform(4, group=16), "layers/*/attn/?": lb.bcq(2, group=32), "embed": lb.uniform(8)}
TOKENS = jnp.arange(10).reshape(2, 5)


def tensors(seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A random llama by the names that transformers uses."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, W), "lm_head.weight": (48, W)}
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (W if n in "qo" else KV, W) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (H, W) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (W, H), f"{at}.input_layernorm.weight": (W,)}
        shapes |= {f"{at}.post_attention_layernorm.weight": (W,)}
    shapes["model.norm.weight"] = (W,)
    return {n: (rng.normal(size=s) * 0.2 + (len(s) == 1)).astype(dtype) for n, s in shapes.items()}


def written(folder: Path, arrays: Mapping[str, np.ndarray], shards: int = 1, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if shards == 1:
        save_file(dict(arrays), folder / "model.safetensors")
        return folder
    index = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(arrays)}
    for file in set(index.values()):
        save_file({n: a for n, a in arrays.items() if index[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "llama", tensors())


def assert_same(one: nnx.Module, other: nnx.Module) -> None:
    """The same graph, and the same bits in every Variable."""
    (graph, a), (like, b) = nnx.split(one), nnx.split(other)
    assert graph == like
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


# ---------------------------------------------------------------- loading


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


def test_loading_with_rules_is_quantizing_what_is_loaded(folder: Path) -> None:
    assert_same(lb.models.load(folder, RULES), lb.quantize(lb.models.load(folder), RULES))


def test_a_layer_that_a_format_cannot_hold_stays_dense(folder: Path) -> None:
    rules = {"layers/0/mlp/*": lb.nested_fp(), "**": None}
    model = lb.models.load(folder, rules)
    assert_same(model, lb.quantize(lb.models.load(folder), rules))


# ---------------------------------------------------------------- lowbit's own folders


@pytest.mark.parametrize("rules", [None, RULES])
def test_a_saved_folder_comes_back_bit_by_bit(folder: Path, tmp_path: Path, rules: Any) -> None:
    model = lb.models.load(folder, rules, dtype=jnp.bfloat16)
    lb.models.save(model, tmp_path / "saved", folder)
    assert_same(lb.models.load(tmp_path / "saved"), model)
