"""Uniform quantization of inputs in another order: w[n, k] = u[n, place[k]], u as in `uniform`.

GPTQ in the order of activations (act-order, desc_act) makes groups of inputs that are rounded one after another, not of
neighbours. The place of each input is stored beside the codes, so that a group is one piece of memory again.
"""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.uniform import affine
from lowbit.ir.build import param
from lowbit.ir.expr import Expr, Gather


@register_format("act_order")
def act_order(n: int, k: int, bits: int, group: int | None = None, scale_dtype: str = "float32") -> Expr:
    """Uniform integers in groups of inputs that are no neighbours: `act_order(4, group=128)`, as GPTQ's desc_act makes.

    Stored: what `uniform` of these options stores, and `place` u16 [k], u32 for more than 65,536 inputs: where each
    input lies in the rows that are stored. Products take the activations in that order, so it costs no time for each
    weight. `lb.read_checkpoint` makes them; there is no quantizer.

    Args:
      bits: 1 to 8.
      group: inputs that share a scale, any positive size; None for one group a row.
      scale_dtype: "float32", "float16" or "bfloat16"; see `bcq`.

    >>> import numpy as np, lowbit as lb
    >>> w = lb.quantize_array(np.eye(4, dtype="f"), lb.uniform(2))
    >>> turned = lb.QuantType(w.type.dims, "f32", lb.act_order(2))
    >>> place = np.array([3, 2, 1, 0], np.uint16)
    >>> lb.dequantize(lb.QuantArray.of({**w.fields, "place": place}, turned)).tolist()[0]
    [0.0, 0.0, 0.0, 1.0]
    """
    rows = affine(n, k, bits, group, scale_dtype, into="place")
    return Gather(rows, param("place", "u16" if k <= 1 << 16 else "u32", (0, k - 1), k=k), "place")
