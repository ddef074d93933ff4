"""The ways to quantize that `examples.quality` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flax import nnx

import lowbit as lb
from examples.subjects import Subject

GROUP = 128


@dataclass(frozen=True)
class Variant:
    """A method at some number of bits: `make` returns a float model and what was made of it."""

    method: str
    bits: int
    make: Callable[[Subject], tuple[nnx.Module, nnx.Module]]


def plain(method: str, fmt: lb.Format, quantizer: Any = None, bits: int | None = None) -> Variant:
    return Variant(method, bits or fmt["bits"], lambda s: (s.model, s.quantized(fmt, quantizer)))


def variants(bits: int) -> Iterator[Variant]:
    """Those that need no statistics."""
    even = lb.uniform(bits, group=GROUP, scale_dtype="float16")
    planes = lb.bcq(bits, group=GROUP, scale_dtype="float16")
    offset = lb.bcq(bits, group=GROUP, offset=True, scale_dtype="float16")
    table = lb.any_precision(bits, bits)
    books = lb.codebook(bits, 8, vec=8, group=GROUP, scale_dtype="float16")
    yield plain("RTN", even)
    yield plain("binary, greedy", planes, lb.greedy())
    yield plain("binary", planes, lb.alternating(weighs_by=()))
    yield plain("binary with offset", offset, lb.alternating(weighs_by=()))
    yield plain("k-means", table, lb.nested_kmeans(weighs_by=()), bits)
    yield plain("codebooks", books, lb.residual_kmeans(rounds=10), bits)


def of_inputs(bits: int) -> Iterator[Variant]:
    """Those that weigh errors by what the inputs are."""
    even = lb.uniform(bits, group=GROUP, scale_dtype="float16")
    table = lb.any_precision(bits, bits)
    books = lb.codebook(bits, 8, vec=8, group=GROUP, scale_dtype="float16")
    yield plain("GPTQ", even, lb.gptq())
    yield plain("binary, weighed", lb.bcq(bits, group=GROUP, scale_dtype="float16"), lb.alternating())
    yield plain("k-means, second moments", table, lb.nested_kmeans(), bits)
    yield plain("LNQ", table, lb.lnq(), bits)
    yield plain("AQLM", books, lb.additive_codebooks(rounds=5), bits)


def of_loss(bits: int) -> Iterator[Variant]:
    """Those that weigh errors by what they cost the loss."""
    even, table = lb.uniform(bits, group=GROUP, scale_dtype="float16"), lb.any_precision(bits, bits)
    yield plain("SqueezeLLM", table, lb.nested_kmeans(weighs_by=("gradient_square",)), bits)
    yield plain("LNQ, GuidedQuant", table, lb.lnq(weighs_by=("guided_gram",)), bits)
    yield plain("GPTQ, GuidedQuant", even, lb.gptq(weighs_by=("guided_gram",)))
    if bits == 3:
        yield Variant("allocated", 3, allocated)


def allocated(s: Subject) -> tuple[nnx.Module, nnx.Module]:
    """Each layer rounded to as many bits as it needs, 3.25 on average."""
    formats = [lb.uniform(b, group=GROUP, scale_dtype="float16") for b in (2, 3, 4)]
    rules = lb.allocate(s.model, s.stats, formats=formats, bits=3.25).rules
    return s.model, lb.quantize(s.model, [*s.rules, *rules])


def every(s: Subject, bits: int) -> Iterator[Variant]:
    """All that the subject's statistics allow."""
    yield from variants(bits)
    if s.batches:
        yield from of_inputs(bits)
    if s.loss:
        yield from of_loss(bits)
