"""SIGKILL at random moments of whatever can be resumed, and of saves: nothing half-written, nothing done twice."""

import subprocess
import sys
from pathlib import Path

import pytest

ALL = pytest.param(50, marks=pytest.mark.slow)


def python(code: str, *args: object) -> str:
    """Runs `code` in a process that forks: with jax imported once, but before its threads are started."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


FORK = """
import os, random, signal, sys, time, traceback
from pathlib import Path

def forked(work, steps=0, seconds=None):
    "Runs `work(step)` in a child; kills it so many seconds after as many calls of `step`. Whether it came to its end."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda: os.write(writer, b"."))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    if seconds is not None:
        for _ in range(steps):
            os.read(reader, 1)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0
"""

SAVES = (
    FORK
    + """
import numpy as np
import lowbit as lb
from flax import nnx

path, kills = Path(sys.argv[1]), int(sys.argv[2])
rng, seen = random.Random(1), set()
# Of 64 bits, which jax leaves alone: it starts no threads before the forks.
model = lambda i: nnx.Dict({name: nnx.Variable(np.full(20_000, i, np.int64)) for name in "abc"})

def save_on(step):
    first = int(lb.load(path)["a"][0])
    for i in range(first + 1, first + 10_000):
        lb.save(model(i), path)
        step()

others = lambda: [p.name for p in path.parent.iterdir() if p != path]
lb.save(model(0), path)
for done in range(20 * kills):  # how much of the time a save takes depends on the disk: until one was caught
    if done >= kills and others():
        break
    assert not forked(save_on, 1, rng.uniform(0, 0.02))
    values = {int(v) for a in lb.load(path).values() for v in a}
    assert len(values) == 1, values
    seen |= values
assert all(name.startswith(".model.safetensors.") and name.endswith(".tmp") for name in others()), others()
print(len(seen), len(others()))
"""
)


@pytest.mark.parametrize("kills", [10, ALL])
def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path: Path, kills: int) -> None:
    files, torn = map(int, python(SAVES, tmp_path / "model.safetensors", kills).split())
    assert files > 1, "the children were killed before they saved anything: the test showed nothing"
    assert 0 < torn <= 20 * kills, "no save was caught in the middle: the test showed nothing"


QUANTIZES = (
    FORK
    + """
from dataclasses import dataclass
import jax.numpy as jnp
import numpy as np
import lowbit as lb
from flax import nnx

folder, kills, LAYERS = Path(sys.argv[1]), int(sys.argv[2]), 8
log, on_solve = folder / "log", lambda: None

@dataclass(frozen=True)
class Slow:
    "Signs and means of magnitudes, noted in a file: slow as a good solver is, and compiled in no time."
    def __call__(self, w, fmt):
        with open(log, "a") as file:
            file.write(".")
        on_solve()
        time.sleep(0.02)
        rows = np.asarray(w)
        planes, alpha = np.packbits(rows >= 0, axis=1, bitorder="little"), np.abs(rows).mean(axis=1)
        return {"planes": jnp.asarray(planes[None, :, None]), "alpha": jnp.asarray(alpha[None, :, None])}

def run(into, out, step=lambda: None):
    global on_solve
    on_solve = step
    normal = np.random.default_rng(0).standard_normal
    make = lambda: nnx.Linear(
        16, 8, use_bias=False, kernel_init=lambda *_: jnp.asarray(normal((16, 8)), jnp.float32), rngs=nnx.Rngs(0)
    )
    layers = nnx.List([make() for _ in range(LAYERS)])
    lb.save(lb.quantize(layers, [lb.Rule("**", lb.bcq(1), Slow())], resume=into), out)

out = folder / "model.safetensors"
assert forked(lambda _: run(folder / "whole", folder / "whole.safetensors"))
want = {p.name: p.read_bytes() for p in (folder / "whole").iterdir()}
assert len(want) == LAYERS == len(log.read_text())
log.write_text("")
rng, runs, caught, left = random.Random(2), 0, 0, LAYERS
for _ in range(kills):
    into = folder / f"run{runs}"
    forked(lambda step: run(into, out, step), rng.randint(1, left), rng.uniform(0, 0.03))
    found = {p.name: p.read_bytes() for p in into.iterdir()}
    torn = [name for name in found if name not in want]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in torn), torn
    assert all(found[name] == want[name] for name in found.keys() - set(torn))
    left = LAYERS - (len(found) - len(torn))
    caught += 0 < left < LAYERS
    if not left:
        runs, left = runs + 1, LAYERS
assert forked(lambda _: run(folder / f"run{runs}", out))
assert out.read_bytes() == (folder / "whole.safetensors").read_bytes()
print(caught, len(log.read_text()) - (runs + 1) * LAYERS)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, ALL])
def test_a_killed_quantization_goes_on_where_it_was(tmp_path: Path, kills: int) -> None:
    caught, again = map(int, python(QUANTIZES, tmp_path, kills).split())
    assert caught > 0, "no quantization was caught in the middle: the test showed nothing"
    assert again <= kills, "only the layer that a kill interrupts may be solved again"


CALIBRATES = (
    FORK
    + """
import jax.numpy as jnp
import numpy as np
import lowbit as lb, lowbit.io
from flax import nnx

folder, kills, BATCHES = Path(sys.argv[1]), int(sys.argv[2]), 8

def run(into, out, step=lambda: None):
    model = nnx.List([nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(4)])
    def loss(model, x):
        for layer in model:
            x = jnp.tanh(layer(x))
        return (x**2).mean()
    def batches():
        for i in range(BATCHES):
            step()
            yield jnp.asarray(np.random.default_rng(i).standard_normal((2, 32)), jnp.float32)
    names = ("second_moment", "gradient_square", "output_gradient")
    stats = lb.calibrate(model, batches(), statistics=names, loss=loss, resume=into)
    lb.io.write(out, {f"{path}/{name}": getattr(s, name) for path, s in stats.items() for name in names})

out = folder / "stats.safetensors"
assert forked(lambda _: run(folder / "whole", folder / "whole.safetensors"))
rng, counts = random.Random(3), []
for _ in range(kills):
    into = folder / "run"
    at = min(BATCHES, max(counts, default=0) + rng.randint(1, 2))
    forked(lambda step: run(into, out, step), at, rng.uniform(0, 0.05))
    if (into / "calibration.safetensors").exists():
        counts.append(int(lb.io.read_header(into / "calibration.safetensors")["metadata"]["count"]))
assert counts == sorted(counts), counts
assert forked(lambda _: run(folder / "run", out))
assert out.read_bytes() == (folder / "whole.safetensors").read_bytes()
print(len(set(counts)))
"""
)


@pytest.mark.slow
def test_a_killed_calibration_goes_on_where_it_was(tmp_path: Path) -> None:
    assert int(python(CALIBRATES, tmp_path, 8)) > 1, "no calibration was caught in the middle: the test showed nothing"


RECONSTRUCTS = (
    FORK
    + """
import jax.numpy as jnp
import numpy as np
import lowbit as lb
from flax import nnx
from lowbit.tune import reconstruction

folder, kills, BLOCKS = Path(sys.argv[1]), int(sys.argv[2]), 6
log, solve = folder / "log", reconstruction.tuned

def run(into, out, step=lambda: None):
    def noted(*args):
        with open(log, "a") as file:
            file.write(".")
        step()
        return solve(*args)

    reconstruction.tuned = noted
    model = nnx.List([nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(BLOCKS)])
    def call(model, x):
        for layer in model:
            x = jnp.tanh(layer(x))
        return x
    batches = [jnp.asarray(np.random.default_rng(i).standard_normal((8, 16)), jnp.float32) for i in range(3)]
    small = lb.quantize(model, [lb.Rule("**", lb.bcq(1), lb.greedy())])
    lb.save(lb.tune.reconstruct(small, model, batches, "*", call, rate=1e-2, epochs=2, resume=into), out)

out = folder / "model.safetensors"
assert forked(lambda _: run(folder / "whole", folder / "whole.safetensors"))
want = {p.name: p.read_bytes() for p in (folder / "whole").iterdir()}
assert len(want) == BLOCKS == len(log.read_text())
log.write_text("")
rng, caught, left = random.Random(4), 0, BLOCKS
for _ in range(kills):
    into = folder / "run"
    forked(lambda step: run(into, out, step), rng.randint(1, 3), rng.uniform(0, 0.4))
    found = {p.name: p.read_bytes() for p in into.iterdir()}
    torn = [name for name in found if name not in want]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in torn), torn
    assert all(found[name] == want[name] for name in found.keys() - set(torn))
    left = BLOCKS - (len(found) - len(torn))
    caught += 0 < left < BLOCKS
    if not left:
        break
assert forked(lambda _: run(folder / "run", out))
assert out.read_bytes() == (folder / "whole.safetensors").read_bytes()
print(caught, len(log.read_text()) - BLOCKS)
"""
)


@pytest.mark.slow
def test_a_killed_reconstruction_goes_on_where_it_was(tmp_path: Path) -> None:
    caught, again = map(int, python(RECONSTRUCTS, tmp_path, 4).split())
    assert caught > 0, "no reconstruction was caught in the middle: the test showed nothing"
    assert again <= 4, "only the block that a kill interrupts may be tuned again"


TRAINS = (
    FORK
    + """
import json
import numpy as np
import optax
import lowbit as lb
from flax import nnx

folder, kills, STEPS = Path(sys.argv[1]), int(sys.argv[2]), 12

class Data:
    "Each batch is asked for once a step, and the first one to know the run by."
    def __init__(self, step):
        self.step = step
    def __getitem__(self, i):
        self.step()
        return np.random.default_rng(i).standard_normal((2, 16)).astype(np.float32)

def loss(model, x):
    return ((model(x) - 1) ** 2).sum(), x.shape[0]

def run(into, out, step=lambda: None):
    model = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    how = {"wrt": nnx.Param, "tx": optax.adam(1e-2), "steps": STEPS, "loss": loss, "folder": into, "save_every": 2}
    lb.save(lb.tune.train(model, Data(step), **how).model, out)

def logged(into):
    return [{**json.loads(line), "seconds": 0} for line in (into / "log.jsonl").read_text().splitlines()]

out = folder / "model.safetensors"
assert forked(lambda _: run(folder / "whole", folder / "whole.safetensors"))
whole, rng, at = logged(folder / "whole"), random.Random(5), []
assert len(whole) == STEPS
for _ in range(kills):
    forked(lambda step: run(folder / "run", out, step), rng.randint(4, 9), rng.uniform(0, 0.1))
    at.append(max((int(p.name) for p in (folder / "run/checkpoints").iterdir() if p.name.isdigit()), default=0))
assert at == sorted(at), at
assert forked(lambda _: run(folder / "run", out))
assert logged(folder / "run") == whole
assert out.read_bytes() == (folder / "whole.safetensors").read_bytes()
print(len({step for step in at if 0 < step < STEPS}))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_where_it_was(tmp_path: Path, kills: int) -> None:
    assert int(python(TRAINS, tmp_path, kills)) > 0, "no training was caught in the middle: the test showed nothing"
