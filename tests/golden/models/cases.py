"""Tiny models of every family: what their configs hold. No torch here: tests read the names."""

from __future__ import annotations

from typing import Any

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 16}
GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,
    "tie_word_embeddings": True,
    "attention_bias": True,
}


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    """A short base, so that every band of frequencies is met by some of the four."""
    return {"rope_type": kind, "rope_theta": 100.0, **values}


CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
    },
    "llama-linear": {"model_type": "llama", "rope_parameters": scaled("linear", factor=3.0)},
    "llama-llama3": {
        "model_type": "llama",
        "rope_parameters": scaled(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": scaled("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0),
    },
    "llama-yarn-mscale": {
        "model_type": "llama",
        "rope_parameters": scaled(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=4.0,
            mscale=1.5,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    },
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, **EXPERTS},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        **EXPERTS,
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        **GEMMA,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        **GEMMA,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 16,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {"model_type": "opt", "ffn_dim": 40, "max_position_embeddings": 16, "tie_word_embeddings": True},
    "opt-post-norm": {
        "model_type": "opt",
        "ffn_dim": 40,
        "max_position_embeddings": 16,
        "do_layer_norm_before": False,
        "enable_bias": False,
    },
    "bert": {"model_type": "bert", "max_position_embeddings": 16, "tie_word_embeddings": True},
    "roberta": {
        "model_type": "roberta",
        "max_position_embeddings": 16,
        "type_vocab_size": 1,
        "tie_word_embeddings": True,
        "pad_token_id": 2,
        "eos_token_id": 0,
    },
}
ENCODERS = ("bert", "roberta")
SHARED = {name: "llama" for name in CASES if name.startswith("llama-") and name != "llama-tied-biases"}
"""Cases that have the weights of another: rotations have none."""


def config(name: str) -> dict[str, Any]:
    """All that the config of a case is made with."""
    case = CASES[name]
    return case if case["model_type"] == "gpt2" else {**SIZES, **case}
