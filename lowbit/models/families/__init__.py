"""What config.json says of a model, and where its parameters lie in the checkpoint, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.io.error import CheckpointError
from lowbit.models.families import bert, gpt, llama
from lowbit.models.families.place import Family as Family
from lowbit.models.families.place import Where as Where
from lowbit.models.families.place import value as value

FAMILIES: Mapping[str, Family] = {**llama.FAMILIES, **gpt.FAMILIES, **bert.FAMILIES}
"""By config.json's `model_type`."""


def family(j: Mapping[str, Any]) -> Family:
    """The family that config.json names. Raises CheckpointError for one that is not known."""
    kind = j.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"config.json states model_type = {kind!r}; this library loads {', '.join(FAMILIES)}: build the model in "
            "Flax NNX and quantize it with lb.quantize"
        )
    return FAMILIES[kind]
