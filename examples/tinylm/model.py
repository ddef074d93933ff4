"""A byte-level decoder-only transformer in Flax NNX, small enough to train on two CPU cores.

The parts are those of today's large models (RMSNorm before every block, rotary positions, gated SiLU MLP, tied
embedding), so what holds for quantizing this model's layers has a fair chance to hold for theirs. Every linear
layer is a bias-free ``nnx.Linear`` whose input size is a multiple of 128, one quantization group.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Cache", "Config", "TinyLM"]

VOCAB = 256
GROUP = 128

Cache = list[dict[str, jax.Array]]
"""One ``{"k": [B, C, H, D], "v": [B, C, H, D]}`` a layer; C is the context, H the heads, D the head size."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `TinyLM`.

    Args:
        layers: number of blocks.
        width: size of the residual stream; a multiple of 128 and of `head`.
        hidden: size of the gated MLP's inner layer; a multiple of 128.
        head: size of one attention head; even, for rotary pairs.
        context: bytes the model looks back over (the length it was trained with, and the KV cache's).
        rope_base: base of the rotary frequencies.

    Raises:
        ValueError: a size breaks one of the rules above.

    Example:
        >>> Config(layers=2).heads
        4
    """

    layers: int = 3
    width: int = 256
    hidden: int = 768
    head: int = 64
    context: int = 512
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("width", "hidden"):
            if getattr(self, name) % GROUP:
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of {GROUP}, one quantization group")
        if self.width % self.head or self.head % 2:
            raise ValueError(f"head={self.head} must be even and divide width={self.width}")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates the halves of each head by its position (RoFormer, arXiv 2104.09864; GPT-NeoX's pairing of halves).

    Args:
        x: [B, T, H, D].
        positions: int [T].
        base: base of the frequencies.

    Returns:
        [B, T, H, D], the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype)[None], jnp.sin(angles).astype(x.dtype)[None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention with its softmax in fp32. q [B, T, H, D], k and v [B, S, H, D], mask bool [T, S] -> [B, T, H, D]."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def causal_attend(q: jax.Array, k: jax.Array, v: jax.Array, block: int = 256) -> jax.Array:
    """`attend` of every position to itself and those before it; all arguments and the result [B, T, H, D].

    Queries go in blocks, each against the keys up to its end: with two blocks that is 3/4 of the full square.
    """
    length = q.shape[1]
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None]
        parts.append(attend(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(parts, axis=1)


class Attention(nnx.Module):
    """Causal multi-head self-attention with rotary positions and RMS-normalized queries and keys."""

    def __init__(self, config: Config, *, dtype: jnp.dtype | None, rngs: nnx.Rngs) -> None:
        self.config = config
        linear = functools.partial(nnx.Linear, config.width, config.width, use_bias=False, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = linear(), linear(), linear()
        self.o = linear(kernel_init=nnx.initializers.zeros)  # every block starts as the identity
        self.q_norm = nnx.RMSNorm(config.head, dtype=dtype, rngs=rngs)
        self.k_norm = nnx.RMSNorm(config.head, dtype=dtype, rngs=rngs)

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, width] -> queries, keys (both rotated) and values, each [B, T, H, D]."""
        split = (*x.shape[:2], self.config.heads, self.config.head)
        q, k, v = (layer(x).reshape(split) for layer in (self.q, self.k, self.v))
        base = self.config.rope_base
        return rope(self.q_norm(q), positions, base), rope(self.k_norm(k), positions, base), v

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, width] -> [B, T, width]; position t sees positions 0..t."""
        return self.o(causal_attend(*self.project(x, jnp.arange(x.shape[1]))).reshape(x.shape))

    def step(self, x: jax.Array, cache: dict[str, jax.Array], pos: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One position: x [B, 1, width] at position `pos` (int scalar) -> [B, 1, width] and the cache with it written.

        The cache is a ring of C slots, so past C positions the oldest is overwritten; keys are stored rotated by
        their own position, so the order of the slots does not matter.
        """
        size = cache["k"].shape[1]
        q, k, v = self.project(x, pos[None])
        new = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], value, pos % size, axis=1)
            for name, value in (("k", k), ("v", v))
        }
        seen = jnp.arange(size)[None, :] <= pos
        return self.o(attend(q, new["k"], new["v"], seen).reshape(x.shape)), new


class MLP(nnx.Module):
    """The gated SiLU feed-forward block (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: Config, *, dtype: jnp.dtype | None, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(config.width, config.hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(config.width, config.hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(
            config.hidden, config.width, use_bias=False, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> [..., width]."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm transformer layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: Config, *, dtype: jnp.dtype | None, rngs: nnx.Rngs) -> None:
        self.attn_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, width] -> [B, T, width]."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: jax.Array, cache: dict[str, jax.Array], pos: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [B, 1, width] at position `pos` -> [B, 1, width] and the layer's new cache."""
        y, cache = self.attn.step(self.attn_norm(x), cache, pos)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class TinyLM(nnx.Module):
    """A decoder-only language model over bytes.

    Args:
        config: the sizes.
        dtype: what the linear layers compute in; None keeps the parameters' float32.
        rngs: the source of the initial weights.

    Example:
        >>> model = TinyLM(Config(layers=1), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 8), jnp.int32)).shape
        (2, 8, 256)
    """

    def __init__(self, config: Config, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        # Small rows, since the table is tied: the residual stream starts as the byte's own row, and with rows of norm
        # 1 the untrained model would be sure that every byte repeats. The logits stay fp32 whatever `dtype` is.
        self.embed = nnx.Embed(VOCAB, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.embed_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.layers = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.embed_norm(self.embed(tokens)).astype(self.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.embed.attend(self.norm(x.astype(jnp.float32)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next byte at every position: int [B, T] -> float32 [B, T, 256]."""
        x = self._embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self._logits(x)

    def init_cache(self, batch: int) -> Cache:
        """An empty KV cache for `decode_step`, one ring of `config.context` slots a layer."""
        shape = (batch, self.config.context, self.config.heads, self.config.head)
        return [{name: jnp.zeros(shape, self.dtype) for name in ("k", "v")} for _ in self.layers]

    def decode_step(self, cache: Cache, token: jax.Array, pos: jax.Array) -> tuple[jax.Array, Cache]:
        """Feeds one byte a sequence and predicts the next.

        Args:
            cache: from `init_cache` or the step before.
            token: int [B].
            pos: int scalar, the byte's position, counted from 0.

        Returns:
            Logits float32 [B, 256] and the new cache.
        """
        x = self._embed(token[:, None])
        new: Cache = []
        for layer, entry in zip(self.layers, cache, strict=True):
            x, entry = layer.step(x, entry, jnp.asarray(pos))
            new.append(entry)
        return self._logits(x)[:, 0], new
