"""Training batches whose order depends on the seed and the step alone."""

from __future__ import annotations

import numpy as np

__all__ = ["Windows"]


class Windows:
    """Training windows of one byte stream, in an order that depends only on the seed.

    Each epoch cuts the stream at another random offset and visits the windows in another random order, so a step's
    batch is a function of (seed, step) and an interrupted run continues with the batches it would have had.

    Args:
        text: the stream, uint8 [N].
        length: inputs in a window; a window has one byte more, the last target.
        seed: of offsets and orders.
    """

    def __init__(self, text: np.ndarray, length: int, seed: int) -> None:
        self.text, self.length, self.seed = text, length, seed
        self.count = (len(text) - 1 - length) // length
        if self.count < 1:
            raise ValueError(f"{len(text)} bytes of text hold no window of {length} at every offset; give more text")
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def _order(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch = (epoch, int(rng.integers(self.length)), rng.permutation(self.count))
        return self._epoch[1:]

    def batch(self, step: int, size: int) -> np.ndarray:
        """The windows of one step: uint8 [size, length + 1]."""
        rows = []
        for index in range(step * size, (step + 1) * size):
            offset, order = self._order(index // self.count)
            start = offset + int(order[index % self.count]) * self.length
            rows.append(self.text[start : start + self.length + 1])
        return np.stack(rows)
