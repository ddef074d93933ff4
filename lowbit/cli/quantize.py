"""`lowbit quantize`."""

from __future__ import annotations

import shutil
from pathlib import Path

from absl import flags

import lowbit as lb
from lowbit.cli import choosing
from lowbit.cli.command import Command, UsageError, expect_free
from lowbit.cli.spelling import format_of, quantizer_of, read_rules
from lowbit.models import Decoder, load, save
from lowbit.models.save import expect_replaceable
from lowbit.nn.rules import Rule, needed


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_float("bits", None, "Budget, bits per weight of the quantized layers.", flag_values=values)
    flags.DEFINE_string("format", None, "One format for all, such as 'uniform(4, group=128)'.", flag_values=values)
    flags.DEFINE_string("rules", None, "JSON file of rules, as `lowbit allocate` writes it.", flag_values=values)
    flags.DEFINE_bool("force", False, "Replace the folder if there is one.", flag_values=values)
    choosing.define(values)


def _run(given: flags.FlagValues, source: str, target: str) -> None:
    if sum(given[name].value is not None for name in ("bits", "format", "rules")) != 1:
        raise UsageError("give one of --bits, --format and --rules")
    expect_free(target, given.force)
    expect_replaceable(target, given.force)
    resume = Path(f"{target}.unfinished")
    try:
        model = _quantized(given, source, resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished layers are in {resume}: the same command goes on after them") from None
    save(model, target, source=source, overwrite=given.force)
    shutil.rmtree(resume)
    found = lb.report(model)
    print(found)
    print(f"wrote {target}: {found.bytes:,} bytes, {found.bits_per_weight:.2f} bits per weight, dense layers counted")


def _quantized(given: flags.FlagValues, source: str, resume: Path) -> Decoder:
    if given.bits is not None:
        dense = load(source)
        found, stats = choosing.allocated(given, source, dense, given.bits, resume)
        return lb.quantize(dense, found.rules, stats=stats, donate=True, resume=resume)
    rules = read_rules(given.rules) if given.rules else [_rule(given)]
    if given.calibration is None:
        return load(source, rules, resume=resume)
    wanted = {name for rule in rules if rule.format is not None for name in needed(rule)}
    if not wanted:
        raise UsageError(
            "--calibration: none of the quantizers takes statistics; name one, such as --quantizer='gptq()'"
        )
    dense = load(source)
    stats = choosing.statistics(given, source, dense, wanted, resume)
    return lb.quantize(dense, rules, stats=stats, donate=True, resume=resume)


def _rule(given: flags.FlagValues) -> Rule:
    return Rule(given.layers, format_of(given.format), quantizer_of(given.quantizer) if given.quantizer else None)


COMMAND = Command(
    "quantize",
    ("IN", "OUT"),
    "Quantize the layers of a checkpoint folder. Each finished layer is kept in OUT.unfinished, so that the same "
    "command goes on where it was stopped; OUT appears whole or not at all.",
    (
        "lowbit quantize examples/tinylm/model build/q --bits 3.25",
        "lowbit quantize examples/tinylm/model build/q4 --format 'uniform(4)' --quantizer gptq --calibration README.md",
    ),
    _define,
    _run,
)
