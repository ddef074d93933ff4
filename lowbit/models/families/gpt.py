"""GPT-2 and OPT: learned positions, layer norms and biases."""

from __future__ import annotations

from lowbit.models.config import Config
from lowbit.models.families.place import Family, Places, Where, layer_norm, linear
from lowbit.models.families.stated import ACTIVATIONS, Stated, reader


def _gpt2(j: Stated) -> Config:
    j.only("scale_attn_by_inverse_layer_idx", False)
    j.only("add_cross_attention", False)
    width, heads = j["n_embd"], j["n_head"]
    return Config(
        vocab=j["vocab_size"],
        width=width,
        layers=j["n_layer"],
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=j.get("n_inner") or 4 * width,
        context=j["n_positions"],
        norm="layer",
        eps=j["layer_norm_epsilon"],
        activation=j.known("activation_function", ACTIVATIONS),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attention_scale=None if j.get("scale_attn_weights", True) else 1.0,
        tied=j.get("tie_word_embeddings", True),
    )


def _gpt2_places(c: Config) -> Places:
    yield "embed/embedding", Where(("transformer.wte.weight",))
    yield "positions/embedding", Where(("transformer.wpe.weight",))
    yield from layer_norm("norm", "transformer.ln_f")
    if not c.tied:
        yield "head/kernel", Where(("lm_head.weight",), transposed=True)
    for i in range(c.layers):
        at, stored = f"layers/{i}", f"transformer.h.{i}"
        yield from layer_norm(f"{at}/attn_norm", f"{stored}.ln_1")
        yield from layer_norm(f"{at}/mlp_norm", f"{stored}.ln_2")
        for part, name in enumerate("qkv"):
            rows = part * c.width, (part + 1) * c.width
            yield from linear(f"{at}/attn/{name}", f"{stored}.attn.c_attn", True, rows, transposed=False)
        for path, name in (("attn/o", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj")):
            yield from linear(f"{at}/{path}", f"{stored}.{name}", True, transposed=False)


def _gpt2_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _opt(j: Stated) -> Config:
    width, heads = j["hidden_size"], j["num_attention_heads"]
    j.only("word_embed_proj_dim", width)
    j.only("layer_norm_elementwise_affine", True)
    j.only("_remove_final_layer_norm", False)
    before, bias = j.get("do_layer_norm_before", True), j.get("enable_bias", True)
    return Config(
        vocab=j["vocab_size"],
        width=width,
        layers=j["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=j["ffn_dim"],
        context=j["max_position_embeddings"],
        position_offset=2,
        norm="layer",
        eps=1e-5,
        pre_norm=before,
        post_norm=not before,
        activation=j.known("activation_function", ACTIVATIONS),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=j.get("tie_word_embeddings", True),
    )


def _opt_places(c: Config) -> Places:
    top = "model.decoder"
    yield "embed/embedding", Where((f"{top}.embed_tokens.weight",))
    yield "positions/embedding", Where((f"{top}.embed_positions.weight",))
    if c.pre_norm:
        yield from layer_norm("norm", f"{top}.final_layer_norm")
    if not c.tied:
        yield "head/kernel", Where(("lm_head.weight",), transposed=True)
    place = "norm" if c.pre_norm else "post_norm"
    for i in range(c.layers):
        at, stored = f"layers/{i}", f"{top}.layers.{i}"
        yield from layer_norm(f"{at}/attn_{place}", f"{stored}.self_attn_layer_norm")
        yield from layer_norm(f"{at}/mlp_{place}", f"{stored}.final_layer_norm")
        for path, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            yield from linear(f"{at}/attn/{path}", f"{stored}.self_attn.{name}", c.qkv_bias)
        for path, name in (("up", "fc1"), ("down", "fc2")):
            yield from linear(f"{at}/mlp/{path}", f"{stored}.{name}", c.mlp_bias)


def _opt_name(name: str) -> str:
    return f"model.{name}" if name.startswith("decoder.") else name


FAMILIES = {
    "gpt2": Family(
        reader(_gpt2), _gpt2_places, (".attn.bias", ".attn.masked_bias", "lm_head.weight"), rename=_gpt2_name
    ),
    "opt": Family(reader(_opt), _opt_places, ("lm_head.weight",), rename=_opt_name),
}
