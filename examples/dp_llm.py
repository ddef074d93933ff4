"""DP-LLM beside mixes of widths that are chosen before a model runs: what is lost at the same effective bits.

    python examples/dp_llm.py [--out dp_llm]
    python examples/dp_llm.py --model FOLDER --text FILE [--steps 5000 --rate 1e-2 --length 512]

Without `--model` it is the tiny language model, on Python's source as it was trained on, and measured on code that it
never saw; of another text the last tenth is held out. Each figure is of the same sequences, teacher-forced, and each
position chooses its own widths.

Writes results.json as it goes, from which a run that was killed goes on, and table.md, curve.png, widths.png and
drift.png at the end. Exits with 1 where something that is claimed does not hold.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import exp, log, nan
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

if not __package__:  # run as a file: Python then looks for packages beside it, and not above
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import lowbit as lb
from benchmarks.harness import machine
from examples import dp_plots, precisions
from examples.precisions import MIXES, Settings, Subject
from examples.tinylm import weights
from lowbit.tune.precision import blends

BATCH = 16
"""Sequences at a time."""
TOLERANCE = 0.02
"""Of the target, that effective bits may be off."""
PAIRS = ((4, 5), (4, 6), (3, 5), (3, 6))
PAIRS_AT = 4.5
"""As published."""
DP, EXACT, BLENDED = "DP-LLM", "DP-LLM, exact", "DP-LLM, blended"
ERRORS = 2.0
"""Standard errors of a mean of differences that may be chance."""


@dataclass(frozen=True)
class Row:
    """What was measured of a model.

    Attributes:
      target: bits a weight that were asked for.
      bits: effective bits, the mean over positions.
      layers: the same by layer.
      losses: bits a byte of each sequence.
      pairs: of layers that choose, their two widths.
      of_queries: effective bits of each sequence, of a model that chooses.
    """

    method: str
    target: float
    bits: float
    perplexity: float
    bits_per_byte: float
    layers: dict[str, float]
    losses: list[float] = field(default_factory=list)
    pairs: dict[str, tuple[int, int]] = field(default_factory=dict)
    of_queries: list[float] = field(default_factory=list)

    def drift(self, share: float) -> float:
        """What so many of the sequences stay within, relative to the mean of all: of effective bits."""
        return float(np.quantile(np.abs(np.array(self.of_queries) / np.mean(self.of_queries) - 1), share))

    def over(self, other: Row) -> tuple[float, float]:
        """By how many bits a byte this loses more than another on the same sequences, and the standard error."""
        differences = np.array(self.losses) - np.array(other.losses)
        count = len(differences)
        return float(differences.mean()), float(differences.std(ddof=1) / count**0.5) if count > 1 else nan


Nats = np.ndarray[Any, np.dtype[np.float64]]
Made = dict[tuple[str, float], Row]
"""By method and target."""


@nnx.jit
def _chosen(model: Any, tokens: jax.Array) -> tuple[jax.Array, lb.nn.EffectiveBits]:
    """The loss and the widths of each sequence."""
    return jax.vmap(lambda one: lb.nn.effective_bits(lambda m: precisions.mean_loss(m, one[None]), model))(tokens)


@nnx.jit
def _fixed(model: Any, tokens: jax.Array, widths: dict[str, jax.Array]) -> jax.Array:
    read = lb.at_width(model, widths) if widths else model
    return jax.vmap(lambda one: precisions.mean_loss(read, one[None]))(tokens)


def _over(s: Subject, call: Callable[..., Any], *given: Any) -> Any:
    """What a function of a model and sequences gives, for all that are held out."""
    held = s.text.held[: s.settings.held]
    parts = [call(*given[:1], jnp.asarray(held[i : i + BATCH]), *given[1:]) for i in range(0, len(held), BATCH)]
    return jax.tree.map(lambda *of: np.concatenate([np.asarray(a, np.float64) for a in of]), *parts)


def _row(s: Subject, method: str, target: float, nats: Nats, layers: Mapping[str, float], **more: Any) -> Row:
    bits = sum(s.sizes[path] * b for path, b in layers.items()) / sum(s.sizes.values())
    losses = nats / log(2) / s.text.bytes_per_token
    return Row(
        method, target, bits, exp(nats.mean()), float(losses.mean()), dict(layers), losses.round(6).tolist(), **more
    )


def of_widths(s: Subject, method: str, target: float, widths: Mapping[str, int]) -> Row:
    """Of one width a layer."""
    nats = _over(s, _fixed, s.small, {path: jnp.int32(b) for path, b in widths.items()})
    return _row(s, method, target, nats, widths)


def of_choices(s: Subject, method: str, target: float, found: lb.tune.Thresholds) -> Row:
    """Of layers that choose."""
    nats, bits = _over(s, _chosen, lb.tune.switched(s.small, found))
    pairs = {p: (int(v["low"]), int(v["high"])) for p, v in found.layers.items() if np.isfinite(v["threshold"])}
    layers = {path: float(bits.layers[path].mean()) for path in s.sizes}
    return _row(s, method, target, nats, layers, pairs=pairs, of_queries=bits.mean.round(6).tolist())


def sweep(s: Subject, targets: Sequence[float], done: Made) -> Iterator[Row]:
    """Every method at every target, and uniform widths."""
    for b in s.settings.widths:
        if ("uniform", b) not in done:
            yield of_widths(s, "uniform", b, dict.fromkeys(s.sizes, b))
    for target in targets:
        if (DP, target) in done:  # the last one
            continue
        for method, harm in MIXES.items():
            yield of_widths(s, method, target, precisions.mix(s, harm(s), target))
        model = precisions.precise(s, target)
        layers = {path: float(blend.bits) for path, blend in blends(model).items()}
        yield _row(s, BLENDED, target, _over(s, _fixed, model, {}), layers)
        yield of_choices(s, EXACT, target, precisions.thresholds(s, model, None))
        yield of_choices(s, DP, target, precisions.thresholds(s, model, s.estimators))


def pairs(s: Subject, target: float, done: Made) -> Iterator[Row]:
    """Two widths for all layers, by the exact errors."""
    for low, high in PAIRS:
        if (f"({low}, {high})", target) in done:
            continue
        model = precisions.precise(s, target, most=high, widths=(low, high))
        yield of_choices(s, f"({low}, {high})", target, precisions.thresholds(s, model, None))


def broken(rows: Sequence[Row]) -> list[str]:
    """What does not hold of what is claimed: that layers which choose use both widths, that effective bits are at the
    target, and that no mix loses less than DP-LLM at the same target, beyond what may be chance."""
    wrong = []
    for r in (r for r in rows if r.pairs):
        at = f"{r.method} at {r.target}"
        for path, (low, high) in r.pairs.items():
            if not low < r.layers[path] < high:
                wrong.append(f"{at}: layer {path!r} has {r.layers[path]} bits always, of {low} and {high}")
        if not abs(r.bits / r.target - 1) <= TOLERANCE:
            wrong.append(f"{at}: {r.bits:.3f} effective bits, more than {TOLERANCE:.0%} off")
    for r, mix in beside(rows, (DP,)):
        more, error = r.over(mix)
        if not more <= ERRORS * error:  # nor NaN
            wrong.append(f"{r.method} at {r.target} loses {more:.4f} bits a byte to {mix.method}, +- {error:.4f}")
    return wrong


def beside(rows: Sequence[Row], methods: Sequence[str] = (DP, EXACT)) -> list[tuple[Row, Row]]:
    """Rows of layers that choose, each with those of the mixes at its target."""
    own, mixes = ([r for r in rows if r.method in names] for names in (methods, MIXES))
    return [(r, mix) for r in own for mix in mixes if mix.target == r.target]


def gains(rows: Sequence[Row]) -> str:
    """What layers that choose lose more than mixes, in bits a byte with its standard error, as Markdown."""
    names = [f"{method} over {mix}" for method in (DP, EXACT) for mix in MIXES]
    found = {(r.target, f"{r.method} over {mix.method}"): r.over(mix) for r, mix in beside(rows)}
    lines = [f"| target | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for target in sorted({target for target, _ in found}):
        cells = ("{:+.4f} ± {:.4f}".format(*found[target, name]) for name in names)
        lines.append(f"| {target:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [
        "| target | method | effective bits | perplexity | bits/byte | drift p90 | p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r.target, r.method)):
        drift = f"{r.drift(0.9):.2%} | {r.drift(0.99):.2%}" if r.of_queries else " | "
        lines.append(
            f"| {r.target:g} | {r.method} | {r.bits:.3f} | {r.perplexity:.4f} | {r.bits_per_byte:.4f} | {drift} |"
        )
    return "\n".join(lines) + "\n"


def read(result: Mapping[str, Any], name: str) -> list[Row]:
    """The rows of a file of results."""
    return [Row(**of | {"pairs": {path: tuple(pair) for path, pair in of["pairs"].items()}}) for of in result[name]]


def run(s: Subject, targets: Sequence[float], out: pathlib.Path, say: Callable[[str], None]) -> list[str]:
    """Measures and writes everything; what is claimed and does not hold."""
    out.mkdir(parents=True, exist_ok=True)
    dense = float(_over(s, _fixed, s.dense, {}).mean())
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": asdict(s.settings),
        "most": dict(s.most),
        "carried": precisions.carried(s),
        "float": {"perplexity": exp(dense), "bits_per_byte": dense / log(2) / s.text.bytes_per_token},
    }
    made = {name: _kept(out, result, name) for name in ("rows", "pairs")}
    has_pairs = s.settings.least <= PAIRS[-1][0] and s.settings.most >= PAIRS[-1][1]
    rows = sweep(s, targets, made["rows"])
    for name, every in (("rows", rows), ("pairs", pairs(s, PAIRS_AT, made["pairs"]) if has_pairs else ())):
        for row in every:
            made[name][row.method, row.target] = row
            result |= {n: [asdict(r) for r in of.values()] for n, of in made.items()}
            (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
            say(table([row]).splitlines()[-1])
    found, wide = (list(of.values()) for of in made.values())
    (out / "table.md").write_text("\n".join((table(found), gains(found), table(wide))))
    dp_plots.every(found, DP, out)
    return broken([*found, *wide])


def _kept(out: pathlib.Path, result: Mapping[str, Any], name: str) -> Made:
    """What an earlier run has written that did as much with the same model."""
    file = out / "results.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    same = all(before.get(n) == result[n] for n in ("settings", "most", "float"))
    return {(r.method, r.target): r for r in read(before, name)} if same and name in before else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("dp_llm"))
    parser.add_argument("--model", help="a folder that lb.models.load opens")
    parser.add_argument("--text", type=pathlib.Path, help="for that model")
    parser.add_argument("--targets", type=float, nargs="+", help="seven between the least width and the budget")
    for f in fields(Settings):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    given = vars(parser.parse_args())
    s = Settings(**{f.name: given[f.name] for f in fields(Settings)})
    if (given["model"] is None) != (given["text"] is None):
        parser.error("--model and --text go together: a model, and a text for it")
    targets = given["targets"] or np.linspace(s.least, s.budget, 9)[1:-1].round(4).tolist()
    folder = given["model"] or str(weights.MODEL)
    dense = lb.models.load(folder, dtype=jnp.float32)
    text = precisions.text_of(folder, dense, given["text"], s.length)
    say = Console(width=120, markup=False, highlight=False).print
    wrong = run(precisions.prepared(dense, text, s), targets, given["out"], say)
    say(f"wrote results.json, table.md, curve.png, widths.png and drift.png in {given['out']}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
