"""The kit passes a format written outside the package, and catches what can be wrong with one, by name."""

import importlib
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import lowbit as lb
from lowbit import by_term, ops, planning
from lowbit.ir import (
    Bitcast,
    Call,
    CallSpec,
    Gather,
    Type,
    Unpack,
    const,
    contract,
    merge,
    param,
    parse,
    register_call,
    slice_,
    text,
)
from lowbit.kernels.choice import GRADIENTS, KERNELS
from lowbit.passes import PIPELINES, Pass
from lowbit.passes.lower_xla import emit
from lowbit.testing import checks, kit, quantizing, strategies
from lowbit.testing.tolerance import exact_and_bound
from tests import fp3

pytest_plugins = ["pytester"]

W = lb.testing.random_array(lb.QuantType((("k", 24), ("n", 3)), "f32", lb.bcq(2, group=8)))
X = jnp.asarray(checks.random_rows(2, 24))
SMALL = [(2, 9)]
"""A size at which the arrays are ragged and everything compiles in a moment."""
ALWAYS = {"decode", "text", "product decode", "batches", "bfloat16", "vmap", "gradients", "file", "report", "export"}


def failures(fmt: lb.Format, **more) -> dict[str, str]:
    """What the kit says, by the check."""
    with pytest.raises(AssertionError) as err:
        lb.testing.check_format(fmt, SMALL, **more)
    head, *lines = str(err.value).splitlines()
    assert re.fullmatch(rf"{re.escape(str(fmt))}: {len(lines)} of \d+ checks failed", head), head
    return dict(re.fullmatch(r"n=2 k=9: ([\w ]+): (.*)", line).groups() for line in lines)


def number(of: str = "") -> str:
    return rf"-?[\d.]+(?:e-?\d+)?{of}"


WORST = rf"\d+ of \d+ differ; at \(\d, \d\): {number()}, not {number()} \+- {number()}$"

# ---------------------------------------------------------------- what is right passes


@pytest.mark.slow
def test_a_format_from_outside_passes():
    done = lb.testing.check_format(fp3.fp3_rows(), quantizer=fp3.nearest, lowerings=["decode", "join", "table"])
    assert list(done.passed) == ["n=3 k=256", "n=2 k=141", "n=1 k=1"] and not done.refused
    for names in done.passed.values():
        assert ALWAYS | {"quantizer"} <= set(names)
    assert {"product table", "product join"} <= set(done.passed["n=2 k=141"])
    first, *lines = str(done).splitlines()
    assert first == f"fp3_rows(): {sum(map(len, done.passed.values()))} checks passed"
    assert lines[0].startswith("  n=3 k=256: decode, text, product decode, ")


@lb.register_format("only_pairs")
def only_pairs(n: int, k: int):
    if k % 2:
        raise ValueError(f"k = {k} is not a multiple of 2")
    return param("w", "f32", n=n, k=k) * 1.0


@pytest.mark.slow
def test_sizes_that_a_format_refuses(monkeypatch):
    monkeypatch.setattr(kit, "SHAPES", ((1, 4), (2, 3)))
    done = lb.testing.check_format(only_pairs(), lowerings=["decode"])
    assert set(done.passed["n=1 k=4"]) == ALWAYS
    assert done.refused == {"n=2 k=3": "k = 3 is not a multiple of 2"}
    assert str(done).splitlines()[-1] == "  n=2 k=3: refused, k = 3 is not a multiple of 2"
    with pytest.raises(ValueError, match=r"^k = 9 is not a multiple of 2$"):
        lb.testing.check_format(only_pairs(), SMALL)
    monkeypatch.setattr(kit, "SHAPES", ((2, 3),))
    with pytest.raises(ValueError, match=r"^only_pairs\(\) refuses every size: .*; name some that it stores, shapes="):
        lb.testing.check_format(only_pairs())


def test_what_is_no_format():
    with pytest.raises(TypeError, match=r"^<function .*> is not a format such as lb.bcq\(3, group=128\)$"):
        lb.testing.check_format(lb.uniform)


def test_random_arrays_fill_the_range_of_their_leaves():
    t = lb.QuantType((("k", 4000), ("n", 4)), "f32", lb.uniform(2, group=8, scale_dtype="float16"))
    w = lb.testing.random_array(t, seed=1)
    assert {f: a.dtype.name for f, a in w.fields.items()} == {"planes": "uint8", "scale": "float16", "zero": "uint8"}
    assert set(np.unique(w.fields["planes"])) == set(range(256))


@settings(max_examples=30)
@given(strategies.arrays(strategies.formats()), strategies.shapes(3, 5))
def test_strategies(w, shape):
    assert w.type.format.name in ("bcq", "uniform") and set(dict(w.type.dims)) == {"n", "k"}
    assert parse(text(w.type.decode)) is w.type.decode
    assert np.isfinite(exact_and_bound(w.type.decode, checks.stored(w))[0]).all()
    assert 1 <= shape[0] <= 3 and 1 <= shape[1] <= 5


@settings(max_examples=10)
@given(strategies.arrays(strategies.formats(only_pairs), strategies.shapes(2, 9)))
def test_strategies_do_not_draw_sizes_that_are_refused(w):
    assert dict(w.type.dims)["k"] % 2 == 0


def test_strategies_need_hypothesis(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "lowbit.testing.strategies")
    with pytest.raises(ModuleNotFoundError, match=r"^lowbit.testing.strategies needs hypothesis: pip install lowbit\["):
        importlib.import_module("lowbit.testing.strategies")


# ---------------------------------------------------------------- what is wrong is caught: the decode

register_call(
    "doubled_unless_compiled",
    CallSpec(
        type=lambda t: Type(t.dims, "f32", None),
        oracle=lambda v: 2.0 * v,
        operations=lambda t: 1,
        xla=lambda v: v.astype(np.float32) * jnp.where(v == 3, 1, 2),
    ),
)


@lb.register_format("double_meaning")
def double_meaning(n: int, k: int):
    """An opaque step whose jnp reading is wrong for one code."""
    return param("scale", "f32", n=n) * Call("doubled_unless_compiled", (param("codes", "u8", (0, 3), n=n, k=k),))


def test_a_wrong_decode_is_caught():
    found = failures(double_meaning())
    assert list(found) == ["decode"]  # what follows from it is not tried
    assert re.match(r"weight \['k', 'n'\]: " + WORST, found["decode"])


@lb.register_format("forgets_the_tail")
def forgets_the_tail(n: int, k: int):
    codes = Unpack(param("codes", "u8", n=n, j=k // 4), 2, "v", 4)
    return param("scale", "f32", n=n) * merge(codes, "j", "v", into="k")


def test_a_ragged_tail_is_caught():
    assert failures(forgets_the_tail()) == {
        "decode": "ValueError: format forgets_the_tail() decodes to f32[n=2 k=8], which is not [n=2 k=9]"
    }
    with pytest.raises(AssertionError, match=r"\nn=1 k=1: decode: DimError: param codes: dim 'j' has size 0"):
        lb.testing.check_format(forgets_the_tail(), [(1, 1)])


@lb.register_format("decodes_to_integers")
def decodes_to_integers(n: int, k: int):
    return param("codes", "i8", n=n, k=k)


@lb.register_format("bits_of_floats")
def bits_of_floats(n: int, k: int):
    """All bit patterns that the leaf allows are NaN."""
    return Bitcast(param("codes", "u8", (0x7F, 0x7F), n=n, k=k), "e4m3") * param("scale", "f32", n=n)


@lb.register_format("infinite_level")
def infinite_level(n: int, k: int):
    levels = const([0, 1, np.inf, 2], "f32", "c")
    return Gather(levels, param("codes", "u8", (0, 3), n=n, k=k), "c") * param("scale", "f32", n=n)


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (decodes_to_integers(), r"decodes to i8\[n=2 k=9\]; weights are floats: multiply by a scale"),
        (infinite_level(), r"\d+ of 18 weights of random stored arrays are NaN or inf"),
        (bits_of_floats(), "ValueError: 'codes' holds 18 codes among 18 that are NaN or inf, read as e4m3"),
    ],
)
def test_what_is_no_weight_is_caught(fmt, message):
    assert re.fullmatch(message, failures(fmt)["decode"])


def test_options_that_a_file_cannot_hold_are_caught():
    """Constructors refuse them, but a Format can be made without one."""

    @lb.register_format("odd_options")
    def odd_options(n: int, k: int, levels: object = None):
        return param("w", "f32", n=n, k=k) * 1.0

    odd = lb.Format(odd_options().name, (("levels", (1, 2)),))
    with pytest.raises(
        AssertionError, match=r"^the type is read back as .*levels=\[1, 2\]\), not .*: options are ints, "
    ):
        checks.check_text(lb.QuantType((("k", 4), ("n", 2)), "f32", odd))


# ---------------------------------------------------------------- what is wrong is caught: the library


def planted(name: str) -> lb.Format:
    """The same format under a name of its own, so that no cache knows it from another test, or remembers it for one."""

    @lb.register_format(name)
    def fmt(n: int, k: int):
        return fp3.fp3_rows().decode(n, k)

    return fmt()


@pytest.mark.slow
def test_a_wrong_pass_is_caught(monkeypatch):
    place = const([1, 2, 4], "i32", "p")
    wrong = Pass("wrong", (lambda e: const([4, 2, 1], "i32", "p") if e is place else None,))
    monkeypatch.setitem(PIPELINES, "join", (wrong, *PIPELINES["join"]))
    found = failures(planted("fp3_wrong_pass"))
    assert re.match(r"y \[m, n\]: " + WORST, found["product join"])
    assert "decode" not in found and "product decode" not in found


def test_a_pass_that_fails_is_named(monkeypatch):
    def fails(e):
        raise RuntimeError("no such node")

    monkeypatch.setitem(PIPELINES, "join", (Pass("fails", (fails,)),))
    found = failures(planted("fp3_failing_pass"))
    assert found["product join"] == "RuntimeError: no such node" and "decode" not in found


def test_a_wrong_gradient_is_caught(monkeypatch):
    real = planning.transpose
    monkeypatch.setattr(planning, "transpose", lambda *args: real(*args) * 2.0)
    found = failures(planted("fp3_wrong_gradient"), lowerings=["decode"])
    assert list(found) == ["gradients"]
    assert re.match(r"the cotangent of '\w+' \['\w'(, '\w')?\]: \d+ of \d+ differ; at ", found["gradients"])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("file", lambda w, path: {"w": jax.tree.map(lambda a: a + a, w)}, "^'planes' is read back differently$"),
        ("file", lambda w, path: {"w": jnp.ones(3)}, r"^the file holds Array\(\[1., 1., 1.\]"),
        ("report", lambda w, layer: SimpleNamespace(rows=[SimpleNamespace(bytes=1)]), "counts 1 bytes, 20 are stored$"),
    ],
)
def test_what_is_stored_otherwise_is_caught(monkeypatch, name, wrong, message):
    w = lb.testing.random_array(lb.QuantType((("k", 9), ("n", 2)), "f32", fp3.fp3_rows()))
    monkeypatch.setattr(checks, {"file": "read", "report": "report"}[name], lambda given: wrong(w, given))
    with pytest.raises(AssertionError, match=message):
        getattr(checks, f"check_{name}")(w)


def test_an_oracle_that_autodiff_contradicts_is_caught(monkeypatch):
    real = checks.transpose
    monkeypatch.setattr(checks, "transpose", lambda *args: real(*args) * 2.0)
    with pytest.raises(
        AssertionError, match=r"^jax.vjp of the decode against the oracle: the cotangent of 'x' \['m', "
    ):
        checks.check_gradients(np.asarray(X), W)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        ("batches", lambda x, w: lb.matmul(x, w) if x.size else jnp.zeros((1, 3)), r"^no rows give \[1, 3\]$"),
        ("batches", lambda x, w: lb.matmul(x, w) + (x.ndim == 3), r"^y \[m, n\]: " + WORST),
        ("vmap", lambda x, w: lb.matmul(x, w) + isinstance(x, jax.core.Tracer), r"^y \[m, n\]: " + WORST),
        ("product", lambda x, w: lb.matmul(x, w).astype("float16"), r"^float16\[2, 3\], not float32\[2, 3\]$"),
    ],
)
def test_a_wrong_product_is_caught(monkeypatch, check, wrong, message):
    x = np.stack([X, X]) if check == "vmap" else np.asarray(X)
    monkeypatch.setattr(checks, "matmul", wrong)
    with pytest.raises(AssertionError, match=message):
        getattr(checks, f"check_{check}")(x, [W, W] if check == "vmap" else W)


def test_a_program_that_changes_is_caught(monkeypatch):
    monkeypatch.setattr(jax.export, "deserialize", lambda _: SimpleNamespace(call=lambda x, w: lb.matmul(x, w) + 1))
    with pytest.raises(AssertionError, match=r"^the exported product differs by 1\.0"):
        checks.check_export(np.asarray(X), W)


# ---------------------------------------------------------------- what is wrong is caught: the quantizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w, f: f | {"scale": f["scale"] / jnp.abs(w).max(1) * jnp.abs(w).max(1)},
            r"a weight that is zero: 'scale' holds NaN, as a division by zero gives: repair the quantizer$",
        ),
        (lambda w, f: f | {"scale": 0 * f["scale"]}, r"a weight that is normal: 'scale' underflows float32"),
        (lambda w, f: f | {"scale": -f["scale"]}, r"the relative error on N\(0, 1\) is 2.0\d; all zeros have 1$"),
        (lambda w, f: f | {"scale": f["scale"] ** 2 / f["scale"]}, r"a weight that is huge: 'scale' overflows float32"),
        (
            lambda w, f: {"scale": f["scale"]},
            r"fp3_rows\(\) stores \['planes', 'scale'\], but the fields are \['scale'\]$",
        ),
    ],
)
def test_a_wrong_quantizer_is_caught(change, message):
    with pytest.raises(AssertionError, match=f"^{message}"):
        quantizing.check_quantizer(fp3.fp3_rows(), 2, 9, lambda w, fmt: change(w, fp3.nearest(w, fmt)))


@lb.register_format("int4_groups")
def int4_groups(n: int, k: int):
    """A signed code of 4 bits times a scale for each 4 inputs, the last group padded."""
    groups = -(-k // 4)
    weight = param("codes", "i8", (-8, 7), n=n, g=groups, t=4) * param("scale", "f32", n=n, g=groups)
    return slice_(merge(weight, "g", "t", into="k"), "k", 0, k)


def absmax(w, fmt):
    groups = jnp.pad(w, ((0, 0), (0, -w.shape[1] % 4))).reshape(len(w), -1, 4)
    largest = jnp.abs(groups).max(-1)
    scale = jnp.where(largest > 0, largest / 7, 1.0)
    return {"codes": jnp.round(groups / scale[:, :, None]).astype(jnp.int8), "scale": scale}


SIGNS = r"\d+ of 80 weights take the signs of others, the worst at n=\d k=\d+: does the quantizer put codes"
SIZES = "weights that are 4 times smaller in the first half of {} come back larger than in the second: does "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"codes": f["codes"].at[:, -1, :2].set(f["codes"][:, -1, 1::-1])}, SIGNS),
        (lambda f: f | {"codes": f["codes"].at[:, -1].set(0)}, SIZES.format("k")),
        (lambda f: f | {"scale": jnp.roll(f["scale"], 1, axis=1)}, SIZES.format("k")),
        (lambda f: f | {"scale": f["scale"][::-1]}, SIZES.format("n")),
    ],
    ids=["tail reversed", "tail dropped", "scales of other groups", "scales of other outputs"],
)
def test_codes_and_scales_at_wrong_places_are_caught(change, message):
    """The error of all weights together would pass each."""
    quantizing.check_quantizer(int4_groups(), 8, 10, absmax)
    with pytest.raises(AssertionError, match=f"^{message}"):
        quantizing.check_places(int4_groups(), 8, 10, lambda w, fmt: change(absmax(w, fmt)))


@pytest.mark.parametrize(
    ("fmt", "quantizer"),
    [
        pytest.param(lb.bcq(1), lb.greedy(), marks=pytest.mark.slow),
        (lb.bcq(1, offset=True), lb.greedy()),
        (lb.uniform(1), None),
    ],
)
def test_one_scale_for_weights_of_two_sizes_is_no_fault(fmt, quantizer):
    quantizing.check_places(fmt, 2, 21, quantizer)


@pytest.mark.slow
def test_a_quantizer_that_returns_no_arrays_is_named():
    message = r"TypeError: a weight that is normal: the quantizer returned a NoneType, not the stored arrays by name: "
    found = failures(planted("fp3_no_arrays"), lowerings=["decode"], quantizer=lambda w, fmt: None)
    assert re.match(message + r"fp3_no_arrays\(\) stores \['planes', 'scale'\]$", found["quantizer"])


def test_weights_that_come_back_as_nan_are_caught():
    """Stored floats may be finite and their product not."""

    @lb.register_format("two_scales")
    def two_scales(n: int, k: int):
        return param("a", "f32", n=n) * param("b", "f32", n=n) * param("codes", "i8", n=n, k=k)

    def quantizer(w, fmt):
        largest = jnp.abs(w).max(1)
        codes = jnp.round(w / jnp.where(largest > 0, largest, 1)[:, None]).astype(jnp.int8)
        return {"a": largest, "b": jnp.where(largest > 1e30, largest, 1.0), "codes": codes}

    with pytest.raises(AssertionError, match=r"^\d+ of 18 weights that were huge come back as NaN or inf$"):
        quantizing.check_quantizer(two_scales(), 2, 9, quantizer)


# ---------------------------------------------------------------- one lowering


def test_a_lowering_really_runs(monkeypatch):
    """Also in what was compiled before, and no longer than it was asked for."""
    ran = []
    monkeypatch.setattr(by_term, "emit", lambda term, *rest: ran.append(term) or emit(term, *rest))
    w = lb.testing.random_array(lb.QuantType((("k", 24), ("n", 5)), "f32", lb.bcq(2, group=8)))  # no other test's
    plan = lb.plan(X.shape, w.type)
    compiled = jax.jit(lb.matmul)
    usual = compiled(X, w)
    for name in plan.names:
        with lb.testing.lowering(name):
            compiled(X, w)
            assert ran[-1] is plan.choice(name).term
            before = len(ran)
            compiled(X, w)
            assert len(ran) == before
    assert np.array_equal(compiled(X, w), usual) and plan.choice() is plan.forms[0]


def test_lowerings_that_are_not_there():
    with pytest.raises(
        lb.testing.LoweringError,
        match=f"^there is no lowering 'tabel': use one of {', '.join((*PIPELINES, *KERNELS, *GRADIENTS))}$",
    ):
        lb.testing.lowering("tabel").__enter__()
    one = lb.testing.random_array(lb.QuantType((("k", 24), ("n", 3)), "f32", lb.uniform(2, group=8)))
    message = r"^lowering 'bucket' cannot run x\[2, k\] @ f32\[k=24 n=3\] as uniform\(.*\): use one of \w+, "
    with pytest.raises(lb.testing.LoweringError, match=message), lb.testing.lowering("bucket"):
        lb.matmul(X, one)
    with pytest.raises(lb.testing.LoweringError, match=r"^lowering 'bucket' cannot run uniform\(bits=2\): "):
        lb.testing.check_format(lb.uniform(2), SMALL, lowerings=["decode", "bucket"])


# ---------------------------------------------------------------- a model


@pytest.mark.slow
def test_a_model_passes():
    model, batch = fp3.model()
    done = lb.testing.check_model(model, batch)
    assert list(done.passed) == ["layers/0/kernel", "layers/2/kernel"]
    assert all({"decode", "product decode", "product table"} <= set(names) for names in done.passed.values())


class Tied(nnx.Module):
    """A table that is looked up, and another that is a head too."""

    def __init__(self) -> None:
        self.positions = nnx.Embed(4, 8, rngs=nnx.Rngs(0))
        self.tokens = nnx.Embed(6, 8, rngs=nnx.Rngs(1))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.tokens.attend(self.tokens(ids) + self.positions(jnp.arange(ids.size)))


@pytest.mark.slow
def test_tables_are_checked_by_row(monkeypatch):
    model, ids = lb.quantize(Tied(), [lb.Rule("**", fp3.fp3_rows(), fp3.nearest)]), jnp.array([5, 0, 2])
    done = lb.testing.check_model(model, ids, lowerings=["decode"])
    assert done.passed == {
        "positions/embedding": ("decode", "rows"),
        "tokens/embedding": ("decode", "rows", "product decode"),
    }
    monkeypatch.setattr(checks, "take", lambda w, ids: ops.take(w, ids[::-1]))
    with pytest.raises(AssertionError, match=r"\npositions/embedding: rows: rows \[3, 0\]: \d+ of 16 differ; at "):
        lb.testing.check_model(model, ids, lowerings=["decode"])


@pytest.mark.slow
def test_slices_of_a_stack_are_checked_one_by_one(monkeypatch):
    dense = nnx.Dict(
        conv=nnx.Conv(4, 6, 1, feature_group_count=2, rngs=nnx.Rngs(0)), moe=lb.nn.Experts(2, 8, 3, rngs=nnx.Rngs(0))
    )
    model = lb.quantize(dense, lb.uniform(2))
    check = lambda: lb.testing.check_model(  # noqa: E731
        model, jnp.ones((3, 4)), lambda m, x: (m.conv(x), m.moe(jnp.ones((2, 8)), jnp.array([1, 1]))), ["decode"]
    )
    assert check().passed == {
        "conv/kernel[0]": ("decode", "product decode"),
        "conv/kernel[1]": ("decode", "product decode"),
        "moe/kernel[0]": ("decode",),
        "moe/kernel[1]": ("decode",),
    }
    wrong = model.conv.kernel.array.fields["scale"][1]
    monkeypatch.setattr(checks, "matmul", lambda x, w: lb.matmul(x, w) + bool((w.fields["scale"] == wrong).all()))
    with pytest.raises(AssertionError, match=r"1 of 6 checks failed\nconv/kernel\[1\]: product decode: "):
        check()


def test_a_wrong_layer_is_caught(monkeypatch):
    model, batch = fp3.model()
    monkeypatch.setattr(checks, "matmul", lambda x, w: lb.matmul(x, w) + (x.shape[-1] == 8))
    with pytest.raises(AssertionError) as err:
        lb.testing.check_model(model, batch, lowerings=["decode"])
    head, line = str(err.value).splitlines()
    assert head == "Sequential: 1 of 4 checks failed"
    assert re.match(r"layers/2/kernel: product decode: y \[m, n\]: 6 of 6 differ; at ", line)


def test_models_with_nothing_to_check():
    model, batch = fp3.model()
    with pytest.raises(ValueError, match=r"^Linear holds no quantized weight: there is nothing to check$"):
        lb.testing.check_model(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
    with pytest.raises(
        ValueError, match=r"^the batch reaches no quantized weight of this Sequential: give one that does"
    ):
        lb.testing.check_model(model, batch, call=lambda m, b: b)
    with pytest.raises(ValueError, match=r"^the batch reaches no quantized weight .* a call that does not compile$"):
        lb.testing.check_model(model, batch, call=nnx.jit(lambda m, b: m(b)))
    with pytest.raises(lb.testing.LoweringError, match=r"^lowering 'tabel' cannot run Sequential: use one"):
        lb.testing.check_model(model, batch, lowerings=["tabel"])


# ---------------------------------------------------------------- bounds of opaque steps


def test_an_opaque_step_of_rounded_values_states_its_bound():
    x = param("x", "f32", k=3)
    with pytest.raises(
        AssertionError, match=r"^call 'doubled_unless_compiled' of a rounded value: register it with `bound=`$"
    ):
        exact_and_bound(Call("doubled_unless_compiled", (contract((x, x), ()),)), {"x": np.ones(3, np.float32)})


# ---------------------------------------------------------------- the plugin


@pytest.fixture
def plugin(pytester, monkeypatch):
    """Runs pytest with the plugin, whether or not lowbit was installed with it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return lambda *args: pytester.runpytest_inprocess("-p", "lowbit.testing.plugin", "-p", "no:cacheprovider", *args)


def test_the_plugin_runs_the_kit_alone(plugin, pytester):
    pytester.makepyfile("def test_mine(): assert False")
    run = plugin(
        "--lowbit-format=tests.fp3:fp3_rows", "--lowbit-model=tests.fp3:model", "-v", "-k", "report or layers/0"
    )
    assert run.ret == 0
    run.stdout.fnmatch_lines(
        [
            "lowbit-format=tests.fp3:fp3_rows::n=3 k=256: report PASSED*",
            "lowbit-format=tests.fp3:fp3_rows::n=1 k=1: report PASSED*",
            "lowbit-model=tests.fp3:model::layers/0/kernel: decode PASSED*",
            "lowbit-model=tests.fp3:model::layers/0/kernel: product table PASSED*",
        ]
    )


def test_the_plugin_beside_tests_of_ones_own(plugin, pytester):
    pytester.makepyfile(
        """
        import lowbit as lb
        from tests.jax.test_testing import W, X

        def test_mine(lowbit_lowering):
            assert lowbit_lowering in ("decode", "table")
            lb.testing.check_product(X, W, lowbit_lowering)
        """
    )
    run = plugin("test_the_plugin_beside_tests_of_ones_own.py", "--lowbit-lowering=decode,table")
    run.assert_outcomes(passed=2)
    run = plugin("--lowbit-format=tests.jax.test_testing:double_meaning", "-k", "decode and not product")
    run.assert_outcomes(failed=3)
    run.stdout.re_match_lines([r"weight \['k', 'n'\]: " + WORST])


def test_the_plugin_shows_sizes_that_a_format_refuses(plugin):
    run = plugin("--lowbit-format=tests.jax.test_testing:only_pairs", "-rs", "-k", "text or not decode and 141")
    run.stdout.fnmatch_lines(["SKIPPED*refused: k = 141 is not a multiple of 2"])
    run.assert_outcomes(passed=1, skipped=1)


@pytest.mark.slow
def test_a_lowering_that_a_test_does_not_have(plugin, pytester):
    pytester.makepyfile(
        """
        import jax.numpy as jnp, lowbit as lb

        def test_mine(lowbit_lowering):
            t = lb.QuantType((("k", 9), ("n", 2)), "f32", lb.uniform(1))
            lb.matmul(jnp.ones((1, 9)), lb.testing.random_array(t))
        """
    )
    run = plugin("-rs")
    run.stdout.fnmatch_lines(["*lowering 'bucket' cannot run x[[]1, k] @ *"])
    assert run.parseoutcomes()["skipped"] + run.parseoutcomes()["passed"] == len(PIPELINES) + len(KERNELS)
    plugin("--lowbit-lowering=bucket").assert_outcomes(failed=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--lowbit-lowering=tabel",
            f"ERROR: --lowbit-lowering: there is no lowering 'tabel'; use all, {', '.join((*PIPELINES, *KERNELS))}",
        ),
        ("--lowbit-format=tests.fp3", "'tests.fp3' is not MODULE:NAME"),
        (
            "--lowbit-format=tests.fp3:fp4",
            "'tests.fp3:fp4' cannot be imported: module 'tests.fp3' has no attribute 'fp4'",
        ),
        (
            "--lowbit-model=tests.jax.test_testing:Tied",
            "'tests.jax.test_testing:Tied' gives a Tied, not the pair (model, batch)",
        ),
        ("--lowbit-model=no_such:model", "'no_such:model' cannot be imported: No module named 'no_such'"),
    ],
)
def test_options_that_name_nothing(plugin, option, message):
    run = plugin(option)
    assert message in [line.strip() for line in (*run.outlines, *run.errlines)] and run.ret != 0
