"""Positions of code bits are where the prefix that decodes them finds them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lowbit.ir import Concat, Expr, Slice, Unpack, const, contract, evaluate, param, params, split
from lowbit.ir.dtypes import bits as dtype_bits
from lowbit.ir.dtypes import numpy_dtype
from lowbit.passes.relayout import bit_positions


def planes() -> Expr:
    return contract((Unpack(param("planes", "u8", p=3, j=2), 1, "v", 8), const([1, 2, 4], "i32", "p")), ("p",))


def from_two_words() -> Expr:
    """Two bits of each, the second word's on top."""
    fields = Unpack(split(param("words", "u16", w=4), "w", half=2, j=2), 2, "v", 8)
    low, high = (Slice(fields, "half", i, i + 1).sum("half") for i in range(2))
    return low + high * 4


def reversed_() -> Expr:
    return Concat(tuple(Slice(planes(), "v", i, i + 1) for i in reversed(range(8))), "v")


PREFIXES: dict[str, tuple[Callable[[], Expr], int]] = {
    "planes": (planes, 3),
    "from two words": (from_two_words, 4),
    "reversed": (reversed_, 3),
    "fields of fields": (lambda: Unpack(Unpack(param("words", "u32", j=3), 16, "h", 2), 4, "v", 4), 4),
    "one word": (lambda: Unpack(param("words", "u8", j=1), 1, "v", 8), 1),
    "bytes": (lambda: param("words", "u8", k=5), 8),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_codes_gathered_bit_by_bit_are_the_decoded_ones(name: str) -> None:
    make, width = PREFIXES[name]
    prefix = make()
    ((leaf_name, leaf),) = params(prefix).items()
    word = dtype_bits(leaf.dtype)
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 1 << word, list(leaf.dims.values())).astype(numpy_dtype(leaf.dtype))
    at = bit_positions(prefix, width)
    assert at.shape == (*prefix.dims.values(), width)
    bits = stored.reshape(-1)[at // word].astype(np.int64) >> at % word & 1
    np.testing.assert_array_equal((bits << np.arange(width)).sum(-1), evaluate(prefix, {leaf_name: stored}))


@pytest.mark.parametrize(
    ("prefix", "width"),
    [
        (Slice(planes(), "j", 0, 1), 3),  # bits of the second byte are nobody's
        (planes(), 2),  # the third plane is
        (planes() * const([1, 1], "i32", "twice"), 3),  # every bit belongs to two codes
        (Unpack(param("planes", "u8", j=2), 1, "v", 8) * 3, 2),  # or is two bits of one
    ],
    ids=["some words", "some bits", "two codes", "two bits"],
)
def test_words_that_are_not_the_codes_bits_are_refused(prefix: Expr, width: int) -> None:
    with pytest.raises(ValueError, match=r"the (48|16) bits of u8\[.*\] are not the bits of codes"):
        bit_positions(prefix, width)
