"""`lowbit report`."""

from __future__ import annotations

import json

from absl import flags

import lowbit as lb
from lowbit.cli.command import Command
from lowbit.models import load


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("json", False, "Print JSON in place of a table.", flag_values=values)


def _run(given: flags.FlagValues, model: str) -> None:
    found = lb.report(load(model))
    print(json.dumps(found.to_dict(), indent=1) if given.json else found)


COMMAND = Command(
    "report",
    ("MODEL",),
    "What a model stores, layer by layer: formats, bits per weight, bytes, and errors where it was quantized here.",
    ("lowbit report build/q",),
    _define,
    _run,
)
