"""`lb.compare`: outputs of each layer in two models."""

from __future__ import annotations

from math import inf, log10
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from tests.models import TOKENS, Net, fast, inputs

BCQ = lb.bcq(2, group=8)


def pair() -> nnx.Dict:
    return nnx.Dict(up=nnx.Linear(16, 8, rngs=nnx.Rngs(0)), down=nnx.Linear(8, 16, rngs=nnx.Rngs(1)))


def both(m: nnx.Dict, x: jnp.ndarray) -> jnp.ndarray:
    return 2 * m.down(m.up(x))


def test_errors_by_hand() -> None:
    model, x = pair(), inputs(3, 16)
    q = lb.quantize(model, fast(BCQ))
    found = lb.compare(model, q, x, both)
    assert [r.layer for r in found.rows] == ["up", "down", "(output)"]
    up, other = (np.asarray(m.up(x), np.float64) for m in (model, q))
    error = np.linalg.norm(up - other) / np.linalg.norm(up)
    assert found.rows[0].relative_error == pytest.approx(error, rel=1e-4)
    assert found.rows[0].sqnr_db == pytest.approx(-20 * log10(error), rel=1e-4)
    assert found.rows[1].relative_error == pytest.approx(found.rows[2].relative_error, rel=1e-6)  # twice both


@pytest.mark.slow
def test_a_model_with_itself() -> None:
    model = Net(nnx.Rngs(0))
    found = lb.compare(model, model, TOKENS)
    assert {(r.relative_error, r.sqnr_db) for r in found.rows} == {(0.0, inf)}


@pytest.mark.slow
def test_whole_models_with_embeddings_and_dense_parts() -> None:
    model = Net(nnx.Rngs(0))
    q = lb.quantize(model, fast({"head/**": None, "**": BCQ}))
    found = lb.compare(model, q, TOKENS)
    assert found.rows[0].layer == "embed"
    assert 0 < found.rows[0].relative_error < 1
    assert "embed" in str(found)
    assert found.to_dict()["layers"][0]["layer"] == "embed"
    np.testing.assert_array_equal(q(TOKENS), q(TOKENS))  # neither model was changed
    assert type(model.embed) is nnx.Embed


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    model = pair()
    lb.compare(model, lb.quantize(model, fast(BCQ)), inputs(3, 16), both).plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_models_that_run_other_layers() -> None:
    first, second = (nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(n))) for n in (2, 3))
    with pytest.raises(
        ValueError, match=r"not run the same layers: at step 2 one runs '\(output\)', the other 'layers/2'$"
    ):
        lb.compare(first, second, inputs(2, 8))


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"^cannot compare with a dict: give an nnx\.Module$"):
        lb.compare(pair(), {}, inputs(3, 16))  # type: ignore[arg-type]


def test_outputs_of_other_shapes_or_of_no_array() -> None:
    one, two = (nnx.Linear(16, n, rngs=nnx.Rngs(0)) for n in (1, 8))
    with pytest.raises(
        ValueError, match=r"^'' gives the shape \(3, 1\) in one model, \(3, 8\) in the other: compare like models$"
    ):
        lb.compare(one, two, inputs(3, 16))
    with pytest.raises(TypeError, match=r"^the models return a tuple: give call=, a function that returns one array$"):
        lb.compare(one, one, inputs(3, 16), lambda m, x: (m(x), x))


def test_an_abstract_model() -> None:
    q = lb.quantize(pair(), fast(BCQ))
    with pytest.raises(ValueError, match=r"^cannot compare with an abstract model, as 'down/kernel' is: load or quan"):
        lb.compare(pair(), nnx.eval_shape(lambda: q), inputs(3, 16), both)
