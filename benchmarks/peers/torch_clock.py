"""Products of PyTorch, and how long they take: by CUPTI through torch.profiler, as those of jax are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cold import ROUNDS, copies, middle
from benchmarks.peers.peer import Peer
from benchmarks.peers.weights import Array


def run(peer: Peer, x: Array, packed: Any) -> Array:
    with torch.inference_mode():
        y: Array = peer.product(on_device(x, peer.dtype), packed).float().cpu().numpy()
    return y


def on_device(x: Array, dtype: str | None = None) -> Any:
    """An array of numpy on the GPU, converted there."""
    moved = torch.from_numpy(x).cuda()
    return moved if dtype is None else moved.to(getattr(torch, dtype))


def tensors(packed: Any) -> list[Any]:
    """Those of a module, of the attributes of an object, or of nested containers."""
    if isinstance(packed, torch.Tensor):
        return [packed]
    if isinstance(packed, torch.nn.Module):
        return list(packed.state_dict().values())
    items = packed if isinstance(packed, list | tuple) else vars(packed).values() if hasattr(packed, "__dict__") else ()
    return [tensor for item in items for tensor in tensors(item)]


def nbytes(packed: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(packed))


def rotation(packed: Any) -> list[Any]:
    return [packed, *(copy.deepcopy(packed) for _ in range(copies(nbytes(packed)) - 1))]


def timed(peer: Peer, x: Array, rotated: list[Any]) -> dict[str, Any]:
    on_gpu = on_device(x, peer.dtype)

    def products() -> None:
        for packed in rotated:
            peer.product(on_gpu, packed)

    with torch.inference_mode():
        products()
        wall = middle([between_events(products) / len(rotated) for _ in range(ROUNDS)])
        kernels = [profiled(products, len(rotated)) / len(rotated) for _ in range(ROUNDS)]
    if not all(kernels):
        return {**wall, "clock": "CUDA events", "wall": wall["seconds"]}
    return {**middle(kernels), "clock": "CUPTI", "wall": wall["seconds"]}


def between_events(products: Callable[[], None]) -> float:
    """Seconds from the first kernel's start to the last one's end, with the gaps that a slow host leaves."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    products()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def profiled(products: Callable[[], None], count: int) -> float:
    """Seconds of the kernels alone; 0 where the profiler does not see one for each product."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        products()
        torch.cuda.synchronize()
    kernels = [e.time_range.elapsed_us() for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(kernels) / 1e6 if len(kernels) >= count else 0.0


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
