"""The tinylm as a checkpoint that `lb.models.load` reads too: saving a `TinyLM` in fp16, and loading it as float32.

The folder is that of a Qwen3, which has no norm of embeddings: its `embed_tokens` are the normalized rows, its
`lm_head` the table itself. What `load` needs beside, the scale of that norm, is in the file's metadata.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.tinylm.model import VOCAB, Config, TinyLM

__all__ = ["MODEL", "load", "save"]

MODEL = pathlib.Path(__file__).with_name("model")
FILE, TOKENIZER = "model.safetensors", "tokenizer.json"
NORM = "embed_norm.scale"
"""In the metadata, a JSON list."""
EPS = 1e-6
"""Of nnx.RMSNorm."""
NAMES = {
    "embed.embedding": "lm_head.weight",
    "norm.scale": "model.norm.weight",
    r"layers\.(\d+)\.attn_norm\.scale": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.mlp_norm\.scale": r"model.layers.\1.post_attention_layernorm.weight",
    r"layers\.(\d+)\.attn\.([qk])_norm\.scale": r"model.layers.\1.self_attn.\2_norm.weight",
    r"layers\.(\d+)\.attn\.([qkvo])\.kernel": r"model.layers.\1.self_attn.\2_proj.weight",
    r"layers\.(\d+)\.mlp\.(gate|up|down)\.kernel": r"model.layers.\1.mlp.\2_proj.weight",
}
"""Patterns of our names, and what the checkpoint calls these parameters."""


def named(model: TinyLM) -> dict[str, jax.Array]:
    """The parameters by dotted path, as in ``layers.0.attn.q.kernel``."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def _stored(name: str) -> str:
    pattern = next(pattern for pattern in NAMES if re.fullmatch(pattern, name))
    return re.sub(pattern, NAMES[pattern], name)


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """A kernel [in, out] as the checkpoint has it, [out, in], and back."""
    return np.ascontiguousarray(array.T) if name.endswith(".kernel") else array


def save(model: TinyLM, folder: pathlib.Path = MODEL) -> None:
    """Writes config.json and tokenizer.json, and the parameters in fp16.

    Raises:
        ValueError: a parameter does not fit fp16's range.
    """
    arrays = {name: np.asarray(value).astype(np.float16) for name, value in named(model).items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values beyond fp16's 65504 or not finite; the model cannot be saved in fp16")
    scale = arrays.pop(NORM)
    table = arrays["embed.embedding"].astype(np.float32)
    rms = np.sqrt((table**2).mean(axis=1, keepdims=True) + EPS)
    tensors = {_stored(name): _turned(name, array) for name, array in arrays.items()}
    tensors["model.embed_tokens.weight"] = (table / rms * scale).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={"format": "pt", NORM: json.dumps(scale.astype(float).tolist())})
    (folder / "config.json").write_text(json.dumps(_described(model.config), indent=2) + "\n")
    (folder / TOKENIZER).write_bytes((MODEL / TOKENIZER).read_bytes())


def _described(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float16",
    }


def _config(j: Mapping[str, Any]) -> Config:
    return Config(
        layers=j["num_hidden_layers"],
        width=j["hidden_size"],
        hidden=j["intermediate_size"],
        head=j["head_dim"],
        context=j["max_position_embeddings"],
        rope_base=j["rope_theta"],
    )


def load(folder: pathlib.Path = MODEL) -> TinyLM:
    """The saved model, its parameters as float32.

    Raises:
        ValueError: the file's tensors are not those of the model that config.json describes.

    Example:
        >>> load().config.width
        256
    """
    config = _config(json.loads((folder / "config.json").read_text()))
    with safe_open(folder / FILE, framework="numpy") as file:
        scale = np.array(json.loads(file.metadata()[NORM]))
        held = {name: file.get_tensor(name) for name in file.keys() if name != "model.embed_tokens.weight"}
    model = TinyLM(config, rngs=nnx.Rngs(0))
    ours = {_stored(name): name for name in named(model) if name != NORM}
    arrays = {ours.get(t, t): _turned(ours.get(t, t), array) for t, array in held.items()} | {NORM: scale}
    shapes = {name: value.shape for name, value in named(model).items()}
    if shapes != {name: value.shape for name, value in arrays.items()}:
        odd = sorted(set(shapes.items()) ^ {(name, value.shape) for name, value in arrays.items()})
        raise ValueError(f"{folder} does not fit {config}: the model or the file alone has {odd}")
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    filled = [(key, v.replace(jnp.asarray(arrays[".".join(map(str, key))], jnp.float32))) for key, v in flat]
    nnx.update(model, nnx.from_flat_state(filled))
    return model
