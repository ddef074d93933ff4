"""What the programs that one platform's compiler makes fast look like."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Style:
    """How to write a term for XLA on one platform; its value is the same up to rounding.

    Attributes:
      part: bytes of an array in between above which a term is made in parts (see `tile`).
      sums_as_dots: write the sum of looked-up terms as a product with ones. XLA's CPU compiler gives a sum to a library
        that reads its terms from memory; a product leaves the look-ups, the scales and the sum over planes one loop.
      vectors_as_loops: write a matrix times one vector as a sum of products, which XLA fuses with the decode; of a
        product it would write the decoded matrix first, and read it back.
    """

    part: float = inf
    sums_as_dots: bool = False
    vectors_as_loops: bool = False


PLAIN = Style()
"""As the term says."""
