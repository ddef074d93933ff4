"""A low-rank adapter on a frozen weight: LoRA (Hu et al. 2021), on a quantized base QLoRA (Dettmers et al. 2023).

w + alpha / rank * sum_r lora_a[k, r] lora_b[r, n],  in float32
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowbit.ir.build import const, contract, param
from lowbit.ir.expr import Expr

LORA_A, LORA_B = "lora_a", "lora_b"


@dataclass(frozen=True)
class LowRank:
    """What is static about an adapter."""

    rank: int
    alpha: float

    def decode(self, n: int, k: int) -> Expr:
        """What is added to the decode term of an [n, k] weight."""
        scale = const(np.float32(self.alpha / self.rank), "f32")
        a, b = param(LORA_A, "f32", k=k, r=self.rank), param(LORA_B, "f32", r=self.rank, n=n)
        return contract((scale, a, b), ("r",))

    def __str__(self) -> str:
        return f"lora(rank={self.rank}, alpha={self.alpha:g})"
