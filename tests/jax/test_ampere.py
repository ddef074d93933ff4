"""The schedule `mma` for compute capability 8: its twin in the interpreter against the oracle, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit import compat, devices, planning
from lowbit.array import laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.ir.dtypes import short
from lowbit.kernels import ampere
from lowbit.kernels.ampere import tuning
from lowbit.kernels.ampere_verbs import AmpereTwin
from lowbit.kernels.lanes import from_registers
from lowbit.kernels.memory import looked_up, too_much_before_hopper
from lowbit.kernels.mma import Shape, Tuning
from lowbit.kernels.product import product
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing import random_array
from lowbit.testing.checks import assert_product, random_rows
from lowbit.testing.terms import kernel_term
from tests.forgetting import forget


def check(fmt: lb.Format, dtype: str, m: int, n: int, k: int, tuned: Tuning | None, twin: Any = AmpereTwin) -> None:
    w = random_array(QuantType((("k", k), ("n", n)), "bf16", fmt))
    x, at = random_rows(m, k, dtype=dtype), readings(w.type).index(w.type.decode)
    verbs = twin(interpret_params(detect_races=True))
    y = product(kernel_layout(w.type), jnp.asarray(x), laid_out(w).fields, tuned, verbs, at, "ampere")
    jax.block_until_ready(y)
    assert not races_found()
    assert_product(y, x, w, kernel_term(m, w.type, short(x.dtype)))


@pytest.mark.parametrize(
    ("fmt", "dtype", "m", "inputs", "tuned"),
    [
        (lb.bcq(2, group=128), "bfloat16", 5, 525, Tuning(8, 1, 2)),
        # two parts of k, two blocks of columns
        pytest.param(lb.uniform(4, group=64), "float16", 11, 1500, Tuning(8, 2, 2), marks=pytest.mark.slow),
        # a table in shared memory
        pytest.param(lb.any_precision(3, 8, width=4), "bfloat16", 3, 900, Tuning(8, 1, 4), marks=pytest.mark.slow),
        # two stages share a group
        pytest.param(lb.bcq(3, group=512), "bfloat16", 16, 1100, Tuning(16, 1, 4), marks=pytest.mark.slow),
        pytest.param(lb.bcq(4, group=32), "float16", 3, 1500, Tuning(8, 1, 4), marks=pytest.mark.slow),
        pytest.param(lb.codebook(1, 8, vec=4), "float16", 3, 900, Tuning(8, 1, 4), marks=pytest.mark.slow),
        pytest.param(lb.bcq(2), "float16", 40, 70, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_product(fmt: lb.Format, dtype: str, m: int, inputs: int, tuned: Tuning | None) -> None:
    check(fmt, dtype, m, 65, inputs, tuned)


def test_registers_are_those_of_the_instruction() -> None:
    """The lanes' order of operand A of m16n8k16 with 16-bit elements, as the PTX ISA draws it, is that of a stage."""
    lanes = np.arange(128)
    at = np.empty((16, 4, 128, 2), int)  # step, register, lane, half: row and input as 64 row + input
    for register in range(4):
        row = lanes // 32 * 16 + lanes % 32 // 4 + 8 * (register % 2)
        for step in range(16):
            for half in range(2):
                at[step, register, :, half] = 256 * row + 16 * step + 2 * (lanes % 4) + half + 8 * (register // 2)
    packed = (at[..., 0] | at[..., 1] << 16).astype(np.uint32).reshape(64, 128)
    assert (from_registers(packed, "f16").view(np.uint16) == np.arange(64 * 256).reshape(64, 256)).all()


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    "fmt", [lb.uniform(4, group=32), lb.any_precision(3, 8, width=6), lb.codebook(2, 8, vec=8)], ids=str
)
@pytest.mark.parametrize("m", [8, 24, 64])
@pytest.mark.parametrize("n", [1024, pytest.param(32768, marks=pytest.mark.slow)])
def test_stages_in_flight_fit(fmt: lb.Format, m: int, n: int) -> None:
    t = QuantType((("k", 4096), ("n", n)), "f32", fmt, layout="mma")
    program = kernel_layout(t).program("f16", readings(t).index(t.decode))
    of = Shape(m, kernel_layout(t).tiles, kernel_layout(t).stages)
    chosen = tuning(of, program)
    buffers = [*ampere.AmpereSchedule(program, of, chosen, AmpereTwin(False)).ring]
    size = looked_up(program) + sum(np.prod(b.shape) * b.dtype.itemsize for b in buffers)
    assert size <= 99 << 10 and chosen.columns <= 32 and m % chosen.columns == 0
    assert of.stages % chosen.parts == 0 and chosen.depth <= max(2, of.stages // chosen.parts)


def test_what_it_does_not_decode() -> None:
    def refused(fmt: lb.Format) -> str | None:
        t = QuantType((("k", 512), ("n", 128)), "f32", fmt, layout="mma")
        return too_much_before_hopper(kernel_layout(t).program("f16", readings(t).index(t.decode)))

    assert refused(lb.any_precision(3, 8, width=6)) is None
    tables, words, x, alignment = 2 * 256 * 66 * 2, 2 * 64 * 256, 2 * 8 * 256, 5 * 1024
    needed = f"{tables + 2 * (words + x + alignment):,} bytes of shared memory, and a block has 98,304"
    assert refused(lb.any_precision(3, 8, width=8)) == f"its tables and two stages take {needed}"
    assert refused(lb.nested_fp()) == "weights of whole bytes are decoded on compute capability 9.0 alone"


# ---------------------------------------------------------------- the choice

W = random_array(QuantType((("k", 300), ("n", 100)), "bf16", lb.uniform(4, group=64)))
X = jnp.ones((5, 300), jnp.bfloat16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that may be said to be any GPU."""
    device = SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    planning.planned.cache_clear()
    forget()
    yield device
    planning.planned.cache_clear()
    forget()


def refused(w: lb.QuantArray, name: str = "mma") -> str | None:
    planning.planned.cache_clear()
    return next(k.refused for k in lb.plan((1, 300), w.type, "gpu", "bfloat16").kernels if k.name == name)


def test_only_a_new_jax_has_it(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = laid_out(W)
    layer = lb.nn.Linear(lb.nn.Kernel(W, jnp.zeros(2)), None)
    monkeypatch.setattr(compat, "BEFORE_HOPPER", False)
    assert refused(there) == f"compute capability 8.0 needs jax >= 0.12, and this is {jax.__version__}"
    assert lb.prepare(layer) is layer
    monkeypatch.setattr(compat, "BEFORE_HOPPER", True)
    for capability in ("8.0", "8.6", "8.9"):
        gpu.compute_capability = capability
        assert refused(there) is None and devices.variant_here() == "ampere"
        assert lb.prepare(layer).kernel.type.layout == "mma"
    wide = laid_out(random_array(QuantType((("k", 512), ("n", 64)), "bf16", lb.any_precision(3, 8))))
    planning.planned.cache_clear()
    assert "bytes of shared memory, and a block has" in str(lb.plan((1, 512), wide.type, "gpu", "bfloat16"))
    floats = laid_out(random_array(QuantType((("k", 300), ("n", 64)), "f16", lb.nested_fp(8))))
    assert refused(floats, "fp8") == "it is for compute capability 9.0 only"


@pytest.mark.parametrize("capability", ["10.0", "12.0", "7.5"])
def test_any_other_gpu_runs_what_xla_makes(gpu: Any, capability: str) -> None:
    gpu.compute_capability = capability
    has = "lowbit has schedules for WGMMA, which is 9.0 only, and for mma.sync with cp.async, 8.0, 8.6 and 8.9"
    missing = ", and no tcgen05 schedule yet" if capability == "10.0" else ""
    assert refused(laid_out(W)) == f"compute capability {capability}: {has}{missing}"
    assert f"mma      refused: compute capability {capability}: lowbit has" in lb.explain(laid_out(W))


def test_a_product_there_is_of_this_schedule(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "BEFORE_HOPPER", True)
    made = []

    def recorded(program: Any, shape: Shape, tuned: Tuning, verbs: Any) -> Any:
        made.append(shape.m)
        return lambda *arrays: jnp.zeros((tuned.parts, shape.rows * 64, shape.m), jnp.float32)

    monkeypatch.setattr(ampere, "mma", recorded)
    jax.jit(lb.matmul).trace(X, laid_out(W))
    assert made == [8]
