"""What it costs that layers choose their widths, beside a step of decoding at fixed ones.

    python -m benchmarks.selector [--width 4096] [--hidden 14336] [--smoke] [--json out.json]

Products of one token with nested weights of 3 and 4 bits, each by itself and then all of one block of Llama 3 8B, whose
attention is over that token alone. The baseline, `fixed`, reads 3 bits: a width in an array, so that the branch is
taken there too. Beside it the layers estimate and compare, with thresholds of inf, so that what is multiplied is the
same: by lines in ||x||, by projections of 64 rows, and in a block by one or the other in about equal parts, as was
published (DP-LLM, Park et al. 2025, with an overhead of 0.5 to 4 percent on GPUs). `asynchronous` estimates from older
inputs. Codes are random, on which the time does not depend. A ratio is that of the fastest rounds, and beside it stand
the least and the largest that a third of the rounds has. Where other programs disturb more than choosing costs, what
the estimates of a block take by themselves says more than the difference of two blocks: `block_estimates`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

if __name__ == "__main__":  # as a script; as a module it has the repository's root already
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lowbit as lb
from benchmarks.harness import Row, fastest, in_turn, main
from lowbit.models import Config
from lowbit.models.decoder import FED, Block
from lowbit.nn.kernel import Kernel, layer_kernels
from lowbit.nn.switch import Switch
from lowbit.testing.checks import random_array

FORMAT, WIDTH, ROWS = lb.any_precision(3, 4), 3, 64
LINES = ("attn/q", "attn/k", "mlp/gate")
"""Layers that estimate by a line where some do; they have 0.4 of a block's weights."""

Program = Callable[[], Any]


def layer(k: int, n: int, seed: int) -> lb.nn.Linear:
    array = random_array(lb.QuantType((("k", k), ("n", n)), "f32", FORMAT), seed)
    return lb.nn.Linear(Kernel(array, jnp.zeros(2)), None)


def block(width: int, hidden: int) -> Block:
    """Four heads of queries to one of keys and values."""
    config = Config(
        vocab=8, width=width, layers=2, heads=width // 128, kv_heads=width // 512, head=128, hidden=hidden, context=8
    )
    made = nnx.eval_shape(lambda: Block(config, 1, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    for name in ("attn_norm", "mlp_norm"):
        setattr(made, name, nnx.RMSNorm(width, rngs=nnx.Rngs(0)))
    shapes = {f"{part}/{name}": m for part in ("attn", "mlp") for name, m in vars(getattr(made, part)).items()}
    for seed, (path, linear) in enumerate((p, m) for p, m in shapes.items() if isinstance(m, nnx.Linear)):
        part, name = path.split("/")
        setattr(getattr(made, part), name, layer(linear.in_features, linear.out_features, seed))
    return made


def choosing(model: Any, lines: Iterable[str], asynchronous: Iterable[str] = ()) -> Any:
    """A copy whose layers always choose `WIDTH`, by lines or else by projections, some of older inputs."""
    out = nnx.clone(model)
    for path, kernel in layer_kernels(out).items():
        values = {"low": jnp.int32(WIDTH), "high": jnp.int32(WIDTH + 1), "most": jnp.int32(WIDTH)}
        values["threshold"] = jnp.float32(jnp.inf)
        if path in lines:
            values |= {"slope": jnp.float32(1), "offset": jnp.float32(0)}
        else:
            values["projection"] = jnp.ones((ROWS, kernel.shape[0]), jnp.bfloat16)
        kernel.reader = Switch({**values, "asynchronous": jnp.bool_(True)} if path in asynchronous else values)
    return lb.nn.switching(out, "call")


def program(model: Any, call: Callable[..., Any], *args: Any) -> Program:
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, *args: call(nnx.merge(graph, state), *args))
    return partial(run, state, *args)


def rows(name: str, programs: Mapping[str, Program], rounds: int) -> Iterator[Row]:
    seconds = in_turn(programs, rounds)
    for way, s in seconds.items():
        yield fastest(f"{name}_{way}", s, f"{name}_fixed", seconds["fixed"])


def of_layer(k: int, n: int, rounds: int) -> Iterator[Row]:
    model, x = nnx.Dict(one=layer(k, n, 0)), jax.random.normal(jax.random.key(0), (1, k))
    by = {"line": choosing(model, ("one",)), "projection": choosing(model, ())}
    models = {"fixed": lb.nn.switching(by["line"], "most"), **by}
    yield from rows(f"{k}x{n}", {way: program(m, lambda m, x: m["one"](x), x) for way, m in models.items()}, rounds)


def of_block(width: int, hidden: int, rounds: int) -> Iterator[Row]:
    model = block(width, hidden)
    every = tuple(layer_kernels(model))
    models = {"fixed": lb.nn.switching(choosing(model, every), "most")}
    models |= {way: choosing(model, lines) for way, lines in {"line": every, "projection": (), "both": LINES}.items()}
    models["both_asynchronous"] = choosing(model, LINES, FED)
    x, before = (jax.random.normal(jax.random.key(i), (1, 1, width)) for i in (0, 1))

    def step(model: Block, x: jax.Array, before: jax.Array) -> Any:
        return model(x, jnp.zeros((1, 1), jnp.int32), None, before if model.asks_older else None)[0]

    programs = {way: program(m, step, x, before) for way, m in models.items()}
    programs |= {f"estimates_{way}": asking(models[way]) for way in ("line", "projection", "both")}
    yield from rows("block", programs, rounds)


def asking(model: Block) -> Program:
    """The estimates of all layers, each of an input, and nothing else."""
    sizes = {path: kernel.shape[0] for path, kernel in layer_kernels(model).items()}
    inputs = {path: jax.random.normal(jax.random.key(k), (1, k)) for path, k in sizes.items()}

    def ask(model: Block, inputs: Mapping[str, jax.Array]) -> list[jax.Array]:
        switches = {path: (kernel.reader, kernel.array) for path, kernel in layer_kernels(model).items()}
        return [s.estimate(inputs[path], array) > s.threshold[...] for path, (s, array) in switches.items()]

    return program(model, ask, inputs)


def measure(width: int, hidden: int, smoke: bool = False, rounds: int = 45) -> list[Row]:
    if smoke:
        width, hidden, rounds = 512, 512, 3
    shapes = dict.fromkeys(((width, width), (width, hidden), (hidden, width), (width, width // 4)))
    out = [r for shape in shapes for r in of_layer(*shape, rounds)]
    return [*out, *of_block(width, hidden, rounds)]


if __name__ == "__main__":
    main("The choice of widths on this machine's default device", measure, width=4096, hidden=14336, smoke=False)
