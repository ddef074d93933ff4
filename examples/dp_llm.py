"""DP-LLM beside mixes of widths that are chosen before a model runs: what is lost at the same effective bits.

    python examples/dp_llm.py [--out dp_llm]
    python examples/dp_llm.py --model FOLDER [--text FILE] [--steps 5000 --rate 1e-2 --length 512]

Without `--model` it is the tiny language model. Without `--text`, for a model of bytes, it is Python's source as that
was trained on, and measured on code that it never saw; of another text the last tenth is held out. Each figure is of
the same sequences, teacher-forced, and each position chooses its own widths.

Writes results.json as it goes, from which a run that was killed goes on, and table.md, curve.png, widths.png and
drift.png at the end. Exits with 1 where something that is claimed does not hold.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from math import exp, log
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
from examples.dp_table import ASYNCHRONOUS, BLENDED, DP, EXACT, PAIRS, WIDER, Row, broken, gains, read, table
from examples.precisions import HARMS, Settings, Subject
from examples.tinylm import weights
from lowbit.io.atomic import replacing
from lowbit.tune.precision import blends

BATCH = 16
"""Sequences at a time."""
PAIRS_AT = 4.5
"""As published."""
LIKE = ("settings", "most", "float", "machine")
"""What rows of one file have in common."""
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
    losses = nats / log(2) / s.text.bytes_per_token
    return Row(
        method,
        target,
        s.mean(layers),
        exp(nats.mean()),
        float(losses.mean()),
        dict(layers),
        losses.round(6).tolist(),
        **more,
    )


def of_widths(s: Subject, method: str, target: float, widths: Mapping[str, int]) -> Row:
    """Of one width a layer."""
    nats = _over(s, _fixed, s.small, {path: jnp.int32(b) for path, b in widths.items()})
    return _row(s, method, target, nats, widths)


def of_choices(s: Subject, method: str, target: float, found: lb.tune.Thresholds, *, asynchronous: bool = False) -> Row:
    """Of layers that choose."""
    nats, bits = _over(s, _chosen, lb.tune.switched(s.small, found, asynchronous=asynchronous))
    pairs = {p: (int(v["low"]), int(v["high"])) for p, v in found.layers.items() if np.isfinite(v["threshold"])}
    layers = {path: float(bits.layers[path].mean()) for path in s.sizes}
    return _row(s, method, target, nats, layers, pairs=pairs, of_queries=bits.mean.round(6).tolist())


def sweep(s: Subject, targets: Sequence[float], done: Made) -> Iterator[Row]:
    """Every method at every target, and uniform widths."""
    for b in s.settings.widths:
        if ("uniform", b) not in done:
            yield of_widths(s, "uniform", b, dict.fromkeys(s.sizes, b))
    offered = {method: precisions.offered(s, harm(s)) for method, harm in HARMS.items()}
    for target in targets:
        if (DP, target) in done:  # the last one
            continue
        for method, found in offered.items():
            yield of_widths(s, method, target, precisions.mix(found, target))
        model = precisions.precise(s, target)
        layers = {path: float(blend.bits) for path, blend in blends(model).items()}
        yield _row(s, BLENDED, target, _over(s, _fixed, model, {}), layers)
        yield of_choices(s, EXACT, target, precisions.thresholds(s, model, None))
        estimated = precisions.thresholds(s, model, s.estimators)
        yield of_choices(s, ASYNCHRONOUS, target, estimated, asynchronous=True)
        yield of_choices(s, DP, target, estimated)


def pairs(s: Subject, target: float, done: Made) -> Iterator[Row]:
    """Two widths for all layers, by the exact errors."""
    for low, high in PAIRS:
        if (f"({low}, {high})", target) in done:
            continue
        model = precisions.precise(s, target, most=high, widths=(low, high))
        yield of_choices(s, f"({low}, {high})", target, precisions.thresholds(s, model, None))


def run(s: Subject, targets: Sequence[float], out: pathlib.Path, say: Callable[[str], None]) -> list[str]:
    """Measures and writes everything in a folder; what is claimed and does not hold."""
    reach = s.mean(s.most)
    if off := [target for target in targets if not s.settings.least <= target <= reach]:
        raise SystemExit(
            f"targets {off} are not from {s.settings.least} to {reach:.3f} bits, the mean of the first phase within "
            f"{s.settings.budget:g}: give others"
        )
    nats = float(_over(s, _fixed, s.dense, {}).mean())
    exact = {"perplexity": exp(nats), "bits_per_byte": nats / log(2) / s.text.bytes_per_token}
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": asdict(s.settings),
        "most": dict(s.most),
        "carried": precisions.carried(s),
        "float": {name: round(value, 6) for name, value in exact.items()},
    }
    made = _kept(out / "results.json", result)
    has_pairs = s.settings.least <= PAIRS[-1][0] and s.settings.most >= PAIRS[-1][1]
    rows = sweep(s, targets, made["rows"])
    for name, every in (("rows", rows), ("pairs", pairs(s, PAIRS_AT, made["pairs"]) if has_pairs else ())):
        for row in every:
            made[name][row.method, row.target] = row
            result |= {n: [asdict(r) for r in of.values()] for n, of in made.items()}
            with replacing(out / "results.json") as file:
                file.write(f"{json.dumps(result, indent=1)}\n".encode())
            say(table([row]).splitlines()[-1])
    found, wide = (list(of.values()) for of in made.values())
    (out / "table.md").write_text("\n".join((table(found), gains(found), table(wide), gains(wide, WIDER))))
    dp_plots.every(found, DP, out)
    return broken([*found, *wide])


def _kept(file: pathlib.Path, result: dict[str, Any]) -> dict[str, Made]:
    """The rows of an earlier run, whose date stays with them. Refuses to go on with one that is not alike."""
    if not file.exists():
        return {"rows": {}, "pairs": {}}
    try:
        before = json.loads(file.read_text())
        kept = {name: {(r.method, r.target): r for r in read(before, name)} for name in ("rows", "pairs")}
        unlike = [name for name in LIKE if _dateless(before[name]) != _dateless(result[name])]
    except (ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"{file} holds no results of this example ({e!r}): give another --out") from None
    if unlike:
        told = "; ".join(f"{name} is {before[name]} there and {result[name]} here" for name in unlike)
        raise SystemExit(f"{file} is of another run: {told}: give another --out")
    result["machine"] = before["machine"]
    return kept


def _dateless(value: Any) -> Any:
    return value.rpartition(", ")[0] if isinstance(value, str) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("dp_llm"))
    parser.add_argument("--model", help="a folder that lb.models.load opens")
    parser.add_argument("--text", type=pathlib.Path, help="for that model; of bytes the tiny model's, if left out")
    parser.add_argument("--targets", type=float, nargs="+", help="seven between the least width and the budget")
    for f in fields(Settings):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    given = vars(parser.parse_args())
    s = Settings(**{f.name: given[f.name] for f in fields(Settings)})
    given["out"].mkdir(parents=True, exist_ok=True)
    targets = given["targets"] or np.linspace(s.least, s.budget, 9)[1:-1].round(4).tolist()
    folder = given["model"] or str(weights.MODEL)
    dense = lb.models.load(folder, dtype=jnp.float32)
    precisions.expect_plain(folder, dense, s.length)
    text = precisions.text_of(folder, dense, given["text"], s.length)
    say = Console(width=140, markup=False, highlight=False).print
    wrong = run(precisions.prepared(dense, text, s), targets, given["out"], say)
    say(f"wrote results.json, table.md, curve.png, widths.png and drift.png in {given['out']}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
