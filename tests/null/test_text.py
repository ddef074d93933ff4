"""The text of a term: what it looks like, that it comes back, and that no other text gets through."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.ir import Expr, ParseError, const, param, parse, text
from lowbit.ir.parse import MAX_CHARS, MAX_NODES
from tests.terms import matmuls, terms

LINE = "%0 = param x : f32[m=2 k=8]"


@given(terms())
def test_round_trip(e: Expr) -> None:
    assert parse(text(e)) is e


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16", "e5m2", "i8", "u8", "i16", "u16", "i32", "u32"])
def test_constants_come_back_bit_by_bit(dtype: str) -> None:
    values = [0, 1, 2, 3] if dtype.startswith("u") else [-1.0, -2.0, 0.0, 4.0]
    for n in (4, 32):  # as numbers, and as bytes
        e = const(np.resize(values, n), dtype, "c")  # type: ignore[arg-type]
        assert parse(text(e)) is e


@pytest.mark.parametrize("value", [-0.0, np.nan, np.inf, -np.inf, 2.0**-149, 3.4028234663852886e38])
def test_odd_floats_come_back(value: float) -> None:
    assert parse(text(const(value, "f32"))) is const(value, "f32")


def test_a_nan_payload_comes_back() -> None:
    payload = np.array([0x7FC00123], np.uint32).view(np.float32)
    stated = f"%0 = const b64:{base64.b64encode(payload.tobytes()).decode()} : f32[c=1]"
    assert text(parse(stated)).split() == stated.split()


def test_short_form_hides_long_tables_and_is_refused() -> None:
    shown = text(const(np.arange(256), "i32", "c"), short=True)
    assert shown.startswith("%0 = const #")
    with pytest.raises(ParseError, match="line 1: 'const' is not an operation, or not written like that"):
        parse(shown)


HUGE = "9" * 4000
REFUSED = [
    ("", "line 1: expected '%0 = ... : type', found ''"),
    ("%1 = param x : f32[]", "line 1: expected '%0 = ... : type', found '%1 = param x : f32[]'"),
    ("%0 = launch x : f32[]", "line 1: 'launch' is not an operation, or not written like that, in"),
    ("%0 = param x : f33[m=2]", "line 1: 'f33[m=2]' is not a type such as f32[m=2 k=8] in"),
    ("%0 = param x : f32[m=-2]", "line 1: param x: dim 'm' has size -2; sizes are positive ints in"),
    ("%0 = param x : f32[m=two]", "line 1: invalid literal for int() with base 10: 'two' in"),
    (f"{LINE}\n%1 = %0 + %2 : f32[m=2 k=8]", "line 2: "),
    (f"{LINE}\n%1 = %0 + %1 : f32[m=2 k=8]", "line 2: "),
    (f"{LINE}\n%1 = sum[k] %0 : f32[m=3]", "line 2: states type f32[m=3], but the node is f32[m=2]"),
    (f"{LINE}\n%1 = sum[z] %0 : f32[m=2]", "line 2: sum over ['z']"),
    (f"{LINE}\n%1 = call nobody_has_this %0 : f32[]", "line 2: \"call 'nobody_has_this' is not registered"),
    ("%0 = const b64:AA=A : u8[c=1]", "line 1: "),
    (f"%0 = param x : f32[j={HUGE} k={HUGE}]\n%1 = merge %0 j k -> z : f32[z=1]", "line 2: Exceeds the limit"),
    ("%0 = const {1, , 2} : u8[c=3]", "line 1: could not convert string to float: ' ' in"),
    ("%0 = const {1} : u8[c=2]", "line 1: const u8[c=2]: 1 bytes do not fill 2 entries in"),
    ("%0 = const {300} : u8[c=1]", "line 1: [300.0] has values that u8 cannot hold in"),
    ("%0 = const {inf} : i32[c=1]", "line 1: [inf] has values that i32 cannot hold in"),
    ("%0 = const {0.1} : bf16[c=1]", "line 1: [0.1] has values that bf16 cannot hold in"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED, ids=[m[-40:] for m, _ in REFUSED])
def test_other_text_is_refused(source: str, message: str) -> None:
    with pytest.raises(ParseError) as err:
        parse(source)
    assert str(err.value).startswith(message)


def test_size_is_limited_before_anything_is_read() -> None:
    with pytest.raises(ParseError, match=f"has {MAX_CHARS + 1} characters, at most {MAX_CHARS} are read"):
        parse("x" * (MAX_CHARS + 1))
    with pytest.raises(ParseError, match=f"has {MAX_NODES + 1} lines, at most {MAX_NODES} are read"):
        parse("x\n" * MAX_NODES + "x")


def test_the_deepest_text_that_is_read_is_also_printed() -> None:
    lines = ["%0 = param x : f32[k=2]"]
    lines += [f"%{i} = pad %{i - 1} k 0 1 : f32[k={i + 2}]" for i in range(1, MAX_NODES)]
    assert text(parse("\n".join(lines))).count("\n") == MAX_NODES - 1


@given(matmuls(), st.data())
def test_a_damaged_text_is_refused_or_is_a_term(e: Expr, data: st.DataObject) -> None:
    source = text(e)
    at = data.draw(st.integers(0, len(source) - 1))
    insert = data.draw(st.text("%[]{}=:*+ 0123456789.,kmgxuf-", max_size=3))
    cut = data.draw(st.integers(0, 3))
    try:
        got = parse(source[:at] + insert + source[at + cut :])
    except ParseError:
        return
    assert parse(text(got)) is got


def test_text_is_deterministic() -> None:
    x, w = param("x", "f32", m=2, k=8), param("w", "f32", n=3, k=8)
    assert text((x * w).sum("k")) == text((x * w).sum("k"))
