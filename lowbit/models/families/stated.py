"""What config.json states, read so that nothing it asks for is left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from math import log
from typing import Any

from lowbit.io.error import CheckpointError
from lowbit.models.config import Activation, Config
from lowbit.models.rope import Linear, Llama3, Rope, Yarn

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
TYPES: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "an integer": (int, (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
        "sliding_window_pattern", "max_window_layers", "num_local_experts", "num_experts", "num_experts_per_tok",
        "n_embd", "n_head", "n_layer", "n_inner", "n_positions", "ffn_dim", "type_vocab_size", "pad_token_id",
        "original_max_position_embeddings",
    )),
    "a number": (float, (
        "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq",
        "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
        "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim",
    )),
    "true or false": (bool, (
        "tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "use_sliding_window",
        "scale_attn_weights", "do_layer_norm_before", "enable_bias", "truncate",
    )),
}  # fmt: skip
"""What the values of keys must be, where they are not null, in config.json and in the rotations it describes."""
FULL, SLIDING = "full_attention", "sliding_attention"


class Stated(dict[str, Any]):
    """Keys and values of config.json, or of the object in it that `at` names."""

    def __init__(self, given: Mapping[str, Any], at: str = "") -> None:
        super().__init__(given)
        self.at = at

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"config.json lacks {self.at}{key}, which a model_type of its kind needs: add it")

    def known(self, key: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """What the value of a key means. Raises CheckpointError for one that is not known."""
        given = self[key] if default is None else self.get(key) or default
        if given not in known:
            raise self.refusal(key, ", ".join(repr(value) for value in known))
        return known[given]

    def only(self, key: str, *values: Any) -> None:
        """Raises CheckpointError if the key is there with another value than these."""
        if (given := self.get(key)) is not None and given not in values:
            raise self.refusal(key, " or ".join(repr(value) for value in values) or "none")

    def refusal(self, key: str, known: str) -> CheckpointError:
        return CheckpointError(
            f"config.json states {self.at}{key} = {self[key]!r}, which this library does not compute; it knows {known}"
        )


def reader(make: Callable[[Stated], Config]) -> Callable[[Mapping[str, Any]], Config]:
    """A function from plain JSON whose errors are all CheckpointErrors."""

    @wraps(make)
    def read(j: Mapping[str, Any]) -> Config:
        stated = Stated(j)
        _check_types(stated)
        try:
            return make(stated)
        except CheckpointError:
            raise
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"config.json describes no model: {error}") from error

    return read


def _check_types(j: Stated) -> None:
    for what, (kind, keys) in TYPES.items():
        for key in keys:
            if (given := j.get(key)) is None or type(given) is kind or (kind is float and type(given) is int):
                continue
            raise CheckpointError(f"config.json states {j.at}{key} = {given!r}: it must be {what}")


def head_size(j: Stated) -> int:
    return j.get("head_dim") or j["hidden_size"] // j["num_attention_heads"]


def windows(j: Stated, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Of each layer, by `layer_types`, or by the rule of the family where a file is older than that key."""
    kinds = j.get("layer_types") or [SLIDING if sliding(i) else FULL for i in range(j["num_hidden_layers"])]
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise CheckpointError(f"config.json states layer_types of {sorted(unknown)}; known are {FULL} and {SLIDING}")
    return tuple(j["sliding_window"] if kind == SLIDING else None for kind in kinds)


def rope(j: Stated, base: float = 10_000.0, *, partial: bool = False) -> Rope:
    """The rotation that config.json asks for, of all layers.

    Args:
      j: all of config.json.
      base: where it states none.
      partial: whether the family may rotate a part of each head.
    """
    key = "rope_scaling" if j.get("rope_scaling") else "rope_parameters"  # as older and as newer files name it
    return rotation(j, Stated(j.get(key) or {}, f"{key}."), j.get("rope_theta") or base, partial=partial)


def rotation(j: Stated, given: Stated, base: float, *, partial: bool = False) -> Rope:
    """See `rope`; `given` is the object in config.json that describes the rotation."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            raise given.refusal(key, "one rotation for all layers")
    _check_types(given)
    key = "partial_rotary_factor"
    given.setdefault(key, j.get(key) or 1.0)
    if not partial:
        given.only(key, 1.0)
    base, size = given.get("rope_theta") or base, int(head_size(j) * given[key])
    kind = "type" if given.get("rope_type") is None else "rope_type"
    return Rope(base, size, given.known(kind, _SCALINGS, "default")(j, given))


def _yarn(j: Stated, given: Stated) -> Yarn:
    original = _original(j, given)
    factor = given.get("factor") or j["max_position_embeddings"] / original
    one, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    gain = given.get("attention_factor")
    if gain is None:
        gain = _gain(factor, one) / _gain(factor, all_dims) if one and all_dims else _gain(factor, 1.0)
    turns = given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0
    return Yarn(factor, original, *turns, gain, given.get("truncate", True))


def _gain(factor: float, scale: float) -> float:
    return 0.1 * scale * log(max(factor, 1.0)) + 1.0


def _llama3(j: Stated, given: Stated) -> Llama3:
    return Llama3(given["factor"], given["low_freq_factor"], given["high_freq_factor"], _original(j, given))


def _original(j: Stated, given: Stated) -> int:
    key = "original_max_position_embeddings"
    return j.get(key) or given.get(key) or j["max_position_embeddings"]


_SCALINGS: Mapping[str, Callable[[Stated, Stated], Linear | Llama3 | Yarn | None]] = {
    "default": lambda j, given: None,
    "linear": lambda j, given: Linear(given["factor"]),
    "llama3": _llama3,
    "yarn": _yarn,
}
