"""`lb.quantize`, its rules, `lb.report` and `lb.explain`, on models of every structure."""

import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.formats import Format
from lowbit.nn.kinds import NAMES
from tests.models import NET, TOKENS, Net, Shared, Tied, arrays, assert_same, dense, fast, inputs

BCQ = lb.bcq(2, group=8)
FAST = fast(BCQ)


def net(seed: int = 0) -> Net:
    return Net(nnx.Rngs(seed))


def linear(k: int = 16, n: int = 16, **options: Any) -> nnx.Linear:
    return nnx.Linear(k, n, rngs=nnx.Rngs(0), **options)


def formats(model: nnx.Module) -> dict[str, str]:
    return {row.layer: row.format for row in lb.report(model).rows}


def rule(path: str, fmt: Format | None) -> lb.Rule:
    return lb.Rule(path, fmt, lb.greedy() if fmt else None)


# ---- where layers are found


@pytest.mark.slow
def test_every_layer_of_lists_dicts_and_sequentials() -> None:
    q = lb.quantize(net(), FAST)
    assert {path.rpartition("/")[0] for path in lb.nn.kernels(q)} == set(NET)
    assert type(q) is Net and type(q.layers) is nnx.List and type(q.layers[0].mlp) is nnx.Dict
    assert type(q.head.layers[2]) is type(q.layers[1].mlp["up"]) is lb.nn.Linear and type(q.embed) is lb.nn.Embed
    assert type(q.layers[0].norm) is nnx.LayerNorm
    assert q(TOKENS).shape == (2, 5, 20)


@pytest.mark.slow
def test_each_layer_is_what_quantize_array_makes_of_its_weight() -> None:
    model = net()
    q = lb.quantize(model, {"embed": lb.uniform(3, group=8), "**": BCQ})
    for path, kernel in lb.nn.kernels(q).items():
        node: Any = model
        for part in path.split("/"):
            item = isinstance(node, nnx.Dict | nnx.List)
            node = node[int(part) if part.isdigit() else part] if item else getattr(node, part)
        embedding = path.startswith("embed")
        fmt, dims = (lb.uniform(3, group=8), ("n", "k")) if embedding else (BCQ, ("k", "n"))
        want = lb.quantize_array(node[...], fmt, dims=dims)
        assert kernel.type == want.type
        assert all((kernel.array.fields[f] == want.fields[f]).all() for f in want.fields)


def test_a_linear_can_be_the_whole_model() -> None:
    layer = linear()
    for rules in (BCQ, {"": BCQ}, {"**": BCQ}, {"*": BCQ}):
        q = lb.quantize(layer, fast(rules))
        assert type(q) is lb.nn.Linear and lb.nn.kernels(q).keys() == {"kernel"}
    assert type(layer.kernel) is nnx.Param
    assert formats(q) == {"": "bcq(bits=2, group=8)"}


def test_a_shared_layer_stays_one() -> None:
    q = lb.quantize(Shared(nnx.Rngs(0)), FAST)
    assert q.z is q.sub[0] and q.sub[1] is q.a["q"] and q.z is not q.a["q"]
    assert lb.nn.kernels(q).keys() == {"a/q/kernel", "sub/0/kernel"}
    assert formats(q).keys() == {"a/q", "sub/0"}
    assert {p.rpartition("/")[0] for p in arrays(q)} >= {"a/q/kernel", "sub/0/kernel"}  # the same names in files
    one = lb.quantize(Shared(nnx.Rngs(0)), fast({"sub/0": BCQ}))
    assert type(one.z) is lb.nn.Linear and type(one.a["q"]) is nnx.Linear


def test_a_shared_variable_stays_one() -> None:
    q = lb.quantize(Tied(nnx.Rngs(0)), FAST)
    assert q.a is not q.b and q.a.kernel is q.b.kernel and q.a.bias is not q.b.bias
    apart = lb.quantize(Tied(nnx.Rngs(0)), [rule("a", BCQ), rule("b", lb.uniform(4))][:1])
    assert type(apart.a) is lb.nn.Linear and type(apart.b.kernel) is nnx.Param
    assert lb.report(apart).bytes == apart.a.kernel.type.bits // 8 + 16 * 16 * 4 + 2 * 16 * 4
    untouched = lb.report(Tied(nnx.Rngs(0)))
    assert [r.bytes for r in untouched.rows] == [1024] and untouched.other_bytes == 128


# ---- the old model


def test_the_old_model_is_left_alone() -> None:
    model = net()
    types = [(p, type(m)) for p, m in nnx.iter_modules(model)]
    before, variables = arrays(model), dict(nnx.to_flat_state(nnx.state(model)))
    q = lb.quantize(model, FAST)
    for _, variable in nnx.to_flat_state(nnx.state(q, nnx.Param)):
        variable[...] += 1
    assert [(p, type(m)) for p, m in nnx.iter_modules(model)] == types
    assert_same(arrays(model), before)
    assert all(dict(nnx.to_flat_state(nnx.state(model)))[p] is v for p, v in variables.items())
    # Nor does training the old one reach the new one; what is not quantized is shared until then, not copied.
    q = lb.quantize(model, FAST)
    assert q.layers[0].norm.scale.get_value() is model.layers[0].norm.scale.get_value()
    kept = arrays(q)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] += 1
    assert_same(arrays(q), kept)


def test_donate_frees_each_weight_before_the_next_is_quantized() -> None:
    model, alive = net(), []
    weights = [v.get_value() for p, v in nnx.to_flat_state(nnx.state(model)) if p[-1] in ("kernel", "embedding")]
    want = lb.quantize(net(), FAST)

    def solver(w: jax.Array, fmt: Format) -> Any:
        alive.append(sum(not a.is_deleted() for a in weights))
        return lb.greedy()(w, fmt)

    q = lb.quantize(model, [lb.Rule("**", BCQ, solver)], donate=True)
    assert alive == [7, 6, 5, 4, 3, 2, 1] and all(a.is_deleted() for a in weights)
    assert_same(arrays(q), arrays(want))
    assert not model.layers[0].norm.scale.get_value().is_deleted()
    np.testing.assert_array_equal(q(TOKENS), want(TOKENS))


@pytest.mark.slow
def test_donate_spares_what_stays_dense() -> None:
    class Raw(nnx.Module):
        """A table that the head reads without a layer."""

        def __init__(self) -> None:
            self.embed = nnx.Embed(8, 16, rngs=nnx.Rngs(0))
            self.head = nnx.List([self.embed.embedding])

        def __call__(self, ids: jax.Array) -> jax.Array:
            return self.embed(ids) @ self.head[0].T

    raw = lb.quantize(Raw(), FAST, donate=True)
    assert raw(jnp.arange(3)).shape == (3, 8)
    tied = Tied(nnx.Rngs(0))
    weight = tied.a.kernel.get_value()
    half = lb.quantize(tied, fast({"a": BCQ, "b": None}), donate=True)
    assert not weight.is_deleted() and half(inputs(2, 16)).shape == (2, 16)
    both = lb.quantize(tied, FAST, donate=True)
    assert weight.is_deleted() and both(inputs(2, 16)).shape == (2, 16)
    one = nnx.List([linear(), linear()])
    one[1].kernel = nnx.Param(one[0].kernel.get_value())  # two Variables over one array
    lb.quantize(one, fast({"0": BCQ, "1": None}), donate=True)
    assert one[1](inputs(2, 16)).shape == (2, 16)
    numpy = linear()
    numpy.kernel = nnx.Param(np.asarray(numpy.kernel[...]))
    assert lb.quantize(numpy, FAST, donate=True)(inputs(2, 16)).shape == (2, 16)
    inside = nnx.jit(lambda: lb.quantize(linear(), FAST, donate=True))()
    assert inside.kernel.type == lb.quantize(linear(), FAST).kernel.type and np.isfinite(inside(inputs(2, 16))).all()


# ---- rules


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ({"**": BCQ}, {p: "2" for p in NET}),
        ({"layers/*/mlp/up": BCQ}, {"layers/0/mlp/up": "2", "layers/1/mlp/up": "2"}),
        ({"layers/0/**": BCQ}, {"layers/0/mlp/down": "2", "layers/0/mlp/up": "2"}),
        ({"**/up": BCQ}, {"layers/0/mlp/up": "2", "layers/1/mlp/up": "2"}),
        ({"**/layers/2": BCQ}, {"head/layers/2": "2"}),
        ({"?mbed": BCQ}, {"embed": "2"}),
        ({"embed": None, "**": BCQ}, {p: "2" for p in NET if p != "embed"}),
        (
            {"embed": lb.bcq(3), "head/**": lb.bcq(4), "**": BCQ},
            {"embed": "3"} | dict.fromkeys(NET[1:3], "4") | dict.fromkeys(NET[3:], "2"),
        ),
        ({"layers/**/up": BCQ, "layers/**": lb.bcq(4)}, {p: "2" if p.endswith("up") else "4" for p in NET[3:]}),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_rule_that_matches_wins(rules: dict[str, Format | None], want: dict[str, str]) -> None:
    q = nnx.eval_shape(lambda: lb.quantize(net(), fast(rules)))
    assert {p.rpartition("/")[0]: str(k.type.format["bits"]) for p, k in lb.nn.kernels(q).items()} == want
    assert {p: f for p, f in formats(q).items() if p not in want} == {p: "dense float32" for p in NET if p not in want}


def test_rules_come_in_three_forms() -> None:
    want = arrays(lb.quantize(net(), BCQ))
    for rules in ({"**": BCQ}, [lb.Rule("**", BCQ)], (lb.Rule("**", BCQ, lb.alternating()) for _ in range(1))):
        assert_same(arrays(lb.quantize(net(), rules)), want)
    greedy = arrays(lb.quantize(net(), [lb.Rule("**", BCQ, lb.greedy())]))
    assert not np.array_equal(greedy["embed/embedding/alpha"], want["embed/embedding/alpha"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"embed": BCQ, "layer/*": BCQ},
            (
                "rule 'layer/*' matches none of the 7 layers that can be quantized, such as "
                "'head/layers/2', 'head/layers/0', 'layers/1/mlp/up'"
            ),
        ),
        (
            {"**": BCQ, "embed": lb.uniform(4)},
            "rule 'embed' is never used: '**' comes first and takes 'embed'",
        ),
        (
            {"layers/**": None, "**": BCQ, "layers/*/mlp/*": lb.uniform(4)},
            (
                "rule 'layers/*/mlp/*' is never used: 'layers/**' comes first and takes "
                "'layers/0/mlp/down', 'layers/0/mlp/up', 'layers/1/mlp/down'"
            ),
        ),
        (
            [lb.Rule("embed", BCQ), lb.Rule("embed", BCQ)],
            "rule 'embed' is never used: 'embed' comes first and takes 'embed'",
        ),
        (
            {"layers/*": BCQ},
            (
                "rule 'layers/*' matches none of the 7 layers that can be quantized, such as "
                "'head/layers/2', 'head/layers/0', 'layers/1/mlp/up'"
            ),
        ),
    ],
    ids=["unmatched", "shadowed", "shadowed by None", "twice", "too short"],
)
def test_a_rule_that_is_never_used_is_an_error(rules: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        lb.quantize(net(), rules)
    assert str(error.value) == message


def test_rules_that_mean_what_cannot_be_named() -> None:
    class Sub(nnx.Linear):
        def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
            return -super().__call__(x)

    model = nnx.Dict(sub=Sub(16, 16, rngs=nnx.Rngs(0)), plain=linear())
    such = "matches none of the 1 layers that can be quantized, such as 'plain'"
    text = f"rule 'sub' {such}; 'sub' is a Sub; only {NAMES} themselves can be"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.quantize(model, {"sub": BCQ})
    text = "such as 'a/q', 'sub/0'; 'z' is the shared layer 'sub/0', which goes by this path"
    with pytest.raises(ValueError, match=re.escape(text)):
        lb.quantize(Shared(nnx.Rngs(0)), {"z": BCQ})


@pytest.mark.parametrize("rules", [[BCQ], {"**": "bcq(3)"}, ["**"]], ids=str)
def test_what_is_no_rule_is_an_error(rules: Any) -> None:
    text = "is not a rule: give lb.Rule(path, format), or a dict of path to format or None"
    with pytest.raises(TypeError, match=re.escape(text)):
        lb.quantize(net(), rules)
    with pytest.raises(ValueError, match=r"^no rules were given: nothing would be quantized$"):
        lb.quantize(net(), {})


# ---- what is skipped, and said


def other_layers() -> nnx.Dict:
    class Sub(nnx.Linear):
        pass

    return nnx.Dict(
        a=linear(),
        b=Sub(16, 16, rngs=nnx.Rngs(0)),
        c=nnx.ConvTranspose(4, 8, 3, rngs=nnx.Rngs(0)),
        d=linear(),
        e=nnx.LayerNorm(16, rngs=nnx.Rngs(0)),
    )


def test_skipped_layers_are_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    q = lb.quantize(other_layers(), fast({"d": BCQ}))
    said = [(r.levelno, r.getMessage()) for r in caplog.records]
    assert said == [(logging.WARNING, "lowbit: no rule quantizes a, b (Sub), c (ConvTranspose): left dense")]
    assert type(q.b).__name__ == "Sub" and type(q.b.kernel) is nnx.Param
    assert formats(q) == {
        "d": "bcq(bits=2, group=8)",
        "a": "dense float32",
        "b": "dense float32 (Sub)",
        "c": "dense float32 (ConvTranspose)",
    }
    report = lb.report(q)
    assert report.other_bytes == 4 * (16 + 16 + 8 + 16 + 2 * 16)  # biases, and the norm's scale and bias
    caplog.clear()
    lb.quantize(nnx.Dict(a=linear(), b=linear()), fast({"a": BCQ, "b": None}))
    assert not caplog.records  # what a rule leaves dense is no surprise


@pytest.mark.parametrize(
    "layer",
    [
        lambda: linear(dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)),
        lambda: linear(promote_dtype=lambda arrays, **_: arrays),
        lambda: linear(preferred_element_type=jnp.float64),
        lambda: nnx.Embed(8, 16, promote_dtype=lambda arrays, **_: arrays, rngs=nnx.Rngs(0)),
    ],
    ids=["dot_general", "promote_dtype", "preferred_element_type", "embed's promote_dtype"],
)
def test_layers_with_arithmetic_of_their_own_are_refused(
    layer: Callable[[], nnx.Module], request: pytest.FixtureRequest
) -> None:
    option = request.node.callspec.id.split()[-1]
    text = (
        f"layer 'up' cannot be quantized: its {option} is not the default one; "
        "leave it dense with a rule for its path with the format None"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.quantize(nnx.Dict(up=layer(), down=linear()), FAST)
    q = lb.quantize(nnx.Dict(up=layer(), down=linear()), fast({"up": None, "**": BCQ}))
    assert formats(q)["up"] == "dense float32"


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lb.quantize(net(), FAST, progress=True)
    out, err = capsys.readouterr()
    assert "quantizing" in err and "100%" in err and out == ""
    lb.quantize(net(), FAST)
    assert capsys.readouterr() == ("", "")  # captured: no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lb.quantize(net(), FAST)
    assert "100%" in capsys.readouterr().err
    lb.quantize(net(), FAST, progress=False)
    assert capsys.readouterr() == ("", "")


# ---- report and explain


def test_report_by_hand() -> None:
    model = nnx.Dict(
        up=linear(20, 6),
        table=nnx.Embed(6, 16, param_dtype="bfloat16", rngs=nnx.Rngs(0)),
        out=linear(16, 4, use_bias=False),
    )
    up, table = model.up.kernel[...], model.table.embedding[...]
    fmt = lb.bcq(3, group=12, offset=True, scale_dtype="float16")
    q = lb.quantize(model, fast({"up": fmt, "table": lb.uniform(5), "out": None}))
    rows = {row.layer: row for row in lb.report(q).rows}
    # 2 groups of 12 (the last holds 8) are 2 bytes each a plane; 3 alphas and a beta for each, of 16 bits.
    assert rows["up"].bytes == 6 * 2 * (3 * 2 + (3 + 1) * 2)
    assert rows["up"].bits_per_weight == pytest.approx(8 * rows["up"].bytes / 120, abs=0)
    # 16 codes of 5 bits, a float32 scale and a byte of zero point a row.
    assert rows["table"].bytes == 6 * (16 * 5 // 8 + 4 + 1) and rows["table"].weights == 96
    assert (rows["out"].format, rows["out"].bytes, rows["out"].bits_per_weight) == ("dense float32", 256, 32.0)
    assert rows["out"].relative_error is rows["out"].sqnr_db is None
    for name, w, kernel in (("up", up, q.up.kernel), ("table", table, q.table.embedding)):
        w = np.asarray(w, np.float64)
        stored = np.asarray(jnp.asarray(dense(kernel.array)).astype(kernel.dtype), np.float64)
        ratio = np.sum((w - stored) ** 2) / np.sum(w**2)
        # Sums of at most 120 squares of differences that are off by an eps of the weight, which is 10 times larger.
        assert rows[name].relative_error == pytest.approx(ratio**0.5, rel=(120 + 2 * 10) * 2.0**-23)
        assert rows[name].sqnr_db == pytest.approx(-10 * np.log10(ratio), rel=1e-4)
        assert 0.005 < rows[name].relative_error < 0.3
    report = lb.report(q)
    assert report.other_bytes == 6 * 4  # the bias of up
    assert report.bytes == sum(r.bytes for r in rows.values()) + 24
    held = sum(a.nbytes for name, a in arrays(q).items() if not name.endswith("stats"))
    assert report.bytes == held
    assert report.bits_per_weight == pytest.approx(8 * (held - 24) / (120 + 96 + 64), rel=1e-15)


def test_report_as_dict_and_table() -> None:
    q = lb.quantize(nnx.Dict(up=linear(), out=linear()), fast({"up": BCQ}))
    report = lb.report(q)
    data = report.to_dict()
    assert data.keys() == {"layers", "other_bytes", "bytes", "bits_per_weight"}
    assert data["layers"][0] | {"relative_error": 0, "sqnr_db": 0} == {
        "layer": "up", "format": "bcq(bits=2, group=8)", "weights": 256, "bits_per_weight": 10.0, "bytes": 320,
        "relative_error": 0, "sqnr_db": 0,
    }  # fmt: skip
    assert (data["bytes"], data["other_bytes"], data["bits_per_weight"]) == (320 + 1024 + 128, 128, 21.0)
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in str(report).splitlines()]
    lines = [cells for cells in lines if cells]
    first = report.rows[0]
    assert lines == [
        ["layer", "format", "weights", "bits/weight", "bytes", "rel. error", "SQNR dB"],
        ["up", "bcq(bits=2, group=8)", "256", "10.000", "320", f"{first.relative_error:.4f}", f"{first.sqnr_db:.1f}"],
        ["out", "dense float32", "256", "32.000", "1,024", "", ""],
        ["all of these", "", "512", "21.000", "1,344", "", ""],
        ["other parameters", "", "", "", "128", "", ""],
    ]


def test_report_of_abstract_exact_and_odd_models() -> None:
    abstract = nnx.eval_shape(lambda: lb.quantize(net(), FAST))
    concrete = lb.report(lb.quantize(net(), FAST))
    assert lb.report(abstract).bytes == concrete.bytes
    assert all(r.relative_error is None and r.sqnr_db is None for r in lb.report(abstract).rows)
    zero = linear()
    zero.kernel[...] = jnp.zeros((16, 16))
    row = lb.report(lb.quantize(zero, FAST)).rows[0]
    assert (row.relative_error, row.sqnr_db) == (0.0, np.inf)
    odd = nnx.Dict(a=linear(), dropout=nnx.Dropout(0.5, rngs=nnx.Rngs(0)), count=nnx.Variable(3))
    assert lb.report(odd).other_bytes == 16 * 4 + 4  # the bias, and the generator's count; keys are no parameters
    assert lb.report(nnx.Dict(e=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))).rows == ()


def test_explain() -> None:
    q = lb.quantize(net(), fast({"embed": BCQ, "**/up": BCQ}))
    up, table = q.layers[0].mlp["up"], q.embed
    text = lb.explain(up, batch=4)
    assert text.splitlines()[0] == "x[4, k] @ f32[k=16 n=32] as bcq(bits=2, group=8) on cpu"
    assert text.splitlines()[1].split() == ["form", "predicted", "bytes", "read", "fma", "look-ups"]
    *rows, mma, sums, dense = text.splitlines()[2:]
    assert [line.split()[:2] for line in (mma, sums, dense)] == [[k, "refused:"] for k in ("mma", "sums", "dense")]
    times = [float(line.split()[1]) for line in rows]
    assert len(times) >= 2 and times == sorted(times)
    assert "decode" in {line.split()[0] for line in text.splitlines()[2:]}
    assert lb.explain(up.kernel, batch=4) == lb.explain(up.kernel.array, batch=4) == text
    assert lb.explain(table).splitlines()[0] == "x[1, k] @ f32[n=20 k=16] as bcq(bits=2, group=8) on cpu"
    assert lb.explain(table, platform="gpu").splitlines()[0].endswith(" on gpu")
    for wrong in (q.layers[0].mlp["down"], q, 3):
        with pytest.raises(TypeError, match=f"^{type(wrong).__name__} is not a quantized layer or array"):
            lb.explain(wrong)
