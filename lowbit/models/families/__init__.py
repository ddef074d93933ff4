"""What config.json says of a model, and where its parameters lie in the checkpoint, family by family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lowbit.io.error import CheckpointError
from lowbit.models.config import Config
from lowbit.models.families.place import Family as Family
from lowbit.models.families.place import Json
from lowbit.models.families.place import Where as Where
from lowbit.models.families.place import value as value
from lowbit.models.rope import Linear, Llama3, Rope, Yarn


def _llama(j: Json) -> Config:
    heads, width, layers = j["num_attention_heads"], j["hidden_size"], j["num_hidden_layers"]
    head = j.get("head_dim") or width // heads
    return Config(
        vocab=j["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=j.get("num_key_value_heads") or heads,
        head=head,
        hidden=j["intermediate_size"],
        context=j["max_position_embeddings"],
        ropes=(rope(j, head),) * layers,
        eps=j["rms_norm_eps"],
        tied=j.get("tie_word_embeddings", False),
    )


def rope(j: Json, size: int) -> Rope:
    """The rotation that config.json asks for. Raises CheckpointError for a scaling that is not known."""
    scaling = j.get("rope_parameters") or j.get("rope_scaling") or {}  # as newer and as older files name it
    base = scaling.get("rope_theta") or j.get("rope_theta") or 10_000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    match kind:
        case "default":
            return Rope(base, size)
        case "linear":
            return Rope(base, size, Linear(scaling["factor"]))
        case "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            return Rope(base, size, Llama3(scaling["factor"], low, high, scaling["original_max_position_embeddings"]))
        case "yarn":
            original = scaling.get("original_max_position_embeddings") or j["max_position_embeddings"]
            return Rope(base, size, Yarn(scaling["factor"], original))
    raise CheckpointError(f"config.json asks for rope_type = {kind!r}; known are default, linear, llama3 and yarn")


def _llama_places(c: Config) -> Iterator[tuple[str, Where]]:
    yield "embed/embedding", Where(("model.embed_tokens.weight",))
    yield "norm/scale", Where(("model.norm.weight",))
    if not c.tied:
        yield "head/kernel", Where(("lm_head.weight",), transposed=True)
    for i in range(c.layers):
        at, stored = f"layers/{i}", f"model.layers.{i}"
        yield f"{at}/attn_norm/scale", Where((f"{stored}.input_layernorm.weight",))
        yield f"{at}/mlp_norm/scale", Where((f"{stored}.post_attention_layernorm.weight",))
        for name in "qkvo":
            yield from _linear(f"{at}/attn/{name}", f"{stored}.self_attn.{name}_proj", False)
        for name in ("gate", "up", "down"):
            yield from _linear(f"{at}/mlp/{name}", f"{stored}.mlp.{name}_proj", False)


def _linear(path: str, tensor: str, bias: bool) -> Iterator[tuple[str, Where]]:
    yield f"{path}/kernel", Where((f"{tensor}.weight",), transposed=True)
    if bias:
        yield f"{path}/bias", Where((f"{tensor}.bias",))


FAMILIES: Mapping[str, Family] = {"llama": Family(_llama, _llama_places, ("rotary_emb.inv_freq",))}
"""By config.json's `model_type`."""


def family(j: Json) -> Family:
    """The family that config.json names. Raises CheckpointError for one that is not known."""
    kind = j.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"config.json states model_type = {kind!r}; this library loads {', '.join(FAMILIES)}: build the model in "
            "Flax NNX and quantize it with lb.quantize"
        )
    return FAMILIES[kind]
