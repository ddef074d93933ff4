"""Contenders that miss, crash, hang or err, for the tests of the race, and a clock of numpy's. No jax, no torch."""

from __future__ import annotations

import atexit
import os
import time
from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.peer import Peer
from benchmarks.peers.weights import Array, Weight


def run(peer: Peer, x: Array, packed: Any) -> Array:
    y: Array = peer.product(x, packed)
    return y


def nbytes(packed: Any) -> int:
    return int(packed.nbytes)


def rotation(packed: Any) -> list[Any]:
    return [packed]


def timed(peer: Peer, x: Array, rotated: list[Any]) -> dict[str, Any]:
    return {"seconds": 1e-6 * len(x), "spread": 0.0, "clock": "CUPTI", "wall": 2e-6}


def versions() -> dict[str, str]:
    return {"fake": "1"}


def pack(w: Weight) -> Any:
    return w.columns(np.arange(w.k))[0]


def refuses(w: Weight) -> Any:
    raise ValueError(f"no {w.what}\nhere")


def leaves(w: Weight) -> Any:
    os._exit(0)


def product(x: Array, w: Any) -> Any:
    return (x.astype(np.float64) @ w.T).astype(np.float16).astype(np.float32)


def crashes(x: Array, w: Any) -> Any:
    if len(x) == 2:
        os.abort()
    return product(x, w)


def hangs(x: Array, w: Any) -> Any:
    if len(x) == 2:
        time.sleep(60)
    return product(x, w)


def errs(x: Array, w: Any) -> Any:
    return product(x, w) + (len(x) == 2)


def raises(x: Array, w: Any) -> Any:
    if len(x) == 2:
        atexit.register(os._exit, 3)  # as a GPU's driver may end it
        raise RuntimeError("two are too many")
    return product(x, w)


fake = partial(Peer, what="bcq3", dtype="float16", needs="json", clock=__name__)
PEERS = [
    fake("good", pack=pack, product=product),
    fake("absent", needs="no_such_package", pack=pack, product=product),
    fake("refuses", pack=refuses, product=product),
    fake("leaves", pack=leaves, product=product),
    fake("crashes", pack=pack, product=crashes),
    fake("hangs", pack=pack, product=hangs),
    fake("errs", pack=pack, product=errs),
    fake("raises", pack=pack, product=raises),
]
