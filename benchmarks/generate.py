"""Tokens a second and bytes a token of generation, dense and quantized.

    python benchmarks/generate.py [--batch 1] [--dp] [--smoke] [--json out.json]

A random model, shaped as those of Llama are, is timed in each format and with each kind of cache in turn, in one run.
Prompts are read as generation reads them, without logits: of the last layer that is keys and values alone. `--smoke`
takes a tiny model, to see that all runs.

`--dp` instead times the tiny language model of examples/ with layers that choose their widths as they run (DP-LLM):
with thresholds that they choose by, with thresholds that leave them no choice and are compared with all the same, and
without estimates, by widths that are given as arrays or known when it is compiled. Where there is no choice, that and
given widths differ by what choosing costs; `benchmarks/selector.py` adds what it costs in products as large as those of
an 8B model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

if __name__ == "__main__":  # as a script; as a module it has the repository's root already
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lowbit as lb
from benchmarks import selector
from benchmarks.harness import Row, fastest, in_turn, interleaved, main, row
from lowbit.models import CacheKind, Config, Decoder, DenseKV, Rope, Sampling
from lowbit.models.steps import Runner

FORMATS = {"uniform4": lb.uniform(4, group=128), "bcq3": lb.bcq(3, group=128)}
CACHES: dict[str, CacheKind] = {
    "int8": lb.models.Int8KV(), "fp8": lb.models.Fp8KV(), "kivi4": lb.models.Kivi(4), "kivi2": lb.models.Kivi(2),
}  # fmt: skip

SHAPES_8B = {"width": 4096, "hidden": 14336}
FOLDER = Path(__file__).parents[1] / "examples/tinylm/model"
BLOCKS = ("layers/*/attn/*", "layers/*/mlp/*")
"""The linear layers that choose their widths."""


@dataclass(frozen=True)
class Sizes:
    """Of the model and what it does: `batch` prompts of `prompt` tokens, and then `new` ones each."""

    width: int = 1024
    hidden: int = 2816
    layers: int = 4
    vocab: int = 8192
    batch: int = 1
    prompt: int = 512
    new: int = 128


TINY = Sizes(width=256, hidden=768, layers=3, vocab=256, prompt=64, new=128)
"""The model in `FOLDER`."""
SMOKE = Sizes(width=128, hidden=128, layers=1, vocab=64, prompt=16, new=2)


def dense(s: Sizes) -> Decoder:
    """Heads of 64, two of queries to one of keys and values."""
    config = Config(
        vocab=s.vocab, width=s.width, layers=s.layers, heads=s.width // 64, kv_heads=s.width // 128, head=64,
        hidden=s.hidden, context=s.prompt + s.new, ropes=(Rope(10_000.0, 64),) * s.layers,
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0))


def quantized(model: Decoder, fmt: lb.Format) -> Decoder:
    """All but the embedding. Greedy codes: how good they are does not change the time."""
    quantizer = lb.greedy() if fmt.name == "bcq" else None
    return lb.quantize(model, [lb.Rule("embed", None), lb.Rule("**", fmt, quantizer)])


def read_in_a_step(model: Decoder, cache: Any) -> int:
    """Bytes of all weights but the embedding, of which a token reads one row, and of the cache, with its free slots."""
    told = lb.report(model)
    weights = sum(r.bytes for r in told.rows if r.layer != "embed") + told.other_bytes
    return weights + sum(a.nbytes for a in jax.tree.leaves(cache))


class Timed:
    """One model with one kind of cache, ready to be timed."""

    def __init__(self, model: Decoder, kind: CacheKind, s: Sizes) -> None:
        self.s, self.runner = s, Runner(model, kind, Sampling())
        self.prompts = list(np.random.default_rng(0).integers(0, s.vocab, (s.batch, s.prompt)).astype(np.int32))
        self.filled = self.prefill()
        self.bytes = read_in_a_step(model, self.filled) / s.batch

    def prefill(self) -> Any:
        empty = self.runner.empty(self.s.batch, self.s.prompt + self.s.new)
        return self.runner.store(empty, self.prompts, 0, self.s.prompt)

    def decode(self) -> np.ndarray:
        cache, seeds = jax.tree.map(jnp.copy, self.filled), np.zeros(self.s.batch, np.uint32)
        tokens, positions = np.zeros(self.s.batch, np.int32), np.full(self.s.batch, self.s.prompt, np.int32)
        for i in range(self.s.new):
            tokens, cache, _ = self.runner.step(cache, tokens, positions + i, seeds)
        return tokens


def choosing(s: Sizes, model: Decoder) -> dict[str, Decoder]:
    """With 3 and 4 bits to choose from: by thresholds, forced to one of the two, and of that width alone, given as an
    array or known when it is compiled."""
    small = lb.quantize(model, {**dict.fromkeys(BLOCKS, lb.any_precision(3, 6)), "**": None})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, s.vocab, (4, s.prompt)), jnp.int32)
    start = lb.tune.blended(small, 6, 3.5, layers=BLOCKS)
    found = lb.tune.thresholds(start, model, [tokens], estimators=lb.tune.Estimators(steps=0), progress=False)

    def at(threshold: float) -> Decoder:
        values = {n: jnp.float32(threshold) if n.endswith("/threshold") else v for n, v in found.values.items()}
        return lb.tune.switched(small, replace(found, values=values))

    forced = {"forced3": at(np.inf), "forced4": at(-np.inf)}
    given = {f"given{b}": lb.at_width(small, jnp.int32(b)) for b in (3, 4)}
    known = {f"known{b}": lb.at_width(small, b) for b in (3, 4)}
    return {"chosen": lb.tune.switched(small, found), **forced, **given, **known}


def measure_choosing(batch: int, smoke: bool = False) -> Iterator[Row]:
    """A step of decoding, beside one whose widths are given."""
    s = replace(SMOKE if smoke else TINY, batch=batch)
    model = dense(s) if smoke else lb.models.load(FOLDER)
    timed = {name: Timed(of, DenseKV(), s) for name, of in choosing(s, model).items()}
    seconds = in_turn({name: t.decode for name, t in timed.items()}, rounds=3 if smoke else 9)
    for name in seconds:
        base = "given4" if name.endswith("4") else "given3"
        own, others = ([t / s.new for t in seconds[n]] for n in (name, base))
        yield fastest(f"{name}_step", own, f"{base}_step", others)
    yield from selector.measure(**SHAPES_8B, smoke=smoke)


def measure(batch: int, smoke: bool = False, dp: bool = False) -> Iterator[Row]:
    if dp:
        yield from measure_choosing(batch, smoke)
        return
    s = replace(SMOKE if smoke else Sizes(), batch=batch)
    model = dense(s)
    timed = {"dense": Timed(model, DenseKV(), s)}
    timed |= {name: Timed(quantized(model, fmt), DenseKV(), s) for name, fmt in FORMATS.items()}
    timed |= {f"dense_{name}_cache": Timed(model, kind, s) for name, kind in CACHES.items()}
    for what, tokens in ("prefill", s.batch * s.prompt), ("decode", s.batch * s.new):
        programs: dict[str, Callable[[], Any]] = {name: getattr(t, what) for name, t in timed.items()}
        rates = {name: tokens / seconds for name, seconds in interleaved(programs, rounds=3).items()}
        for name, rate in rates.items():
            yield row(f"{name}_{what}", rate, "tokens/s", "dense", rates["dense"])
    for name, t in timed.items():
        yield row(f"{name}_read", t.bytes, "bytes/token", "dense", timed["dense"].bytes)


if __name__ == "__main__":
    main(
        "Generation on this machine's default device",
        lambda batch, smoke, dp: list(measure(batch, smoke, dp)),
        batch=1,
        smoke=False,
        dp=False,
    )
