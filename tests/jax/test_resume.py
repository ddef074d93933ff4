"""`lb.quantize(resume=folder)`: finished layers are taken from the folder, and only what they were made of counts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.nn import LayerStats
from tests.models import Shared, arrays, assert_same

SOLVED: list[tuple[int, ...]] = []


@dataclass(frozen=True)
class Counting:
    """Signs, and weighted means of magnitudes shared among the planes: nothing to compile. Notes what it is given."""

    note: str = ""
    takes_importance = True

    def __call__(self, w: jax.Array, fmt: lb.Format, importance: jax.Array | None = None) -> dict[str, jax.Array]:
        SOLVED.append(w.shape)
        rows = np.asarray(w, np.float32)
        alpha = np.average(np.abs(rows), axis=1, weights=importance) / fmt["bits"]
        planes = np.packbits(rows >= 0, axis=1, bitorder="little")[None, :, None]
        shape = (fmt["bits"], len(rows), 1)
        return {
            "planes": jnp.asarray(np.broadcast_to(planes, (*shape, planes.shape[-1]))),
            "alpha": jnp.asarray(np.broadcast_to(alpha[None, :, None], shape), jnp.float32),
        }


def model(seed: int = 0) -> nnx.Dict:
    rngs = nnx.Rngs(seed)
    return nnx.Dict(up=nnx.Linear(16, 8, rngs=rngs), down=nnx.Linear(8, 16, rngs=rngs))


def run(folder: Path, of: Any = None, fmt: Any = None, note: str = "", **options: Any) -> int:
    """How many layers were solved; the result must be that of a run without a folder."""
    rules = [lb.Rule("**", fmt or lb.bcq(2), Counting(note))]
    want = arrays(lb.quantize(of or model(), rules, **options))
    SOLVED.clear()
    assert_same(arrays(lb.quantize(of or model(), rules, resume=folder, **options)), want)
    return len(SOLVED)


def test_finished_layers_are_not_solved_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert run(folder) == 2
    assert run(folder) == 0
    next(folder.iterdir()).unlink()
    assert run(folder) == 1
    donated = model()
    lb.quantize(donated, [lb.Rule("**", lb.bcq(2), Counting())], resume=folder, donate=True)
    assert donated.up.kernel.get_value().is_deleted() and len(SOLVED) == 1


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file' is a file: name a folder"):
        lb.quantize(model(), lb.bcq(2), resume=tmp_path / "file")


def test_what_was_made_of_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path) == 2
    assert run(tmp_path, of=model(1)) == 2
    assert run(tmp_path, fmt=lb.bcq(3)) == 2
    assert run(tmp_path, note="better") == 2
    stats = {"up": LayerStats(jnp.arange(16.0), jnp.ones(16), 4)}
    assert run(tmp_path, stats=stats) == 1
    assert run(tmp_path, stats={"up": LayerStats(jnp.arange(1, 17.0), jnp.ones(16), 4)}) == 1
    half = model()
    half.up.kernel.set_value(half.up.kernel[...].astype("bfloat16"))
    assert run(tmp_path, of=half) == 1
    monkeypatch.setattr(lb, "__version__", "0.0.1")
    assert run(tmp_path) == 2
    monkeypatch.undo()
    assert run(tmp_path) == run(tmp_path, stats=stats) == run(tmp_path, of=model(1)) == 0


def test_shared_layers_stay_shared(tmp_path: Path) -> None:
    assert run(tmp_path, of=Shared(nnx.Rngs(0))) == 2
    rules = [lb.Rule("**", lb.bcq(2), Counting())]
    again = lb.quantize(Shared(nnx.Rngs(0)), rules, resume=tmp_path)
    assert again.z is again.sub[0]


@pytest.mark.slow
def test_stacks_and_groups_of_features(tmp_path: Path) -> None:
    of = nnx.Dict(
        moe=lb.nn.Experts(4, 16, 8, rngs=nnx.Rngs(0)), conv=nnx.Conv(4, 6, 4, feature_group_count=2, rngs=nnx.Rngs(1))
    )
    assert run(tmp_path, of=of) == 4 + 2
    assert run(tmp_path, of=of) == 0
    stats = {"moe": LayerStats(jnp.arange(16.0), jnp.ones(16), 4)}
    assert (run(tmp_path, of=of, stats=stats), run(tmp_path, of=of, stats=stats)) == (4, 0)
    twice = nnx.Dict(moe=lb.nn.Experts(2, 16, 8, rngs=nnx.Rngs(0)), conv=of.conv)
    twice.moe.kernel.set_value(of.moe.kernel[...].reshape(2, 2, 16, 8))  # as `nnx.vmap` stacks two of them
    assert (run(tmp_path, of=twice), run(tmp_path, of=twice), run(tmp_path, of=of)) == (4, 0, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_file_is_named_and_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path) == 2
    first, second = sorted(tmp_path.iterdir())
    good = first.read_bytes()
    bad = {"flip": good[:-1] + bytes([good[-1] ^ 1]), "cut": good[:-9], "other": second.read_bytes()}[damage]
    first.write_bytes(bad)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert run(tmp_path) == 1
    (message,) = [r.getMessage() for r in caplog.records]
    why = {"flip": "is damaged", "cut": "is truncated", "other": "holds another layer than its name says"}[damage]
    assert message.startswith("lowbit: '") and f"is solved again: {first}" in message and why in message
    assert first.read_bytes() == good and run(tmp_path) == 0


@dataclass
class Inner:
    of: Any = field(default_factory=lambda: lambda w: w)

    def __call__(self, w: jax.Array, fmt: lb.Format) -> Any: ...


@pytest.mark.parametrize("quantizer", [lambda w, fmt: Counting()(w, fmt), Inner()], ids=["lambda", "attribute"])
def test_a_quantizer_without_an_identity(tmp_path: Path, quantizer: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"^the quantizer .* of rule 'up' has no name that another run could know it by \(.*\): for resume=, use "
        "a function of a module or an instance of a class of one$",
    ):
        lb.quantize(model(), [lb.Rule("up", lb.bcq(2), quantizer)], resume=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_under_jit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^'up' is traced: write files outside of jax.jit"):
        nnx.jit(lambda m: lb.quantize(m, {"up": lb.bcq(2), "down": None}, resume=tmp_path))(model())
