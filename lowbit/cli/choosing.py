"""What `lowbit quantize` and `lowbit allocate` share: flags, statistics, and rules within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import lowbit as lb
from lowbit.cli import texts
from lowbit.cli.command import UsageError
from lowbit.cli.spelling import format_of, quantizer_of
from lowbit.models import Decoder
from lowbit.nn.allocate import NEEDS
from lowbit.nn.allocation import Allocation
from lowbit.nn.calibrate import OF_LOSS, LayerStats
from lowbit.nn.kinds import layers, statistic_shape
from lowbit.nn.rules import Rule, needed
from lowbit.tune import next_token_loss

GROUP = 128
"""Of the formats that a budget is spent on when none are named."""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "layers", "layers/**", "Pattern of the layers that are quantized by --bits and --format; others stay dense.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "choice", None, "With --bits, a format that layers may get, such as 'bcq(3, group=128)'; may be repeated. "
        "Integers of nearby sizes if none is given.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("quantizer", None, "How codes are found, such as 'gptq()'.", flag_values=values)
    flags.DEFINE_string("calibration", None, "File of a text to measure layers with.", flag_values=values)
    flags.DEFINE_integer("samples", 128, "Windows of it, at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", 512, "Tokens in a window.", lower_bound=2, flag_values=values)
    flags.DEFINE_enum(
        "by", "output", ["output", "loss", "trace"], "With --bits, how harm is estimated, see lb.allocate; "
        "trace is that of squared gradients. All but output need --calibration.", flag_values=values,
    )  # fmt: skip


def choices(given: flags.FlagValues, bits: float) -> list[Any]:
    """The formats that a budget of so many bits per weight is spent on."""
    if given.choice:
        formats = [format_of(text) for text in given.choice]
    else:
        sizes = range(max(1, int(bits) - 1), min(8, int(bits) + 2) + 1)
        formats = [lb.uniform(size, group=GROUP, scale_dtype="float16") for size in sizes]
    quantizer = quantizer_of(given.quantizer) if given.quantizer else None
    return [(fmt, quantizer) if quantizer else fmt for fmt in formats]


def allocated(
    given: flags.FlagValues, folder: str, model: Decoder, bits: float, resume: Path | None = None
) -> tuple[Allocation, Mapping[str, LayerStats]]:
    """The best choice of formats for the layers of a model, and what was measured of them.

    Without a text to measure with, all inputs of a layer are taken to be of one size.
    """
    formats = choices(given, bits)
    found = {path: layer for path, layer in layers(model).items() if Rule(given.layers, None).matches(path)}
    if not found:
        raise ValueError(
            f"--layers={given.layers}: none of the layers of {folder}, such as {next(iter(layers(model)))}"
        )
    if given.calibration is None:
        if given.by != "output":
            raise UsageError(f"--by={given.by} needs --calibration, a text to measure gradients with")
        stats = {path: LayerStats(jnp.ones(statistic_shape(layer, "k")), None, 0) for path, layer in found.items()}
    else:
        rules = [Rule(given.layers, *(choice if isinstance(choice, tuple) else (choice,))) for choice in formats]
        wanted = {NEEDS[given.by][-1], *(name for rule in rules for name in needed(rule))}
        measured = statistics(given, folder, model, wanted, resume)
        stats = {path: of for path, of in measured.items() if path in found}
    made = lb.allocate(model, stats, formats=formats, bits=bits, by=given.by, resume=resume)
    return made, stats


def statistics(
    given: flags.FlagValues, folder: str, model: Decoder, wanted: set[str], resume: Path | None
) -> Mapping[str, LayerStats]:
    """What the model's layers are given while it reads the text for calibration."""
    ids = texts.encoded(folder, model, texts.read(given.calibration))
    batches = texts.samples(ids, given.samples, given.length, given.calibration)
    return lb.calibrate(
        model,
        batches,
        statistics=sorted(wanted),  # type: ignore[arg-type]
        loss=mean_loss if wanted & OF_LOSS else None,
        resume=None if resume is None else resume / "calibration",
    )


def mean_loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy of int [B, T]."""
    total, count = next_token_loss(model, {"tokens": tokens, "mask": jnp.ones_like(tokens, bool)})
    return total / count
