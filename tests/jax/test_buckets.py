"""Gradients of tables of all rows: sums by vectors against plain loops, the schedule's twin against the oracle."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.ir.build import merge, param
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Expr, Gather
from lowbit.kernels import buckets as module
from lowbit.kernels.buckets import Buckets, in_numpy
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.mma_db import table_gradients
from lowbit.kernels.product import in_order
from lowbit.kernels.verbs import HALVES, Twin
from lowbit.passes.pointwise import UnsuitableError
from lowbit.planning import LoweringError
from lowbit.quant_type import QuantType, kernel_layout
from lowbit.testing.checks import random_array, random_rows
from tests.parameter_gradients import check_table_gradients


def array(fmt: lb.Format, n: int, k: int, dtype: str = "f32") -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), dtype, fmt))


@lb.register_format("unscaled")
def unscaled(n: int, k: int) -> Expr:
    """A table of vectors of 4 whose entries are the weights."""
    table, codes = param("table", "f32", c=16, v=4), param("codes", "u8", (0, 15), n=n, j=k // 4)
    return merge(Gather(table, codes, "c"), "j", "v", into="k")


FORMATS = {
    lb.codebook(1, 8, vec=4, group=32): (1024, 18),
    lb.codebook(2, 8, vec=8, group=128, scale_dtype="float16"): (4096, 19),
    lb.codebook(1, 10, vec=2, group=64): (2048, 17),  # codes across words
    lb.codebook(2, 6, vec=16): (2048, 20),
    unscaled(): (256, 18),
}


def bucketed(w: QuantArray, g: Any) -> dict[str, Any]:
    """The sums of one tile as lanes make them, in the shape of the table."""
    there, of = laid_out(w), kernel_layout(w.type)
    buckets = Buckets(of.program("f16"))
    stored = [np.asarray(there.fields[e.leaf.name])[0, group, 0] for e, group in buckets.stored]
    ordered = np.asarray(in_order(jnp.asarray(g), buckets.decoder.consecutive))
    memory = in_numpy(buckets, ordered, np.asarray(there.fields["words"])[0, 0], *stored)
    sums = memory[0].view(np.float32).reshape(-1)[: prod(buckets.shape)].reshape(buckets.shape)
    return {name: sums.swapaxes(1, 2).reshape(w.fields[name].shape) for name in of.books}


@pytest.mark.parametrize(
    "fmt",
    [pytest.param(fmt, marks=() if fmt.name == "unscaled" or fmt["vec"] == 4 else pytest.mark.slow) for fmt in FORMATS],
    ids=str,
)
def test_sums_by_vectors(fmt: lb.Format) -> None:
    """Of one tile, which is dy^T x where x is the identity."""
    w, g = array(fmt, ROWS, STAGE), random_rows(ROWS, STAGE) * np.float32(2.0**-20)
    buckets = Buckets(kernel_layout(w.type).program("f16"))
    assert (buckets.words, buckets.most) == FORMATS[fmt]
    check_table_gradients(bucketed(w, g), np.eye(STAGE, dtype=np.float16), g.T, laid_out(w), products=0)


def test_all_vectors_under_one_code() -> None:
    """No sum is too large for 32 bits, whatever the sign; and what all have the most of is exact."""
    w = array(unscaled(), ROWS, STAGE)
    w = QuantArray({**w.fields, "codes": jnp.full_like(w.fields["codes"], 15)}, w.type)
    for value in (1.0, -1.0, np.nextafter(np.float32(2), np.float32(0))):
        sums = bucketed(w, np.full((ROWS, STAGE), value, np.float32))["table"]
        np.testing.assert_array_equal(sums[15], ROWS * STAGE // 4 * np.float32(value))
        assert not sums[:15].any()


def test_what_is_zero_or_not_finite() -> None:
    w = array(lb.codebook(1, 4, vec=4, group=32), ROWS, STAGE)
    w = QuantArray({**w.fields, "scale": w.fields["scale"] + np.float32(2.0**50)}, w.type)
    assert not bucketed(w, np.zeros((ROWS, STAGE), np.float32))["codebooks"].any()
    for what in (np.inf, -np.inf, np.nan):
        g = random_rows(ROWS, STAGE)
        g[63, 255] = what
        assert not np.isfinite(bucketed(w, g)["codebooks"]).any()


@pytest.mark.parametrize(
    ("fmt", "kind", "n", "m", "k"),
    [
        pytest.param(lb.codebook(1, 8, vec=4, group=32), "bf16", 65, 5, 70, marks=pytest.mark.slow),
        (unscaled(), "f16", 65, 70, 64),
        pytest.param(
            lb.codebook(2, 8, vec=8, group=128, scale_dtype="float16"), "f16", 130, 70, 301, marks=pytest.mark.slow
        ),
        pytest.param(lb.codebook(2, 8, vec=8, group=512), "f16", 13, 5, 700, marks=pytest.mark.slow),
        pytest.param(lb.codebook(1, 8, vec=16, scale_dtype="bfloat16"), "bf16", 70, 5, 520, marks=pytest.mark.slow),
        pytest.param(lb.codebook(2, 6, vec=4, group=64), "f16", 13, 5, 512, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_cotangent(fmt: lb.Format, kind: Any, n: int, m: int, k: int) -> None:
    w = laid_out(array(fmt, n, k))
    x, dy = random_rows(m, k, dtype=HALVES[kind]), random_rows(m, n, dtype=HALVES[kind], seed=3)
    check_table_gradients(by_twin(x, dy, w), x, dy, w)
    assert not races_found()


def by_twin(x: Any, dy: Any, w: QuantArray) -> dict[str, jax.Array]:
    verbs = Twin(interpret_params(detect_races=True))
    return table_gradients(kernel_layout(w.type), jnp.asarray(x), jnp.asarray(dy), w.fields, verbs=verbs)


def test_bands_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    of = kernel_layout(QuantType((("k", 64), ("n", 320)), "f32", unscaled()))
    buckets = Buckets(of.program("f16"))
    assert (of.tiles, buckets.bands(of)) == (6, (1, 6))
    for tiles, bands in ((5, (2, 4)), (3, (3, 2)), (0.1, (3, 2))):
        monkeypatch.setattr(module, "PARTS", 4 * tiles * buckets.words)
        assert buckets.bands(of) == bands
    large = kernel_layout(QuantType((("k", 2048), ("n", 2048)), "f32", lb.codebook(2, 8, vec=8, group=128)))
    monkeypatch.undo()
    assert (large.tiles, Buckets(large.program("f16")).bands(large)) == (32, (1, 32))  # 4 MiB, and 16 of a dense one


@pytest.mark.slow
def test_the_twin_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, the last with fewer tiles: the same sums."""
    w = laid_out(array(unscaled(), 320, 64))
    x, dy = random_rows(5, 64, dtype="float16"), random_rows(5, 320, dtype="float16", seed=3)
    monkeypatch.setattr(module, "PARTS", 4 * 5 * 256)
    check_table_gradients(by_twin(x, dy, w), x, dy, w)


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        (lb.bcq(2), "none of its tables is one that all rows share"),
        (
            lb.codebook(1, 12, vec=4, group=128),
            "its tables hold 16,384 numbers, each summed as two integers: a block needs 360,448 bytes of shared memory",
        ),
    ],
    ids=str,
)
def test_what_is_not_summed(fmt: lb.Format, why: str) -> None:
    with pytest.raises(UnsuitableError, match=re.escape(why)):
        Buckets(kernel_layout(QuantType((("k", 512), ("n", 256)), "f32", fmt)).program("f16"))


def test_only_halves_are_multiplied() -> None:
    w = laid_out(array(unscaled(), 13, 64))
    with pytest.raises(TypeError, match="x is float32 and dy float16: the matrix unit multiplies two float16 or two"):
        by_twin(random_rows(1, 64), random_rows(1, 13, dtype="float16"), w)


# ---------------------------------------------------------------- programs, and the choice

KERNEL = "custom_call @mosaic_gpu"
W = array(lb.codebook(1, 8, vec=4, group=64), 100, 300, "bf16")
THERE = laid_out(W)
X = jnp.asarray(random_rows(5, 300, dtype="bfloat16"))


def book(w: QuantArray, x: jax.Array = X, **how: Any) -> jax.Array:
    """The gradient of the table."""

    def loss(books: jax.Array) -> jax.Array:
        return lb.matmul(x, QuantArray({**w.fields, "codebooks": books}, w.type), **how).astype(jnp.float32).sum()

    return jax.grad(loss)(w.fields["codebooks"])


def for_cuda(f: Any, *args: Any) -> str:
    return str(jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


def test_a_program_for_cuda_holds_the_kernel() -> None:
    assert for_cuda(book, THERE).count(KERNEL) == 1  # neither the product nor any other gradient is computed
    assert KERNEL not in for_cuda(book, W)
    assert KERNEL not in for_cuda(book, THERE, X.astype("float32"))
    assert KERNEL not in str(jax.jit(book).lower(THERE).as_text())
    assert KERNEL in for_cuda(jax.vmap(book), jax.tree.map(lambda a: jnp.stack([a, a]), THERE))


def test_on_a_cpu_gradients_are_those_of_the_plain_array() -> None:
    np.testing.assert_array_equal(jax.jit(book)(THERE), jax.jit(book)(W))


def test_explain_lists_the_ways_to_the_gradients() -> None:
    def lines(w: QuantArray, platform: str = "gpu", dtype: str = "bfloat16") -> list[str]:
        *_, of_rows, table = lb.explain(w, batch=64, platform=platform, dtype=dtype, gradient=True).split("\n\n")
        assert of_rows.startswith("dw of ") and table.startswith(f"db of x[64, k] @ {w.type} on {platform}\n")
        return table.splitlines()[2:]

    kernel, by_term = lines(THERE)
    assert kernel.startswith("mma_db ") and f"{THERE.type.bits // 8 + 2 * 64 * 400:,}" in kernel
    assert by_term.startswith("xla_db ")
    for w, platform, dtype, why in (
        (THERE, "cpu", "bfloat16", "it is for GPUs"),
        (W, "gpu", "bfloat16", "the weight is in its format's own layout: lb.prepare the model for its GPU"),
        (THERE, "gpu", "float32", "x is f32, and it multiplies halves: cast x to bfloat16 or float16"),
        (laid_out(array(lb.codebook(1, 12, vec=4), 128, 256)), "gpu", "bfloat16", "its tables hold 16,384 numbers"),
    ):
        by_term, kernel = lines(w, platform, dtype)
        assert by_term.startswith("xla_db ") and kernel.startswith(f"mma_db   refused: {why}")
    assert "db of" not in lb.explain(laid_out(array(lb.bcq(2), 100, 300)), gradient=True)


@pytest.mark.slow
def test_lowering_names_the_way_to_the_gradients() -> None:
    assert jax.eval_shape(lambda w: book(w, lowering="xla_db"), THERE).shape == (1, 256, 4)
    with pytest.raises(LoweringError) as refused:
        book(THERE, lowering=["xla_dw", "mma_db"])
    message = str(refused.value)
    assert message.startswith(f"lowering 'mma_db' cannot run db of x[5, k] @ {THERE.type}: use one of xla_db")
    assert "mma_db   refused: it is for GPUs" in message


def test_a_layer_trains_its_scales_and_tables_by_two_kernels() -> None:
    t = QuantType((("k", 2048), ("n", 2048)), "bf16", lb.codebook(1, 8, vec=4, group=128), layout="mma")
    fields = {name: jax.ShapeDtypeStruct(tuple(f.dims.values()), numpy_dtype(f.dtype)) for name, f in t.fields.items()}

    def loss(trained: Any, words: Any, x: Any) -> jax.Array:
        return lb.matmul(x, QuantArray({**trained, "words": words}, t)).astype(jnp.float32).sum()

    words, x = fields.pop("words"), jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16)
    both = for_cuda(jax.grad(loss), fields, words, x)
    scale = for_cuda(lambda *args: jax.grad(loss)(*args)["scale"], fields, words, x)
    assert (both.count(KERNEL), scale.count(KERNEL)) == (2, 1)
    assert "stablehlo.while" not in both


def test_the_page_says_what_the_table_counts() -> None:
    """What runs once a tile is counted with 8 iterations, and with 64; and the cost model takes it so, about."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    rows = [[cell.strip(" `%") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    counted = {row[0]: float(row[4]) for row in rows if "_db_" in row[0]}
    formats = {"codebook_m1v4": lb.codebook(1, 8, vec=4), "codebook_m2v8": lb.codebook(2, 8, vec=8)}
    said = {row[0]: row for row in rows if row[0] in formats and len(row) == 7}
    assert said.keys() == formats.keys() and len(counted) == 2 * len(said)
    for name, (_, sums, instructions, clocks, added, *products) in said.items():
        few, many = (counted[f"{name}_db_bf16_m{m}"] for m in (512, 4096))
        once = few - 8 * (many - few) / 56
        assert float(instructions) == pytest.approx(once, abs=0.06)  # of one decimal
        assert float(clocks.replace(",", "")) == pytest.approx(once * ROWS * STAGE / 128, abs=6 + 0.01 * 128)
        buckets = Buckets(kernel_layout(QuantType((("k", 512), ("n", 128)), "f32", formats[name])).program("bf16"))
        assert buckets.issued == pytest.approx(once, rel=0.05)
        assert float(added.replace(",", "")) == pytest.approx(buckets.loaded * ROWS * STAGE / 32, abs=6)
        assert (sums, *products) == (f"{buckets.words:,}", "4,096", "32,768")
