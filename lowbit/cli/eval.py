"""`lowbit eval`."""

from __future__ import annotations

import json
from dataclasses import asdict

from absl import flags

from lowbit.cli import texts
from lowbit.cli.command import Command
from lowbit.cli.tasks import with_task
from lowbit.models import load
from lowbit.models.evaluate import evaluate
from lowbit.nn import switching


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("text", None, "File of the text.", flag_values=values)
    flags.DEFINE_integer(
        "length", None, "Tokens in a window; the model's context, at most 2048, if not given.", lower_bound=2,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("batch", 8, "Windows at a time.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("task", None, "File of `lowbit tune`, to put into the model.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)


def _run(given: flags.FlagValues, folder: str) -> None:
    model, text = with_task(load(folder), given.task), texts.read(given.text)
    model = switching(model, "row")  # as if each token were decoded alone
    ids = texts.encoded(folder, model, text)
    found = evaluate(model, ids, length=given.length, batch=given.batch, size=len(text.encode()))
    if given.json:
        print(json.dumps(asdict(found)))
    else:
        chosen = "" if found.effective_bits is None else f", {found.effective_bits:.3f} effective bits"
        score = f"{found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.3f} over {found.tokens} tokens"
        print(score + chosen)


COMMAND = Command(
    "eval",
    ("MODEL",),
    "How well a model predicts a text. Each token but the first is predicted once, from at least half a window. Of a "
    "model whose layers choose their widths, with the effective bits: each token chooses as if it were decoded alone.",
    ("lowbit eval build/q --text README.md",),
    _define,
    _run,
    required=("text",),
)
