"""What config.json says of a model, and where its parameters lie in the checkpoint, family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.io.error import CheckpointError
from lowbit.models.config import Config
from lowbit.models.rope import Linear, Llama3, Rope, Yarn

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Where:
    """Where the value of one of the model's parameters lies in a checkpoint.

    Attributes:
      tensors: their names; several are stacked along a new first axis, as the experts of a mixture are.
      rows: of the outputs, which ones of a tensor that holds several parameters; all if None.
      transposed: whether a tensor [outputs, inputs] holds a kernel [inputs, outputs].
      plus: that is added in float32, for norms that store their scale less 1.
    """

    tensors: tuple[str, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    plus: float = 0.0


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are to be read.

    Attributes:
      config: from what config.json holds to what a model is made of. Raises KeyError for a key that is missing.
      places: from a config to each parameter, by path as in "layers/0/attn/q/kernel", and where its value lies.
      unused: endings of names of tensors that no model needs, such as tables that follow from config.json.
    """

    config: Callable[[Json], Config]
    places: Callable[[Config], Iterator[tuple[str, Where]]]
    unused: tuple[str, ...] = ()


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
