"""The kernels' layout: there and back, what it refuses, and that an array in it is the array it was everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit as lb
from lowbit import io
from lowbit.array import QuantArray, laid_out, own
from lowbit.ir import Bitcast, Call, Concat, Expr, Gather, Slice, Unpack, cast, const, merge, param, split
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.layout import Layout, layout
from lowbit.kernels.product import shared_tables
from lowbit.kernels.verbs import HALVES
from lowbit.ops import take
from lowbit.passes.pointwise import UnsuitableError
from lowbit.quant_type import QuantType, kernel_layout, readings, type_from_json, type_to_json
from lowbit.testing import random_array
from tests.fp3 import fp3_rows
from tests.models import arrays, assert_same, fast, inputs, whole, wholes
from tests.staged import staged

Array = np.ndarray[Any, Any]
GROUPS = [32, 64, 128, 256, 512, None]


def exact(w: QuantArray) -> QuantArray:
    """Scales of few bits, so that sums of them are exact in float32."""
    few = {n: jnp.round(a * 16) / 16 if jnp.issubdtype(a.dtype, jnp.floating) else a for n, a in w.fields.items()}
    return QuantArray(few, w.type)


def some(fmt: lb.Format, n: int, k: int, seed: int = 0, dims: str = "kn") -> QuantArray:
    sizes = {"n": n, "k": k}
    return exact(random_array(QuantType(tuple((d, sizes[d]) for d in dims), "f32", fmt), seed))


def linear(fmt: lb.Format, n: int = 12, k: int = 70) -> nnx.Module:
    """A layer of such an array."""
    return lb.nn.Linear(lb.nn.Kernel(some(fmt, n, k), jnp.array([1.0, 100.0])), None)


def unpadded(w: QuantArray) -> dict[str, Array]:
    """The fields, bits of the planes that pad a group or the last one cleared."""
    fields = {name: np.asarray(a) for name, a in w.fields.items()}
    k, options = dict(w.type.dims)["k"], dict(w.type.format.options)
    if "codes" in fields:
        groups, vectors = fields["codes"].shape[2:]
        used = np.arange(groups * vectors).reshape(groups, vectors) < -(-k // options["vec"])
        return {**fields, "codes": np.where(used, fields["codes"], 0)}
    planes = fields["planes"]
    if w.type.format.name == "fp3_rows":
        used = np.arange(8 * planes.shape[-1]) < k
    else:
        size, vec = min(options.get("group") or k, k), options.get("vec", 1)
        t = np.arange(8 * planes.shape[-1])
        used = (t < -(-size // vec)) & (np.arange(planes.shape[-2])[:, None] * size + t * vec < k)
    return {**fields, "planes": planes & np.packbits(used, axis=-1, bitorder="little")}


def by_lanes(w: QuantArray, kind: Any) -> Array:
    """The weights [n, k] of an array in the kernels' layout, stage by stage as a kernel decodes them."""
    of = kernel_layout(w.type)
    p = of.program(kind, readings(w.type).index(w.type.decode))
    fields = {name: np.asarray(a) for name, a in w.fields.items()}
    books = np.asarray(shared_tables(p, p.decoder, w.fields)) if of.books else None
    out = np.zeros((of.tiles * ROWS, of.stages * STAGE))
    for tile in range(of.tiles):
        for stage in range(of.stages):
            stored = [fields[e.leaf.name][tile, group_at(e, stage, g), index(of, e)] for e, g in p.inputs]
            at = (tile, slice(None), slice(stage * STAGE, (stage + 1) * STAGE)) if of.as_stored else (tile, stage)
            words = [fields[name][at] for name in list(of.words)[: len(p.words)]]
            here = np.s_[tile * ROWS : (tile + 1) * ROWS, stage * STAGE : (stage + 1) * STAGE]
            out[here] = staged(p, words, *stored, books=books)
    return out[: of.n, : of.k]


def group_at(e: Any, stage: int, group: int) -> int:
    return stage * STAGE // e.span + group if e.span else 0


def index(of: Layout, e: Any) -> int:
    return of.leaves[e.leaf.name].index(e)


def check(w: QuantArray, kind: Any) -> None:
    there = laid_out(w)
    assert there.type == replace(w.type, layout="mma")
    assert {n: (a.shape, a.dtype) for n, a in QuantArray.of(there.fields, there.type).fields.items()} == {
        n: (a.shape, a.dtype) for n, a in there.fields.items()
    }
    back = own(there)
    assert back.type == w.type
    assert_same({n: np.asarray(a) for n, a in back.fields.items()}, unpadded(w))
    for width in w.type.format.widths or (None,):
        here, on_gpu = (a if width is None else QuantArray(a.fields, a.type.at(width)) for a in (w, there))
        dense = np.asarray(lb.dequantize(here))
        np.testing.assert_array_equal(np.asarray(lb.dequantize(on_gpu)), dense)
        rows = dense if w.type.dims[0][0] == "n" else dense.T
        np.testing.assert_array_equal(by_lanes(on_gpu, kind), rows.astype(HALVES[kind]).astype(np.float64))


# ---------------------------------------------------------------- there and back

CASES = [
    # Rows: one, less than a tile, a tile and a bit. Inputs: one stage or several, ragged in bytes, groups and stages.
    (lb.uniform(4, group=128), 100, 300, "f16"),
    pytest.param(lb.bcq(3, group=512, scale_dtype="float16"), 129, 1030, "bf16", marks=pytest.mark.slow),
    pytest.param(lb.bcq(4, group=32, offset=True), 3, 100, "f16", marks=pytest.mark.slow),
    pytest.param(lb.bcq(4, group=64), 64, 256, "bf16", marks=pytest.mark.slow),
    (lb.bcq(2), 70, 33, "bf16"),
    pytest.param(lb.bcq(1, group=256), 1, 513, "f16", marks=pytest.mark.slow),
    (fp3_rows(), 13, 70, "f16"),
    # Read at every width: from one bit, with permutes, with a table in shared memory, with nothing else.
    pytest.param(lb.any_precision(1, 4), 70, 300, "bf16", marks=pytest.mark.slow),
    pytest.param(lb.any_precision(2, 6), 64, 70, "f16", marks=pytest.mark.slow),
    pytest.param(lb.any_precision(3, 8, table_dtype="bfloat16"), 3, 300, "bf16", marks=pytest.mark.slow),
    (lb.any_precision(4, 5), 5, 64, "f16"),
    pytest.param(lb.any_bcq(2, 4, group=32), 70, 100, "bf16", marks=pytest.mark.slow),
    # Vectors from tables that all rows share: words of 2 to 12 a lane, codes across words, part of a vector at the end.
    (lb.codebook(1, 8, vec=4, group=128), 70, 300, "f16"),
    pytest.param(lb.codebook(2, 8, vec=8), 64, 301, "bf16", marks=pytest.mark.slow),
    pytest.param(lb.codebook(2, 6, vec=4, group=64, scale_dtype="float16"), 13, 512, "f16", marks=pytest.mark.slow),
    pytest.param(lb.codebook(1, 10, vec=2, group=32), 100, 70, "f16", marks=pytest.mark.slow),
    pytest.param(lb.codebook(1, 8, vec=16), 70, 256, "bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fmt", "n", "k", "kind"), CASES, ids=lambda v: str(v))
def test_arrays_come_back_and_lanes_read_the_same_weights(fmt: lb.Format, n: int, k: int, kind: str) -> None:
    check(some(fmt, n, k), kind)


@pytest.mark.parametrize("kind", [pytest.param("f16", marks=pytest.mark.slow), "bf16"])
def test_bytes_come_back_and_lanes_rebuild_the_same_floats(kind: str) -> None:
    upper = jnp.delete(jnp.arange(256, dtype=jnp.uint8), np.array([0x7F, 0xFF]))  # all but NaN
    fields = {
        "upper": jnp.repeat(upper[:, None], 256, 1),
        "lower": jnp.tile(jnp.arange(256, dtype=jnp.uint8), (254, 1)),
    }
    w = QuantArray.of(fields, QuantType((("n", 254), ("k", 256)), "f16", lb.nested_fp()))
    there = laid_out(w)
    assert_same({n: np.asarray(a) for n, a in own(there).fields.items()}, {n: np.asarray(a) for n, a in fields.items()})
    want = np.asarray(lb.dequantize(w)).astype(HALVES[kind]).astype(np.float64)
    np.testing.assert_array_equal(by_lanes(there, kind), want)


@pytest.mark.slow
def test_random_formats_and_sizes() -> None:
    shared = {"group": st.sampled_from(GROUPS), "scale_dtype": st.sampled_from(["float32", "float16", "bfloat16"])}
    bits = st.integers(1, 4)
    formats = st.builds(lb.bcq, bits=bits, offset=st.booleans(), **shared) | st.builds(lb.uniform, bits=bits, **shared)

    @settings(max_examples=30)
    @given(formats, st.integers(1, 140), st.integers(2, 300), st.sampled_from(["kn", "nk"]), st.integers(0, 99))
    def property_(fmt: lb.Format, n: int, k: int, dims: str, seed: int) -> None:
        check(some(fmt, n, k, seed, dims), "f16")

    property_()


@lb.register_format("three_books")
def three_books(n: int, k: int) -> Expr:
    """Sums of vectors from tables of 2, 16 and 8."""
    first = Gather(param("two", "f32", c=2, t=4), param("first", "u8", (0, 1), n=n, j=k // 4), "c")
    second = Gather(param("sixteen", "f32", c=16, t=4), param("second", "u8", (0, 15), n=n, j=k // 4), "c")
    third = Gather(param("eight", "f32", c=8, t=4), param("third", "u8", (0, 7), n=n, j=k // 4), "c")
    return merge(first + second + third, "j", "t", into="k")


@pytest.mark.slow
def test_tables_of_all_rows_may_have_different_sizes() -> None:
    w = some(three_books(), 5, 64)
    there = laid_out(w)
    assert_same(*({n: np.asarray(a) for n, a in x.fields.items()} for x in (own(there), w)))
    rows = np.asarray(lb.dequantize(w)).T
    np.testing.assert_array_equal(by_lanes(there, "f16"), rows.astype(np.float64))
    np.testing.assert_array_equal(take(there, jnp.array([4, 0])), rows[[4, 0]])


@pytest.mark.slow
def test_a_stack_is_laid_out_slice_by_slice() -> None:
    slices = [some(lb.bcq(3, group=32), 5, 70, seed) for seed in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *slices)
    there = laid_out(stack)
    assert there.stack == (2,) and there.shape == stack.shape
    for i, w in enumerate(slices):
        assert_same(
            {n: np.asarray(a[i]) for n, a in there.fields.items()},
            {n: np.asarray(a) for n, a in laid_out(w).fields.items()},
        )
    np.testing.assert_array_equal(lb.dequantize(there), lb.dequantize(stack))


def test_what_is_laid_out_stays_as_it_is() -> None:
    w = some(lb.uniform(4), 5, 70)
    there = laid_out(w)
    assert own(w) is w
    assert_same(
        *({n: np.asarray(a) for n, a in x.fields.items()} for x in (laid_out(there), there))  # through its own
    )


# ---------------------------------------------------------------- refusals

N = 64
CODES, SCALE = param("codes", "u8", (0, 3), n=N, k=128), param("scale", "f32", n=N)
GROUPED = param("scale", "f32", n=N, g=4)


def spread(e: Expr, size: int) -> Expr:
    """A value for each group of `size` inputs."""
    return merge(e * const([1] * size, "i32", "t"), "g", "t", into="k")


BOOK, VECTORS = param("book", "f16", c=256, v=8), param("vectors", "u8", n=N, g=2, j=4)
BOOKS = [(param(f"book{i}", "f16", c=256, v=2), param(f"of{i}", "u8", n=N, j=32)) for i in range(3)]
STEP = Call("rebuild_f16", (param("upper", "u8", n=N, k=64), param("lower", "u8", n=N, k=64)))
BITS = [cast(param(f"bit{i}", "u8", (0, 1), n=N, k=64), "i32") for i in range(5)]
ALPHA = param("alpha", "f32", n=N, a=3)


REFUSED: dict[str, tuple[Callable[[], Expr], str]] = {
    "words": (lambda: SCALE * param("words", "u8", (0, 3), n=N, k=64), "it stores 'words' of its own"),
    "spans": (
        lambda: CODES * spread(GROUPED, 32) + Slice(GROUPED, "g", 0, 1).sum("g"),
        r"'scale' is shared by \[0, 32\] inputs in turn",
    ),
    "groups of 96": (lambda: lb.uniform(4, group=96).decode(N, 960), "groups of 96 inputs do not line up with 256"),
    "a table of all rows": (
        lambda: Gather(param("table", "f32", c=4), CODES, "c"),
        "'table' is a table of all rows with vectors of 1, and a lane loads vectors of 2, 4, 8, 16",
    ),
    "halves as they are": (
        lambda: Bitcast(param("codes", "u16", n=N, k=64), "f16"),
        "a weight is not one step alone, of whole bytes",
    ),
    "a step without a lane program": (
        lambda: Bitcast(param("codes", "u8", n=N, k=64), "e4m3"),
        "the step 'bitcast_e4m3' has no lane program",
    ),
    "the negative of a step": (lambda: STEP * -1, "a weight is not one step alone, of whole bytes"),
    "bytes in another order": (
        lambda: merge(split(STEP, "k", a=8, b=8), "b", "a", into="k"),
        "bytes of 'upper' are not stored in the order of the weights",
    ),
    "vectors of some inputs": (
        lambda: merge(Gather(param("book", "f16", g=2, c=256, v=8), VECTORS, "c"), "g", "j", "v", into="k"),
        "which vectors of 'book' are looked up depends on the input",
    ),
    "a part of each vector": (
        lambda: merge(Slice(Gather(BOOK, VECTORS, "c"), "v", 0, 4), "g", "j", "v", into="k"),
        "the last dim of 'book' is not that of 4 inputs of a code",
    ),
    "more bits than bytes": (
        lambda: merge(sum((Gather(*b, "c") for b in BOOKS[1:]), Gather(*BOOKS[0], "c")), "j", "v", into="k"),
        "24 bits for 2 inputs are more than 8 for each",
    ),
    "codes of several rows": (
        lambda: merge(Unpack(param("pairs", "u8", i=N // 2, k=64), 4, "v", 2), "i", "v", into="n") * SCALE,
        "'pairs' has no dim that is that of the weight's rows",
    ),
    "a scale too many": (
        lambda: CODES * spread(Slice(param("scale", "f32", n=N, g=5), "g", 0, 4), 32),
        "some entries of 'scale' are part of no weight, and would be lost",
    ),
    "a leaf too many": (
        lambda: Gather(Concat((param("t", "f32", n=N, c=4), param("more", "f32", n=N, c=2)), "c"), CODES, "c"),
        "'more' is part of no weight, and would be lost",
    ),
    "codes that weights share": (
        lambda: merge(param("codes", "u8", (0, 3), n=N, j=64) * const([1, 1], "i32", "t"), "j", "t", into="k") * SCALE,
        "weights share code bits",
    ),
    "five bits": (lambda: lb.uniform(5).decode(N, 64), "a weight's code has 5 bits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_kernels_cannot_hold_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(UnsuitableError, match=message):
        layout(make())


def alpha(i: int) -> Expr:
    return Slice(ALPHA, "a", i, i + 1).sum("a")


def table(bits: int) -> Expr:
    """Stored values of that many bits."""
    code = sum((b * (1 << i) for i, b in enumerate(BITS[1:bits], 1)), BITS[0])
    return Gather(param(f"table{bits}", "f32", n=N, c=1 << bits), code, "c")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            (BITS[0] * alpha(0), BITS[0] * alpha(1) + BITS[1] * alpha(2)),
            "entries of 'alpha' are read in another order at another width",
        ),
        (
            (SCALE * sum((b * (1 << i) for i, b in enumerate(BITS[1:4], 1)), BITS[0]), table(5)),
            "weights of 4 bits are computed, and those of more are stored in tables",
        ),
        ((table(2), SCALE * BITS[1]), "its codes of 1 bits do not begin with those of 2"),
        (
            tuple(
                merge(sum((Gather(*b, "c") for b in BOOKS[1:i]), Gather(*BOOKS[0], "c")), "j", "v", into="k")
                for i in (1, 2)
            ),
            "it has a look-up of all rows, or a step, and widths that are read in other ways",
        ),
    ],
)
def test_widths_that_do_not_share_what_is_stored_are_refused(terms: tuple[Expr, ...], message: str) -> None:
    with pytest.raises(UnsuitableError, match=message):
        layout(*terms)


def test_one_row_needs_a_dim_of_rows() -> None:
    check(some(lb.uniform(4, group=32), 1, 64), "f16")
    rows = param("scale", "f32", g=2)
    term = merge(rows * param("codes", "u8", (0, 3), n=1, g=2, t=32), "g", "t", into="k")
    with pytest.raises(UnsuitableError, match="'scale' has no dim that is that of the weight's rows"):
        layout(term)


# ---------------------------------------------------------------- the type


def test_the_type_in_json_says_its_layout() -> None:
    t = laid_out(some(lb.bcq(3, group=32), 5, 70)).type
    data = json.loads(json.dumps(type_to_json(t)))
    assert data["layout"] == "mma" and type_from_json(data) == t
    assert "layout" not in type_to_json(replace(t, layout="own"))
    with pytest.raises(ValueError, match="layout 'cdna' is not one this library reads: own, mma"):
        type_from_json({**data, "layout": "cdna"})


def test_bits_are_those_of_the_words_and_tiles_that_are_stored() -> None:
    plain = linear(lb.uniform(4, group=128), 100, 300)
    model = lb.prepare(plain, "hopper")
    (row,), fields = lb.report(model).rows, model.kernel.array.fields
    # Two tiles of 64 rows, two stages of 256 inputs: 4 bits a weight, and 4 groups a row.
    assert {n: a.nbytes for n, a in fields.items()} == {"words": 128 * 512 // 2, "scale": 128 * 4 * 4, "zero": 128 * 4}
    assert not fields["scale"][:, 3].any() and not fields["scale"][1, ..., 100 - 64 :].any()  # padding is zeros
    assert row.bytes == sum(a.nbytes for a in fields.values())
    assert row.bits_per_weight == 8 * row.bytes / (300 * 100)
    assert row.relative_error == lb.report(plain).rows[0].relative_error
    assert lb.report(model).other_bytes == lb.report(plain).other_bytes


def test_roles_are_those_of_the_formats_own_fields() -> None:
    kernel = lb.prepare(linear(lb.uniform(4)), "hopper").kernel
    assert (type(kernel.words), type(kernel.zero), type(kernel.scale)) == (lb.Code, lb.Code, lb.Scale)


# ---------------------------------------------------------------- prepared models


class Net(nnx.Module):
    """An embedding tied to the head, and a layer that is and one that is not quantized."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = whole(nnx.Embed(20, 64, rngs=rngs))
        self.up = whole(nnx.Linear(64, 64, rngs=rngs))
        self.dense = nnx.Linear(64, 64, use_bias=False, kernel_init=nnx.initializers.constant(0.5), rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.dense(self.up(self.embed(ids))))


IDS = jnp.array([[3, 1, 4], [1, 5, 9]])


@cache
def small() -> Net:
    return lb.quantize(Net(), fast({"embed": lb.bcq(1), "up": lb.bcq(1), "dense": None}))


def prepared() -> Net:
    return lb.prepare(small(), "hopper")


@pytest.mark.slow
def test_a_prepared_model_is_a_copy_that_computes_the_same() -> None:
    plain = small()
    before = arrays(plain)
    model = lb.prepare(plain, "hopper")
    assert model is not plain and plain.up.kernel.type.layout == "own"
    assert_same(arrays(plain), before)
    assert {k.type.layout for k in (model.embed.embedding, model.up.kernel)} == {"mma"}
    assert model.dense.kernel is not plain.dense.kernel
    call = nnx.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(call(model, IDS), call(plain, IDS))  # of whole numbers: exact
    np.testing.assert_array_equal(take(model.embed.embedding.array, IDS), plain.embed(IDS))
    again = lb.prepare(model, "hopper")
    assert_same(arrays(again), arrays(model))


def test_gradients_are_those_of_the_plain_model() -> None:
    def loss(model: Net) -> jax.Array:
        return (model(IDS) ** 2).sum() / 2**10

    def gradients(model: Net) -> Any:
        return nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, lb.Scale)))(model)

    plain, model = small(), prepared()
    got, want = gradients(model), gradients(plain)
    for kernel, mine, wanted in (
        (model.embed.embedding, got.embed.embedding, want.embed.embedding),
        (model.up.kernel, got.up.kernel, want.up.kernel),
    ):
        alpha = QuantArray({**kernel.array.fields, "alpha": mine.alpha[...]}, kernel.type)
        np.testing.assert_array_equal(own(alpha).fields["alpha"], wanted.alpha[...])  # of whole numbers: exact
        padding = laid_out(own(alpha)).fields["alpha"]
        np.testing.assert_array_equal(mine.alpha[...], padding)  # what pads has no gradient


@pytest.mark.parametrize("mode", [pytest.param("vjp", marks=pytest.mark.slow), "jvp"])
def test_cotangents_of_every_field_are_those_of_the_plain_array(mode: Any) -> None:
    w = some(lb.uniform(4, group=32), 5, 70)
    x, dy = inputs(3, 70), inputs(3, 5, seed=1)

    @jax.jit
    def pulled(w: QuantArray) -> Any:
        return jax.vjp(partial(lb.matmul, differentiable=mode), x, w)[1](dy)

    (dx, dw), (want_dx, want_dw) = pulled(laid_out(w)), pulled(w)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5)
    assert dw.fields["words"].dtype == dw.fields["zero"].dtype == jax.dtypes.float0
    back = own(QuantArray({**laid_out(w).fields, "scale": dw.fields["scale"]}, dw.type)).fields["scale"]
    np.testing.assert_allclose(back, want_dw.fields["scale"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_forward_mode_too() -> None:
    w, x = some(lb.bcq(2, group=32), 5, 70), inputs(3, 70)
    got, want = (jax.jvp(lambda x, w=v: lb.matmul(x, w, differentiable="jvp"), (x,), (x,))[1] for v in (laid_out(w), w))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- files


def test_the_file_of_a_prepared_model_is_that_of_the_plain_one(tmp_path: Path) -> None:
    plain, files = small(), [tmp_path / "plain", tmp_path / "prepared"]
    for model, file in zip((plain, lb.prepare(plain, "hopper")), files, strict=True):
        lb.save(model, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    into = nnx.eval_shape(prepared)
    again = lb.load(files[0], into)
    assert again.up.kernel.type.layout == "mma"
    assert_same(arrays(again), arrays(prepared()))
    with pytest.raises(ValueError, match="cannot prepare an abstract model, as 'embed/embedding' is"):
        lb.prepare(into, "hopper")
    with pytest.raises((TypeError, ValueError), match="ShapeDtypeStruct; only numpy or jax arrays"):
        io.write(tmp_path / "abstract", {"up": into.up.kernel.array})
    io.write(tmp_path / "array", {"up": again.up.kernel.array})
    assert io.read(tmp_path / "array")["up"].type == plain.up.kernel.type


def test_a_prepared_model_takes_only_its_own_weights(tmp_path: Path) -> None:
    lb.save(linear(lb.uniform(3)), tmp_path / "m")
    into = lb.prepare(linear(lb.uniform(4)), "hopper")
    with pytest.raises(lb.CheckpointError, match=r"'kernel' is .*bits=3.*, but the model has .*bits=4"):
        lb.load(tmp_path / "m", into)


# ---------------------------------------------------------------- what works on quantized models


@pytest.mark.slow
def test_conversion_to_binary_coding() -> None:
    w = linear(lb.uniform(4, group=32)).kernel.array
    got, want = lb.to_bcq(laid_out(w)), lb.to_bcq(w)
    assert got.type == want.type
    assert_same(unpadded(got), unpadded(want))


def test_adapters() -> None:
    plain = linear(lb.uniform(4, group=32))
    got = lb.nn.lora(lb.prepare(plain, "hopper"), rank=2, rngs=nnx.Rngs(1))
    want = lb.nn.lora(plain, rank=2, rngs=nnx.Rngs(1))
    assert got.kernel.type == want.kernel.type
    np.testing.assert_array_equal(lb.dequantize(got.kernel.array), lb.dequantize(want.kernel.array))


@pytest.mark.slow
def test_tuning_before_and_after() -> None:
    plain = linear(lb.bcq(3, group=32, scale_dtype="float16"))
    got, want = (lb.tune.alpha_tuning(m) for m in (lb.prepare(plain, "hopper"), plain))
    assert got.trainable == want.trainable and got.model.kernel.type == want.model.kernel.type
    np.testing.assert_array_equal(got.model.kernel.alpha_first[...], want.model.kernel.alpha_first[...])
    tuned = want.model
    tuned.kernel.alpha_first[...] += 1 / 3  # which float16 does not hold
    model = lb.prepare(tuned, "hopper")
    assert isinstance(model.kernel.alpha_rest, lb.nn.Frozen) and isinstance(model.kernel.alpha_first, lb.Scale)
    np.testing.assert_array_equal(lb.dequantize(model.kernel.array), lb.dequantize(tuned.kernel.array))
    further = lb.tune.alpha_tuning(model).model
    np.testing.assert_array_equal(further.kernel.alpha_first[...], tuned.kernel.alpha_first[...])
    assert_same(*({n: v for n, v in arrays(lb.tune.fold(m)).items() if n != "kernel/planes"} for m in (model, tuned)))


@pytest.mark.slow
def test_rows_of_a_table() -> None:
    table = some(lb.uniform(4, group=32), 130, 70, dims="nk")
    ids = jnp.array([[0, 63, 64, 127], [128, 129, -1, 130]])  # of three tiles, from the end, and none
    got = np.asarray(take(laid_out(table), ids))
    np.testing.assert_array_equal(got, take(table, ids))
    assert np.isnan(got[1, 3]).all() and not np.isnan(got[:, :3]).any()


@pytest.mark.slow
def test_rows_of_a_table_whose_offsets_are_tuned() -> None:
    """They are split off along the rows, all of them: the part that a tile of rows has is whole too."""
    table = lb.nn.Linear(lb.nn.Kernel(some(lb.bcq(2, group=32, offset=True), 130, 64, dims="nk"), jnp.zeros(2)), None)
    tuned = lb.tune.alpha_tuning(table, offsets=True).model.kernel.array
    assert ("beta", "n", 130) in tuned.type.splits
    ids = jnp.array([0, 63, 64, 129])
    np.testing.assert_array_equal(take(laid_out(tuned), ids), take(tuned, ids))
    assert tuned.type.resized(n=200).fields["beta_first"].dims["n"] == 200


def test_grouped_products() -> None:
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(some(lb.bcq(2, group=32), 5, 64, seed) for seed in range(2)))
    sizes, x = jnp.array([2, 3]), wholes(5, 64)
    got, want = (lb.grouped_matmul(x, w, sizes) for w in (laid_out(stack), stack))
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------- lb.prepare


def test_a_device_without_kernels_leaves_the_model_alone() -> None:
    model = small()
    assert lb.prepare(model) is model
    assert lb.prepare(model, jax.devices("cpu")[0]) is model


def test_formats_that_kernels_cannot_decode_stay_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    formats = {"wide": lb.uniform(8), "short": lb.bcq(2, group=24), "good": lb.bcq(2, group=32)}
    out = lb.prepare(nnx.Dict({name: linear(fmt) for name, fmt in formats.items()}), "hopper")
    assert [out[n].kernel.type.layout for n in formats] == ["own", "own", "mma"]
    (line,) = said
    assert line.startswith("no kernel decodes ")
    assert "wide/kernel (a weight's code has 8 bits, and with more than 4 its values must be a stored table" in line
    assert "short/kernel ('alpha' has a value for every 24 inputs, not for a multiple of 32)" in line
    assert "good" not in line
    adapted = lb.prepare(lb.nn.lora(linear(lb.bcq(2)), rank=2, rngs=nnx.Rngs(0)), "hopper")
    assert adapted.kernel.type.layout == "own" and "lora" in said[-1]


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="cannot prepare a int"):
        lb.prepare(3, "hopper")


def test_what_is_no_device() -> None:
    with pytest.raises(TypeError, match=r"^device is 'cuda': give a jax[.]Device, None"):
        lb.prepare(small(), "cuda")
