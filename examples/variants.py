"""The ways to quantize that `examples.quality` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit as lb
from examples.subjects import Subject
from lowbit.formats.planes import code_planes

GROUP = 128
RECONSTRUCTED = ("binary, weighed", "LNQ", "AQLM", "nested planes")
"""Of those that weigh errors by the inputs, the ones whose scales or codebooks are trained block by block, too."""


@dataclass(frozen=True)
class Variant:
    """A method at some number of bits: `make` returns a float model and what was made of it."""

    method: str
    bits: int
    make: Callable[[Subject], tuple[nnx.Module, nnx.Module]]


def every(s: Subject, bits: int) -> Iterator[Variant]:
    """All that the subject allows."""
    yield from plain(bits)
    if s.batches:
        yield from of_inputs(bits)
    if s.loss:
        yield from of_loss(bits)
    if s.batches and bits == 3:
        yield Variant("allocated", bits, allocated)
    if s.folds:
        yield from around(bits)


def even(bits: int) -> lb.Format:
    return lb.uniform(bits, group=GROUP, scale_dtype="float16")


def planes(bits: int, offset: bool = False) -> lb.Format:
    return lb.bcq(bits, group=GROUP, offset=offset, scale_dtype="float16")


def table(bits: int) -> lb.Format:
    return lb.any_precision(bits, bits)


def books(bits: int) -> lb.Format:
    return lb.codebook(bits, 8, vec=8, group=GROUP, scale_dtype="float16")


def by(method: str, bits: int, fmt: lb.Format, quantizer: Any = None) -> Variant:
    return Variant(method, bits, lambda s: (s.model, s.quantized(fmt, quantizer)))


def nested(method: str, bits: int, fmt: lb.Format, quantizer: Any = None) -> Variant:
    """One width of codes that hold all."""
    return Variant(method, bits, lambda s: (s.model, lb.at_width(s.quantized(fmt, quantizer), bits)))


def plain(bits: int) -> Iterator[Variant]:
    """Those that need no statistics."""
    yield by("RTN", bits, even(bits))
    yield by("K-quant", bits, lb.k_quant(bits))
    yield by("minimum and maximum", bits, lb.k_quant(bits, GROUP, GROUP, scale_bits=0), lb.quantizers.MinMax())
    if find_spec("hqq") is not None:
        yield by("hqq", bits, lb.k_quant(bits, GROUP, GROUP, scale_bits=0), hqq)
    yield by("binary, greedy", bits, planes(bits), lb.greedy())
    yield by("binary", bits, planes(bits), lb.alternating(weighs_by=()))
    yield by("binary with offset", bits, planes(bits, offset=True), lb.alternating(weighs_by=()))
    yield by("k-means", bits, table(bits), lb.nested_kmeans(weighs_by=()))
    yield by("codebooks", bits, books(bits), lb.residual_kmeans(rounds=10))


def of_inputs(bits: int) -> Iterator[Variant]:
    """Those that weigh errors by what the inputs are."""
    yield by("GPTQ", bits, even(bits), lb.gptq())
    yield by("binary, weighed", bits, planes(bits), lb.alternating())
    yield by("k-means, second moments", bits, table(bits), lb.nested_kmeans())
    yield by("LNQ", bits, table(bits), lb.lnq())
    yield by("AQLM", bits, books(bits), lb.additive_codebooks(rounds=2))
    yield nested("nested planes", bits, lb.any_bcq(2, 4, group=GROUP, scale_dtype="float16"))
    yield nested("nested tables", bits, lb.any_precision(2, 4))
    yield nested("nested tables, refitted", bits, lb.any_precision(2, 4), lb.refitted_kmeans())


def of_loss(bits: int) -> Iterator[Variant]:
    """Those that weigh errors by what they cost the loss."""
    yield by("GPTQ, GuidedQuant", bits, even(bits), lb.gptq(weighs_by=("guided_gram",)))
    yield by("SqueezeLLM", bits, table(bits), lb.nested_kmeans(weighs_by=("gradient_square",)))
    yield by("LNQ, GuidedQuant", bits, table(bits), lb.lnq(weighs_by=("guided_gram",)))
    yield Variant("Q-Rater", bits, lambda s: (s.model, s.quantized(even(bits), None, q_rater(s, even(bits)))))


def around(bits: int) -> Iterator[Variant]:
    """Those that look at what lies between layers."""
    yield Variant("AWQ", bits, lambda s: awq(s, even(bits)))
    yield Variant("OmniQuant", bits, lambda s: (s.model, s.quantized(even(bits), None, lwc(s, even(bits)))))
    for of in of_inputs(bits):
        if of.method in RECONSTRUCTED:
            yield Variant(f"{of.method}, reconstructed", bits, lambda s, of=of: reconstructed(s, of))  # type: ignore[misc]


def allocated(s: Subject) -> tuple[nnx.Module, nnx.Module]:
    """Each layer rounded to as many bits as it needs, 3.25 on average."""
    formats = [even(b) for b in (2, 3, 4)]
    rules = lb.allocate(s.model, s.stats, formats=formats, bits=3.25, by="loss" if s.loss else "output").rules
    return s.model, lb.quantize(s.model, [*s.rules, *rules])


def awq(s: Subject, fmt: lb.Format) -> tuple[nnx.Module, nnx.Module]:
    rules, batch, clip = s.all_in(fmt), s.held, ("**/v", "**/o", "**/mlp/*")
    scaled = lb.awq(s.model, rules, s.stats, folds=s.folds, batch=batch, clip=())
    return scaled, s.quantized(fmt, None, lb.awq(s.model, rules, s.stats, folds=s.folds, batch=batch, clip=clip))


def lwc(s: Subject, fmt: lb.Format) -> nnx.Module:
    return lb.lwc(s.model, s.all_in(fmt), s.together[:8], blocks=[s.blocks], call=of_tokens, epochs=10, rate=0.05)


def q_rater(s: Subject, fmt: lb.Format) -> nnx.Module:
    assert s.loss is not None
    return lb.q_rater(s.model, s.all_in(fmt), s.together[:2], s.loss, clips=(0.9, 0.8, 0.7, 0.6))


def reconstructed(s: Subject, of: Variant) -> tuple[nnx.Module, nnx.Module]:
    dense, small = of.make(s)
    return dense, lb.tune.reconstruct(small, dense, s.together[:9], s.blocks, of_tokens, rate=1e-3)


def of_tokens(model: Any, tokens: jax.Array) -> jax.Array:
    """What a language model makes of windows that have their targets, too."""
    out: jax.Array = model(tokens[:, :-1])
    return out


def hqq(w: jax.Array, fmt: lb.Format) -> dict[str, jax.Array]:
    """Half-quadratic quantization (Badri & Shaji, 2023) by its own library, in which w = scale (code - zero)."""
    import torch
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        torch.from_numpy(np.array(w)), nbits=fmt["bits"], group_size=fmt["group"], axis=1, bitpack=False, device="cpu",
        compute_dtype=torch.float32,
    )  # fmt: skip
    scale, zero = (jnp.asarray(meta[name].float().numpy()).reshape(len(w), -1) for name in ("scale", "zero"))
    own = jnp.asarray(codes.numpy().astype(np.uint8)).reshape(len(w), -1, fmt["group"])
    floats = {"scale": scale, "min": scale * zero}
    return {"planes": code_planes(own, fmt["bits"]), **{name: a.astype(jnp.float16) for name, a in floats.items()}}
