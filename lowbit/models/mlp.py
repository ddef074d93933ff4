"""The feed-forward half of a block: plain, gated, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.models.config import Config
from lowbit.nn.experts import Experts
from lowbit.nn.switch import Rows, ask, asks_older

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_tanh": partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
}


class MLP(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, use_bias=config.mlp_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)
        if config.gated:
            self.gate = linear(config.width, config.hidden)
        self.gated, self.activation = config.gated, config.activation

    @property
    def asks_older(self) -> bool:
        return asks_older(self.up, *((self.gate,) if self.gated else ()))

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[..., width] -> [..., width]."""
        act, up = ACTIVATIONS[self.activation], ask(self.up, x, rows)
        return ask(self.down, act(ask(self.gate, x, rows)) * up if self.gated else act(up), rows)


class Mixture(nnx.Module):
    """Gated MLPs of which a router picks some for each token (Mixtral, Jiang et al. 2024)."""

    def __init__(self, config: Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        experts = partial(Experts, config.experts, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.router = nnx.Linear(
            config.width, config.experts, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate, self.up = experts(config.width, config.hidden), experts(config.width, config.hidden)
        self.down = experts(config.hidden, config.width)
        self.config = config

    @property
    def asks_older(self) -> bool:
        return False  # experts do not switch

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[..., width] -> [..., width]. Rows are sorted by expert, so that each expert is one product."""
        c, flat = self.config, x.reshape(-1, x.shape[-1])
        scores = ask(self.router, x, rows).astype(jnp.float32).reshape(-1, c.experts)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), c.experts_per_token)
        if c.normalize_experts:
            weights /= weights.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.ravel())
        given, sizes = flat[order // c.experts_per_token], jnp.bincount(chosen.ravel(), length=c.experts)
        inner = ACTIVATIONS[c.activation](self.gate(given, sizes)) * self.up(given, sizes)
        out = self.down(inner, sizes) * weights.ravel()[order, None].astype(x.dtype)
        return jnp.zeros_like(flat).at[order // c.experts_per_token].add(out).reshape(x.shape)
