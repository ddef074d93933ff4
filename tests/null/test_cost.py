"""Costs, counted by hand, and the order of products, against every order there is."""

from __future__ import annotations

from itertools import combinations
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from lowbit.ir import (
    Bitcast,
    Bucket,
    Call,
    Concat,
    Cost,
    Expr,
    Gather,
    Merge,
    Pad,
    Slice,
    Split,
    Unpack,
    cast,
    const,
    contract,
    cost,
    param,
    params,
)
from lowbit.ir.cost import contraction_work
from lowbit.ir.dtypes import bits
from lowbit.ir.expr import Contract
from lowbit.ir.order import EXHAUSTIVE, contraction_order
from lowbit.ir.walk import topo
from tests.terms import terms

X = param("x", "f32", m=2, k=8)
W = param("w", "f16", n=3, k=8)
CODES = param("codes", "u8", (0, 3), n=3, k=8)


def test_a_matrix_product() -> None:
    assert cost(contract((X, W), ("k",))) == Cost({"f32": 64, "f16": 48}, fma=48, dot=48, largest=24)


def test_a_scaled_sum_is_no_matrix_product() -> None:
    found = cost(contract((X, param("a", "f32", k=8)), ("k",)))
    assert (found.fma, found.dot) == (16, 0)


def test_a_batched_product_moves_its_operands_unless_the_batch_is_summed_with_the_rest() -> None:
    x, w = param("x", "f32", m=2, g=3, k=8), param("w", "f32", n=5, g=3, k=8)
    assert cost(contract((x, w), ("k",))).moved == 2 * 3 * 8 + 5 * 3 * 8
    assert cost(contract((x, w), ("g", "k"))).moved == 0


def test_a_shared_node_counts_once() -> None:
    doubled = X + X
    assert cost(doubled * doubled) == Cost({"f32": 64}, fma=16 + 16, largest=64)


def test_fields_are_counted_where_they_are_made() -> None:
    words = param("words", "u16", n=3)
    unpacked = Unpack(words, 4, "v", 4)
    assert cost(unpacked) == Cost({"u16": 6}, fields=12, largest=12)
    assert cost(cast(unpacked, "f32")).fields == 24
    assert cost(Bitcast(words, "u8", "v")) == Cost({"u16": 6}, fields=6, largest=6)


def test_a_table_costs_its_bytes_only_when_it_is_computed() -> None:
    stored = param("table", "f32", n=3, c=4)
    assert cost(Gather(stored, CODES, "c")) == Cost({"f32": 48, "u8": 24}, lookups=24, largest=96)
    computed = Gather(stored + 1, CODES, "c")
    assert cost(computed) == Cost({"f32": 48, "u8": 24}, fma=12, lookups=24, table=48, largest=96)


def test_a_look_up_of_one_of_two_is_a_select_and_of_a_known_one_is_free() -> None:
    table, bits = param("table", "f32", n=3, c=2), param("bits", "u8", (0, 1), n=3, k=8)
    chosen = Gather(table, bits, "c")
    assert cost(chosen) == Cost({"f32": 24, "u8": 24}, selected=24, largest=96)
    assert cost(Gather(table, const(1, "i32"), "c")) == Cost({"f32": 24}, largest=12)
    for rows, written in ((1, 0), (2, 24)):  # one vector meets each weight as it is chosen, a matrix product reads it
        found = cost(contract((param("x", "f32", m=rows, k=8), chosen), ("k",)))
        assert (found.selected, found.lookups) == (24, written)


def test_a_bucket_counts_what_it_scatters() -> None:
    found = cost(Bucket(X, CODES, "c", 4, frozenset({"k"})))
    assert found == Cost({"f32": 64, "u8": 24}, scattered=48, largest=2 * 3 * 4 * 4)


def test_moving_elements_is_free() -> None:
    moved = Merge(Split(Pad(Slice(X, "k", 1, 5), "k", 1, 3), "k", (("g", 2), ("t", 4))), ("t", "g"), "k")
    assert cost(Concat((moved, moved), "k")) == Cost({"f32": 32}, largest=128)


def test_of_a_leaf_that_is_sliced_the_slices_are_read() -> None:
    first, last = Slice(X, "k", 0, 5), Slice(X, "k", 3, 8)
    assert cost(first.sum("m")).read == {"f32": 2 * 5 * 4}
    assert cost(first + last).read == {"f32": 64}  # at most the whole
    assert cost(first.sum("k") + X.sum("k")).read == {"f32": 64}


def test_an_opaque_step_says_what_it_costs() -> None:
    assert cost(Call("reverse", (X,))) == Cost({"f32": 64}, fma=16, largest=64)


@given(terms())
def test_every_term_has_a_cost(e: Expr) -> None:
    found = cost(e)
    assert 0 <= found.dot <= found.fma
    leaves = params(e).values()
    sliced = {leaf for s in topo(e) if isinstance(s, Slice) for leaf in s.args}
    sizes = {p: prod(p.dims.values()) * bits(p.dtype) // 8 for p in leaves}
    assert sum(size for p, size in sizes.items() if p not in sliced) <= found.bytes <= sum(sizes.values())


def cheapest(factors: list[dict[str, int]], result: set[str]) -> int:
    """Multiply-adds of the best order of pairwise products, by trying them all."""

    def needed(rest: list[dict[str, int]]) -> set[str]:
        return result.union(*rest) if rest else result

    def alone(f: dict[str, int], rest: list[dict[str, int]]) -> tuple[int, dict[str, int]]:
        kept = {k: n for k, n in f.items() if k in needed(rest)}
        return (prod(f.values()) if kept != f else 0), kept

    def best(have: list[dict[str, int]]) -> int:
        if len(have) == 1:
            return 0
        options = []
        for i, j in combinations(range(len(have)), 2):
            rest = [f for at, f in enumerate(have) if at not in (i, j)]
            both = {**have[i], **have[j]}
            kept = {k: n for k, n in both.items() if k in needed(rest)}
            options.append(prod(both.values()) + best([*rest, kept]))
        return min(options)

    first = [alone(f, factors[:i] + factors[i + 1 :]) for i, f in enumerate(factors)]
    return sum(c for c, _ in first) + best([f for _, f in first])


SIZES = {"a": 2, "b": 3, "c": 5, "d": 7}


@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=1, max_size=4), st.sets(st.sampled_from("abcd")))
def test_products_run_in_the_cheapest_order(factors: list[set[str]], over: set[str]) -> None:
    shapes = [{k: SIZES[k] for k in sorted(f)} for f in factors]
    leaves = [param(f"f{i}", "f32", **shape) for i, shape in enumerate(shapes)]
    e = contract(leaves, over.intersection(*([set().union(*factors)])))
    if isinstance(e, Contract):
        assert contraction_work(e)[0] == cheapest(shapes, set(e.dims))


def test_many_factors_are_taken_from_left_to_right() -> None:
    e = contract([param(f"f{i}", "f32", n=2, **{f"k{i}": 3}) for i in range(EXHAUSTIVE + 1)], ("n",))
    assert [s.slots for s in contraction_order(e)][:2] == [(0, 1), (EXHAUSTIVE + 1, 2)]


def test_binary_coding_by_hand() -> None:
    p, n, j, v = 2, 3, 4, 8
    signs = Unpack(param("planes", "u8", p=p, n=n, j=j), 1, "v", v) * 2 - 1
    weight = contract((param("alpha", "f32", p=p, n=n), signs), ("p",))
    y = contract((param("x", "f32", j=j, v=v), weight), ("j", "v"))
    found = cost(y)
    assert found.read == {"u8": p * n * j, "f32": 4 * (p * n + j * v)}
    assert found.fields == p * n * j * v
    # Times 2, minus 1; then x with the signs (a matrix product), and its result with alpha.
    assert found.fma == 2 * p * n * j * v + p * n * j * v + p * n
