"""`lowbit explain`."""

from __future__ import annotations

from difflib import get_close_matches

from absl import flags

import lowbit as lb
from lowbit.cli.command import Command
from lowbit.models import load
from lowbit.nn.kernel import layer_kernels


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("batch", 1, "Rows of activations.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "platform", None, ["cpu", "gpu", "tpu"], "Where it would run; here if not given.", flag_values=values
    )
    flags.DEFINE_bool("gradient", False, "List the ways to gradients, too.", flag_values=values)


def _run(given: flags.FlagValues, model: str, layer: str) -> None:
    held = layer_kernels(load(model))
    if layer not in held:
        close = get_close_matches(layer, held, n=3, cutoff=0.0) or ["none at all"]
        raise ValueError(f"{model} has no quantized layer {layer!r}; it has {', '.join(close)}")
    print(lb.explain(held[layer], batch=given.batch, platform=given.platform, gradient=given.gradient))


COMMAND = Command(
    "explain",
    ("MODEL", "LAYER"),
    "Every way to run a quantized layer's product, cheapest first by prediction, and what cannot run, with the reason.",
    ("lowbit explain build/q layers/0/mlp/up --batch 8 --platform gpu",),
    _define,
    _run,
)
