"""Every quantizer on the same model, beside rounding to nearest and GPTQ: bits a weight against what is lost.

    python examples/quality.py [--out quality] [--bits 2 3 4]
    python examples/quality.py --model layers.safetensors [--inputs inputs.safetensors]

Without `--model` it is the tiny language model: what quantizers know of its inputs and gradients comes from 256 windows
of its training text, and what is lost is measured on text that it never saw. Of another file every float matrix
[out, in] that is not all zero is a linear layer, and `--inputs` has rows [rows, in] under the same names: the first
half is to calibrate on, and on the second is measured.

Writes quality.json, quality.md and quality.png. Exits with 1 where an order that is claimed does not hold.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

if not __package__:  # run as a file: Python then looks for packages beside it, and not above
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import lowbit as lb
from benchmarks.harness import machine
from examples import variants
from examples.subjects import Subject, of_file, tinylm
from examples.tinylm.evaluate import bits_per_byte
from lowbit.ir import cost

EVERY = 2
"""Each variant is measured on every second window of the held-out code: 85 KB, each byte in its true context."""
CLAIMS = (
    ("LNQ, GuidedQuant", "LNQ", (2, 3)),
    ("LNQ", "SqueezeLLM", (2, 3)),
    ("SqueezeLLM", "k-means", (2, 3)),
    ("GPTQ", "RTN", (2, 3, 4)),
    ("AWQ", "RTN", (3,)),
    ("allocated", "RTN", (3,)),
)
"""(better, than, at these bits), by bits per byte."""


@dataclass(frozen=True)
class Row:
    """What was measured of a variant.

    Attributes:
      bits_per_weight: that a product reads, scales and tables counted: of nested codes, those of one width.
      sqnr_db: of the weights, the mean over layers.
      output_error: of each layer's output, relative, the mean over layers, with all layers before it quantized too.
      bits_per_byte: of held-out text; None for a model that is not of language.
    """

    method: str
    bits: int
    bits_per_weight: float
    sqnr_db: float
    output_error: float
    bits_per_byte: float | None


def measure(s: Subject, v: variants.Variant, every: int) -> Row:
    reference, small = v.make(s)
    kernels = lb.nn.kernels(small)
    dense = {"/".join(map(str, at)): v.get_value() for at, v in nnx.to_flat_state(nnx.state(reference, nnx.Param))}
    decibels = [_sqnr(dense[path], lb.dequantize(k.array)) for path, k in kernels.items()]
    bits = 8 * sum(cost(k.type.decode).bytes for k in kernels.values()) / sum(prod(k.shape) for k in kernels.values())
    errors = [r.relative_error for r in lb.compare(reference, small, s.held).rows[:-1]]
    loss = None if s.text is None else bits_per_byte(small, s.text, every=every)  # type: ignore[arg-type]
    return Row(v.method, v.bits, bits, float(np.mean(decibels)), float(np.mean(errors)), loss)


def _sqnr(w: jax.Array, q: jax.Array) -> float:
    return float(10 * jnp.log10(jnp.square(w).sum() / jnp.square(q - w).sum()))


def sweep(s: Subject, bits: Sequence[int], every: int, say: Callable[[str], None]) -> list[Row]:
    """A row for each variant; matrices of a file may be such that a format cannot hold them, and it is said why."""
    rows = []
    for v in (v for b in bits for v in variants.every(s, b)):
        try:
            rows.append(measure(s, v, every))
        except ValueError as err:
            if s.text is not None:
                raise
            say(f"{v.method} at {v.bits} bits is left out: {err}")
            continue
        say(table(rows[-1:]).splitlines()[-1])
    return rows


def broken(rows: list[Row]) -> list[str]:
    """The claims that do not hold, of those whose two sides were measured."""
    loss = {(r.method, r.bits): r.bits_per_byte for r in rows if r.bits_per_byte is not None}
    pairs = [((better, b), (than, b)) for better, than, at in CLAIMS for b in at]
    return [
        f"at {a[1]} bits {a[0]} loses to {b[0]}: {loss[a]:.4f} bits a byte, {loss[b]:.4f}"
        for a, b in pairs
        if a in loss and b in loss and not loss[a] <= loss[b]  # nor NaN
    ]


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| method | bits | bits/weight | SQNR dB | output error | bits/byte |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        loss = "" if r.bits_per_byte is None else f"{r.bits_per_byte:.4f}"
        figures = f"{r.bits_per_weight:.3f} | {r.sqnr_db:.1f} | {r.output_error:.4f} | {loss}"
        lines.append(f"| {r.method} | {r.bits} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """What is lost over bits a weight, and the rows that none beats in both."""
    from matplotlib.figure import Figure

    def lost(r: Row) -> float:
        return r.output_error if r.bits_per_byte is None else r.bits_per_byte

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(dict.fromkeys(r.method for r in rows)):
        points = sorted((r.bits_per_weight, lost(r)) for r in rows if r.method == method)
        axes.plot(*zip(*points, strict=True), "osD^v<>pPX"[i % 10], label=method)
    best = [r for r in rows if not any(o.bits_per_weight <= r.bits_per_weight and lost(o) < lost(r) for o in rows)]
    front = sorted((r.bits_per_weight, lost(r)) for r in best)
    axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, label="best of all")
    of_text = rows[0].bits_per_byte is not None
    axes.set(xlabel="bits per weight", ylabel="bits per byte" if of_text else "output error", yscale="log")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quality"))
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4), default=(2, 3, 4))
    parser.add_argument("--every", type=int, default=EVERY, help="measure on each so-many-th window of the text")
    parser.add_argument("--model", type=pathlib.Path, help="a safetensors file of linear layers")
    parser.add_argument("--inputs", type=pathlib.Path, help="its inputs, under the same names")
    given = parser.parse_args()
    if given.inputs and not given.model:
        parser.error("--inputs are those of the layers of a file: name it with --model")
    say = Console(width=120, markup=False, highlight=False).print
    given.out.mkdir(parents=True, exist_ok=True)
    s = (of_file(given.model, given.inputs) if given.model else tinylm()).calibrated()
    rows = sweep(s, given.bits, given.every, say)
    if not rows:
        raise SystemExit("no variant could be made: nothing was measured")
    base = None if s.text is None else bits_per_byte(s.model, s.text, every=given.every)  # type: ignore[arg-type]
    say(table(rows))
    beside = {"hqq": version("hqq")} if find_spec("hqq") is not None else {}
    result = {"machine": machine(), "beside": beside, "float_bits_per_byte": base, "rows": [asdict(r) for r in rows]}
    (given.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / "quality.md").write_text(table(rows))
    plot(rows, given.out / "quality.png")
    say(("" if base is None else f"float: {base:.4f} bits a byte; ") + f"wrote quality.json, .md, .png in {given.out}")
    if wrong := broken(rows):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
