"""`lowbit allocate`."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from lowbit.cli import choosing
from lowbit.cli.command import Command, expect_free
from lowbit.models import load


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_float("bits", None, "Budget, bits per weight of the chosen layers.", flag_values=values)
    flags.DEFINE_string("plot", None, "Image file to draw harm against bits to.", flag_values=values)
    flags.DEFINE_string("resume", None, "Folder that finished layers are kept in.", flag_values=values)
    flags.DEFINE_bool("force", False, "Replace the file if there is one.", flag_values=values)
    choosing.define(values)


def _run(given: flags.FlagValues, model: str, rules: str) -> None:
    expect_free(rules, given.force)
    resume = None if given.resume is None else Path(given.resume)
    found, _ = choosing.allocated(given, model, load(model), given.bits, resume)
    found.save(rules)
    if given.plot:
        found.plot(given.plot)
    print(found)


COMMAND = Command(
    "allocate",
    ("MODEL", "RULES"),
    "Choose a format for each layer so that all stay within a budget and the estimated harm is least, and write the "
    "rules as JSON, for `lowbit quantize --rules`.",
    ("lowbit allocate examples/tinylm/model build/rules.json --bits 3.25 --plot build/rules.png",),
    _define,
    _run,
    required=("bits",),
)
