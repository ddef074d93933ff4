"""Hypothesis strategies for formats, sizes and quantized arrays. Needs hypothesis, as `lowbit[test]` has.

>>> import lowbit as lb
>>> from hypothesis import given, settings
>>> from lowbit.testing.strategies import arrays, formats
>>> @settings(max_examples=5)
... @given(arrays(formats()))
... def property_(w):
...     assert w.type.bits == 8 * sum(a.nbytes for a in w.fields.values())
>>> property_()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as err:
    raise ModuleNotFoundError("lowbit.testing.strategies needs hypothesis: pip install lowbit[test]") from err

from lowbit.array import QuantArray
from lowbit.formats import Format, bcq, uniform
from lowbit.ir.dtypes import DType
from lowbit.quant_type import QuantType
from lowbit.testing.checks import random_array

_SHARED = {
    "bits": st.integers(1, 8),
    "group": st.none() | st.integers(1, 40),
    "scale_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
}


def formats(
    make: Callable[..., Format] | None = None, /, **options: st.SearchStrategy[Any]
) -> st.SearchStrategy[Format]:
    """Formats: any of lowbit's with any options, or those of one constructor with options drawn from strategies.

    >>> import lowbit as lb
    >>> from hypothesis import strategies as st
    >>> of_mine = formats(lb.uniform, bits=st.integers(2, 4), group=st.sampled_from([16, 32]))
    """
    if make is not None:
        return st.builds(make, **options)
    return st.builds(bcq, offset=st.booleans(), **_SHARED) | st.builds(uniform, **_SHARED)


def shapes(largest_n: int = 5, largest_k: int = 70) -> st.SearchStrategy[tuple[int, int]]:
    """Sizes (n, k) of a weight, most of them ragged in most groups."""
    return st.tuples(st.integers(1, largest_n), st.integers(1, largest_k))


@st.composite
def arrays(
    draw: st.DrawFn,
    fmt: Format | st.SearchStrategy[Format],
    shape: st.SearchStrategy[tuple[int, int]] | None = None,
    dtype: DType = "f32",
) -> QuantArray:
    """Quantized arrays of a format, with random contents, dims in either order. Sizes that it refuses are not drawn."""
    chosen = draw(fmt) if isinstance(fmt, st.SearchStrategy) else fmt
    n, k = draw((shapes() if shape is None else shape).filter(lambda s: _stores(chosen, *s)))
    dims = draw(st.sampled_from([(("k", k), ("n", n)), (("n", n), ("k", k))]))
    return random_array(QuantType(dims, dtype, chosen), draw(st.integers(0, 2**32 - 1)))


def _stores(fmt: Format, n: int, k: int) -> bool:
    try:
        fmt.decode(n, k)
    except ValueError:
        return False
    return True
