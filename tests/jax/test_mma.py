"""The schedule `mma`: its twin in the Mosaic GPU interpreter against the oracle, and the programs that hold it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from math import ceil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax import export

import lowbit as lb
from lowbit import devices, planning
from lowbit.array import QuantArray, laid_out
from lowbit.compat import NEW, interpret_params, races_found
from lowbit.ir import Bitcast, Call, Gather, Unpack, merge, param
from lowbit.ir.dtypes import short
from lowbit.ir.expr import Expr
from lowbit.kernels import mma as schedule
from lowbit.kernels import product as launch
from lowbit.kernels.choice import kernel_choices
from lowbit.kernels.layout import layout
from lowbit.kernels.mma import Tuning, deepest, tuning
from lowbit.kernels.verbs import HALVES, Twin
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing import random_array
from lowbit.testing.checks import assert_product, random_rows
from lowbit.testing.terms import kernel_term
from tests.forgetting import forget
from tests.fp3 import fp3_rows
from tests.models import inputs

KERNEL = "mosaic_gpu"
"""In the name of what a program calls."""


def array(fmt: lb.Format, n: int, k: int, dtype: Any = "bf16", seed: int = 0) -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), dtype, fmt), seed)


def run(w: QuantArray, x: Any, tuned: Tuning | None, twin: type[Twin] = Twin) -> jax.Array:
    verbs, at = twin(interpret_params(detect_races=True)), readings(w.type).index(w.type.decode)
    y = launch.product(kernel_layout(w.type), jnp.asarray(x), laid_out(w).fields, tuned, verbs, at)
    return jax.block_until_ready(y)


def check(fmt: lb.Format, kind: Any, m: int, n: int, k: int, tuned: Tuning | None) -> None:
    w, x = array(fmt, n, k), random_rows(m, k, dtype=HALVES[kind])
    y = run(w, x, tuned)
    assert y.shape == (m, n) and y.dtype == HALVES[kind]
    assert not races_found()
    assert_product(y, x, w, kernel_term(m, w.type, short(x.dtype)))


# ---------------------------------------------------------------- the twin

FORMATS = (
    lb.uniform(4, group=128),
    lb.bcq(2, group=32, scale_dtype="float16"),
    lb.bcq(3),
    lb.bcq(4, group=512, scale_dtype="bfloat16"),
    fp3_rows(),  # a stranger's
)
KINDS, BATCHES, ROWS = ("f16", "bf16"), (1, 5, 16, 64), (13, 65)
INPUTS = ((70, 1), (525, 1), (301, 2), (519, 3))
"""And the parts that they are summed in."""
FACTORS = (FORMATS, KINDS, BATCHES, ROWS, INPUTS)
PAIRWISE = tuple(
    (fmt, KINDS[(i + j // 2) % 2], m, ROWS[(i // 2 + j) % 2], INPUTS[(i + j) % 4])
    for (i, fmt), (j, m) in product(enumerate(FORMATS), enumerate(BATCHES))
)
QUICK = tuple(case for i, case in enumerate(PAIRWISE) if i % len(BATCHES) == i // len(BATCHES) % len(BATCHES))
"""Every format at one batch."""


def test_the_grid_covers_every_pair() -> None:
    assert {case[0] for case in QUICK} == set(FORMATS) and {case[2] for case in QUICK} == set(BATCHES)
    for a, b in combinations(range(len(FACTORS)), 2):
        assert {(case[a], case[b]) for case in PAIRWISE} == set(product(FACTORS[a], FACTORS[b]))


@pytest.mark.parametrize(
    ("fmt", "kind", "m", "n", "inputs"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(map(str, case)))
        for case in dict.fromkeys((*PAIRWISE, *product(*FACTORS[:3], ROWS[1:], INPUTS)))
    ],
)
def test_the_twin_is_the_oracles_product(fmt: lb.Format, kind: Any, m: int, n: int, inputs: tuple[int, int]) -> None:
    k, parts = inputs
    check(fmt, kind, m, n, k, Tuning(columns=8 * ceil(m / 8), parts=parts, depth=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "kind"),
    [
        pytest.param(2, "f16", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
        (4, "bf16"),
        (5, "f16"),
    ],
)
def test_the_twin_reads_every_width(width: int, kind: Any) -> None:
    check(lb.any_precision(2, 5, width=width), kind, 3, 65, 301, Tuning(columns=8, parts=2, depth=2))


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        (lb.codebook(1, 8, vec=4, group=128), "f16"),
        pytest.param(lb.codebook(1, 4, vec=16, scale_dtype="bfloat16"), "bf16", marks=pytest.mark.slow),
        pytest.param(lb.any_bcq(2, 3, group=128), "bf16", marks=pytest.mark.slow),
        pytest.param(lb.k_quant(4), "bf16", marks=pytest.mark.slow),
        pytest.param(lb.k_quant(3, offset=False), "f16", marks=pytest.mark.slow),
        pytest.param(lb.nested_fp(), "f16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_of_other_decoders(fmt: lb.Format, kind: Any) -> None:
    check(fmt, kind, 3, 65, 301, Tuning(columns=8, parts=2, depth=2))


@pytest.mark.parametrize(("m", "n", "k"), [(3, 65, 301), pytest.param(70, 129, 256, marks=pytest.mark.slow)])
def test_the_twin_multiplies_e4m3_as_it_is(m: int, n: int, k: int) -> None:
    w = array(lb.nested_fp(8), n, k, "f16")
    codes = random_rows(m, k).astype(jnp.float8_e4m3fn)
    verbs = Twin(interpret_params(detect_races=True))
    got = np.asarray(launch.product_of_codes(kernel_layout(w.type), codes, laid_out(w).fields, 0, None, verbs))
    assert not races_found()
    exact = codes.astype(np.float64) @ np.asarray(lb.dequantize(w)).astype(np.float64)
    size = np.abs(codes.astype(np.float64)) @ np.abs(np.asarray(lb.dequantize(w)).astype(np.float64))
    assert (np.abs(got - exact) <= (k + 2) * float(jnp.finfo("float32").eps) * size).all()


@pytest.mark.slow
def test_it_runs_with_parameters_of_its_own_choice() -> None:
    check(lb.uniform(4, group=64), "bf16", 3, 13, 1500, None)  # six stages


def test_parameters_of_its_own_choice() -> None:
    of = launch.Shape(8, 2, 64)
    program = layout(lb.uniform(4).decode(128, 64 * 256)).program("bf16")
    chosen = tuning(of, program)
    assert of.stages % chosen.parts == 0 and chosen.parts > 1  # one block would leave most of the GPU idle


@pytest.mark.parametrize("fmt", [lb.any_precision(3, 8), lb.codebook(3, 8, vec=4, group=32), lb.nested_fp()], ids=str)
@pytest.mark.parametrize("m", [8, 40, 64])
def test_what_is_in_flight_fits_beside_the_tables(fmt: lb.Format, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of, found = kernel_layout(QuantType((("k", 4096), ("n", 4096)), "f32", fmt, layout="mma")), []

    def watched(shape: launch.Shape, stage: Any, beside: int) -> Tuning:
        chosen = deepest(shape, stage, beside)
        found.append((chosen, 4 * 128 * chosen.columns + beside + chosen.depth * stage(chosen.columns)))
        return chosen

    monkeypatch.setattr(schedule, "deepest", watched)
    tuning(launch.Shape(m, of.tiles, of.stages), of.program("bf16", -1))
    ((chosen, size),) = found
    assert size < 227 << 10 and m % chosen.columns == 0 and chosen.columns % 8 == 0 and chosen.depth >= 2


@pytest.mark.slow
def test_more_than_a_block_multiplies() -> None:
    check(lb.bcq(2), "f16", 130, 129, 70, None)  # of x's rows and of outputs: 2 by 2 blocks


class Racing(Twin):
    """Both warpgroups add to the same accumulator."""

    def accumulate(self, out: Any, run: Any) -> None:
        super().accumulate(out.ref.at[0], run)


def test_a_planted_race_is_found() -> None:
    w = array(lb.bcq(2), 13, 70)
    if NEW:
        with pytest.raises(Exception, match="RACE DETECTED"):
            run(w, random_rows(1, 70, dtype="float16"), None, Racing)
    else:
        run(w, random_rows(1, 70, dtype="float16"), None, Racing)
        assert races_found()


def test_only_halves_are_multiplied() -> None:
    with pytest.raises(TypeError, match="x is float32: the matrix unit multiplies float16 and bfloat16"):
        run(array(lb.bcq(2), 13, 70), random_rows(1, 70), None)


# ---------------------------------------------------------------- programs

W = array(lb.uniform(4, group=64), 100, 300)
THERE = laid_out(W)
X = inputs(5, 300, dtype="bfloat16")
NESTED = laid_out(array(lb.any_precision(2, 5), 100, 300))


def for_cuda(f: Any, *args: Any) -> str:
    return str(jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize("fmt", [FORMATS[0], pytest.param(FORMATS[1], marks=pytest.mark.slow), fp3_rows()], ids=str)
def test_a_program_for_cuda_holds_the_kernel(fmt: lb.Format) -> None:
    w = laid_out(array(fmt, 100, 300))
    assert KERNEL in for_cuda(lb.matmul, X, w)
    assert KERNEL not in for_cuda(lb.matmul, X, array(fmt, 100, 300))
    assert KERNEL not in for_cuda(lb.matmul, X.astype("float32"), w)
    assert KERNEL not in str(jax.jit(lb.matmul).lower(X, w).as_text())


def test_a_width_on_the_device_chooses_between_kernels() -> None:
    made = for_cuda(lambda x, w, width: lb.matmul(x, w, width=width), X, NESTED, jnp.int32(3))
    assert "stablehlo.case" in made and made.count("stablehlo.custom_call @mosaic_gpu") == 4
    for width in (2, 5):
        one = for_cuda(lambda x, w, width=width: lb.matmul(x, w, width=width), X, NESTED)
        assert KERNEL in one and "stablehlo.case" not in one


@pytest.mark.slow
def test_each_width_of_nested_floats_has_its_kernel() -> None:
    x, w = inputs(5, 256, dtype="float16"), array(lb.nested_fp(), 100, 256, "f16")
    there = laid_out(w)
    for width, name in ((8, "fp8"), (16, "mma")):
        assert (
            lb.plan((5, 4096), there.type.resized(n=4096, k=4096).at(width), "gpu", "float16").choices[0].name == name
        )
        np.testing.assert_array_equal(
            np.asarray(lb.matmul(x, there, width=width)), np.asarray(lb.matmul(x, w, width=width))
        )
    large = QuantType((("k", 4096), ("n", 4096)), "f16", lb.nested_fp(), layout="mma")
    shapes = jax.tree.map(lambda f: jax.ShapeDtypeStruct(tuple(f.dims.values()), "uint8"), dict(large.fields))
    made = for_cuda(
        lambda x, fields, width: lb.matmul(x, QuantArray(fields, large), width=width),
        jax.ShapeDtypeStruct((5, 4096), jnp.float16), shapes, jnp.int32(8),
    )  # fmt: skip
    assert "stablehlo.case" in made and made.count("stablehlo.custom_call @mosaic_gpu") == 2
    table = str(lb.plan((5, 256), w.type.at(8), "gpu", "float16"))
    assert "fp8      refused: the weight is in its format's own layout" in table
    assert "mma      refused: " in table


def test_one_exported_program_serves_cpu_and_cuda() -> None:
    made = export.export(jax.jit(lb.matmul), platforms=["cpu", "cuda"])(X, THERE)
    assert KERNEL in made.mlir_module()
    again = export.deserialize(made.serialize())
    assert again.platforms == ("cpu", "cuda")
    np.testing.assert_array_equal(np.asarray(again.call(X, THERE)), np.asarray(lb.matmul(X, THERE)))


def test_on_a_cpu_products_are_those_of_the_plain_array() -> None:
    np.testing.assert_array_equal(np.asarray(jax.jit(lb.matmul)(X, THERE)), np.asarray(jax.jit(lb.matmul)(X, W)))


STACK = jax.tree.map(lambda *a: jnp.stack(a), W, array(lb.uniform(4, group=64), 100, 300, seed=1))


def scanned(x: jax.Array, stack: QuantArray) -> jax.Array:
    return jax.lax.scan(lambda _, w: (None, lb.matmul(x, w)), None, stack)[1]


def mapped(x: jax.Array, stack: QuantArray) -> jax.Array:
    return jax.vmap(lb.matmul, (None, 0))(x, stack)


def rows_mapped(x: jax.Array, stack: QuantArray) -> jax.Array:
    first = jax.tree.map(lambda a: a[0], stack)
    return jax.vmap(lambda row: lb.matmul(row, first))(x)


@pytest.mark.parametrize(
    "over", [scanned, pytest.param(mapped, marks=pytest.mark.slow), pytest.param(rows_mapped, marks=pytest.mark.slow)]
)
def test_stacks_and_batches(over: Any) -> None:
    there = laid_out(STACK)
    got, want = (np.asarray(jax.jit(over)(X, s).astype("float32")) for s in (there, STACK))
    step = 2 * float(jnp.finfo("bfloat16").eps)  # both round a float32 sum to bfloat16
    np.testing.assert_allclose(got, want, rtol=step, atol=step)
    assert KERNEL in for_cuda(over, X, there)


def test_a_batch_of_symbolic_size() -> None:
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 300), jnp.bfloat16)
    made = export.export(jax.jit(lb.matmul), platforms=["cpu", "cuda"])(x, THERE)
    assert KERNEL in made.mlir_module()
    assert made.call(X, THERE).shape == (5, 100)


# ---------------------------------------------------------------- the choice


def test_explain_lists_the_kernel_taken_or_refused() -> None:
    def line(w: QuantArray, platform: str, dtype: str = "bfloat16", batch: int = 1) -> str:
        table = str(lb.plan((batch, 300), w.type, platform, dtype)).splitlines()
        return next(row for row in table if row.startswith("mma "))

    assert "us" in line(THERE, "gpu") and "refused" not in line(THERE, "gpu")
    assert lb.explain(THERE, batch=1, platform="gpu").splitlines()[2] == line(THERE, "gpu")  # and first of all
    assert f"{THERE.type.bits // 8 + 2 * 300:,}" in line(THERE, "gpu")  # every stored bit, and x
    for w, platform, dtype, why in (
        (THERE, "cpu", "bfloat16", "it is for GPUs"),
        (W, "gpu", "bfloat16", "the weight is in its format's own layout: lb.prepare the model for its GPU"),
        (THERE, "gpu", "float32", "x is f32, and it multiplies halves: cast x to bfloat16 or float16"),
        (array(lb.uniform(6), 100, 300), "gpu", "float16", "a weight's code has 6 bits, and with more than 4"),
        (array(lb.bcq(2, group=96), 100, 300), "gpu", "float16", "groups of 96 inputs do not line up with 256"),
    ):
        assert f"refused: {why}" in line(w, platform, dtype)


@lb.register_format("two_tables")
def two_tables(n: int, k: int) -> Expr:
    """Entries that no kernel has room for: 2 x 16 floats for every 32 inputs."""
    code = merge(Unpack(param("codes", "u8", n=n, g=k // 32, j=16), 4, "v", 2), "j", "v", into="i")
    tables = (param(name, "f32", n=n, g=k // 32, c=16) for name in "ab")
    return merge(sum(Gather(table, code, "c") for table in tables), "g", "i", into="k")


def test_too_much_shared_memory_is_refused_by_its_bytes() -> None:
    t = QuantType((("k", 256), ("n", 128)), "f32", two_tables(), layout="mma")
    parameters, words, x, results = 2 * 16 * 8 * 128 * 4, 128 * 128, 8 * 256 * 2, 128 * 8 * 4
    needed = results + 2 * (parameters + words + x + 2 * 1024)
    plan = str(lb.plan((8, 256), t, "gpu", "bfloat16"))
    assert f"mma      refused: a block needs {needed:,} bytes of shared memory, and there are 231,424" in plan
    w = laid_out(random_array(replace(t, layout="own")))
    assert lb.matmul(jnp.ones((8, 256), jnp.bfloat16), w).shape == (8, 128)  # though all platforms are planned


def test_a_width_that_lanes_cannot_decode_is_refused_alone() -> None:
    upper, lower = (param(name, "u8", n=64, k=256) for name in ("upper", "lower"))
    readings = Bitcast(upper, "e4m3"), Call("rebuild_f16", (upper, lower))
    first, second = (kernel_choices(1, readings, at, 0, "mma", "f16", "gpu")[0] for at in range(2))
    assert first.refused == "the step 'bitcast_e4m3' has no lane program" and second.refused is None


def test_lowering_by_name_or_by_several() -> None:
    with pytest.raises(planning.LoweringError) as refused:
        lb.matmul(X, THERE, lowering="mma")
    message = str(refused.value)
    assert message.startswith(f"lowering 'mma' cannot run x[5, k] @ {THERE.type}: use one of decode")
    assert "mma      refused: it is for GPUs" in message and "predicted" in message
    with pytest.raises(planning.LoweringError, match="fp8      refused: it multiplies e4m3, and x stays as it is"):
        lb.matmul(X, THERE, lowering=["mma", "fp8"])
    with pytest.raises(planning.LoweringError, match="lowering 'mma' or 'dense' cannot run"):
        lb.matmul(X, THERE, lowering=["mma", "dense"])
    with pytest.raises(planning.LoweringError, match=r"there is no lowering 'wgmma': use one of .*sums, fp8, dense"):
        lb.matmul(X, THERE, lowering=["decode", "wgmma"])
    with pytest.raises(planning.LoweringError, match=r"^lowering names nothing: use one of .*, or None"):
        lb.matmul(X, THERE, lowering=[])
    got, want = (lb.matmul(X, THERE, lowering=names) for names in (["mma", "table", "decode"], "table"))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert {"mma", "dense"}.isdisjoint(lb.plan(X.shape, THERE.type, "cpu", "bfloat16").names)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[str]]]:
    """A GPU to be given a capability, and what is logged. Programs are still made for the CPU."""
    said: list[str] = []
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0")
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    _forget()
    yield device, said
    _forget()


def _forget() -> None:
    forget()
    devices._warn.cache_clear()
    planning.planned.cache_clear()


def test_another_gpu_is_named_once_and_runs_what_xla_makes(gpu: tuple[Any, list[str]]) -> None:
    device, said = gpu
    assert KERNEL not in for_cuda(lb.matmul, X, THERE)
    assert KERNEL not in for_cuda(lb.matmul, X[:2], THERE)
    why = devices.no_kernels_on(device)
    assert said == [f"NVIDIA B200 runs none of lowbit's kernels ({why}), so products run as XLA makes them"]
    with pytest.raises(planning.LoweringError, match=r"mma +refused: compute capability 10.0: lowbit has schedules"):
        lb.matmul(X, THERE, lowering="mma")
    layer = lb.nn.Linear(lb.nn.Kernel(W, jnp.zeros(2)), None)
    assert lb.prepare(layer) is layer
    assert "mma      refused: compute capability 10.0" in lb.explain(THERE)
    del device.compute_capability
    assert not devices.runs_kernels(device)


def test_on_a_hopper_gpu_the_kernel_is_the_choice(gpu: tuple[Any, list[str]]) -> None:
    device, said = gpu
    device.compute_capability = "9.0"
    assert KERNEL in for_cuda(lb.matmul, X, THERE)
    assert KERNEL in for_cuda(lambda x, w: lb.matmul(x, w, lowering="mma"), X, THERE)
    assert KERNEL not in for_cuda(lambda x, w: lb.matmul(x, w, lowering="decode"), X, THERE)
    layer = lb.nn.Linear(lb.nn.Kernel(W, jnp.zeros(2)), None)
    assert lb.prepare(layer).kernel.type.layout == "mma"
    assert said == []
