"""`QuantType` and `QuantArray`: checks, pytree laws, what is counted, what trains, and export."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.formats import UnknownFormatError
from lowbit.ir import Gather, evaluate, merge, param
from lowbit.quant_type import QuantType, type_from_json, type_to_json
from lowbit.testing.tolerance import assert_within, exact_and_bound
from tests.terms import environment


def type_of(fmt: lb.Format, k: int = 40, n: int = 3, **more: Any) -> QuantType:
    return QuantType((("k", k), ("n", n)), "f32", fmt, **more)


def fields_of(t: QuantType, seed: int = 0) -> dict[str, np.ndarray]:
    return environment(t.decode, seed, exact=False)


def array(fmt: lb.Format, seed: int = 0, **sizes: int) -> QuantArray:
    t = type_of(fmt, **sizes)
    return QuantArray.of(fields_of(t, seed), t)


@lb.register_format("test_codebook")
def codebook(n: int, k: int, entries: int = 16, half: bool = False):
    """Vectors of 4 weights from one table, times a scale for each row."""
    book = param("book", "f16" if half else "f32", c=entries, v=4)
    codes = param("codes", "u8", (0, entries - 1), n=n, j=k // 4)
    return param("scale", "f32", n=n) * merge(Gather(book, codes, "c"), "j", "v", into="k")


BCQ = lb.bcq(3, group=16, offset=True)

# ---------------------------------------------------------------- types


def test_type_is_a_value():
    a, b = type_of(lb.bcq(3, group=16)), type_of(lb.bcq(bits=3, group=16))
    assert a == b and hash(a) == hash(b) and a.decode is b.decode
    others = [
        type_of(lb.bcq(2, group=16)),
        type_of(lb.bcq(3, group=8)),
        type_of(lb.bcq(3, group=16, offset=True)),
        type_of(lb.bcq(3, group=16), k=41),
        QuantType((("n", 3), ("k", 40)), "f32", lb.bcq(3, group=16)),
        QuantType(a.dims, "bf16", a.format),
        type_of(lb.bcq(3, group=16), splits=(("alpha", "p", 1),)),
    ]
    assert len({a, *others}) == 1 + len(others)


def test_type_as_text():
    assert str(type_of(BCQ)) == "f32[k=40 n=3] as bcq(bits=3, group=16, offset=True)"
    fields = "alpha float32[2, 3, 1], planes uint8[2, 3, 1, 5]"
    assert repr(array(lb.bcq(2))) == f"QuantArray(f32[k=40 n=3] as bcq(bits=2), 3.6 bits/weight: {fields})"


def test_shape_dtype_and_resizing():
    w = array(BCQ)
    assert (w.shape, w.ndim, w.dtype) == ((40, 3), 2, np.float32)
    assert w.type.resized(n=7).dims == (("k", 40), ("n", 7))
    assert w.type.resized(n=7).format == BCQ


@pytest.mark.parametrize("dims", [(("k", 4), ("m", 3)), (("k", 4),), (("k", 4), ("n", 3), ("m", 2))])
def test_other_dims(dims):
    message = f"a quantized array has the dims k and n, not {tuple(d for d, _ in dims)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        assert QuantType(dims, "f32", BCQ).fields


@lb.register_format("test_forgets_k")
def forgets_k(n: int, k: int):
    return param("row", "f32", n=n)


def test_decode_to_another_shape():
    message = "format test_forgets_k() decodes to f32[n=3], which is not [n=3 k=40]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        assert type_of(forgets_k()).fields


def test_json_round_trip():
    for t in (type_of(BCQ), type_of(lb.uniform(4)), type_of(codebook(8)), type_of(BCQ, splits=(("alpha", "p", 1),))):
        assert type_from_json(type_to_json(t)) == t
    data = type_to_json(type_of(BCQ))
    with pytest.raises(ValueError, match=r"^format 'bcq' has version 2, this library reads version 1$"):
        type_from_json({**data, "version": 2})
    with pytest.raises(UnknownFormatError, match="'bcqq' is not registered"):
        type_from_json({**data, "format": "bcqq"})


# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize("s", [32, 16])
@pytest.mark.parametrize("group", [8, 64, 128, None])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bits_per_weight(bits, group, s):
    """q + s (q + offset) / g for binary coding, q + (s + 8) / g for uniform, when 8 | g | k."""
    k, dtype = 256, {32: "float32", 16: "float16"}[s]
    g = group or k
    for offset in (False, True):
        t = type_of(lb.bcq(bits, group, offset=offset, scale_dtype=dtype), k=k)
        assert t.bits_per_weight == bits + s * (bits + offset) / g
    assert type_of(lb.uniform(bits, group, scale_dtype=dtype), k=k).bits_per_weight == bits + (s + 8) / g


def test_padding_is_counted():
    """k=40 in groups of 33 is two groups of 5 bytes a plane, 80 bits for 40 weights, and 2 scales a row."""
    t = type_of(lb.bcq(3, group=33), k=40)
    assert t.fields["planes"].dims == {"p": 3, "n": 3, "g": 2, "j": 5}
    assert t.bits_per_weight == 3 * (80 + 2 * 32) / 40
    for fmt in (lb.bcq(3, group=33), lb.uniform(4, group=12), codebook(8)):
        w = array(fmt)
        assert w.type.bits == sum(8 * a.nbytes for a in w.fields.values())


def test_roles():
    assert {f: type_of(BCQ).role(f) for f in type_of(BCQ).fields} == {
        "planes": "code",
        "alpha": "scale",
        "beta": "scale",
    }
    uniform = type_of(lb.uniform(4))
    assert {f: uniform.role(f) for f in uniform.fields} == {"planes": "code", "scale": "scale", "zero": "code"}
    for fmt in (codebook(), codebook(half=True)):
        t = type_of(fmt)
        assert {f: t.role(f) for f in t.fields} == {"book": "codebook", "codes": "code", "scale": "scale"}
    with pytest.raises(KeyError, match="gamma"):
        uniform.role("gamma")


def test_splitting_the_scales_leaves_the_codebook_one():
    t = type_of(codebook(), splits=(("scale", "n", 2),))
    assert {f: t.role(f) for f in t.fields} == {
        "book": "codebook", "codes": "code", "scale_first": "scale", "scale_rest": "frozen",
    }  # fmt: skip


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_split_alpha_decodes_identically(at, scale_dtype):
    """The first `at` planes' scales in float32, the rest as they were; all of them when `at` is every plane."""
    fmt = lb.bcq(3, group=16, offset=True, scale_dtype=scale_dtype)
    whole = type_of(fmt)
    parts = type_of(fmt, splits=(("alpha", "p", at),))
    fields = fields_of(whole)
    alpha = fields.pop("alpha")
    fields["alpha_first"] = alpha[:at].astype(np.float32)
    if at < 3:
        fields["alpha_rest"] = alpha[at:]
    w = QuantArray.of(fields_of(whole), whole)
    v = QuantArray.of(fields, parts)
    assert np.array_equal(evaluate(parts.decode, fields), evaluate(whole.decode, fields_of(whole)))
    assert np.array_equal(lb.dequantize(v), lb.dequantize(w))
    assert parts.role("alpha_first") == "scale" and (at == 3 or parts.role("alpha_rest") == "frozen")


def test_two_splits():
    t = type_of(BCQ, splits=(("alpha", "p", 1), ("beta", "n", 2)))
    assert set(t.fields) == {"planes", "alpha_first", "alpha_rest", "beta_first", "beta_rest"}


# ---------------------------------------------------------------- arrays are checked once


def test_of_takes_exactly_the_fields():
    t = type_of(BCQ)
    good = fields_of(t)
    assert list(QuantArray.of(dict(reversed(good.items())), t).fields) == ["alpha", "beta", "planes"]
    for bad in ({k: v for k, v in good.items() if k != "beta"}, {**good, "gamma": good["beta"]}, {}):
        message = f"{BCQ} stores ['alpha', 'beta', 'planes'], but the fields are {sorted(bad)}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            QuantArray.of(bad, t)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("alpha", lambda a: a[:2], "stores 'alpha' as f32[p=3 n=3 g=3], but the array is float32[2, 3, 3]"),
        (
            "alpha",
            lambda a: a.astype(np.float16),
            "stores 'alpha' as f32[p=3 n=3 g=3], but the array is float16[3, 3, 3]",
        ),
        ("beta", lambda a: a[:, None], "stores 'beta' as f32[n=3 g=3], but the array is float32[3, 1, 3]"),
        (
            "planes",
            lambda a: a.astype(np.int8),
            "stores 'planes' as u8[p=3 n=3 g=3 j=2], but the array is int8[3, 3, 3, 2]",
        ),
    ],
)
def test_of_names_the_field_and_both_types(field, change, message):
    t = type_of(BCQ)
    fields = fields_of(t)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{BCQ} {message}')}$"):
        QuantArray.of({**fields, field: change(fields[field])}, t)


def test_of_checks_the_range_of_codes():
    t = type_of(codebook(10))
    fields = fields_of(t)
    fields["codes"][1, 2] = 12
    with pytest.raises(ValueError, match=rf"^'codes' holds {fields['codes'].min()}\.\.12, outside its range 0\.\.9$"):
        QuantArray.of(fields, t)


# ---------------------------------------------------------------- pytree


def test_flatten_and_unflatten():
    w = array(BCQ)
    leaves, tree = jax.tree.flatten(w)
    again = jax.tree.unflatten(tree, leaves)
    assert again.type == w.type and list(again.fields) == list(w.fields)
    assert all(again.fields[f] is w.fields[f] for f in w.fields)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path({"kernel": w})]
    assert paths == ["['kernel']['alpha']", "['kernel']['beta']", "['kernel']['planes']"]


def test_trees_are_equal_exactly_when_types_are():
    assert jax.tree.structure(array(BCQ)) == jax.tree.structure(array(BCQ, seed=1))
    assert jax.tree.structure(array(BCQ)) != jax.tree.structure(array(lb.bcq(3, group=16)))
    assert hash(jax.tree.structure(array(BCQ))) == hash(jax.tree.structure(array(BCQ, seed=1)))


def test_unflatten_checks_nothing():
    """tree_map passes through shapes, dtypes and placeholders that are no arrays."""
    w = array(BCQ)
    doubled = jax.tree.map(lambda a: a + a, w)
    assert np.array_equal(doubled.fields["alpha"], 2 * w.fields["alpha"])
    names = jax.tree_util.tree_map_with_path(lambda p, a: p[-1].key, w)
    assert names.fields == {"alpha": "alpha", "beta": "beta", "planes": "planes"} and names.type == w.type
    shapes = jax.eval_shape(lambda w: w, w)
    assert shapes.fields["planes"] == jax.ShapeDtypeStruct((3, 3, 3, 2), np.uint8)
    assert jax.tree.map(lambda a: None, w).fields == dict.fromkeys(w.fields)


def test_stacking_and_scan_over_layers():
    ws = [array(BCQ, seed=s, k=12, n=12) for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *ws)
    assert stacked.type == ws[0].type and stacked.fields["alpha"].shape == (3, 3, 12, 1)
    x = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)

    def layer(x: jax.Array, w: QuantArray) -> tuple[jax.Array, jax.Array]:
        y = lb.matmul(x, w)
        return y, y

    _, outputs = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(jnp.asarray(x), stacked)
    term = lb.plan(x.shape, ws[0].type).term
    order = [list(term.dims).index(d) for d in ("m", "n")]
    for w, y in zip(ws, np.asarray(outputs), strict=True):
        exact, bound = exact_and_bound(term, {**{f: np.asarray(a) for f, a in w.fields.items()}, "x": x})
        assert_within(y, exact.transpose(order), bound.transpose(order))
        x = y


def test_vmap_sees_one_array_of_the_stack():
    ws = [array(BCQ, seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *ws)
    got = jax.vmap(lb.dequantize)(stacked)
    assert np.array_equal(got, jnp.stack([lb.dequantize(w) for w in ws]))


def test_arrays_are_compared_by_identity():
    w = array(BCQ)
    assert w == w and w != array(BCQ) and len({w, w}) == 1


# ---------------------------------------------------------------- export


def round_trip(f: Any, *args: Any, vjp_order: int = 0) -> Any:
    exported = export.export(jax.jit(f))(*args)
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


@pytest.mark.parametrize("fmt", [BCQ, lb.uniform(4, group=16), codebook()], ids=str)
def test_export_of_a_function_that_takes_one(fmt):
    w = array(fmt)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40)), jnp.float32)
    back = round_trip(lb.matmul, x, w)
    assert np.array_equal(back.call(x, w), jax.jit(lb.matmul)(x, w))
    assert np.array_equal(back.call(x, array(fmt, seed=1)), jax.jit(lb.matmul)(x, array(fmt, seed=1)))


def test_export_of_a_function_that_closes_over_one():
    w, x = array(BCQ), jnp.ones((2, 40))
    back = round_trip(lambda x: lb.matmul(x, w), x)
    assert np.array_equal(back.call(x), jax.jit(lambda x: lb.matmul(x, w))(x))


def test_export_of_a_function_that_returns_one():
    w = array(BCQ)
    back = round_trip(lambda w: jax.tree.map(lambda a: a + a, w), w)
    got = back.call(w)
    assert isinstance(got, QuantArray) and got.type == w.type
    assert np.array_equal(got.fields["alpha"], 2 * w.fields["alpha"])


def test_export_with_gradients():
    w, x = array(BCQ), jnp.ones((2, 40))
    back = round_trip(lambda x: lb.matmul(x, w).sum(), x, vjp_order=1)
    assert np.array_equal(back.vjp().call(x, jnp.float32(1))[0], jax.jit(jax.grad(lambda x: lb.matmul(x, w).sum()))(x))


def test_exported_call_checks_the_type():
    w, x = array(BCQ), jnp.ones((2, 40))
    with pytest.raises(ValueError, match="pytree"):
        round_trip(lb.matmul, x, w).call(x, array(lb.bcq(3, group=8, offset=True)))
