"""What quantized arrays and models look like in print and in treescope: short, with format, shape and fields."""

import jax
import jax.numpy as jnp
import pytest
import treescope
from flax import nnx

import lowbit as lb
from tests.models import fast

# treescope 0.1.10 looks at all of numpy for names, and numpy 2.5 warns about one.
pytestmark = pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning")
TYPE = "f32[k=4096 n=32] as bcq(bits=3, group=128), 3.75 bits/weight"


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return lb.quantize(nnx.Linear(4096, 32, rngs=nnx.Rngs(0)), fast(lb.bcq(3, group=128)))


def test_an_array(model: nnx.Module) -> None:
    w = model.kernel.array
    assert repr(w) == f"QuantArray({TYPE}: alpha float32[3, 32, 32], planes uint8[3, 32, 32, 16])"
    assert repr(w.type) == f"QuantType({TYPE})"
    assert repr(jax.eval_shape(lambda: w)) == repr(w)
    assert repr(jax.tree.map(lambda _: None, w)) == f"QuantArray({TYPE}: )"


def test_print_of_a_model(model: nnx.Module) -> None:
    shown = repr(model)
    assert f"type=QuantType({TYPE})" in shown
    assert "value=Array(shape=(3, 32, 32, 16), dtype=dtype('uint8'))" in shown
    assert len(shown.splitlines()) <= 25


def test_treescope_shows_models_and_arrays(model: nnx.Module) -> None:
    for value in (model, model.kernel, model.kernel.array, {"weight": model.kernel.array}):
        shown = treescope.render_to_text(value)
        assert f"QuantType({TYPE})" in shown
        assert "uint8(3, 32, 32, 16)" in shown
        assert len(shown.splitlines()) <= 25
    page = treescope.render_to_html(model, compressed=False)
    assert "3.75 bits/weight" in page
    assert len(page) < 49_152  # a digit for each code would be more


def test_treescope_shows_a_traced_model(model: nnx.Module) -> None:
    shown = []

    @nnx.jit
    def call(m: nnx.Module, x: jax.Array) -> jax.Array:
        shown.append(treescope.render_to_text(m.kernel.type))
        return m(x)

    jax.eval_shape(call, model, jnp.ones((1, 4096)))
    assert shown == [f"QuantType({TYPE})"]
