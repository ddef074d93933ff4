"""A training step of layers of an 8B model on a GPU: AlphaTuning of quantized weights beside LoRA on dense ones.

    python -m benchmarks.gpu_step [--list]

The seven products of each of four layers, without attention, forward and backward, and AdamW. AlphaTuning trains the
first of four planes' scales, in the kernels' layout (`alpha`) and as XLA makes it of the format's own (`alpha_xla`).
LoRA trains factors of rank 16 beside frozen bfloat16. The gradient of a scale is a sum over dy^T x, so that a step
multiplies three times by a weight's size, and LoRA twice: what AlphaTuning has to show for it is memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowbit as lb
from benchmarks.gpu_results import Results, Row, here, hopper, newest, opened, peaks
from benchmarks.gpu_timing import profiled, timed
from lowbit.array import QuantArray, laid_out
from lowbit.testing.checks import random_array

NAME = "gpu_step"
LAYER = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
"""Outputs by inputs."""
DEPTH = 4
"""Layers."""
TOKENS = (512, 2048, 4096)
WAYS = ("lora", "alpha", "alpha_xla")
FORMAT = lb.bcq(4, group=128, scale_dtype="bfloat16")
RANK = 16
TRAINED = "alpha_first"
OPTIMIZER = optax.adamw(1e-4)

Product = Callable[[str, jax.Array], jax.Array]


@dataclass(frozen=True)
class Case:
    """One step: of WAYS, and for how many tokens."""

    way: str
    tokens: int
    layer: Mapping[str, tuple[int, int]] = field(default_factory=lambda: LAYER)

    @property
    def name(self) -> str:
        return f"{self.way} tokens={self.tokens}"

    @property
    def stack(self) -> dict[str, tuple[int, int]]:
        """The weights of all layers."""
        return {f"{i}/{name}": shape for i in range(DEPTH) for name, shape in self.layer.items()}

    @property
    def weights(self) -> int:
        return sum(n * k for n, k in self.stack.values())

    @property
    def stored(self) -> int:
        """Bytes of the weights and of what trains."""
        if self.way == "lora":
            return 2 * self.weights + sum(4 * RANK * (n + k) for n, k in self.stack.values())
        return sum(quantized(n, k).bits // 8 for n, k in self.stack.values())

    @property
    def operations(self) -> int:
        """Of the tensor cores, without LoRA's own."""
        return 2 * (2 if self.way == "lora" else 3) * self.tokens * self.weights


def quantized(n: int, k: int) -> lb.QuantType:
    """Of a weight whose first plane's scales train."""
    return lb.QuantType((("k", k), ("n", n)), "bf16", FORMAT, (("alpha", "p", 1),))


def loss(product: Product, x: jax.Array) -> jax.Array:
    """Of a stack of layers in which every product takes part; a gate stands where attention would."""
    for i in range(DEPTH):
        q, k, v = (product(f"{i}/{name}", normed(x)) for name in "qkv")
        x = x + product(f"{i}/o", q * jnp.tile(jax.nn.silu(k) * v, (1, q.shape[1] // k.shape[1])))
        gate, up = (product(f"{i}/{name}", normed(x)) for name in ("gate", "up"))
        x = x + product(f"{i}/down", jax.nn.silu(gate) * up)
    return (x.astype(jnp.float32) ** 2).mean()


def normed(x: jax.Array) -> jax.Array:
    return (x * jax.lax.rsqrt((x.astype(jnp.float32) ** 2).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def by_lora(frozen: Any, trained: Any, name: str, x: jax.Array) -> jax.Array:
    a, b = (factor.astype(x.dtype) for factor in trained[name])
    return x @ frozen[name] + (x @ a) @ b


def by_scales(frozen: Any, trained: Any, name: str, x: jax.Array) -> jax.Array:
    w = frozen[name]
    return lb.matmul(x, QuantArray({**w.fields, TRAINED: trained[name]}, w.type))


def step(product: Callable[..., jax.Array], frozen: Any, trained: Any, state: Any, x: jax.Array) -> Any:
    """What trains, after one step, the optimizer's state, and the loss."""
    value, gradients = jax.value_and_grad(lambda trained: loss(partial(product, frozen, trained), x))(trained)
    updates, state = OPTIMIZER.update(gradients, state, trained)
    return optax.apply_updates(trained, updates), state, value


def operands(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step of a case as a function, and its arguments."""
    stack = case.stack
    keys = dict(zip(stack, jax.random.split(jax.random.key(0), len(stack)), strict=True))
    x = jax.random.normal(jax.random.key(1), (case.tokens, case.layer["q"][1]), jnp.bfloat16)
    if case.way == "lora":
        frozen: Any = {w: jax.random.normal(keys[w], (k, n), jnp.bfloat16) / k**0.5 for w, (n, k) in stack.items()}
        trained: Any = {w: (jnp.ones((k, RANK)) / k, jnp.zeros((RANK, n))) for w, (n, k) in stack.items()}
        return partial(step, by_lora), (frozen, trained, OPTIMIZER.init(trained), x)
    lay = jax.jit(laid_out) if case.way == "alpha" else lambda w: w
    frozen = {w: lay(random_array(quantized(n, k))) for w, (n, k) in stack.items()}
    trained = {w: a.fields[TRAINED] / a.type.dims[0][1] for w, a in frozen.items()}
    return partial(step, by_scales), (frozen, trained, OPTIMIZER.init(trained), x)


def measure(case: Case, cupti: bool) -> Row:
    program, arguments = operands(case)
    out, times = timed(program, arguments, 1, cupti)
    held = sum(a.nbytes for a in jax.tree.leaves(arguments))
    row = {"name": case.name, "way": case.way, "tokens": case.tokens, "stored": case.stored, "held": held, **times}
    return row if bool(jnp.isfinite(out[2])) else row | {"wrong": f"the loss is {out[2]}"}


def listing(cases: Sequence[Case], results: Results) -> Iterator[str]:
    """Every step: bytes that stay, bytes beside them, the least time for its products, and its time."""
    of = peaks(results.machine["device"])
    yield f"{'step':26} {'stored':>13} {'temporary':>13} {'at peak, us':>12} {'measured, us':>13}"
    for case in cases:
        row = results.rows.get(case.name)
        beside, took = (f"{row['temporary']:,}", f"{1e6 * row['seconds']:.1f}") if row else ("not measured",) * 2
        yield f"{case.name:26} {case.stored:>13,} {beside:>13} {1e6 * case.operations / of.products:>12.1f} {took:>13}"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="what would be measured, and what was; needs no GPU")
    given = parser.parse_args(args)
    cases = [Case(way, tokens) for tokens in TOKENS for way in WAYS]
    if given.list:
        print(*listing(cases, newest(NAME)), sep="\n")
        return 0
    results, cupti, failed = opened(NAME, here(hopper(parser).device_kind)), profiled(), 0
    for case in cases:
        if results.done(case.name):
            continue
        try:
            results.add(measure(case, cupti))
        except Exception as err:  # one that does not run must not cost the others
            failed += 1
            print(f"FAILED {case.name}: {type(err).__name__}: {str(err)[:2000]}", flush=True)
    print(*listing(cases, results), sep="\n")
    return bool(failed or any("wrong" in row for row in results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
