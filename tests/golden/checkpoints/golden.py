"""What the generators of golden checkpoints share: random codes and scales, and the two files of a checkpoint.

A golden is a folder: config.json and model.safetensors as the project writes them, and expected.safetensors, which
holds of each layer, as LAYER/codes and so on, the codes [n, k], zero points [n, g], scales [n, g] and group of each
input that went in, and the weight [n, k] that the project's own code makes of what it packed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def save(
    name: str, options: dict[str, Any], tensors: dict[str, Any], expected: dict[str, dict[str, Any]], tool: str
) -> None:
    """Write a golden. `tool` says which versions made it."""
    from safetensors.torch import save_file

    expected = {f"{layer}/{key}": array for layer, arrays in expected.items() for key, array in arrays.items()}

    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": options}, indent=2) + "\n")
    for file, arrays in (("model", tensors), ("expected", expected)):
        packed = {key: array.contiguous() for key, array in arrays.items()}
        save_file(packed, path := folder / f"{file}.safetensors", {"made_by": tool})
        path.chmod(0o644)


def draw(
    seed: int, n: int, k: int, bits: int, group: int, order: bool, symmetric: bool, least_zero: int = 1
) -> dict[str, Any]:
    """Codes, scales that are exact in float16, zero points and groups."""
    import torch

    rng = np.random.default_rng(seed)
    count = -(-k // group)
    g_idx = np.arange(k) // group
    if order:
        g_idx = g_idx[rng.permutation(k)]
    half = 1 << bits - 1
    zero = np.full((n, count), half) if symmetric else rng.integers(least_zero, 1 << bits, (n, count))
    drawn = {
        "codes": rng.integers(0, 1 << bits, (n, k)).astype(np.uint8),
        "zero": zero.astype(np.uint8),
        "scale": rng.integers(1, 64, (n, count)).astype(np.float16) / 1024,
        "g_idx": g_idx.astype(np.int32),
    }
    return {key: torch.from_numpy(array) for key, array in drawn.items()}


def dense(drawn: dict[str, Any]) -> Any:
    """The float32 weight [n, k], exactly: what the packers are given, which find codes and scales again."""
    at = drawn["g_idx"].long()
    return drawn["scale"].float()[:, at] * (drawn["codes"].float() - drawn["zero"].float()[:, at])
