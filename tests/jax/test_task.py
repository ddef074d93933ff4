"""Tasks beside one base: taken out, put back, refused, switched without compiling, and their sizes."""

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.tune import digest
from tests.models import TOKENS, Net, arrays, assert_same, fast

RULES = fast({"embed": None, "head/**": None, "layers/*/mlp/*": lb.bcq(3, group=8)})


@cache
def quantized(seed: int) -> Net:
    return lb.tune.alpha_tuning(lb.quantize(Net(nnx.Rngs(seed)), RULES)).model


def base(seed: int = 0) -> Net:
    return nnx.clone(quantized(seed))


def tuned(model: Any, factor: float, wrt: Any = lb.Scale) -> Any:
    out = nnx.clone(model)
    nnx.update(out, jax.tree.map(lambda a: a * factor + 1, nnx.state(out, wrt)))
    return out


def test_a_task_is_put_back_bit_for_bit(tmp_path: Path) -> None:
    model = base()
    before = arrays(model)
    one, two = tuned(model, 2.0), tuned(model, 3.0)
    task = lb.tune.extract(one)
    assert set(task.values) == {f"layers/{i}/mlp/{name}/kernel/alpha_first" for i in (0, 1) for name in ("up", "down")}
    task.save(tmp_path / "one.safetensors")
    read = lb.tune.Task.load(tmp_path / "one.safetensors")
    for given in (model, two):  # whatever task was in it before
        assert_same(arrays(lb.tune.apply(given, read)), arrays(one))
    assert_same(arrays(model), before)
    # All else is shared, and not a Variable that both models change.
    again = lb.tune.apply(model, task)
    assert again.layers[0].mlp["up"].kernel.planes[...] is model.layers[0].mlp["up"].kernel.planes[...]
    again.layers[0].norm.scale[...] += 1
    assert_same(arrays(model), before)


@pytest.mark.parametrize("way", [pytest.param("codebook", marks=pytest.mark.slow), "lora"])
def test_tasks_of_codebooks_and_adapters(way: str) -> None:
    if way == "lora":
        small = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), fast(lb.bcq(2)))
        model, wrt = lb.nn.lora(small, rank=2, rngs=nnx.Rngs(1)), nnx.LoRAParam
        other = lb.nn.lora(small, rank=2, rngs=nnx.Rngs(2))
    else:
        fmt = lb.codebook(1, 4, vec=2, group=16, scale_dtype="float16")
        model, wrt = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), fmt), lb.Codebook
        other = tuned(model, 5.0, wrt)
    one = tuned(model, 2.0, wrt)
    assert_same(arrays(lb.tune.apply(other, lb.tune.extract(one, wrt))), arrays(one))


def test_switching_compiles_nothing_and_reads_the_base_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    tasks = [lb.tune.extract(tuned(model, factor)) for factor in (1.5, 2.0)]
    traced, read = [], []

    @nnx.jit
    def logits(model: Net, tokens: jax.Array) -> jax.Array:
        traced.append(1)
        return model(tokens)

    hashed = digest.sha256
    monkeypatch.setattr(digest, "sha256", lambda array: read.append(array.nbytes) or hashed(array))
    found = [logits(lb.tune.apply(model, task), TOKENS) for task in tasks]
    assert len(traced) == 1 and not read
    assert (found[0] != found[1]).any()
    copy = jnp.array(model.layers[0].norm.scale[...])  # the same bits elsewhere: read, and no other base
    model.layers[0].norm.scale[...] = copy
    lb.tune.apply(model, tasks[0])
    assert read == [copy.nbytes]


def test_another_base_is_refused() -> None:
    model, task = base(), lb.tune.extract(tuned(base(), 2.0))
    lb.tune.apply(model, task)
    with pytest.raises(
        ValueError, match=r"was trained on the base [0-9a-f]{32}, and this model is [0-9a-f]{32}: codes"
    ):
        lb.tune.apply(base(1), task)
    bit = nnx.clone(model)
    planes = bit.layers[1].mlp["down"].kernel.planes
    planes[...] = planes[...].at[(0,) * planes[...].ndim].set(planes[...].ravel()[0] ^ 1)
    with pytest.raises(ValueError, match="was trained on the base"):
        lb.tune.apply(bit, task)
    norm = nnx.clone(model)
    norm.layers[0].norm.scale[...] += 1
    with pytest.raises(ValueError, match="codes, or other arrays that are not of the task, differ"):
        lb.tune.apply(norm, task)
    scaled = lb.nn.lora(lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), fast(lb.bcq(2))), 2, 4.0, rngs=nnx.Rngs(1))
    other = lb.nn.lora(lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), fast(lb.bcq(2))), 2, 8.0, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="was trained on the base"):  # the same arrays, read in another way
        lb.tune.apply(other, lb.tune.extract(scaled, nnx.LoRAParam))


def test_a_model_without_a_place_for_the_task_is_refused() -> None:
    model = base()
    task = lb.tune.extract(model)
    with pytest.raises(ValueError, match=r"the task has 'layers/0/mlp/down/kernel/alpha_first' and the model has not"):
        lb.tune.apply(lb.tune.fold(model), task)
    every = lb.tune.alpha_tuning(lb.tune.fold(model), "all").model
    message = "is float32[1, 16, 4] in the task and float32[3, 16, 4] in the model: prepare it as it was"
    with pytest.raises(ValueError, match=re.escape(message)):
        lb.tune.apply(every, task)
    with pytest.raises(ValueError, match=r"Net has nothing of <class 'flax.*LoRAParam'>: there is no task in it"):
        lb.tune.extract(model, nnx.LoRAParam)
    with pytest.raises(TypeError, match="cannot take a task from a dict"):
        lb.tune.extract({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot put a task into an abstract model"):
        lb.tune.apply(nnx.eval_shape(lambda: model), task)
    laid = lb.prepare(lb.quantize(nnx.Linear(256, 128, rngs=nnx.Rngs(0)), fast(lb.bcq(2, group=128))), "hopper")
    with pytest.raises(ValueError, match="'kernel' is laid out for a device: put a task into the model before"):
        lb.tune.apply(laid, task)


def test_a_file_that_is_no_task_is_refused(tmp_path: Path) -> None:
    lb.save(base(), tmp_path / "model.safetensors")
    with pytest.raises(lb.CheckpointError, match=r"model.safetensors holds no task: give a file that"):
        lb.tune.Task.load(tmp_path / "model.safetensors")
    lb.tune.extract(base()).save(tmp_path / "task.safetensors")
    damaged = bytearray((tmp_path / "task.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(lb.CheckpointError, match="damaged"):
        lb.tune.Task.load(tmp_path / "damaged.safetensors")
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        lb.tune.extract(base()).save(tmp_path / "task.safetensors")


def test_storage() -> None:
    model = base()
    tasks = {name: lb.tune.extract(tuned(model, factor)) for name, factor in (("prose", 2.0), ("code", 3.0))}
    found = lb.tune.storage(model, tasks)
    # Two layers, up [16, 32] and down [32, 16], 3 planes in groups of 8: a bit, and a float32 a group, of each plane.
    weights, groups = 2 * 2 * 16 * 32, 2 * (32 * 2 + 16 * 4)
    others = 4 * (20 * 16 + 2 * 2 * 16 + 2 * (32 + 16) + 2 * (16 * 16 + 16))  # embedding, norms, biases, head
    assert found.tasks == {"prose": 4 * groups, "code": 4 * groups}
    assert found.base == 3 * weights // 8 + 2 * 4 * groups + others
    assert found.model == 4 * weights + others
    assert found.together == found.base + 2 * 4 * groups
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert lines == [
        f"base {found.base:,} bytes",
        f"task 'prose' {4 * groups:,} bytes",
        f"task 'code' {4 * groups:,} bytes",
        f"base and tasks {found.together:,} bytes",
        f"a quantized model each {2 * (found.base + 4 * groups):,} bytes",
        f"a model each, not quantized {2 * found.model:,} bytes",
    ]
    np.testing.assert_equal(tasks["code"].bytes, 4 * groups)
