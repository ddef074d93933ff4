"""`lowbit compare`."""

from __future__ import annotations

import json

import jax.numpy as jnp
from absl import flags

import lowbit as lb
from lowbit.cli import texts
from lowbit.cli.command import Command
from lowbit.models import load


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("text", None, "File of the text that both are given.", flag_values=values)
    flags.DEFINE_integer("length", 512, "Tokens in a window.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("samples", 4, "Windows, at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("plot", None, "Image file to draw the errors to.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print JSON in place of a table.", flag_values=values)


def _run(given: flags.FlagValues, model: str, other: str) -> None:
    first, second = load(model), load(other)
    ids = texts.encoded(model, first, texts.read(given.text))
    batch = jnp.concatenate(texts.samples(ids, given.samples, given.length, given.text))
    found = lb.compare(first, second, batch)
    if given.plot:
        found.plot(given.plot)
    print(json.dumps(found.to_dict(), indent=1) if given.json else found)


COMMAND = Command(
    "compare",
    ("MODEL", "OTHER"),
    "Run two models, the dense one first, on the same text, and say how far the outputs of each layer are apart.",
    ("lowbit compare examples/tinylm/model build/q --text README.md",),
    _define,
    _run,
    required=("text",),
)
