"""BERT and RoBERTa: encoders with norms after each half, and the heads of their pretraining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lowbit.models.config import Config
from lowbit.models.encoder import Encoder
from lowbit.models.families.place import Family, Places, Where, layer_norm, linear
from lowbit.models.families.stated import ACTIVATIONS, Stated, reader

HEADS = {
    "BertModel": (False, True),
    "BertForMaskedLM": (True, False),
    "BertForPreTraining": (True, True),
    "RobertaModel": (False, True),
    "RobertaForMaskedLM": (True, False),
}
"""Whether an architecture has the head over tokens, and whether the pooler."""


def _config(j: Stated) -> Config:
    j.only("architectures", *([name] for name in HEADS))
    j.only("position_embedding_type", "absolute")
    j.only("is_decoder", False)
    j.only("add_cross_attention", False)
    j.only("tie_word_embeddings", True)
    width, heads = j["hidden_size"], j["num_attention_heads"]
    token_head, pooler = HEADS[(j.get("architectures") or ["BertModel"])[0]]
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
        token_head=token_head,
        pooler=pooler,
    )


def _roberta(j: Stated) -> Config:
    """Its table of positions begins with rows for padding."""
    j.only("hidden_act", "gelu")  # the head has no other
    config, offset = _config(j), j["pad_token_id"] + 1
    return replace(config, context=config.context - offset, position_offset=offset)


def _places(c: Config, prefix: str, head: tuple[str, str, str]) -> Places:
    """`head` is the dense layer, the norm and the bias of the head over tokens."""
    dense, norm, bias = head
    for path, name in (("embed", "word"), ("positions", "position"), ("types", "token_type")):
        yield f"{path}/embedding", Where((f"{prefix}.embeddings.{name}_embeddings.weight",))
    yield from layer_norm("embed_norm", f"{prefix}.embeddings.LayerNorm")
    for i in range(c.layers):
        at, stored = f"layers/{i}", f"{prefix}.encoder.layer.{i}"
        for path, name in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"{at}/attn/{path}", f"{stored}.attention.self.{name}", True)
        yield from linear(f"{at}/attn/o", f"{stored}.attention.output.dense", True)
        yield from linear(f"{at}/mlp/up", f"{stored}.intermediate.dense", True)
        yield from linear(f"{at}/mlp/down", f"{stored}.output.dense", True)
        yield from layer_norm(f"{at}/attn_post_norm", f"{stored}.attention.output.LayerNorm")
        yield from layer_norm(f"{at}/mlp_post_norm", f"{stored}.output.LayerNorm")
    if c.pooler:
        yield from linear("pooler", f"{prefix}.pooler.dense", True)
    if c.token_head:
        yield from linear("head/dense", dense, True)
        yield from layer_norm("head/norm", norm)
        yield "head/bias", Where((bias,))


def _name(name: str, prefix: str) -> str:
    """Older files call the parameters of norms gamma and beta, and models without a head have no prefix."""
    start, _, end = name.rpartition(".")
    name = f"{start}.{ {'gamma': 'weight', 'beta': 'bias'}.get(end, end) }"
    return f"{prefix}.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _family(config: Callable[[Stated], Config], prefix: str, head: tuple[str, str, str], *others: str) -> Family:
    """`others` are layers that are not computed; a model may leave out any of its heads too."""
    dense, norm, bias = head
    layers = (f"{prefix}.pooler.dense", dense, norm, *others)
    unused = ("embeddings.position_ids", bias, *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")))
    places = partial(_places, prefix=prefix, head=head)
    return Family(reader(config), places, unused, partial(_name, prefix=prefix), Encoder)


_BERT = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
_ROBERTA = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
FAMILIES = {
    "bert": _family(_config, "bert", _BERT, "cls.predictions.decoder", "cls.seq_relationship"),
    "roberta": _family(_roberta, "roberta", _ROBERTA, "lm_head.decoder"),
}
