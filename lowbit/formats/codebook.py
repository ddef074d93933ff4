"""Additive codebooks: w = scale * (a vector from each of m codebooks, added up), vec consecutive inputs at a time.

AQLM (Egiazarian et al., ICML 2024) with a scale for each row, CodeGEMM (NeurIPS 2025) with one for each group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowbit.formats.format import register_format
from lowbit.formats.planes import code_planes, group_size, groups, scale_type
from lowbit.ir.build import const, contract, merge, param, slice_
from lowbit.ir.dtypes import DType
from lowbit.ir.expr import Expr, Gather, Unpack

_WORDS: dict[int, DType] = {8: "u8", 16: "u16"}
"""Bits that fill a word: such a code is looked up as it is stored."""


@register_format("codebook")
def codebook(
    n: int, k: int, m: int, bits: int, vec: int, group: int | None = None, scale_dtype: str = "float32"
) -> Expr:
    """Sums of codebook vectors: `codebook(2, 8, vec=8, group=128)` stores two bytes for every 8 inputs of an output.

    w[n, g, j, v] = scale[n, g] * sum_b codebooks[b, code[b, n, g, j], v]; group g has vectors j of inputs v.

    Stored: `codebooks` [m, 2**bits, vec], which all rows share, `scale` [n, groups], and the codes. With 8 or 16 bits a
    code is a word, `codes` u8 or u16 [m, n, groups, vectors]. Other widths fill no word and are stored as the planes of
    `bcq` are, without waste: `planes` u8 [bits, m, n, groups, ceil(vectors / 8)], plane 0 least significant. Bits per
    weight: m bits / vec + s / group for scales of s bits, and s m 2**bits vec / (n k) for the codebooks. A row whose
    size is not a multiple of `group`, or without groups of `vec`, is padded.

    Args:
      m: codebooks, 1 or more.
      bits: of a code, 4 to 16.
      vec: consecutive inputs that a code stands for, 2 to 16.
      group: inputs that share a scale, a multiple of `vec`; None for one group a row.
      scale_dtype: of scales and codebooks, "float32", "float16" or "bfloat16"; see `bcq`.

    Raises ValueError for other options, and for a weight with fewer entries than the codebooks.

    >>> import lowbit as lb
    >>> lb.QuantType((("k", 4096), ("n", 4096)), "f32", lb.codebook(1, 8, vec=4, group=128)).bits_per_weight
    2.251953125
    """
    _check(n, k, m, bits, vec, group)
    dtype, g, j = scale_type(scale_dtype), groups(k, group), vectors(k, vec, group)
    books = param("codebooks", dtype, b=m, c=1 << bits, v=vec)
    w = contract((Gather(books, _code(m, bits, n, g, j), "c"), param("scale", dtype, n=n, g=g)), ("b",))
    return slice_(merge(w, "g", "j", "v", into="k"), "k", 0, k)


def vectors(k: int, vec: int, group: int | None) -> int:
    """Vectors in a group, the padded one included."""
    return -(-group_size(k, group) // vec)


def pack_codes(codes: jax.Array, bits: int) -> dict[str, jax.Array]:
    """Codes [b, n, g, j], of any integer dtype, as they are stored."""
    if bits in _WORDS:
        return {"codes": codes.astype(jnp.dtype(f"uint{bits}"))}
    return {"planes": code_planes(codes, bits)}


def _code(m: int, bits: int, n: int, g: int, j: int) -> Expr:
    """The codes as a term with dims b n g j."""
    if bits in _WORDS:
        return param("codes", _WORDS[bits], b=m, n=n, g=g, j=j)
    stored = Unpack(param("planes", "u8", p=bits, b=m, n=n, g=g, i=-(-j // 8)), 1, "u", 8)
    code = contract((stored, const([1 << p for p in range(bits)], "i32", "p")), ("p",))
    return slice_(merge(code, "i", "u", into="j"), "j", 0, j)


def _check(n: int, k: int, m: int, bits: int, vec: int, group: int | None) -> None:
    if type(m) is not int or m < 1:
        raise ValueError(f"m must be a positive int, the number of codebooks, not {m!r}")
    if type(bits) is not int or not 4 <= bits <= 16:
        raise ValueError(f"bits must be an int from 4 to 16, not {bits!r}")
    if type(vec) is not int or not 2 <= vec <= 16:
        raise ValueError(f"vec must be an int from 2 to 16, not {vec!r}")
    groups(k, group)
    if group is not None and group % vec:
        raise ValueError(f"a group of {group} inputs is no number of vectors of {vec}: make group a multiple of vec")
    if (size := m * vec << bits) > n * k:
        raise ValueError(
            f"{m} codebooks of {1 << bits} vectors of {vec} hold {size} numbers, more than the weight's {n} x {k} = "
            f"{n * k}: use fewer bits, or leave the layer dense"
        )
