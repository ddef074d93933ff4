"""Small NNX models of the structures that `lb.quantize` must find its way through, and oracles for their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.nn.kinds import KINDS, weight
from lowbit.testing.tolerance import gamma, unit

Array = np.ndarray[Any, Any]


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Dict(up=nnx.Linear(width, 2 * width, rngs=rngs), down=nnx.Linear(2 * width, width, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp["down"](nnx.relu(self.mlp["up"](self.norm(x))))


class Two(nnx.Module):
    """Two layers of 16 inputs, the first with a bias."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


class Net(nnx.Module):
    """Lists, dicts, a Sequential, and an embedding tied to the head."""

    def __init__(self, rngs: nnx.Rngs, width: int = 16) -> None:
        self.embed = nnx.Embed(20, width, rngs=rngs)
        self.layers = nnx.List([Block(width, rngs) for _ in range(2)])
        self.head = nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.relu, nnx.Linear(width, width, rngs=rngs))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.head(x))


NET = ("embed", "head/layers/0", "head/layers/2", *(f"layers/{i}/mlp/{n}" for i in (0, 1) for n in ("down", "up")))
"""The layers of a Net by path, in order."""
TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Shared(nnx.Module):
    """One Linear under three names, deeper and later in the alphabet first."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.z = nnx.Linear(16, 16, rngs=rngs)
        self.sub = nnx.List([self.z, nnx.Linear(16, 16, rngs=rngs)])
        self.a = nnx.Dict(q=self.sub[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.a["q"](self.sub[0](self.sub[1](self.z(x))))


class Tied(nnx.Module):
    """Two Linears over one Variable."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(16, 16, rngs=rngs)
        self.b = nnx.Linear(16, 16, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


class Dropped(nnx.Module):
    """Random keys and counts among the Variables."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.linear(x))


def fast(rules: lb.Format | Mapping[str, lb.Format | None]) -> list[lb.Rule]:
    """Rules with the greedy solver, which compiles in a moment: for tests that do not ask how good the codes are."""
    given = {"**": rules} if isinstance(rules, lb.Format) else rules
    return [lb.Rule(p, f, lb.greedy() if f is not None and f.name == "bcq" else None) for p, f in given.items()]


def inputs(*shape: int, seed: int = 0, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(model: nnx.Module) -> dict[str, Array]:
    """Every Variable of a model by path, random keys as their data."""
    values = {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}
    keys = {n for n, v in values.items() if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)}
    return {n: np.asarray(jax.random.key_data(v) if n in keys else v) for n, v in values.items()}


def assert_same(a: dict[str, Array], b: dict[str, Array]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def dense(w: QuantArray) -> Array:
    """The weight that the stored arrays stand for, in float64."""
    f = {name: np.asarray(v).astype(np.float64) for name, v in w.fields.items()}
    bits = np.unpackbits(np.asarray(w.fields["planes"]), axis=-1, bitorder="little").astype(np.float64)
    sizes, group = dict(w.type.dims), w.type.format["group"]
    size = min(group or sizes["k"], sizes["k"])
    if w.type.format.name == "bcq":
        offset = f.get("beta", np.zeros(f["alpha"].shape[1:]))
        value = np.einsum("png,pngt->ngt", f["alpha"], 2 * bits - 1) + offset[..., None]
    else:
        code = np.einsum("p,pngt->ngt", 2.0 ** np.arange(bits.shape[0]), bits)
        value = f["scale"][..., None] * (code - f["zero"][..., None])
    value = value[..., :size].reshape(sizes["n"], -1)[:, : sizes["k"]]
    return value if w.type.dims[0][0] == "n" else value.T


def largest(w: QuantArray) -> Array:
    """Over every weight, the sum of the magnitudes that it is a sum of: what rounding errors are relative to."""
    sizes, f = dict(w.type.dims), {n: np.abs(np.asarray(v).astype(np.float64)) for n, v in w.fields.items()}
    if w.type.format.name == "bcq":
        groups = f["alpha"].sum(0) + f.get("beta", 0)
    else:
        groups = f["scale"] * (2 ** w.type.format["bits"] - 1 + f["zero"])
    size = min(w.type.format["group"] or sizes["k"], sizes["k"])
    value = np.repeat(groups, size, axis=1)[:, : sizes["k"]]
    return value if w.type.dims[0][0] == "n" else value.T


def product_bound(x: Any, w: QuantArray, out: Any) -> Array:
    """How far `x @ w`, [m, n], may be from exact: every sum of k (2 bits + 4) terms in float32, then one rounding.

    A form may sum the planes apart, subtract zero points or offsets apart, and look sums up: k terms for each plane, as
    many again for the signs' affine, and 4 k for offset, zero and scales.
    """
    k, bits = dict(w.type.dims)["k"], w.type.format["bits"]
    weights = largest(w) if w.type.dims[0][0] == "k" else largest(w).T
    size = np.abs(np.asarray(x, np.float64)) @ weights
    terms = k * (2 * bits + 4) + 2 * bits + 4
    # 3: the planes b = (s + 1) / 2 apart from their affine are at most three times the signed sum.
    return size * (3 * gamma(terms, "float32") * (1 + unit(out)) + unit(out))


def whole(layer: Any, group: int | None = None, seed: int = 0) -> Any:
    """The layer with a weight that `lb.bcq(1, group)` stores without error, and with a bias.

    Every group of a matrix has a whole magnitude of its own, and signs: products with whole inputs are exact in float32
    whatever the order of their sums, so a quantized layer must equal the dense one.
    """
    view, variable = KINDS[type(layer)].view(layer), weight(layer)
    shape = view.matrices(variable.get_value()).shape
    rng, k = np.random.default_rng(seed), view.dims.index("k") - 2
    each = np.arange(shape[k]) // (group or shape[k])
    size = rng.integers(1, 5, (*shape[:-2], shape[-1 if k == -2 else -2], each[-1] + 1))
    sign = rng.choice([-1.0, 1.0], shape)
    magnitude = np.take(size, each, -1)
    matrices = sign * (magnitude.swapaxes(-1, -2) if k == -2 else magnitude)
    variable.set_value(view.kernel(jnp.asarray(matrices, variable.dtype)))
    if getattr(layer, "bias", None) is not None:
        layer.bias.set_value(jnp.asarray(rng.integers(-3, 4, layer.bias.shape), layer.bias.dtype))
    return layer


def wholes(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), "float32")
