"""BERT: an encoder with norms after each half, and the heads of its pretraining."""

from __future__ import annotations

from lowbit.models.config import Config
from lowbit.models.encoder import Encoder
from lowbit.models.families.place import Family, Places, Where, layer_norm, linear
from lowbit.models.families.stated import ACTIVATIONS, Stated, reader

ARCHITECTURES = ("BertModel", "BertForMaskedLM", "BertForPreTraining")
"""With the pooler, with the head over tokens, and with both."""


def _bert(j: Stated) -> Config:
    j.only("architectures", *([name] for name in ARCHITECTURES))
    j.only("position_embedding_type", "absolute")
    j.only("is_decoder", False)
    j.only("add_cross_attention", False)
    j.only("tie_word_embeddings", True)
    width, heads = j["hidden_size"], j["num_attention_heads"]
    (architecture,) = j.get("architectures") or ["BertModel"]
    return Config(
        vocab=j["vocab_size"],
        width=width,
        layers=j["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=j["intermediate_size"],
        context=j["max_position_embeddings"],
        norm="layer",
        eps=j["layer_norm_eps"],
        pre_norm=False,
        post_norm=True,
        activation=j.known("hidden_act", ACTIVATIONS),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=True,
        token_types=j["type_vocab_size"],
        token_head=architecture != "BertModel",
        pooler=architecture != "BertForMaskedLM",
    )


def _places(c: Config) -> Places:
    for path, name in (("embed", "word"), ("positions", "position"), ("types", "token_type")):
        yield f"{path}/embedding", Where((f"bert.embeddings.{name}_embeddings.weight",))
    yield from layer_norm("embed_norm", "bert.embeddings.LayerNorm")
    for i in range(c.layers):
        at, stored = f"layers/{i}", f"bert.encoder.layer.{i}"
        for path, name in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"{at}/attn/{path}", f"{stored}.attention.self.{name}", True)
        yield from linear(f"{at}/attn/o", f"{stored}.attention.output.dense", True)
        yield from linear(f"{at}/mlp/up", f"{stored}.intermediate.dense", True)
        yield from linear(f"{at}/mlp/down", f"{stored}.output.dense", True)
        yield from layer_norm(f"{at}/attn_post_norm", f"{stored}.attention.output.LayerNorm")
        yield from layer_norm(f"{at}/mlp_post_norm", f"{stored}.output.LayerNorm")
    if c.pooler:
        yield from linear("pooler", "bert.pooler.dense", True)
    if c.token_head:
        yield from linear("head/dense", "cls.predictions.transform.dense", True)
        yield from layer_norm("head/norm", "cls.predictions.transform.LayerNorm")
        yield "head/bias", Where(("cls.predictions.bias",))


def _name(name: str) -> str:
    """Older files call the parameters of norms gamma and beta, and models without a head have no prefix."""
    start, _, end = name.rpartition(".")
    name = f"{start}.{ {'gamma': 'weight', 'beta': 'bias'}.get(end, end) }"
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


FAMILIES = {
    "bert": Family(
        reader(_bert),
        _places,
        (
            "embeddings.position_ids",
            "pooler.dense.weight",
            "pooler.dense.bias",
            "seq_relationship.weight",
            "seq_relationship.bias",
            "cls.predictions.decoder.weight",
            "cls.predictions.decoder.bias",
        ),
        rename=_name,
        model=Encoder,
    )
}
