"""Kernels that papers published, built from their repositories: each is the module that its own setup.py makes.

All of them add in float16. One row of x, or a few, run by the paper's kernel; more are, as in the paper's layers, for
another one that decodes the weight and for cuBLAS.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.libraries import on_device
from benchmarks.peers.peer import Peer
from benchmarks.peers.weights import GROUP, Array, Weight

MOST = 8
"""Rows that the kernel of Any-Precision LLM takes."""


def any_precision_words(codes: Array, bits: int) -> Array:
    """int32 [bits, n, k / 32], plane 0 the most significant bit.

    A warp's 128 bytes, eight weights each, the first in the highest bit, go around its 32 lanes four times. So a lane's
    word has bytes l, l + 32, l + 64 and l + 96, the first of them highest.
    """
    packed = np.stack([np.packbits(codes >> p & 1, axis=-1) for p in reversed(range(bits))])
    lanes = packed.reshape(bits, len(codes), -1, 4, 32)[..., ::-1, :].swapaxes(-1, -2)
    return np.ascontiguousarray(lanes).view(np.int32).reshape(bits, len(codes), -1)


def any_precision_pack(w: Weight) -> Any:
    return on_device(any_precision_words(w.fields["codes"], w.bits)), on_device(w.fields["table"]), w.bits


def any_precision_product(x: Any, w: Any) -> Any:
    from any_precision_ext import dequant_kbit, matmul_kbit

    return matmul_kbit(x, *w) if len(x) <= MOST else x @ dequant_kbit(*w).T


def bcq_words(codes: Array, bits: int) -> Array:
    """int32 [k / 32, bits, n], the first of 32 inputs in the lowest bit."""
    packed = [np.packbits(codes >> p & 1, axis=-1, bitorder="little").view(np.int32) for p in range(bits)]
    return np.ascontiguousarray(np.stack(packed).transpose(2, 0, 1))


def anybcq_pack(w: Weight) -> Any:
    """Words, scales [groups, bits, n], and offsets of zero."""
    words, alpha = bcq_words(w.fields["codes"], w.bits), w.fields["alpha"].transpose(2, 0, 1)
    offset = np.zeros((w.k // GROUP, w.n), np.float16)
    return *map(on_device, (words, np.ascontiguousarray(alpha), offset)), w.bits


def anybcq_product(x: Any, w: Any) -> Any:
    import custom_kernel

    *weight, bits = w
    if len(x) > 1:
        return x @ custom_kernel.anybcq_dequant(*weight, bits, bits, GROUP)
    y = x.new_zeros(1, 1, weight[0].shape[2])  # the kernel adds to it
    custom_kernel.anybcq_gemv(x[None], y, *weight, bits, bits, GROUP)
    return y[0]


def codegemm_words(codes: Array) -> Array:
    """Codes u8 [m, n, vectors] to int32 [m, vectors / 4, n], the first vector in the lowest byte."""
    return np.ascontiguousarray(np.ascontiguousarray(codes).view(np.int32).swapaxes(1, 2))


def codegemm_pack(w: Weight) -> Any:
    scale = np.ascontiguousarray(w.fields["scale"].T)
    return tuple(map(on_device, (codegemm_words(w.fields["codes"]), scale, w.fields["codebooks"])))


def codegemm_product(x: Any, w: Any) -> Any:
    import codegemm_kernel

    if len(x) > 1:
        return x @ codegemm_kernel.codegemm_dequant(*w, GROUP)
    y = x.new_zeros(1, 1, w[0].shape[2])  # the kernel adds to it
    codegemm_kernel.codegemm_gemv(x[None], y, *w, GROUP)
    return y[0]


def aqlm_pack(w: Weight) -> Any:
    """Its layer, with codes [n, vectors, m] as signed bytes."""
    import torch
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(w.k, w.n, 8, 1, 2, 8, bias=False, device="cuda", dtype=torch.float16)
    codes = np.ascontiguousarray(np.moveaxis(w.fields["codes"], 0, -1)).view(np.int8)
    layer.codes.data = on_device(codes)
    layer.codebooks.data = on_device(w.fields["codebooks"][:, :, None])
    layer.scales.data = on_device(w.fields["scale"].reshape(-1, 1, 1, 1))
    return layer


def aqlm_product(x: Any, layer: Any) -> Any:
    return layer(x)


half = partial(Peer, dtype="float16", adds_in_halves=True)
PEERS = [
    *(
        half(
            f"Any-Precision {w[-1]} bits", w, needs="any_precision_ext", pack=any_precision_pack,
            product=any_precision_product,
        )
        for w in ("any_precision4", "any_precision3")
    ),
    *(
        half(f"AnyBCQ {w[-1]} bits", w, needs="custom_kernel", pack=anybcq_pack, product=anybcq_product)
        for w in ("bcq4", "bcq3", "bcq2")
    ),
    *(
        half(f"CodeGEMM {w}", w, needs="codegemm_kernel", pack=codegemm_pack, product=codegemm_product)
        for w in ("m1v4", "m2v8")
    ),
    half("AQLM 2x8", "m2v8row", needs="aqlm", pack=aqlm_pack, product=aqlm_product),
]  # fmt: skip
