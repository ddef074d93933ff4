"""Every family computes what `transformers` does, with and without a cache (tests/golden/models/make.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lowbit as lb
from lowbit.io.error import CheckpointError
from lowbit.models import Config, Rope
from lowbit.models.families import FAMILIES, Where, family, value
from lowbit.models.rope import Yarn
from tests.families import GOLDEN, TOLERANCE, assert_same_encoder, error, filled, stepwise
from tests.golden.models.cases import CASES, ENCODERS, SHARED

DECODERS = [name for name in CASES if name not in ENCODERS]
LONG = {"llama", "qwen3", "qwen3_moe", "mixtral", "phi3"}
"""Models whose steps take longest; the whole pass of each is a quick test."""


def stated(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())


@cache
def model_of(name: str) -> Any:
    return filled(stated(name), load_file(GOLDEN / SHARED.get(name, name) / "model.safetensors"))


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(name):
    model, want = model_of(name), load_file(GOLDEN / name / "expected.safetensors")
    got = model(jnp.asarray(want["tokens"]), jnp.asarray(want["mask"]))
    assert error(got, want["logits"], want["mask"]) < TOLERANCE


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in DECODERS]
)
def test_prefill_and_cached_steps_are_the_full_pass(name):
    model, want = model_of(name), load_file(GOLDEN / name / "expected.safetensors")
    assert error(stepwise(model, want["tokens"], want["mask"]), want["logits"], want["mask"]) < TOLERANCE


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_that_of_transformers(name):
    assert_same_encoder(model_of(name), load_file(GOLDEN / name / "expected.safetensors"))


@pytest.mark.parametrize(
    ("architecture", "parts", "lacks", "message"),
    [
        ("BertModel", {"pooler"}, "logits", "no head over tokens: its config states token_head = False"),
        ("BertForMaskedLM", {"head"}, "pooled", "no pooler: its config states pooler = False"),
    ],
)
def test_an_encoder_has_the_heads_of_its_architecture(architecture, parts, lacks, message):
    tensors = load_file(GOLDEN / "bert" / "model.safetensors")
    old = {key.removeprefix("bert.").replace("Norm.weight", "Norm.gamma"): given for key, given in tensors.items()}
    model = filled(stated("bert") | {"architectures": [architecture]}, old)
    assert {"pooler", "head"} & vars(model).keys() == parts
    with pytest.raises(ValueError, match=message):
        getattr(model, lacks)(jnp.zeros((1, 2, 32)))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_files_without_the_prefix_are_the_same(name, prefix):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    bare = filled(stated(name), {key.removeprefix(prefix): array for key, array in tensors.items()})
    for a, b in zip(jax.tree.leaves(nnx.state(bare)), jax.tree.leaves(nnx.state(model_of(name))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_value_is_cut_transposed_stacked_and_raised():
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(3, 2), "b": np.ones((3, 2), np.float16)}
    got = value(Where(("a", "b"), rows=(1, 3), transposed=True, plus=1.0), tensors.__getitem__)
    np.testing.assert_array_equal(got, [[[3, 5], [4, 6]], [[2, 2], [2, 2]]])
    assert got.dtype == np.float32  # float16 would lose bits of small scales beside 1
    assert value(Where(("a",)), tensors.__getitem__) is tensors["a"]


LLAMA_LESS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "hidden_act")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("llama", key) for key in LLAMA_LESS),
        ("mixtral", "num_local_experts"),
        ("gemma2", "query_pre_attn_scalar"),
        ("gpt2", "n_embd"),
        ("opt", "ffn_dim"),
        ("bert", "type_vocab_size"),
    ],
)
def test_a_missing_key_is_named(name, key):
    j = stated(name)
    del j[key]
    with pytest.raises(CheckpointError, match=f"config.json lacks {key}"):
        family(j).config(j)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2', .* it knows 'silu', "),
        ("llama", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type = 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor = '4': it must be a number"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention = {}"),
        ("llama", {"hidden_size": 0}, "describes no model: width = 0"),
        ("llama", {"hidden_size": "32"}, "hidden_size = '32': it must be an integer"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': it must be a number"),
        ("llama", {"rms_norm_eps": None}, "describes no model: eps = None"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': it must be true or false"),
        ("llama", {"rope_theta": -1, "rope_parameters": None}, "describes no model: base = -1 of a rotation"),
        ("llama", {"num_attention_heads": 0}, "describes no model: "),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, r"layer_types of \['chunked_attention'\]"),
        ("qwen2", {"layer_types": ["full_attention"]}, "windows has 1 entries for 2 layers"),
        ("qwen2", {"use_sliding_window": False}, "layer_types = "),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.type = 'longrope'.* it knows 'default'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0.* it knows none"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16.* it knows 32"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
        ("bert", {"architectures": ["BertForSequenceClassification"]}, "architectures = "),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, change, message):
    j = stated(name) | change
    with pytest.raises(CheckpointError, match=message):
        family(j).config(j)


def test_an_unknown_family_is_refused():
    with pytest.raises(CheckpointError, match=r"model_type = 'mamba'; this library loads llama, .*lb.quantize"):
        family({"model_type": "mamba"})


def test_the_page_lists_every_family():
    page = (GOLDEN.parents[2] / "docs/models.md").read_text("utf-8")
    rows = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, re.MULTILINE))
    assert rows == {"model_type", *FAMILIES}
    assert {case["model_type"] for case in CASES.values()} == set(FAMILIES)


def older(name: str, drop: Iterable[str], **keys: Any) -> Config:
    """The config of a file written before `rope_parameters` and `layer_types`."""
    j = {key: given for key, given in stated(name).items() if key not in {"rope_parameters", "layer_types", *drop}}
    return family(j).config(j | keys)


def test_older_files_say_the_same_in_other_keys():
    scaling = stated("llama-llama3")["rope_parameters"]
    scaling["type"] = scaling.pop("rope_type")
    base = scaling.pop("rope_theta")
    assert older("llama-llama3", (), rope_scaling=scaling, rope_theta=base) == config_of("llama-llama3")
    assert older("llama", ("head_dim",)) == config_of("llama")
    assert older("mixtral", ()) == config_of("mixtral")  # whose base is another where none is stated
    assert older("qwen2", ()) == config_of("qwen2")
    assert older("phi3", (), rope_theta=1e4, partial_rotary_factor=0.5) == config_of("phi3")
    assert older("gemma2", ("tie_word_embeddings", "hidden_activation")) == config_of("gemma2")
    keys = {"rope_theta": 1e3, "rope_local_base_freq": 1e2, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert older("gemma3_text", (), sliding_window_pattern=2, **keys) == config_of("gemma3_text")


def config_of(name: str) -> Config:
    j = stated(name)
    return family(j).config(j)


def test_yarn_takes_a_stated_attention_factor():
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16, "attention_factor": 1.25}
    j = stated("llama") | {"rope_parameters": scaling}
    assert family(j).config(j).ropes[0] == Rope(1e4, 8, Yarn(4.0, 16, attention=1.25))  # 64 positions from 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gemma2", "gpt2", "bert"])
def test_a_quantized_family_computes_the_same(name):
    """In a format that holds float16 weights exactly."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    model = filled(stated(name), {key: a.astype(np.float16).astype(np.float32) for key, a in tensors.items()})
    want = load_file(GOLDEN / name / "expected.safetensors")
    tokens, mask = jnp.asarray(want["tokens"]), jnp.asarray(want["mask"])
    small = lb.quantize(model, lb.nested_fp())
    assert not isinstance(small.layers[0].attn.q, nnx.Linear)
    assert error(small(tokens, mask), np.asarray(model(tokens, mask)), want["mask"]) < TOLERANCE
