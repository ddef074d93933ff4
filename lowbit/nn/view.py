"""How the weight of a layer, whatever its dims, is a stack of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax


@dataclass(frozen=True)
class View:
    """A dense kernel as a stack of matrices and back: [*shape] <-> [*stack, k, n].

    Every axis of the kernel is one of three: the input has it too and the product keeps it (`stack`), sums over it
    (`summed`), or the product gets it from the kernel (`kept`). k runs over the summed axes in the order given here,
    the last one fastest, and n over the kept ones: the groups of a format lie along k in that order. Where all kept
    axes come first the matrices are [*stack, n, k], and nothing is transposed.

    A kernel may have further axes before these, those of layers stacked by `nnx.vmap`: they lead the stack.

    Attributes:
      shape: of the kernel.
      stack, summed, kept: its axes, counted after `split`.
      split: the shape with an axis split into a part of the stack and the rest, as for groups of features; () if none.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    summed: tuple[int, ...]
    kept: tuple[int, ...]
    split: tuple[int, ...] = ()

    @property
    def dims(self) -> tuple[str, str]:
        """The order of the matrices' own dims."""
        return ("k", "n") if max(self.kept, default=-1) > min(self.summed) else ("n", "k")

    @property
    def order(self) -> tuple[int, ...]:
        first, last = (self.summed, self.kept) if self.dims[0] == "k" else (self.kept, self.summed)
        return (*self.stack, *first, *last)

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple((self.split or self.shape)[a] for a in axes)

    def size(self, dim: str) -> int:
        """Of k or n."""
        return prod(self.sizes(self.summed if dim == "k" else self.kept))

    def lead(self, kernel: jax.Array) -> tuple[int, ...]:
        """The axes of a kernel before those of `shape`. Raises ValueError when it has another shape."""
        count = kernel.ndim - len(self.shape)
        if count < 0 or kernel.shape[count:] != self.shape:
            raise ValueError(
                f"its weight has shape {kernel.shape}, but the layer says {self.shape}, after the axes of a stack if "
                "nnx.vmap made one; stack along axis 0"
            )
        return kernel.shape[:count]

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """[*lead, *shape] -> [*lead, *stack, k, n], or n, k as `dims` says."""
        lead = self.lead(kernel)
        whole = kernel.reshape(*lead, *(self.split or self.shape))
        moved = whole.transpose(*range(len(lead)), *(len(lead) + a for a in self.order))
        return moved.reshape(*lead, *self.sizes(self.stack), *(self.size(d) for d in self.dims))

    def kernel(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `matrices`."""
        lead = matrices.shape[: matrices.ndim - len(self.stack) - 2]
        whole = matrices.reshape(*lead, *self.sizes(self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return whole.transpose(*range(len(lead)), *(len(lead) + a for a in back)).reshape(*lead, *self.shape)

    def rows(self, x: jax.Array, stack: Sequence[int], summed: Sequence[int]) -> jax.Array:
        """What the matrices multiply: x with these axes first and last, [*stack, ..., k].

        Raises ValueError when x has other sizes there than the kernel.
        """
        found, want = (tuple(x.shape[a] for a in (*stack, *summed)), self.sizes((*self.stack, *self.summed)))
        if found != want:
            raise ValueError(f"the input has shape {x.shape}: its axes {(*stack, *summed)} must have the sizes {want}")
        return ends(x, stack, summed)


def ends(x: jax.Array, first: Sequence[int], last: Sequence[int]) -> jax.Array:
    """x with these axes first and last, the last ones as one: [*first, ..., last]."""
    rest = [a for a in range(x.ndim) if a not in (*first, *last)]
    moved = x.transpose(*first, *rest, *last)
    return moved.reshape(*moved.shape[: len(first) + len(rest)], prod(x.shape[a] for a in last))
