"""`lowbit convert`."""

from __future__ import annotations

from absl import flags

import lowbit as lb
from lowbit.cli.command import Command, expect_free
from lowbit.models import load, save


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("force", False, "Replace what is there.", flag_values=values)


def _run(given: flags.FlagValues, source: str, target: str) -> None:
    expect_free(target, given.force)
    if target.endswith(".safetensors"):
        lb.convert(source, target)
    else:
        save(load(source), target, source=source, overwrite=given.force)
    print(f"wrote {target}")


COMMAND = Command(
    "convert",
    ("IN", "OUT"),
    "Bring a checkpoint of another project (GPTQ, AWQ, compressed-tensors, AQLM, any-precision-llm, GGUF) into a form "
    "of lowbit's, without rounding anything: a folder that the other commands take, or, if OUT ends with .safetensors, "
    "a file of arrays by their names, for any model.",
    ("lowbit convert examples/tinylm/model build/dense",),
    _define,
    _run,
)
