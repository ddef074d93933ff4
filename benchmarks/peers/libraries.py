"""Libraries of PyTorch that install from PyPI. Each is asked for what its own layers run."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.peer import Peer
from benchmarks.peers.weights import GROUP, NF4_BLOCK, Weight


def on_device(x: Any, dtype: str | None = None) -> Any:
    from benchmarks.peers import torch_clock

    return torch_clock.on_device(x, dtype)


def cublas_pack(w: Weight) -> Any:
    return on_device(w.fields["dense"], "float16")


def cublas_product(x: Any, w: Any) -> Any:
    return x @ w.T


def gemlite_pack(w: Weight) -> Any:
    """Tensors and meta arguments of a layer, as its own forward passes them on."""
    from gemlite.helper import A16W2_HQQ_INT, A16W4_HQQ_INT

    made = {2: A16W2_HQQ_INT, 4: A16W4_HQQ_INT}[w.bits](device="cuda:0")
    zero = np.full_like(w.fields["scale"], 1 << w.bits - 1)
    layer = made.from_weights(*map(on_device, (w.fields["codes"], w.fields["scale"], zero)))
    return layer.get_tensor_args(), layer.get_meta_args()


def gemlite_product(x: Any, w: Any) -> Any:
    from gemlite.core import forward_functional

    return forward_functional(x, None, *w)


def humming_pack(w: Weight) -> Any:
    """A layer with symmetric codes, which it counts from zero as we do."""
    import torch
    from humming import ops
    from humming.layer import HummingLayer

    config = {"dtype": f"int{w.bits}", "group_size": GROUP}
    layer = HummingLayer(shape_n=w.n, shape_k=w.k, weight_config=config, torch_dtype=torch.float16).cuda()
    codes = ops.pack_weight(on_device(w.fields["codes"], "int32"), w.bits)
    layer.load_from_tensors({"weight": codes, "weight_scale": on_device(w.fields["scale"])})
    layer.transform()
    return layer


def humming_product(x: Any, layer: Any) -> Any:
    return layer(x)


def tinygemm_pack(w: Weight) -> Any:
    """Two codes a byte, the first above, tiled; scale and zero point, which is added last, [groups, n, 2]."""
    import torch

    codes = w.fields["codes"]
    tiled = torch.ops.aten._convert_weight_to_int4pack(on_device(codes[:, ::2] << 4 | codes[:, 1::2]), 8)
    scale = w.fields["scale"].T
    return tiled, on_device(np.stack([scale, np.zeros_like(scale)], -1), "bfloat16")


def tinygemm_product(x: Any, w: Any) -> Any:
    import torch

    codes, scale_and_zero = w
    return torch.ops.aten._weight_int4pack_mm(x, codes, GROUP, scale_and_zero)


def nf4_pack(w: Weight) -> Any:
    """Two codes a byte, the first above, and its state."""
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type

    codes = w.fields["codes"]
    state = QuantState(
        absmax=on_device(w.fields["scale"].reshape(-1)),
        shape=torch.Size((w.n, w.k)),
        code=get_4bit_type("nf4", device="cuda"),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=torch.float16,
    )
    return on_device((codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)), state


def nf4_product(x: Any, w: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, w[0], quant_state=w[1])


half = partial(Peer, dtype="float16")
adding = partial(half, adds_in_halves=True)
"""PyTorch lets cuBLAS add parts of a sum in halves, and gemlite's kernels that split k add to the result."""
PEERS = [
    adding("cuBLAS float16", "dense", needs="torch", pack=cublas_pack, product=cublas_product),
    *(
        adding(f"gemlite {w}", w, needs="gemlite", pack=gemlite_pack, product=gemlite_product)
        for w in ("uniform4", "uniform2")
    ),
    *(
        half(f"humming {w}", w, needs="humming", pack=humming_pack, product=humming_product)
        for w in ("uniform4", "uniform3", "uniform2")
    ),
    Peer("torchao int4", "uniform4", "bfloat16", "torch", tinygemm_pack, tinygemm_product),
    adding("bitsandbytes nf4", "nf4", needs="bitsandbytes", pack=nf4_pack, product=nf4_product, rival="any_precision4"),
]
