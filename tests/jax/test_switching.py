"""Decoders whose layers choose their widths as they run: by older inputs, and without a say of what is no token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lowbit as lb
from lowbit.models import attention, decoder, mlp
from lowbit.models.decoder import positions
from lowbit.nn.reached import noted
from lowbit.nn.switch import switches
from lowbit.testing.tolerance import unit
from lowbit.tune.captured import Passes
from lowbit.tune.nested import fingerprint, nested
from tests.families import GOLDEN, filled
from tests.golden.models.cases import CASES, ENCODERS, SHARED

NESTED = lb.any_precision(2, 3, table_dtype="float32")
LAYERS = ("layers/0/mlp/down", "layers/*/attn/q", "layers/1/mlp/up")
T = 6


def tolerance(model: Any) -> float:
    """Of logits, relative to the largest one, where sums are made in another order: as `tests.families.TOLERANCE`."""
    c = model.config
    return c.layers * 20 * max(c.width, c.hidden) ** 0.5 * unit("float32")


def text(vocab: int) -> jax.Array:
    """[1, T], always the same."""
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab, (1, T)), jnp.int32)


@cache
def choices(post_norm: bool = False) -> tuple[Any, lb.tune.Thresholds]:
    """A decoder of three blocks, and thresholds near the middle of what its layers see."""
    sizes = {"vocab": 16, "width": 16, "layers": 3, "heads": 2, "kv_heads": 1, "head": 8, "hidden": 16}
    dense = lb.models.Decoder(lb.models.Config(**sizes, context=32, post_norm=post_norm), rngs=nnx.Rngs(0))
    small = lb.quantize(dense, dict.fromkeys(LAYERS, NESTED) | {"**": None})
    return small, found(small)


def found(model: Any) -> lb.tune.Thresholds:
    """Projections on few rows, and thresholds that half of what the layers multiply is above, of the text."""
    held, values = nested(model), dict[str, jax.Array]()
    passes = Passes(model, lambda m, tokens: m(tokens), [text(model.config.vocab)], dict.fromkeys(held, (2, 3)), held)
    for path, kernel in held.items():
        g = np.random.default_rng(len(path)).standard_normal((4, kernel.shape[0])).astype(np.float32)
        seen = np.linalg.norm(np.asarray(passes.inputs(path)) @ g.T, axis=1)
        own = {"low": jnp.int32(2), "high": jnp.int32(3), "most": jnp.int32(3), "projection": jnp.asarray(g)}
        own["threshold"] = jnp.float32(np.median(seen))
        values |= {f"{path}/{name}": value for name, value in own.items()}
    return lb.tune.Thresholds(values, fingerprint(held, held))


def nearer(found: lb.tune.Thresholds) -> lb.tune.Thresholds:
    """Other thresholds for the same layers."""
    values = {name: 0.9 * v if name.endswith("threshold") else v for name, v in found.values.items()}
    return lb.tune.Thresholds(values, found.base)


def stepping(model: Any) -> tuple[Any, Callable[[Any, Any, Any], Any]]:
    """Its arrays, and a jitted step by `call` -> (logits, cache), and widths."""
    graph, state = nnx.split(lb.nn.switching(model, "call"))

    @jax.jit
    def step(state: Any, cache: Any, tokens: jax.Array, at: jax.Array) -> Any:
        def run(m: Any) -> Any:
            hidden, new = m.hidden(tokens[:, None], at[:, None], cache)
            return m.logits(hidden[:, 0], at), new

        return lb.nn.effective_bits(run, nnx.merge(graph, state))

    return state, step


def assert_steps_are_the_row(model: Any) -> Any:
    """Every layer has the same width at every position, and logits are the same; returns the step."""
    tokens = text(model.config.vocab)
    whole = nnx.jit(lambda m, mask: lb.nn.effective_bits(lambda m: m(tokens, mask), m))
    ends = [whole(model, jnp.arange(T)[None] <= i) for i in range(T)]  # places beyond the end are not counted
    logits = np.asarray(ends[-1][0][0])
    state, step = stepping(model)
    cache = lb.models.DenseKV().empty(model.config, 1, T, jnp.float32)
    before, chosen = dict.fromkeys(switches(model), 0.0), set()
    for i in range(T):
        (got, cache), bits = step(state, cache, tokens[:, i], jnp.full(1, i, jnp.int32))
        total = {path: round(float(mean) * (i + 1)) for path, mean in ends[i][1].layers.items()}
        now = {path: float(b) for path, b in bits.layers.items()}
        assert now == {path: total[path] - before[path] for path in total}
        assert np.abs(np.asarray(got[0]) - logits[i]).max() <= tolerance(model) * np.abs(logits).max()
        before = total
        chosen |= set(now.items())
    for name in {path.rpartition("/")[2] for path in total}:
        assert {b for path, b in chosen if path.endswith(name)} == {2.0, 3.0}, name
    assert step._cache_size() == 1
    return step


@pytest.mark.slow
def test_steps_choose_as_the_same_model_does_over_a_text_in_one_program() -> None:
    small, near = choices()
    model = lb.tune.switched(small, near, asynchronous=True)
    step = assert_steps_are_the_row(model)
    other, _ = stepping(lb.tune.switched(small, nearer(near), asynchronous=True))
    cache = lb.models.DenseKV().empty(model.config, 1, T, jnp.float32)
    given = other, cache, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    step(*given)
    assert step._cache_size() == 1
    assert "callback" not in str(jax.make_jaxpr(step)(*given))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in ENCODERS])
def test_every_family_switches(name: str) -> None:
    j = json.loads((GOLDEN / name / "config.json").read_text())
    dense = filled(j, load_file(GOLDEN / SHARED.get(name, name) / "model.safetensors"))
    layers = "layers/*/attn/*" if dense.config.experts else "layers/*/*/*"
    small = lb.quantize(dense, {layers: NESTED, "**": None})
    assert_steps_are_the_row(lb.tune.switched(small, found(small), asynchronous=True))


@pytest.mark.parametrize("post_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_are_asked_by_the_stream_before_the_last_sublayer(post_norm: bool) -> None:
    model = lb.tune.switched(*choices(post_norm), asynchronous=True)
    marked = {"layers/1/attn/q", "layers/1/mlp/up"}
    assert marked == {p for p, s in switches(model).items() if s.asynchronous is not None} - {"layers/2/attn/q"}
    tokens = text(16)

    def older(model: Any) -> Any:
        seen: dict[str, Any] = {}
        noted(model, marked, lambda path, given: seen.update({path: given.arrays[2]}))(tokens)
        at, first, second = positions(tokens, None), *model.layers[:2]
        x = model.embed(tokens) + model.positions(at)
        y, _ = first.attn(first.attn_norm(x), lb.nn.Rows(at))
        entered = x + (first.attn_post_norm(y) if post_norm else y)
        after, *_ = first(x, at)
        return seen, {"layers/1/attn/q": second.attn_norm(entered), "layers/1/mlp/up": second.mlp_norm(after)}

    got, want = nnx.jit(older)(model)
    for path in marked:
        np.testing.assert_array_equal(got[path], want[path])


def test_what_is_not_asked_by_older_inputs_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small, near = choices()
    tokens = jnp.zeros((1, T), jnp.int32)
    dense = lb.models.Decoder(small.config, rngs=nnx.Rngs(0))
    models = {"dense": dense, "quantized": small, "switched": lb.tune.switched(small, near)}
    models["asynchronous"] = lb.tune.switched(small, near, asynchronous=True)
    models["most"] = lb.nn.switching(models["asynchronous"], "most")

    def program(name: str) -> str:
        return str(jax.make_jaxpr(lambda tokens: models[name](tokens))(tokens))

    before = {name: program(name) for name in models}
    norms = {name: program.count("rsqrt") for name, program in before.items()}
    assert norms["dense"] == norms["quantized"] == norms["switched"] == norms["most"] == 7
    assert norms["asynchronous"] == 7 + 3  # for two times q and one up
    for module in (attention, mlp, decoder):
        monkeypatch.setattr(module, "ask", lambda layer, x, rows: layer(x))  # as if there were nothing to tell
    for name in ("dense", "quantized"):
        assert program(name) == before[name]


def test_a_row_without_a_token_neither_asks_nor_counts() -> None:
    layer = lb.tune.switched(*choices()).layers[0].attn.q
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16)), jnp.float32)

    @nnx.jit(static_argnums=0)
    def mean(by: Any, layer: Any, at: jax.Array) -> jax.Array:
        told = nnx.Dict(layer=lb.nn.switching(layer, by))
        return lb.nn.effective_bits(lambda m: m["layer"](x, lb.nn.Rows(at)), told)[1].mean

    def widths(by: str, rows: Iterable[int]) -> float:
        return float(mean(by, layer, jnp.full(8, -1, jnp.int32).at[np.asarray([*rows], int)].set(0)))

    alone = [widths("row", [row]) for row in range(8)]
    assert set(alone) == {2.0, 3.0} and np.isnan(widths("call", []))
    low = [row for row in range(8) if alone[row] == 2.0]
    for rows in ([0, 1], [2, 5, 7], low, range(8)):
        assert widths("call", rows) == max(alone[row] for row in rows)
        assert widths("row", rows) == pytest.approx(np.mean([alone[row] for row in rows]), rel=unit("float32"))


def test_whether_a_model_is_asynchronous_is_saved_with_it(tmp_path: Path) -> None:
    small, near = choices()
    model = lb.tune.switched(small, near, asynchronous=True)
    lb.save(model, tmp_path / "m.safetensors")
    like = nnx.eval_shape(lambda: model)
    again = lb.load(tmp_path / "m.safetensors", into=like)
    assert {p for p, s in switches(again).items() if s.asynchronous is None} == {"layers/0/attn/q", "layers/0/mlp/down"}
    with pytest.raises(lb.CheckpointError, match=r"the model lacks .*attn/q/kernel/reader/asynchronous"):
        lb.load(tmp_path / "m.safetensors", into=nnx.eval_shape(lambda: lb.tune.switched(small, near)))


def test_what_cannot_be_asynchronous_is_refused() -> None:
    small, near = choices()
    net = nnx.Dict(layers=small.layers)
    with pytest.raises(ValueError, match=r"asynchronous=True needs .* and not a Dict: leave it out"):
        lb.tune.switched(net, near, asynchronous=True)
    model = lb.tune.switched(small, near, asynchronous=True)
    with pytest.raises(ValueError, match="by an older input than its own, and was given none"):
        model.layers[1].attn.q(jnp.zeros((1, 16)))
