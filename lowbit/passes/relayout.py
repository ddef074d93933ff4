"""prefix(words) = codes: which bit of which word holds which bit of which code, found by evaluating the prefix.

Two prefixes that decode to the same codes hold the same bits in another order. That order is not written down
anywhere: the oracle reads the prefix on words whose bits spell their own positions.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from lowbit.ir.dtypes import bits as dtype_bits
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Expr
from lowbit.ir.oracle import evaluate
from lowbit.ir.walk import params

Positions = np.ndarray[Any, np.dtype[np.int64]]


@lru_cache(maxsize=64)
def bit_positions(prefix: Expr, width: int) -> Positions:
    """Where each bit of each code is: positions [*codes, width], counted through the words of the one leaf of `prefix`.

    Raises ValueError unless every bit of a word is one bit of one code.

    >>> from lowbit.ir import Unpack, merge, param
    >>> nibbles = merge(Unpack(param("words", "u8", j=2), 4, "v", 2), "j", "v", into="k")
    >>> bit_positions(nibbles, 4).tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    """
    ((name, leaf),) = params(prefix).items()
    word = dtype_bits(leaf.dtype)
    shape = tuple(leaf.dims.values())
    ids = np.arange(prod(shape) * word).reshape(*shape, word)
    weights = np.uint64(1) << np.arange(word, dtype=np.uint64)
    out = np.zeros((*prefix.dims.values(), width), np.int64)
    for digit in range(int(ids.max()).bit_length()):
        spelled = ((ids >> digit & 1).astype(np.uint64) * weights).sum(-1).astype(numpy_dtype(leaf.dtype))
        codes = evaluate(prefix, {name: spelled})[..., None]
        out |= (codes >> np.arange(width) & 1) << digit
    if not np.array_equal(np.sort(out.reshape(-1)), ids.reshape(-1)):
        raise ValueError(f"the {prod(shape) * word} bits of {leaf.type} are not the bits of codes {prefix.type}")
    return out
