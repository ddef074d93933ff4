"""Trains the tinylm on the standard library's source and exports its weights.

The shipped weights took 3,050 steps of 8,192 bytes (25 million, 2.7 passes) and 104 minutes on two shared CPU cores::

    python -m examples.tinylm.train --out OUT --context 256 --batch 32 --warmup 60 --steps 3600 --decay 1500
    python -m examples.tinylm.train --out OUT --context 256 --batch 32 --warmup 60 --steps 3050 --decay 529 --resume

The first was stopped at its checkpoint of step 2750, its rate at 0.57 of the peak; the second starts from the same rate
and brings it down to 0 in 300 steps rather than 850. ``train_log.jsonl`` holds both. One replica runs on
each core: XLA's CPU backend spreads a matrix product over cores, but little else, and two replicas of half the batch
were twice as fast as one. glibc's allocator returns each step's buffers to the system unless told otherwise;
``MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592`` keeps them.

``--size 12M`` is a larger model, for an accelerator, of which nothing is shipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.tinylm import corpus, weights
from examples.tinylm.batches import Windows
from examples.tinylm.evaluate import bits_per_byte
from examples.tinylm.model import Config, TinyLM
from examples.tinylm.optim import optimizer, trapezoid

SIZES = {"2.6M": Config(), "12M": Config(layers=6, width=384, hidden=1152)}
"""By parameters. The larger one is for an accelerator."""
AXIS = "replica"
LOG_EVERY = 25
SAVE_EVERY = 250
WATCHED = 1 << 15  # bytes of the held-out code to watch; nothing is selected by it


def make_step(graph: nnx.GraphDef[TinyLM], tx: optax.GradientTransformation, mesh: Mesh) -> Callable[..., Any]:
    """The jitted step: (params, state, tokens [M, B, T + 1]) -> (params, state, mean loss in nats a byte).

    The M micro-batches run one after the other (small ones stay in cache), the B windows of each split over `mesh`.
    """

    def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        tokens = tokens.astype(jnp.int32)
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(
        params: nnx.State, state: optax.OptState, tokens: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        def add(total: Any, micro: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, micro)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, tokens)
        value, grads = jax.lax.pmean(jax.tree.map(lambda x: x / tokens.shape[0], total), AXIS)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    # check_vma: the gathered Muon updates are equal on every replica, which the checker cannot see.
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P(None, AXIS)), out_specs=(P(), P(), P()), check_vma=False
    )
    return jax.jit(sharded, donate_argnums=(0, 1))


def save_checkpoint(folder: pathlib.Path, step: int, tree: Any) -> None:
    """Writes the leaves of `tree` and the step count, atomically: a run killed here leaves the older checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "checkpoint.tmp", "wb") as file:
        np.savez(file, np.asarray(step), *map(np.asarray, jax.tree.leaves(tree)))
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.npz")


def load_checkpoint(folder: pathlib.Path, tree: Any) -> tuple[int, Any]:
    """The step count and the tree that `save_checkpoint` wrote; `tree` gives the structure."""
    with np.load(folder / "checkpoint.npz") as file:
        step, *leaves = (file[name] for name in file.files)
    wanted = [leaf.shape for leaf in jax.tree.leaves(tree)]
    if [leaf.shape for leaf in leaves] != wanted:
        raise ValueError(f"{folder}/checkpoint.npz holds other shapes than this model's; remove it or match its flags")
    return int(step), jax.tree.unflatten(jax.tree.structure(tree), leaves)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tinylm.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the weights and the log")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "tinylm"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=int, default=1600, help="steps at the end over which the rate falls to 0")
    parser.add_argument("--stop", type=int, help="stop after this many steps, for trials")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--micro", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--replicas", type=int, default=os.cpu_count(), help="CPU devices to split each batch over")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--size", choices=SIZES, default="2.6M", help="parameters")
    for name in ("layers", "hidden", "context"):
        parser.add_argument(f"--{name}", type=int, help="instead of that of the size")
    return parser.parse_args()


def configured(args: argparse.Namespace) -> Config:
    """The sizes of the model that is asked for."""
    own = {name: value for name in ("layers", "hidden", "context") if (value := getattr(args, name)) is not None}
    return dataclasses.replace(SIZES[args.size], **own)


def header(args: argparse.Namespace, parameters: int, text: int) -> dict[str, Any]:
    """What a reader of the log needs to repeat the run."""
    flags = {name: value for name, value in vars(args).items() if not isinstance(value, pathlib.Path)}
    versions = {m.__name__: m.__version__ for m in (jax, flax, optax, np)}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "parameters": parameters,
        "train_bytes": text,
        "flags": flags,
    }


class Log:
    """The training log: one JSON record a line, printed too; a resumed run appends to it."""

    def __init__(self, path: pathlib.Path, append: bool) -> None:
        self.file = open(path, "a" if append else "w")

    def __call__(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        print(record, flush=True)


def setup(args: argparse.Namespace) -> tuple[Mesh, nnx.GraphDef[TinyLM], nnx.State, optax.GradientTransformation]:
    """The replicas, the untrained model that computes in bf16, and the optimizer."""
    jax.config.update("jax_num_cpu_devices", args.replicas)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))  # of accelerators, where there are some
    graph, params = nnx.split(TinyLM(configured(args), dtype=jnp.bfloat16, rngs=nnx.Rngs(args.seed)), nnx.Param)
    tx = optimizer(
        trapezoid(args.warmup, args.steps, args.decay),
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        decay=args.weight_decay,
        axis=AXIS,
        replicas=mesh.size,
    )
    return mesh, graph, params, tx


def train(args: argparse.Namespace) -> None:
    """Trains, logging as it goes; after the last step writes the weights."""
    mesh, graph, params, tx = setup(args)
    text = np.frombuffer(b"".join(corpus.train_code().values()), np.uint8)
    watched = corpus.match_listed("code").text[:WATCHED]
    config = configured(args)
    plain = nnx.graphdef(TinyLM(config, rngs=nnx.Rngs(0)))
    state, first = tx.init(params), 0
    if args.resume:
        first, (params, state) = load_checkpoint(args.scratch, (params, state))
    params, state = jax.device_put((params, state), NamedSharding(mesh, P()))
    step, windows = make_step(graph, tx, mesh), Windows(text, config.context, args.seed)
    log = Log(args.out / "train_log.jsonl", append=args.resume)
    log(header(args, sum(x.size for x in jax.tree.leaves(params)), len(text)) | {"first_step": first})
    start, losses = time.monotonic(), []
    last = args.steps if args.stop is None else min(args.stop, args.steps)
    for done in range(first + 1, last + 1):
        tokens = windows.batch(done - 1, args.batch).reshape(args.micro, -1, config.context + 1)
        params, state, value = step(params, state, tokens)
        losses.append(float(value))
        if done % LOG_EVERY and done != last:
            continue
        nats, losses = sum(losses) / len(losses), []
        record = {"step": done, "loss": round(nats, 5), "bits_per_byte": round(nats / math.log(2), 4)}
        if done % SAVE_EVERY == 0 or done == last:
            save_checkpoint(args.scratch, done, (params, state))
            bits = bits_per_byte(nnx.merge(plain, jax.device_get(params)), watched)
            record[f"heldout_{WATCHED >> 10}k_bits_per_byte"] = round(bits, 4)
        log(record | {"seconds": round(time.monotonic() - start, 1)})
    if last == args.steps:
        weights.save(nnx.merge(plain, jax.device_get(params)), args.out / "model")


if __name__ == "__main__":
    train(parse())
