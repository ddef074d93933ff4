"""Training at size: what trains, accumulation, recomputation, dtypes, evaluation, and runs that go on."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from lowbit.tune.step import How, added, computing, parts, zeros
from tests.models import TOKENS, Dropped, Net, arrays, assert_same, fast, inputs

TEXT = {"tokens": np.asarray(TOKENS), "mask": np.ones(TOKENS.shape, bool)}
ADAM = optax.adam(1e-2)  # one object: what is compiled depends on it


def net(fmt: Any) -> Net:
    return lb.quantize(Net(nnx.Rngs(0)), fast({"embed": None, "head/**": None, "layers/*/mlp/*": fmt}))


def losses(trained: Any) -> list[float]:
    return [record["loss"] for record in trained.records if "loss" in record]


def without_seconds(records: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in r.items() if name != "seconds"} for r in records]


@pytest.mark.parametrize(
    "way",
    [
        "alpha_first",
        pytest.param("codebooks", marks=pytest.mark.slow),
        pytest.param("lora_a lora_b", marks=pytest.mark.slow),
    ],
)
def test_what_trains(way: str) -> None:
    given: Any
    if way == "alpha_first":
        given, wrt = lb.tune.alpha_tuning(net(lb.bcq(2, group=8))), lb.Scale
        model = given.model
    elif way == "codebooks":
        given, wrt = net(lb.codebook(1, 4, vec=2, group=16, scale_dtype="float16")), lb.Codebook
        model = given
    else:
        given, wrt = lb.nn.lora(net(lb.bcq(2, group=8)), rank=2, rngs=nnx.Rngs(1)), nnx.LoRAParam
        model = given
    before = arrays(model)
    trained = lb.tune.train(given, [TEXT] * 4, tx=ADAM, steps=4, wrt=wrt)
    assert_same(arrays(model), before)
    after = arrays(trained.model)
    assert {name: a.dtype for name, a in after.items()} == {name: a.dtype for name, a in before.items()}
    moved = {name.rpartition("/")[2] for name in after if after[name].tobytes() != before[name].tobytes()}
    assert moved == set(way.split())
    assert [r["step"] for r in trained.records] == [1, 2, 3, 4]
    assert losses(trained)[-1] < losses(trained)[0]


@pytest.mark.slow
def test_a_decoder_of_the_library() -> None:
    config = lb.models.Config(
        vocab=256,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head=8,
        hidden=32,
        context=32,
        ropes=(lb.models.Rope(1e4, 8),) * 2,
    )
    model = lb.quantize(lb.models.Decoder(config, rngs=nnx.Rngs(0)), fast({"layers/*/mlp/*": lb.bcq(2)}))
    texts = [{"prompt": f"{i} and one is ", "completion": str(i + 1)} for i in range(20)]
    data = lb.tune.text_batches(texts, str.encode, vocab=256, length=16, batch=4, end=0)
    given: Any = {"tx": ADAM, "remat": "layers/*", "compute_dtype": "bfloat16", "accumulate": 2}
    with jax.numpy_rank_promotion("allow"):  # the decoder's tables of angles
        trained = lb.tune.train(lb.tune.alpha_tuning(model), data, steps=6, **given)
    assert losses(trained)[-1] < losses(trained)[0]
    assert trained.model.layers[0].mlp.up.dtype is None


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        signs = lambda key, shape, dtype: jax.random.rademacher(key, shape, dtype)  # noqa: E731
        self.up = nnx.Linear(8, 32, use_bias=False, kernel_init=signs, rngs=rngs)
        self.down = nnx.Linear(32, 8, use_bias=False, kernel_init=signs, rngs=rngs)
        self.wide = 32

    def __call__(self, x: jax.Array, mask: Any = None, *, times: float) -> tuple[jax.Array, Any]:
        return times * nnx.relu(self.down(nnx.relu(self.up(x)))), mask


class Deep(nnx.Module):
    def __init__(self, blocks: int = 3) -> None:
        self.layers = nnx.List([Block(nnx.Rngs(i)) for i in range(blocks)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.layers:
            x, mask = block(x, None, times=1 / block.wide)
            assert mask is None
        return x


def linear_loss(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    return (model(batch["x"]) * batch["y"]).sum(), batch["weight"]


def exact(blocks: int = 3) -> lb.tune.AlphaTuning[Any]:
    """Scales of 1, and dyadic values of few bits throughout: float32 sums have no error in any order."""
    return lb.tune.alpha_tuning(lb.quantize(Deep(blocks), fast(lb.bcq(1))))


def exact_batch(rows: int, weight: int, seed: int) -> dict[str, Any]:
    x, y = (np.random.default_rng([seed, i]).integers(-1, 2, (rows, 8)).astype(np.float32) for i in (0, 1))
    return {"x": x, "y": y, "weight": weight}


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch() -> None:
    batches = [exact_batch(2, weight, i) for i, weight in enumerate((1, 3, 2, 2))]
    large = {name: np.concatenate([b[name] for b in batches]) for name in "xy"} | {"weight": 8}
    tx, tuning = optax.sgd(2.0**-4), exact()
    small = lb.tune.train(tuning, batches, tx=tx, steps=1, accumulate=4, loss=linear_loss)
    whole = lb.tune.train(tuning, [large], tx=tx, steps=1, loss=linear_loss)
    assert losses(small) == losses(whole)
    assert_same(arrays(small.model), arrays(whole.model))
    moved = [a != 1 for name, a in arrays(small.model).items() if name.endswith("alpha_first")]
    assert len(moved) == 6 and any(m.any() for m in moved)


def held_bytes(tuning: Any, remat: list[str], batch: dict[str, Any]) -> int:
    """Of activations, which have 4 rows, between the forward and the backward pass."""
    graph, stored, changing, rest = parts(computing(tuning.model, None, remat), lb.Scale)
    how = How(linear_loss, graph, lb.Scale)

    def pull(stored: Any) -> Any:
        return jax.vjp(lambda s: how.value(s, changing, rest, batch)[0], stored)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pull, stored))
    return sum(a.size * a.dtype.itemsize for a in leaves if a.shape[:1] == (4,))


ROWS = 512


def compiled_bytes(tuning: Any, remat: list[str]) -> int:
    """Of what is neither argument nor result."""
    graph, stored, changing, rest = parts(computing(tuning.model, None, remat), lb.Scale)
    args = stored, stored, changing, rest, zeros(stored), exact_batch(ROWS, 1, 0)
    compiled = added.lower(How(linear_loss, graph, lb.Scale), *args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_recomputed_blocks_give_the_same_and_hold_less() -> None:
    tuning, tx, batch = exact(), optax.sgd(2.0**-4), exact_batch(4, 4, 0)
    plain, recomputed = (
        lb.tune.train(tuning, [batch], tx=tx, steps=1, loss=linear_loss, remat=remat) for remat in ((), "layers/*")
    )
    assert losses(plain) == losses(recomputed)
    assert_same(arrays(plain.model), arrays(recomputed.model))
    assert type(recomputed.model.layers[0]) is Block

    less, more = (held_bytes(tuning, remat, batch) for remat in (["layers/*"], []))
    # Of float32 activations, [4, 8] and [4, 32], the backward pass holds what each of three blocks was given and y.
    assert 0 < less <= 4 * 4 * 8 * 4
    # Otherwise also the hidden layer, which `down` was given.
    assert more >= less + 3 * 4 * 32 * 4
    if jax.__version_info__ >= (0, 12):  # in 0.10 XLA undoes it on a CPU
        assert compiled_bytes(tuning, ["layers/*"]) <= compiled_bytes(tuning, []) - 2 * ROWS * 32 * 4


@pytest.mark.slow
def test_layers_compute_in_bfloat16_and_float32_trains() -> None:
    tuning, batch = exact(), exact_batch(4, 4, 0)
    graph, stored, changing, rest = parts(computing(tuning.model, jnp.bfloat16, ()), lb.Scale)
    made = jax.make_jaxpr(lambda *args: added(How(linear_loss, graph, lb.Scale), *args))(
        stored, stored, changing, rest, zeros(stored), batch
    )
    assert "bf16[4,32]" in str(made)
    small = optax.sgd(2.0**-14)  # updates that bfloat16 near 1 cannot tell from none
    trained = lb.tune.train(tuning, [batch], tx=small, steps=1, loss=linear_loss, compute_dtype="bfloat16")
    scales = [a for name, a in arrays(trained.model).items() if name.endswith("alpha_first")]
    assert {a.dtype for a in scales} == {np.dtype(np.float32)}
    moved = np.concatenate([a[a != 1] for a in scales])
    assert moved.size and (moved.astype(jnp.bfloat16) == 1).all()
    assert trained.model.layers[0].up.dtype is None


def one_layer() -> Any:
    return nnx.Linear(8, 2, use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))


def test_gradients_of_an_alpha_tuning_are_divided_by_the_group_size() -> None:
    tuning, batch = lb.tune.alpha_tuning(lb.quantize(one_layer(), fast(lb.bcq(1)))), exact_batch(4, 1, 0)
    batch["y"] = batch["y"][:, :2] + 1
    divided = lb.tune.train(tuning, [batch], tx=optax.sgd(2.0**-4), steps=1, loss=linear_loss)
    plain = lb.tune.train(tuning.model, [batch], tx=optax.sgd(2.0**-7), steps=1, loss=linear_loss)
    assert (divided.model.kernel.alpha_first[...] != 1).any()
    assert_same(arrays(divided.model), arrays(plain.model))


@pytest.mark.slow
def test_updates_smaller_than_the_stored_dtype_add_up() -> None:
    small = lb.quantize(one_layer(), fast(lb.bcq(1, scale_dtype="float16")))
    batch = {"x": np.eye(1, 8, dtype=np.float32), "y": -np.ones((1, 2), np.float32), "weight": 1}
    alpha = {}
    for steps in (1, 4):  # of 2^-12, and float16 has 1 and 1 + 2^-10
        trained = lb.tune.train(small, [batch] * steps, tx=optax.sgd(2.0**-12), steps=steps, loss=linear_loss)
        alpha[steps] = np.asarray(trained.model.kernel.alpha[...])
        assert alpha[steps].dtype == np.float16
    assert (alpha[1] == 1).all() and (alpha[4] == 1 + 2.0**-10).all()


def squares(model: Any, x: Any) -> tuple[Any, Any]:
    return jnp.square(model(x)).sum(), x.shape[0]


def dropped() -> lb.tune.AlphaTuning[Any]:
    return lb.tune.alpha_tuning(lb.quantize(Dropped(nnx.Rngs(0)), fast(lb.bcq(2))))


X = [np.asarray(inputs(4, 16, seed=i)) for i in range(8)]


@pytest.mark.slow
def test_evaluation_drops_nothing_and_training_does() -> None:
    run = {"tx": optax.sgd(0.0), "loss": squares, "eval_data": X[6:], "eval_every": 1}
    trained = lb.tune.train(dropped(), [X[0]] * 3, steps=3, **run)
    found = [r["eval_loss"] for r in trained.records]
    assert [r["step"] for r in trained.records] == [0, 1, 2, 3] and len(set(found)) == 1
    assert len(set(losses(trained))) == 3, "each step drops others"


def test_training_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    tuning, worse, seen = dropped(), optax.sgd(-1.0), []
    given = {
        "loss": squares,
        "eval_data": X[6:],
        "eval_every": 2,
        "patience": 2,
        "folder": tmp_path,
        "log": seen.append,
    }
    for _ in range(2):  # the second time nothing is left to do
        trained = lb.tune.train(tuning, X, tx=worse, steps=8, **given)
    assert trained.records == tuple(seen)
    assert [r["step"] for r in trained.records] == [0, 1, 2, 3, 4]
    found = [r["eval_loss"] for r in trained.records if "eval_loss" in r]
    assert found == sorted(found) and len(found) == 3
    alpha = tuning.model.linear.kernel.alpha_first[...]
    np.testing.assert_array_equal(trained.model.linear.kernel.alpha_first[...], alpha)


def test_a_run_goes_on_from_its_folder(tmp_path: Path) -> None:
    given = {"tx": ADAM, "loss": squares, "eval_data": X[6:], "eval_every": 2, "save_every": 1, "keep": 1}
    whole = lb.tune.train(dropped(), X, steps=6, **given)
    seen: list[Any] = []
    for steps in (2, 4, 6, 6):
        trained = lb.tune.train(dropped(), X, steps=steps, folder=tmp_path, log=seen.append, **given)
    assert without_seconds(trained.records) == without_seconds(whole.records) == without_seconds(seen)
    assert_same(
        *({n: a for n, a in arrays(m).items() if "alpha" in n or "count" in n} for m in (trained.model, whole.model))
    )
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == list(trained.records)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]
    kept = json.loads((tmp_path / "checkpoints/6/state/_METADATA").read_text())["tree_metadata"]
    assert any("alpha_first" in name for name in kept) and not any("planes" in name for name in kept)


@pytest.mark.slow
def test_what_was_logged_after_the_checkpoint_is_done_again(tmp_path: Path) -> None:
    given = {"tx": ADAM, "loss": squares, "folder": tmp_path}
    lb.tune.train(dropped(), X, steps=2, **given)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0.0, "seconds": 1}\n{"step": 4, "lo')
    trained = lb.tune.train(dropped(), X, steps=4, **given)
    assert [r["step"] for r in trained.records] == [1, 2, 3, 4]
    assert losses(trained) == losses(lb.tune.train(dropped(), X, steps=4, tx=ADAM, loss=squares))


@pytest.mark.slow
def test_a_run_killed_in_its_first_steps_begins_again(tmp_path: Path) -> None:
    given: Any = {"tx": ADAM, "loss": squares, "eval_data": X[6:], "folder": tmp_path, "steps": 2}
    seen: list[Any] = []

    def log(record: Any) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lb.tune.train(dropped(), X, log=log, **given)
    trained = lb.tune.train(dropped(), X, **given)
    assert [r["step"] for r in trained.records] == [0, 1, 2]
    assert without_seconds(trained.records[:2]) == without_seconds(seen)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    given = {"tx": ADAM, "loss": squares, "folder": tmp_path / "a", "steps": 1}
    lb.tune.train(dropped(), X, **given)
    other = lb.tune.alpha_tuning(lb.quantize(Dropped(nnx.Rngs(1)), fast(lb.bcq(2))))
    for model, data, more, what in (
        (other, X, {}, r"model is [0-9a-f]{32}, and here it is [0-9a-f]{32}; give another folder"),
        (dropped(), X[1:], {}, "first batch is"),
        (dropped(), X, {"accumulate": 2}, "accumulate is 1, and here it is 2"),
        (dropped(), X, {"compute_dtype": "bfloat16"}, "compute_dtype is None, and here it is bfloat16"),
        (dropped(), X, {"remat": "linear"}, r"remat is \[\], and here it is \['linear'\]"),
        (dropped(), X, {"eval_data": X}, "first evaluation batch is None"),
        (dropped(), X, {"tx": optax.sgd(1.0)}, "what trains is"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'a'))} holds another run: its {what}"):
            lb.tune.train(model, data, **(given | more))
    lb.tune.train(dropped(), X, **(given | {"steps": 2}))
    with pytest.raises(ValueError, match="is at step 2, and steps=1: give more steps"):
        lb.tune.train(dropped(), X, **given)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/log.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"log.jsonl is a log without checkpoints: give another folder"):
        lb.tune.train(dropped(), X, **(given | {"folder": tmp_path / "b"}))


@pytest.mark.slow
def test_what_is_not_finite_stops_the_run_and_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    given = {"tx": ADAM, "loss": squares, "steps": 4, "folder": tmp_path, "save_every": 1}
    data = [*X[:2], np.full((4, 16), np.nan, np.float32), X[3]]
    with pytest.raises(
        FloatingPointError, match=r"step 3: the loss is nan.*data from batch 2 on.*has the checkpoint of step 2"
    ):
        lb.tune.train(dropped(), data, **given)
    repaired = lb.tune.train(dropped(), X, **given)
    assert losses(repaired) == losses(lb.tune.train(dropped(), X, tx=ADAM, loss=squares, steps=4))
    with pytest.raises(FloatingPointError, match=r"step 1: the norm of the update is (inf|nan): lower the rate"):
        lb.tune.train(dropped(), X, tx=optax.sgd(np.inf), loss=squares, steps=1)
    with pytest.raises(FloatingPointError, match="step 0: the evaluation loss is nan: look at eval_data"):
        lb.tune.train(dropped(), X, tx=ADAM, loss=squares, steps=1, eval_data=data)


REFUSED = [
    ({"steps": 0}, "steps must be an int, 1 or more, not 0"),
    ({"accumulate": 1.0}, "accumulate must be an int, 1 or more, not 1.0"),
    ({"patience": 0, "eval_data": X}, "patience must be an int, 1 or more, not 0"),
    ({"patience": 1}, "patience=1 counts evaluations: give eval_data"),
    ({"wrt": lb.Codebook}, "an AlphaTuning trains lb.Scale; give its .model"),
    ({"steps": 9}, "step 9 needs batch 8, counted from 0, which data does not have: 9 steps take 9"),
    ({"remat": "layers/*"}, "rule 'layers/*' matches none of the"),
    (
        {"loss": lambda m, x: (jnp.square(m(x)).sum(), 0), "eval_data": X[:1]},
        "the 1 evaluation batches have no targets",
    ),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[r[1][:30] for r in REFUSED])
def test_refusals(more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lb.tune.train(dropped(), X, **({"tx": ADAM, "loss": squares, "steps": 1} | more))


def test_refused_models() -> None:
    given: Any = {"tx": ADAM, "loss": squares, "steps": 1}
    model = dropped().model
    for wrt, message in (
        (lb.Codebook, "has nothing of <class 'lowbit.nn.kernel.Codebook'>"),
        (lb.Code, "selects uint"),
    ):
        with pytest.raises(ValueError, match=message):
            lb.tune.train(model, X, wrt=wrt, **given)
    with pytest.raises(ValueError, match="cannot train an abstract model"):
        lb.tune.train(nnx.eval_shape(lambda: model), X, **given)
    with pytest.raises(TypeError, match="cannot train a dict"):
        lb.tune.train({}, X, **given)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"loss\(model, batch\) must return the sum of losses and their number, not"):
        lb.tune.train(model, X, **(given | {"loss": lambda m, x: m(x).sum()}))
    plain = nnx.Dict(w=nnx.Param(jnp.ones(16)))
    with pytest.raises(ValueError, match="no layer of Dict has a dtype to compute in: leave out compute_dtype"):
        lb.tune.train(plain, X, wrt=nnx.Param, compute_dtype="bfloat16", **given)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="writes with tensorboardX, which is not installed: pip install"):
        lb.tune.tensorboard(tmp_path)
    written: list[Any] = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar), flush=lambda: written.append("flush"))
    module = SimpleNamespace(SummaryWriter=lambda folder: written.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    lb.tune.tensorboard(tmp_path)({"step": 3, "loss": 0.5})
    assert written == [str(tmp_path), ("loss", 0.5, 3), "flush"]
