"""`lowbit generate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from lowbit.cli import texts
from lowbit.cli.command import Command
from lowbit.cli.tasks import with_task
from lowbit.models import CacheKind, DenseKV, Fp8KV, Int8KV, Kivi, Sampling, load, stop_tokens, stream, tokenizer
from lowbit.nn import EffectiveBits

CACHES: Mapping[str, CacheKind] = {
    "dense": DenseKV(), "int8": Int8KV(), "fp8": Fp8KV(), "kivi4": Kivi(bits=4), "kivi2": Kivi(bits=2),
}  # fmt: skip


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("prompt", None, "What to continue; read from standard input if -.", flag_values=values)
    flags.DEFINE_integer("tokens", 128, "How many to add, at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token each time.", flag_values=values)
    flags.DEFINE_integer("top_k", None, "Of the k likeliest tokens only.", flag_values=values)
    flags.DEFINE_float("top_p", None, "Of the likeliest tokens that have this share together.", flag_values=values)
    flags.DEFINE_float("min_p", None, "Of tokens with this share of the likeliest one's.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the sampling.", flag_values=values)
    flags.DEFINE_string("task", None, "File of `lowbit tune`, to put into the model.", flag_values=values)
    flags.DEFINE_bool("bits", False, "Of a model of --dp, also print the effective bits a step.", flag_values=values)
    flags.DEFINE_enum("cache", "dense", list(CACHES), "How keys and values are stored.", flag_values=values)


def _run(given: flags.FlagValues, folder: str) -> None:
    sampling = Sampling(given.temperature, given.top_k, given.top_p, given.min_p)
    model, spelled = with_task(load(folder), given.task), tokenizer(folder)
    prompt = texts.encoded(folder, model, sys.stdin.read() if given.prompt == "-" else given.prompt).tolist()
    made: list[int] = []
    widths: list[EffectiveBits] = []
    steps: Any = stream(
        model, [prompt], given.tokens, sampling=sampling, stop=stop_tokens(folder), seed=given.seed,
        cache=CACHES[given.cache], bits=given.bits,
    )  # fmt: skip
    shown = ""
    for step in steps:
        if given.bits:
            widths.append(step.bits)
        made.append(int((step.tokens if given.bits else step)[0]))
        text = spelled.decode(made)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(spelled.decode(made)[len(shown) :])
    if widths:
        means = [float(bits.mean) for bits in widths]
        print(f"{sum(means) / len(means):.3f} effective bits, from {min(means):.3f} to {max(means):.3f} a step")


COMMAND = Command(
    "generate",
    ("MODEL",),
    "Continue a prompt; text is shown as it is made.",
    ("lowbit generate build/q --prompt 'def '",),
    _define,
    _run,
    required=("prompt",),
)
