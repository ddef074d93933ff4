"""What trains in a model, by the method's name, and models with what was trained before."""

from __future__ import annotations

from typing import Any

from flax import nnx

import lowbit as lb
from lowbit.formats.low_rank import LORA_A
from lowbit.models import Decoder
from lowbit.tune import AlphaTuning, Task, alpha_tuning, apply

METHODS = ("alpha", "codebook", "lora")


def prepared(model: Decoder, method: str, rank: int) -> tuple[Decoder | AlphaTuning[Decoder], Any]:
    """A quantized model as it is before training, and the filter for what trains."""
    if method == "alpha":
        return alpha_tuning(model), lb.Scale
    if method == "codebook":
        return model, lb.Codebook
    return lb.nn.lora(model, rank, rngs=nnx.Rngs(0)), nnx.LoRAParam


def with_task(model: Decoder, file: str | None) -> Decoder:
    """The model with a task that `lowbit tune` wrote, or as it is. The names of its arrays tell the method."""
    if file is None:
        return model
    task = Task.load(file)
    ranks = [value.shape[-1] for name, value in task.values.items() if name.endswith(f"/{LORA_A}")]
    method = "lora" if ranks else "alpha" if any(name.endswith("_first") for name in task.values) else "codebook"
    base = prepared(model, method, max(ranks, default=1))[0]
    return apply(base.model if isinstance(base, AlphaTuning) else base, task)
