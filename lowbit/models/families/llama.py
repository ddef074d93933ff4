"""Llama and the families that keep the names of its tensors: Mistral, Mixtral, Qwen, Phi-3 and Gemma."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lowbit.models.config import Activation, Config
from lowbit.models.families.place import Family, Places, Where, linear
from lowbit.models.families.stated import (
    ACTIVATIONS,
    FULL,
    SLIDING,
    Stated,
    head_size,
    reader,
    rope,
    rotation,
    windows,
)
from lowbit.models.rope import Rope


def _config(
    j: Stated,
    *,
    head: int | None = None,
    hidden: int | None = None,
    activation: Activation | None = None,
    ropes: tuple[Rope, ...] | None = None,
    tied: bool = False,
    **choices: Any,
) -> Config:
    """What all of them state alike, unless it is given, and what a family chooses; `tied` if config.json is silent."""
    layers, heads = j["num_hidden_layers"], j["num_attention_heads"]
    return Config(
        vocab=j["vocab_size"],
        width=j["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=j.get("num_key_value_heads") or heads,
        head=head or head_size(j),
        hidden=hidden or j["intermediate_size"],
        context=j["max_position_embeddings"],
        ropes=ropes or (rope(j),) * layers,
        eps=j["rms_norm_eps"],
        activation=activation or j.known("hidden_act", ACTIVATIONS),
        tied=j.get("tie_word_embeddings", tied),
        **choices,
    )


def _biases(j: Stated) -> dict[str, Any]:
    return dict.fromkeys(("qkv_bias", "out_bias"), j.get("attention_bias") or False)


def _everywhere(j: Stated) -> tuple[int | None, ...]:
    """The same window for all layers, or none."""
    return (j.get("sliding_window"),) * j["num_hidden_layers"]


def _late(j: Stated) -> tuple[int | None, ...]:
    """Qwen's rule: a window from some layer on, if at all."""
    if not j.get("use_sliding_window"):
        j.only("layer_types", [FULL] * j["num_hidden_layers"])
        return ()
    return windows(j, lambda layer: layer >= j["max_window_layers"])


def _llama(j: Stated) -> Config:
    return _config(j, mlp_bias=j.get("mlp_bias") or False, **_biases(j))


def _mistral(j: Stated) -> Config:
    j.only("layer_types", [SLIDING if j.get("sliding_window") else FULL] * j["num_hidden_layers"])
    return _config(j, windows=_everywhere(j))


def _mixtral(j: Stated) -> Config:
    ropes = (rope(j, 1e6),) * j["num_hidden_layers"]
    experts = {"experts": j["num_local_experts"], "experts_per_token": j["num_experts_per_tok"]}
    return _config(j, windows=_everywhere(j), ropes=ropes, **experts)


def _qwen2(j: Stated) -> Config:
    return _config(j, windows=_late(j), qkv_bias=True)


def _qwen3(j: Stated) -> Config:
    return _config(j, head=j["head_dim"], windows=_late(j), qk_norm=True, **_biases(j))


def _qwen3_moe(j: Stated) -> Config:
    j.only("use_sliding_window", False)
    j.only("mlp_only_layers", [])
    j.only("decoder_sparse_step", 1)
    return _config(
        j,
        qk_norm=True,
        hidden=j["moe_intermediate_size"],
        experts=j["num_local_experts" if "num_local_experts" in j else "num_experts"],  # newer and older files
        experts_per_token=j["num_experts_per_tok"],
        normalize_experts=j.get("norm_topk_prob") or False,
        **_biases(j),
    )


def _phi3(j: Stated) -> Config:
    for key in ("rope_scaling", "rope_parameters"):
        given = Stated(j.get(key) or {}, f"{key}.")
        given.only("rope_type", "default")
        given.only("type", "default")
    return _config(j, windows=_everywhere(j), ropes=(rope(j, partial=True),) * j["num_hidden_layers"])


def _gemma(j: Stated, **choices: Any) -> Config:
    j.only("use_bidirectional_attention", False)
    return _config(
        j,
        head=j["head_dim"],
        post_norm=True,
        activation=j.known("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        attention_scale=j["query_pre_attn_scalar"] ** -0.5,
        embed_scale=j["hidden_size"] ** 0.5,
        tied=True,
        **_biases(j),
        **choices,
    )


def _gemma2(j: Stated) -> Config:
    caps = {"attention_cap": j["attn_logit_softcapping"], "logit_cap": j["final_logit_softcapping"]}
    return _gemma(j, windows=windows(j, lambda i: i % 2 == 0), **caps)


def _gemma3(j: Stated) -> Config:
    """Layers with a window have a rotation of their own."""
    j.only("attn_logit_softcapping")
    pattern = j.get("sliding_window_pattern") or 6
    seen = windows(j, lambda i: (i + 1) % pattern != 0)
    kinds = j.get("rope_parameters") or {}
    whole, near = (Stated(kinds.get(kind) or {}, f"rope_parameters.{kind}.") for kind in (FULL, SLIDING))
    whole.update(j.get("rope_scaling") or {})
    far = rotation(j, whole, j.get("rope_theta") or 1e6)
    local = rotation(j, near, j.get("rope_local_base_freq") or 1e4)
    ropes, cap = tuple(far if window is None else local for window in seen), j.get("final_logit_softcapping")
    return _gemma(j, windows=seen, ropes=ropes, qk_norm=True, logit_cap=cap)


Half = Callable[[Config, str, str], Places]
"""Places of one half of a block, given where it is in the model and the name of the block in the checkpoint."""


def _places(c: Config, attention: Half, mlp: Half, plus: float = 0.0) -> Places:
    yield "embed/embedding", Where(("model.embed_tokens.weight",))
    yield "norm/scale", Where(("model.norm.weight",), plus=plus)
    if not c.tied:
        yield "head/kernel", Where(("lm_head.weight",), transposed=True)
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.post_norm:
        norms |= {"attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
        norms["mlp_post_norm"] = "post_feedforward_layernorm"
    for i in range(c.layers):
        at, stored = f"layers/{i}", f"model.layers.{i}"
        for path, name in norms.items():
            yield f"{at}/{path}/scale", Where((f"{stored}.{name}.weight",), plus=plus)
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield f"{at}/attn/{name}/scale", Where((f"{stored}.self_attn.{name}.weight",), plus=plus)
        yield from linear(f"{at}/attn/o", f"{stored}.self_attn.o_proj", c.out_bias)
        yield from attention(c, f"{at}/attn", stored)
        yield from mlp(c, f"{at}/mlp", stored)


def _apart(c: Config, at: str, stored: str) -> Places:
    for name in "qkv":
        yield from linear(f"{at}/{name}", f"{stored}.self_attn.{name}_proj", c.qkv_bias)


def _fused(c: Config, at: str, stored: str) -> Places:
    start = 0
    for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        rows = start, start + heads * c.head
        yield from linear(f"{at}/{name}", f"{stored}.self_attn.qkv_proj", False, rows)
        start = rows[1]


def _gated(c: Config, at: str, stored: str) -> Places:
    for name in ("gate", "up", "down"):
        yield from linear(f"{at}/{name}", f"{stored}.mlp.{name}_proj", c.mlp_bias)


def _gated_fused(c: Config, at: str, stored: str) -> Places:
    for i, name in enumerate(("gate", "up")):
        rows = i * c.hidden, (i + 1) * c.hidden
        yield from linear(f"{at}/{name}", f"{stored}.mlp.gate_up_proj", False, rows)
    yield from linear(f"{at}/down", f"{stored}.mlp.down_proj", False)


def _mixture(c: Config, at: str, stored: str, *, block: str, names: tuple[str, str, str]) -> Places:
    yield from linear(f"{at}/router", f"{stored}.{block}.gate", False)
    for path, name in zip(("gate", "up", "down"), names, strict=True):
        tensors = tuple(f"{stored}.{block}.experts.{i}.{name}.weight" for i in range(c.experts))
        yield f"{at}/{path}/kernel", Where(tensors, transposed=True)


def _family(config: Callable[[Stated], Config], attention: Half = _apart, mlp: Half = _gated, **more: Any) -> Family:
    places = partial(_places, attention=attention, mlp=mlp, **more)
    return Family(reader(config), places, ("rotary_emb.inv_freq", "lm_head.weight"))  # the head of a tied model too


FAMILIES = {
    "llama": _family(_llama),
    "mistral": _family(_mistral),
    "mixtral": _family(_mixtral, mlp=partial(_mixture, block="block_sparse_moe", names=("w1", "w3", "w2"))),
    "qwen2": _family(_qwen2),
    "qwen3": _family(_qwen3),
    "qwen3_moe": _family(_qwen3_moe, mlp=partial(_mixture, block="mlp", names=("gate_proj", "up_proj", "down_proj"))),
    "phi3": _family(_phi3, _fused, _gated_fused),
    "gemma2": _family(_gemma2, plus=1.0),
    "gemma3_text": _family(_gemma3, plus=1.0),
}
