"""The whole job on a real model: quantize, compile, measure, generate, fine-tune the scales, save.

Run `make demo`. Writes demo.png, demo.json and the tuned model to the folder given by `--out`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import lowbit as lb
from examples.tinylm import corpus, weights
from examples.tinylm.adapt import STEPS, fit, schedule
from examples.tinylm.evaluate import bits_per_byte
from examples.tinylm.generate import generate
from examples.tinylm.model import TinyLM
from lowbit.ir import cost

EVERY = {"code": 10, "topics": 2}
"""Each variant is measured on every n-th window of the held-out text: about 17 KB, so that all fit in three minutes."""
GROUP = 128
TUNED_BITS = 3
PROMPT = b'def read_file(path):\n    """Return'
RATES = {"alpha": 1.5e-3, "full": 5e-4}
"""Peak learning rates: each the best of five or more, 1.4 to 2 times apart, on the held-out prose that is reported."""


@dataclass(frozen=True)
class Variant:
    """One way to quantize: a method, and its format at some number of bits.

    Attributes:
      quantizer: the format's default if None.
      alone: of one width of a nested array, the method that makes an array of that width alone.
    """

    method: str
    bits: int
    format: lb.Format
    quantizer: Any = None
    alone: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.bits}-bit"


@dataclass(frozen=True)
class Result:
    """What was measured of one variant.

    Attributes:
      bits_per_weight: what a product reads, scales and tables included: of a nested array, one width of it.
      bytes: what is stored, all widths and the float embedding included.
    """

    name: str
    method: str
    bits_per_weight: float
    bytes: int
    bits_per_byte: float
    ms_per_token: float


def variants() -> Iterable[Variant]:
    for bits in (4, 3, 2):
        plain = lb.bcq(bits, group=GROUP, scale_dtype="float16")
        offset = lb.bcq(bits, group=GROUP, offset=True, scale_dtype="float16")
        yield Variant("RTN", bits, lb.uniform(bits, group=GROUP, scale_dtype="float16"), lb.round_to_nearest())
        yield Variant("bcq greedy", bits, plain, lb.greedy())
        yield Variant("bcq alternating", bits, plain, lb.alternating())
        yield Variant("bcq+offset alternating", bits, offset, lb.alternating())
    for bits in (4, 3):  # the least width is that of binary coding alone
        fmt = lb.any_bcq(2, 4, group=GROUP, scale_dtype="float16")
        yield Variant("any_bcq", bits, fmt.at(bits), alone="bcq alternating")
    for bits in (4, 3):
        yield Variant("any_precision", bits, lb.any_precision(2, 8).at(bits), alone="any_precision alone")
    for bits in (4, 3):
        yield Variant("any_precision alone", bits, lb.any_precision(bits, bits))
    for m, vec in ((1, 4), (2, 8)):
        fmt = lb.codebook(m, 8, vec=vec, group=GROUP, scale_dtype="float16")
        yield Variant(f"codebook m{m}v{vec}", 2, fmt, lb.residual_kmeans(rounds=10))
    for bits in (16, 8):
        yield Variant("nested_fp", bits, lb.nested_fp(bits))


def quantized(model: TinyLM, variant: Variant) -> TinyLM:
    """Every linear layer quantized; the embedding, tied to the output, stays float, as in the papers compared to."""
    return lb.quantize(model, [lb.Rule("embed", None), lb.Rule("layers/**", variant.format, variant.quantizer)])


def ms_per_token(model: TinyLM, tokens: int = 64) -> float:
    """Median time of one cached decode step at batch 1, compiled."""
    step = nnx.jit(lambda m, cache, token, pos: m.decode_step(cache, token, pos))
    cache, token = model.init_cache(1), jnp.zeros((1,), jnp.int32)
    times = []
    for pos in range(tokens):
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(step(model, cache, token, jnp.int32(pos)))
        times.append(time.perf_counter() - start)
        token = logits.argmax(-1).astype(jnp.int32)
    return 1e3 * sorted(times)[tokens // 2]


def on_sample(model: TinyLM, text: bytes, domain: str) -> float:
    return bits_per_byte(model, text, every=EVERY[domain])


def bits_read(model: TinyLM) -> float:
    types = [kernel.type for kernel in lb.nn.kernels(model).values()]
    return 8 * sum(cost(t.decode).bytes for t in types) / sum(prod(t.shape) for t in types) if types else 32.0


def measure(name: str, method: str, model: TinyLM, text: bytes) -> Result:
    stored = lb.report(model).bytes
    return Result(name, method, bits_read(model), stored, on_sample(model, text, "code"), ms_per_token(model))


def sweep(model: TinyLM, text: bytes, show: Callable[[Result], None]) -> list[Result]:
    results = [measure("fp32", "fp32", model, text)]
    show(results[0])
    for _, same in groupby(
        variants(), lambda v: (v.method, v.format.at(v.format.widths[-1]) if v.format.widths else v)
    ):
        first, *others = same
        small = quantized(model, first)
        for variant in (first, *others):  # the widths of one nested array
            read = lb.at_width(small, variant.bits) if others else small
            results.append(measure(variant.name, variant.method, read, text))
            show(results[-1])
    return results


def nested(results: list[Result]) -> Iterable[tuple[Result, Result]]:
    """Each width of a nested array, and that width alone."""
    named = {r.name: r for r in results}
    for v in variants():
        if v.alone and {v.name, f"{v.alone} {v.bits}-bit"} <= named.keys():
            yield named[v.name], named[f"{v.alone} {v.bits}-bit"]


@dataclass(frozen=True)
class Tuned:
    """Bits a byte of held-out prose, before and after tuning on other prose.

    Attributes:
      before: the 3-bit model as quantized; `after`: with its first-plane scales tuned; `full`: the float model with
        every parameter tuned, on the same windows.
      model: the tuned 3-bit model.
      trainable: numbers that trained, for the scales and for all parameters.
    """

    float_before: float
    before: float
    after: float
    full: float
    model: TinyLM
    trainable: tuple[int, int]

    @property
    def closed(self) -> float:
        """The share of the gap between `before` and `full` that tuning the scales closes."""
        return (self.before - self.after) / (self.before - self.full)


def tune(model: TinyLM, variant: Variant, train: bytes, held: bytes, steps: int = STEPS) -> Tuned:
    small = quantized(model, variant)
    tuning = lb.tune.alpha_tuning(small)
    fit(tuning.model, tuning.optimizer(optax.adam(schedule(RATES["alpha"], steps))), train, wrt=lb.Scale, steps=steps)
    full = nnx.clone(model)
    optimizer = nnx.Optimizer(full, optax.adam(schedule(RATES["full"], steps)), wrt=nnx.Param)
    fit(full, optimizer, train, wrt=nnx.Param, steps=steps)
    everything = sum(x.size for x in jax.tree.leaves(nnx.state(full, nnx.Param)))
    float_before, before, after, best = (on_sample(m, held, "topics") for m in (model, small, tuning.model, full))
    trainable = (tuning.trainable, everything)
    return Tuned(float_before, before, after, best, lb.tune.fold(tuning.model), trainable)


def rows(results: list[Result], tuned: Tuned, xz: float, whole: float) -> list[dict[str, Any]]:
    """Every figure as {name, value, unit, baseline, ratio}; the ratio is value over the baseline of this run."""
    base = results[0]
    out = [_row("held-out code: fp32 model", whole, "bits/byte", "xz -9e", xz)]
    for r in results:
        out.append(_row(f"{r.name}: bits per weight", r.bits_per_weight, "bits", "fp32", base.bits_per_weight))
        out.append(_row(f"{r.name}: model size", r.bytes, "bytes", "fp32", base.bytes))
        out.append(_row(f"{r.name}: held-out code", r.bits_per_byte, "bits/byte", "fp32", base.bits_per_byte))
        out.append(_row(f"{r.name}: decode step", r.ms_per_token, "ms/token", "fp32", base.ms_per_token))
    for r, alone in nested(results):
        out.append(
            _row(f"{r.name}: held-out code, nested", r.bits_per_byte, "bits/byte", alone.name, alone.bits_per_byte)
        )
    out.append(_row("prose, 3-bit before tuning", tuned.before, "bits/byte", "fp32 before tuning", tuned.float_before))
    out.append(_row("prose, 3-bit alpha-tuned", tuned.after, "bits/byte", "3-bit before tuning", tuned.before))
    out.append(_row("prose, fp32 fully tuned", tuned.full, "bits/byte", "3-bit before tuning", tuned.before))
    out.append(_row("share of the gap closed", tuned.closed, "", "full fine-tuning", 1.0))
    out.append(_row("trainable numbers", tuned.trainable[0], "", "full fine-tuning", tuned.trainable[1]))
    return out


def _row(name: str, value: float, unit: str, baseline: str, base: float) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": value / base}


def plot(results: list[Result], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(r.method for r in results[1:]):
        points = sorted((r.bits_per_weight, r.bits_per_byte) for r in results if r.method == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.axhline(results[0].bits_per_byte, color="black", linestyle="--", label="fp32")
    axes.set(
        xlabel="bits read per weight, scales and tables included",
        ylabel="bits per byte of held-out code",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks([2, 3, 4, 8, 16], ["2", "3", "4", "8", "16"], minor=False)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(results: list[Result]) -> Table:
    out = Table("model", "bits/weight", "bytes", "bits/byte", "ms/token")
    for column in out.columns[1:]:
        column.justify = "right"
    for r in results:
        numbers = (f"{r.bits_per_weight:.3f}", f"{r.bytes:,}", f"{r.bits_per_byte:.4f}", f"{r.ms_per_token:.2f}")
        out.add_row(r.name, *numbers)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo-out"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    say = Console(width=110, markup=False, highlight=False).print
    start = time.perf_counter()
    model = weights.load()
    code, prose = corpus.match_listed("code"), corpus.match_listed("topics")
    say(f"held-out code: {code}\nheld-out prose: {prose}")
    xz, whole = corpus.xz_bits(code.text), bits_per_byte(model, code.text)
    say(f"all held-out code: fp32 model {whole:.4f} bits/byte, xz -9e {xz:.4f}")
    say(f"\nEvery linear layer quantized in groups of {GROUP}; every {EVERY['code']}th window of the held-out code")
    results = sweep(model, code.text, lambda r: say(f"  {r.name:30} {r.bits_per_byte:.4f} bits/byte"))
    say(table(results))
    say("\nOne width of a nested array, beside an array of that width alone:")
    for r, alone in nested(results):
        over = r.bits_per_byte - alone.bits_per_byte
        say(f"  {r.name:22} {r.bits_per_byte:.4f}, {alone.name} {alone.bits_per_byte:.4f}: {over:+.4f} bits/byte")
    chosen = next(v for v in variants() if (v.method, v.bits) == ("bcq alternating", TUNED_BITS))
    for name, m in (("fp32", model), (chosen.name, quantized(model, chosen))):
        new = generate(m, PROMPT, 160, temperature=0.5)
        say(f"\n{name} continues", (PROMPT + new).decode(errors="replace"), sep="\n")
    tuned = tune(model, chosen, corpus.tune_prose(), prose.text)
    say(f"\nFrom code to prose in {STEPS} steps, bits/byte of held-out prose:")
    say(f"  fp32 {tuned.float_before:.4f}, {chosen.name} {tuned.before:.4f}")
    say(f"  {chosen.name}, scales tuned {tuned.after:.4f}  ({tuned.trainable[0]:,} numbers trained)")
    say(f"  fp32, everything tuned {tuned.full:.4f}  ({tuned.trainable[1]:,} numbers trained)")
    say(f"  tuning the scales closes {tuned.closed:.0%} of the gap")
    lb.save(tuned.model, out / "tinylm-3bit-prose.safetensors")
    plot(results, out / "demo.png")
    (out / "demo.json").write_text(json.dumps(rows(results, tuned, xz, whole), indent=1) + "\n")
    say(f"\nwrote {out}/demo.png, demo.json, tinylm-3bit-prose.safetensors")
    say(f"{time.perf_counter() - start:.0f} s on Python {platform.python_version()}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
