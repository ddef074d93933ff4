"""A small random llama as a checkpoint's folder, and what it means that two models are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lowbit.io.shards import INDEX

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
W, H, KV = 32, 64, 16


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


def assert_same(one: nnx.Module, other: nnx.Module) -> None:
    """The same graph, and the same bits in every Variable."""
    (graph, a), (like, b) = nnx.split(one), nnx.split(other)
    assert graph == like
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)
