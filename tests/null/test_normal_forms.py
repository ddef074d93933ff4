"""Where the pipelines take the decode of real formats: golden texts, and the forms that the papers describe."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.ir import (
    Add,
    Contract,
    Expr,
    Gather,
    Param,
    Unpack,
    cast,
    const,
    contract,
    evaluate,
    merge,
    param,
    slice_,
    text,
    topo,
)
from lowbit.passes import PIPELINES, run

P, N, G, J, V = 3, 6, 2, 4, 8
K = G * J * V
X = param("x", "f32", m=2, k=K)
STORED = param("planes", "u8", p=P, n=N, g=G, j=J)
ALPHA = param("alpha", "f32", p=P, n=N, g=G)


def product(w: Expr) -> Expr:
    return contract((X, w), ("k",))


def signed(bits: Expr) -> Expr:
    return merge(contract((ALPHA, bits * 2 - 1), ("p",)), "g", "j", "v", into="k")


def binary_coding() -> Expr:
    return product(signed(Unpack(STORED, 1, "v", V)))


def xor_network(matrix: np.ndarray) -> Expr:
    """FleXOR: weight bit v is the xor of the stored bits u that row v of the matrix selects."""
    network = const(matrix, "u8", "v", "u")
    return product(signed(contract((Unpack(STORED, 1, "u", V), network), ("u",), ring="gf2")))


def offset() -> Expr:
    w = contract((ALPHA, Unpack(STORED, 1, "v", V) * 2 - 1), ("p",)) + param("beta", "f32", n=N, g=G)
    return product(merge(w, "g", "j", "v", into="k"))


def ragged() -> Expr:
    """Groups of 30 in 4 bytes, and k = 57 instead of 60."""
    w = contract((ALPHA, Unpack(STORED, 1, "v", V) * 2 - 1), ("p",))
    within = slice_(merge(w, "j", "v", into="t"), "t", 0, 30)
    return contract((param("x", "f32", m=2, k=57), slice_(merge(within, "g", "t", into="k"), "k", 0, 57)), ("k",))


def additive_codebooks() -> Expr:
    """AQLM and CodeGEMM: two codebooks of 256 vectors of 8, and a scale for each group."""
    code = param("code", "u8", b=2, n=N, g=G, j=J)
    book = param("book", "f32", b=2, c=256, v=V)
    w = contract((Gather(book, code, "c"), param("s", "f32", n=N, g=G)), ("b",))
    return product(merge(w, "g", "j", "v", into="k"))


def affine() -> Expr:
    """Two 4-bit codes a byte, scale and zero point."""
    q = Unpack(param("codes", "u8", n=N, g=G, j=K // G // 2), 4, "v", 2)
    w = param("s", "f32", n=N, g=G) * (cast(q, "i32") - cast(param("z", "u8", n=N, g=G), "i32"))
    return product(merge(w, "g", "j", "v", into="k"))


def integer_planes() -> Expr:
    """Three-bit integers stored as bit planes, scale and zero point."""
    q = contract((Unpack(STORED, 1, "v", V), const([1, 2, 4], "i32", "p")), ("p",))
    w = param("s", "f32", n=N, g=G) * (q - cast(param("z", "u8", n=N, g=G), "i32"))
    return product(merge(w, "g", "j", "v", into="k"))


def row_table() -> Expr:
    """SqueezeLLM: a table of 16 numbers a row."""
    return product(Gather(param("t", "f32", n=N, c=16), param("code", "u8", (0, 15), n=N, k=K), "c"))


def index_planes() -> Expr:
    """Any-Precision: bit planes, most significant first, make the index of a table a row."""
    index = contract((Unpack(STORED, 1, "v", V), const([4, 2, 1], "i32", "p")), ("p",))
    return product(merge(Gather(param("t", "f32", n=N, c=8), index, "c"), "g", "j", "v", into="k"))


def low_rank() -> Expr:
    """QLoRA: binary coding and an adapter of rank 2."""
    a, b = param("lora_a", "f32", k=K, r=2), param("lora_b", "f32", r=2, n=N)
    return product(signed(Unpack(STORED, 1, "v", V)) + contract((const(2, "f32"), a, b), ("r",)))


TERMS = (binary_coding, offset, ragged, additive_codebooks, affine, integer_planes, row_table, index_planes, low_rank)


def arrays(e: Expr) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for leaf in topo(e):
        if isinstance(leaf, Param):
            shape = tuple(leaf.dims.values())
            whole = leaf.bounds and rng.integers(leaf.bounds[0], leaf.bounds[1] + 1, shape)
            out[leaf.name] = rng.normal(size=shape) if leaf.bounds is None else whole
    return out


@pytest.mark.parametrize("make", TERMS)
@pytest.mark.parametrize("form", PIPELINES)
def test_every_form_means_the_same(make, form, golden):
    e = make()
    new = run(e, PIPELINES[form])
    env = arrays(e)
    want, got = evaluate(e, env), evaluate(new, env)
    got = got.transpose([list(new.dims).index(k) for k in e.dims])
    # float64 sums of at most K * 256 terms of magnitude up to ~100: reassociation moves the last bits only.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    golden(text(new, short=True))


def psumbook(e: Expr) -> Gather:
    """The one computed table of a term that is looked up."""
    (found,) = [n for n in topo(e) if isinstance(n, Gather) and isinstance(n.table, Contract)]
    return found


def test_binary_coding_ends_as_lut_gemm():
    g = psumbook(run(binary_coding(), PIPELINES["table"]))
    assert g.index is STORED
    assert g.table.dims[g.dim] == 256
    assert {k: n for k, n in g.table.dims.items() if k != g.dim} == {"m": 2, "g": G, "j": J}


def test_xor_network_ends_as_the_same_term():
    matrix = np.random.default_rng(1).integers(0, 2, (V, V))
    flexor, bcq = run(xor_network(matrix), PIPELINES["table"]), run(binary_coding(), PIPELINES["table"])

    def without_digest(e: Expr) -> list[str]:
        return [line for line in text(e, short=True).split("\n") if " = const" not in line]

    assert without_digest(flexor) == without_digest(bcq)
    assert len(text(flexor, short=True).split("\n")) == len(text(bcq, short=True).split("\n"))


def test_an_xor_network_that_does_nothing_is_the_very_same_object():
    assert run(xor_network(np.eye(V, dtype=int)), PIPELINES["table"]) is run(binary_coding(), PIPELINES["table"])


def test_bit_planes_of_integers_end_as_a_psumbook_too():
    """Place values and scale are factors, like the scales of binary coding; the zero point is a product of its own."""
    g = psumbook(run(integer_planes(), PIPELINES["planes"]))
    assert g.index is STORED
    assert g.table.dims[g.dim] == 256


def test_codebooks_end_as_a_psumbook():
    g = psumbook(run(additive_codebooks(), PIPELINES["table"]))
    assert isinstance(g.index, Param) and g.index.name == "code"
    assert {k: n for k, n in g.table.dims.items() if k != g.dim} == {"m": 2, "g": G, "j": J, "b": 2}


def test_a_low_rank_adapter_leaves_the_forms_of_its_base_alone():
    base, adapted = run(binary_coding(), PIPELINES["table"]), run(low_rank(), PIPELINES["table"])
    assert isinstance(adapted, Add) and adapted.a is base
    assert isinstance(adapted.b, Contract)
    assert {f.name for f in adapted.b.factors if isinstance(f, Param)} == {"x", "lora_a", "lora_b"}


def test_dump_shows_each_pass(golden):
    lines: list[str] = []
    run(binary_coding(), PIPELINES["table"], dump=lines.append)
    golden("\n".join(lines))
