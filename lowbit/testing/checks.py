"""One function a property: what must hold of any quantized array, whatever its format, against the numpy oracle.

Each takes plain arrays and raises AssertionError; `lowbit.testing.kit` runs them all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, dequantize, in_numerics, own
from lowbit.io import read, write
from lowbit.ir.build import contract, param
from lowbit.ir.dtypes import is_float, numpy_dtype, short
from lowbit.ir.expr import Expr
from lowbit.ir.oracle import evaluate
from lowbit.ir.parse import parse
from lowbit.ir.text import text
from lowbit.ir.transpose import transpose
from lowbit.ir.walk import params
from lowbit.nn import Kernel, Linear, report
from lowbit.ops import matmul, take
from lowbit.passes.choose import Form, choose
from lowbit.passes.lower_xla import align, emit
from lowbit.planning import lowering, machine_of, plan
from lowbit.quant_type import QuantType, float_words, type_from_json, type_to_json
from lowbit.testing.terms import encoded, kernel_dx_term, kernel_term, product_term
from lowbit.testing.tolerance import Array, assert_within, exact_and_bound, expect, in_float64, rounded

DRAWS = 64
"""Times that codes which are no numbers are drawn again: after that a format has none."""


def random_array(t: QuantType, seed: int = 0) -> QuantArray:
    """An array of a type with random contents: normal floats, and integers from all of each leaf's range.

    Whatever the leaves allow is a valid array, so this needs no quantizer; codes that a reading takes for the bits of
    floats are drawn again where they are NaN or inf. Padding is random too: no reading may look at it.

    >>> import lowbit as lb
    >>> lb.testing.random_array(lb.QuantType((("k", 40), ("n", 3)), "f32", lb.bcq(2)))
    QuantArray(f32[k=40 n=3] as bcq(bits=2), 3.6 bits/weight: alpha float32[2, 3, 1], planes uint8[2, 3, 1, 5])
    """
    rng = np.random.default_rng(seed)
    fields = {}
    for name, leaf in t.fields.items():
        shape = list(leaf.dims.values())
        integers = None if leaf.bounds is None else rng.integers(leaf.bounds[0], leaf.bounds[1] + 1, shape)
        values = rng.standard_normal(shape) if integers is None else integers
        fields[name] = np.asarray(values).astype(numpy_dtype(leaf.dtype))
    for name, read_as in float_words(t).items():
        for _ in range(DRAWS):
            bad = ~np.isfinite(fields[name].view(numpy_dtype(read_as)))
            if not bad.any():
                break
            low, high = t.fields[name].bounds or (0, 0)
            fields[name][bad] = rng.integers(low, high + 1, bad.sum())
    return QuantArray.of(fields, t)


def random_rows(*shape: int, dtype: Any = "float32", seed: int = 9) -> Array:
    """Activations, or their cotangents, from a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(short(dtype)))


def stored(w: QuantArray) -> dict[str, Array]:
    """The fields of an array, on the host."""
    return {name: np.asarray(a) for name, a in w.fields.items()}


# ---------------------------------------------------------------- values


def check_decode(w: QuantArray) -> None:
    """`lb.dequantize` is the oracle's decode, which is finite, in the type's dims and dtype; else AssertionError.

    >>> import lowbit as lb
    >>> lb.testing.check_decode(lb.quantize_array(np.eye(8, 4), lb.bcq(2)))
    """
    exact, bound = exact_and_bound(w.type.decode, stored(w), list(dict(w.type.dims)))
    expect(is_float(w.type.decode.dtype), f"decodes to {w.type.decode.type}; weights are floats: multiply by a scale")
    expect(np.isfinite(exact).all(), f"{count(~np.isfinite(exact))} weights of random stored arrays are NaN or inf")
    got = dequantize(w)
    expect(got.shape == w.shape and got.dtype == w.dtype, f"{got.dtype}{list(got.shape)}, not {w.dtype}{list(w.shape)}")
    assert_within(got, exact, rounded(exact, bound, w.dtype), f"weight {list(dict(w.type.dims))}")


def check_rows(w: QuantArray) -> None:
    """Rows looked up in a table with dims n, k are those of the oracle's decode."""
    exact, bound = exact_and_bound(w.type.decode, stored(w), ("n", "k"))
    ids = np.array([exact.shape[0] - 1, 0])
    assert_within(take(w, jnp.asarray(ids)), exact[ids], rounded(exact, bound, w.dtype)[ids], f"rows {ids.tolist()}")


def check_text(t: QuantType) -> None:
    """The decode is what its text says, and the type what its JSON says: what files and exported programs rest on."""
    expect(parse(text(t.decode)) is t.decode, "the text of the decode parses to another term")
    again = type_from_json(json.loads(json.dumps(type_to_json(t))))
    expect(again == t, f"the type is read back as {again}, not {t}: options are ints, floats, bools, strings or None")


def check_product(x: Any, w: QuantArray, form: str | None = None) -> None:
    """`lb.matmul(x, w)` in a form, or the one chosen, is the product of x with the oracle's weights.

    The bound is that of the arithmetic of the form, rounded once to x's dtype. Raises LoweringError for a form that
    this product does not have, AssertionError for a product or a shape that is wrong.

    >>> import lowbit as lb
    >>> w = lb.quantize_array(np.eye(8, 4), lb.bcq(2))
    >>> lb.testing.check_product(np.ones((3, 8), np.float32), w, "decode")  # x [..., k]
    """
    x = np.asarray(x)
    planned = plan(x.shape, w.type, dtype=x.dtype).choice(form)
    with lowering(planned.name):
        y = matmul(jnp.asarray(x), w)
    shape = (*x.shape[:-1], dict(w.type.dims)["n"])
    expect(y.shape == shape and y.dtype == x.dtype, f"{y.dtype}{list(y.shape)}, not {x.dtype}{list(shape)}")
    rows = x.size // x.shape[-1]
    term = planned.term if isinstance(planned, Form) else kernel_term(rows, w.type, short(x.dtype), planned.name)
    assert_product(y, x, own(w), term)


def assert_product(y: Any, x: Array, w: QuantArray, term: Expr) -> None:
    """y [..., n] is x [..., k] times w, as exactly as `term` computes it."""
    rows = x.reshape(-1, x.shape[-1])
    env = {**stored(w), "x": rows}
    exact = _ordered(evaluate(product := product_term(len(rows), w.type, short(x.dtype)), env), product, ("m", "n"))
    _, bound = exact_and_bound(term, env, ("m", "n"))
    assert_within(np.asarray(y).reshape(exact.shape), exact, rounded(exact, bound, x.dtype), "y [m, n]")


def assert_dx(dx: Any, dy: Array, w: QuantArray, by_kernel: bool = True) -> None:
    """dx [m, k] is dy [m, n] times the transpose of w, as exactly as kernels compute it, or forms of the term."""
    m, env = len(dy), {**stored(w), "dy": dy}
    plain = contract((param("dy", short(dy.dtype), None, m=m, n=dict(w.type.dims)["n"]), w.type.decode), ("n",))
    exact = _ordered(evaluate(plain, env), plain, ("m", "k"))
    _, bound = exact_and_bound(kernel_dx_term(m, w.type, short(dy.dtype)) if by_kernel else plain, env, ("m", "k"))
    expect(dx.shape == exact.shape and dx.dtype == dy.dtype, f"{dx.dtype}{list(dx.shape)}, not {list(exact.shape)}")
    assert_within(dx, exact, rounded(exact, bound, dy.dtype), "dx [m, k]")


def check_batches(x: Array, w: QuantArray) -> None:
    """One vector, more batch dims, and no rows."""
    check_product(x[0], w)
    check_product(x.reshape(1, *x.shape), w)
    empty = matmul(jnp.asarray(x[:0]), w)
    expect(empty.shape == (0, dict(w.type.dims)["n"]), f"no rows give {list(empty.shape)}")


def check_vmap(x: Array, ws: Sequence[QuantArray]) -> None:
    """`jax.vmap` over a batch of x, and over stacked arrays: each its own product. x [len(ws), m, k]."""
    term = plan(x.shape[1:], ws[0].type).term
    shared = jax.vmap(matmul, in_axes=(0, None))(jnp.asarray(x), ws[0])
    stacked = jax.vmap(matmul)(jnp.asarray(x), jax.tree.map(lambda *a: jnp.stack(a), *ws))
    for i, w in enumerate(ws):
        assert_product(shared[i], x[i], ws[0], term)
        assert_product(stacked[i], x[i], w, term)


# ---------------------------------------------------------------- gradients


def check_gradients(x: Array, w: QuantArray) -> None:
    """The cotangents of x and of every float field are those of the transposed term, and those of `jax.vjp` of the
    decode followed by a dot in float64; codes have none. x is [m, k]. Raises AssertionError otherwise.

    >>> import lowbit as lb
    >>> lb.testing.check_gradients(np.ones((3, 8), np.float32), lb.quantize_array(np.eye(8, 4), lb.bcq(2)))
    """
    given, w = w, in_numerics(w, "float")  # gradients are those of the product in floats, whatever its numerics
    m, n = x.shape[0], dict(w.type.dims)["n"]
    # Small, so that the cotangents stay within the narrowest type that may store a scale: 448 for e4m3.
    dy = (random_rows(m, n, seed=3) / 64).astype(x.dtype)
    dx, dw = jax.jit(lambda x, w, dy: jax.vjp(matmul, x, w)[1](dy))(jnp.asarray(x), given, jnp.asarray(dy))
    expect(isinstance(dw, QuantArray) and dw.type == given.type, f"the cotangent of w is {dw!r}")
    autodiff = _autodiff(encoded(x, w.type), w, dy)
    term, leaf_dy = product_term(m, w.type, short(x.dtype)), param("dy", short(dy.dtype), None, m=m, n=n)
    env = {**stored(w), "x": x, "dy": dy}
    machine = machine_of(jax.default_backend())
    for name, leaf in params(term).items():
        got = dx if name == "x" else dw.fields[name]
        if not is_float(leaf.dtype):
            expect(got.dtype == jax.dtypes.float0, f"the codes {name!r} have a cotangent, {got.dtype}")
            continue
        what = f"the cotangent of {name!r} {list(leaf.dims)}"
        expect(short(got.dtype) == leaf.dtype, f"{what} is {got.dtype}, not {leaf.dtype}")
        pulled = transpose(product_term(m, w.type, short(x.dtype), name == "x"), leaf, leaf_dy)
        exact = _ordered(evaluate(pulled, env), pulled, list(leaf.dims))
        _, bound = exact_and_bound(choose(pulled, machine), env, list(leaf.dims))
        assert_within(autodiff[name], exact, bound, f"jax.vjp of the decode against the oracle: {what}")
        assert_within(got, exact, rounded(exact, bound, leaf.dtype), what)


def _autodiff(x: Array, w: QuantArray, dy: Array) -> dict[str, Array]:
    """`jax.vjp` of decode-then-dot in float64."""
    term = in_float64(w.type.decode)
    env: dict[str, Any] = {name if name in params(term) else f"{name}_64": a for name, a in stored(w).items()}
    floats = {name: a.astype(np.float64) for name, a in env.items() if is_float(short(a.dtype))}

    @jax.jit
    def pull(x: jax.Array, floats: dict[str, jax.Array], dy: jax.Array) -> Any:
        def dense(x: jax.Array, f: Mapping[str, Any]) -> jax.Array:
            sizes = dict(w.type.dims)
            return x @ align(emit(term, {**env, **f}), term.dims, {"k": sizes["k"], "n": sizes["n"]})

        return jax.vjp(dense, x, floats)[1](dy)

    with jax.enable_x64(True):
        dx, fields = pull(x.astype(np.float64), floats, dy.astype(np.float64))
        return {"x": np.asarray(dx), **{name.removesuffix("_64"): np.asarray(g) for name, g in fields.items()}}


# ---------------------------------------------------------------- what is stored


def check_file(w: QuantArray) -> None:
    """What is written to a file is read back bit for bit, of the same type."""
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "w.safetensors")
        write(path, {"w": w})
        again = read(path)["w"]
    expect(isinstance(again, QuantArray) and again.type == w.type, f"the file holds {again!r}, not {w!r}")
    assert isinstance(again, QuantArray)
    for name, value in stored(w).items():
        back = np.asarray(again.fields[name])
        expect(back.tobytes() == value.tobytes() and back.dtype == value.dtype, f"{name!r} is read back differently")


def check_report(w: QuantArray) -> None:
    """A layer can hold the array, and `lb.report` counts every stored bit."""
    row = report(Linear(Kernel(w, jnp.zeros(2)), None)).rows[0]
    held = sum(a.nbytes for a in stored(w).values())
    expect(row.bytes == held and w.type.bits == 8 * held, f"lb.report counts {row.bytes} bytes, {held} are stored")


def check_export(x: Array, w: QuantArray) -> None:
    """A compiled program that takes the array survives serialization, and gives the same bits."""
    program = jax.jit(matmul)
    again = jax.export.deserialize(jax.export.export(program)(jnp.asarray(x), w).serialize())
    got, want = np.asarray(again.call(jnp.asarray(x), w)), np.asarray(program(jnp.asarray(x), w))
    expect(got.tobytes() == want.tobytes(), f"the exported product differs by {np.abs(got - want).max()}")


def _ordered(value: Array, term: Expr, dims: Sequence[str]) -> Array:
    return value.transpose([list(term.dims).index(d) for d in dims])


def count(wrong: Array) -> str:
    return f"{wrong.sum()} of {wrong.size}"
