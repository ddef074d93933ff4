"""The optimizer: Muon for the weight matrices, Adam for the embedding and the norms.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
orthogonal matrix. optax has it as ``optax.contrib.muon``; this one differs in stacking equal shapes and in dealing
the stacks out to the replicas of a data-parallel step, so that no replica repeats another's matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["optimizer", "orthogonalize", "trapezoid"]

# Quintic Newton-Schulz coefficients of the reference implementation: they push singular values into 0.7..1.2 within
# five steps rather than to 1 in the limit, which serves an update direction better.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Moves the singular values of each matrix to about 1 (0.7..1.2): [N, I, O] -> [N, I, O], in bf16 products."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.swapaxes(1, 2) if tall else matrices
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
    x = (x / (norm + 1e-7)).astype(jnp.bfloat16)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.astype(jnp.float32)
    return x.swapaxes(1, 2) if tall else x


def trapezoid(warmup: int, steps: int, decay: int) -> optax.Schedule:
    """Fraction of the peak rate: up over `warmup` steps, flat, and down to 0 over the last `decay` of `steps`.

    Before the decay the rate does not depend on `steps`, so a run can be lengthened or shortened while it is flat.
    """

    def fraction(step: jax.Array) -> jax.Array:
        return jnp.clip(jnp.minimum((step + 1) / warmup, (steps - step) / decay), 0.0, 1.0)

    return fraction


class MuonState(NamedTuple):
    """The momentum of every matrix, in the shape of the parameters."""

    momentum: optax.Updates


def scale_by_muon(axis: str, replicas: int, momentum: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized; to be used inside a ``shard_map`` over `axis` of `replicas` devices.

    The update of an [I, O] matrix is scaled by sqrt(max(1, O / I)), so that layers of any shape share one rate.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + g, velocity, grads)
        leaves, tree = jax.tree.flatten(ahead)
        return jax.tree.unflatten(tree, _deal(leaves, axis, replicas)), MuonState(velocity)

    return optax.GradientTransformation(init, update)


def _deal(leaves: list[jax.Array], axis: str, replicas: int) -> list[jax.Array]:
    """Orthogonalizes matrices of equal shape in one batch, each replica its share of the batch."""
    out = list(leaves)
    for shape in sorted({leaf.shape for leaf in leaves}):
        where = [i for i, leaf in enumerate(leaves) if leaf.shape == shape]
        share = -(-len(where) // replicas)
        spare = jnp.ones((share * replicas - len(where), *shape), jnp.float32)
        stack = jnp.concatenate([jnp.stack([leaves[i] for i in where]), spare])
        mine = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(axis) * share, share)
        every = jax.lax.all_gather(orthogonalize(mine), axis, tiled=True)
        for row, i in enumerate(where):
            out[i] = every[row] * max(1.0, shape[1] / shape[0]) ** 0.5
    return out


def kinds(params: optax.Params) -> optax.Params:
    """Labels each parameter ``"muon"`` (the kernels) or ``"adam"`` (embedding, norm scales)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if "kernel" in jax.tree_util.keystr(path) else "adam", params
    )


def optimizer(
    schedule: optax.Schedule, *, muon_rate: float, adam_rate: float, decay: float, axis: str, replicas: int
) -> optax.GradientTransformation:
    """Gradient clipping to norm 1, then Muon with decoupled weight decay, or Adam without.

    Args:
        schedule: step -> fraction of the peak learning rate.
        muon_rate: peak rate of the matrices; an update has spectral norm of about this.
        adam_rate: peak rate of everything else.
        decay: weight decay of the matrices, relative to the rate.
        axis: the ``shard_map`` axis that the step runs under.
        replicas: the size of that axis.
    """
    muon = optax.chain(
        scale_by_muon(axis, replicas),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(lambda step: muon_rate * schedule(step)),
    )
    adam = optax.adam(lambda step: adam_rate * schedule(step), b1=0.9, b2=0.98, eps=1e-8)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition({"muon": muon, "adam": adam}, kinds))
