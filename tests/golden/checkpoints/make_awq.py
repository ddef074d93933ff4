"""Makes the golden AWQ checkpoints with the packer of AutoAWQ.

    pip download --no-deps autoawq==0.2.9     and unpack it
    pip install torch==2.13.0 safetensors accelerate
    python tests/golden/checkpoints/make_awq.py FOLDER_OF_AUTOAWQ

The folder is the one that holds the package.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

LAYER, N, K = "model.layers.0.up_proj", 32, 64


def autoawq(folder: Path) -> Any:
    """The modules for packing, without the package around them, which imports every model that there is."""
    for name in ("awq", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    packing = importlib.import_module("awq.utils.packing_utils")
    return importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM, packing.dequantize_gemm


def make(linear: Any, dequantize: Any, group: int, tool: str) -> None:
    import torch
    from golden import dense, draw, save

    drawn = draw(group, N, K, 4, group, order=False, symmetric=False, least_zero=0)
    given = torch.nn.Linear(K, N)
    given.weight.data, given.bias.data = dense(drawn), torch.arange(N) / 8
    scales, zeros = drawn["scale"].T.contiguous(), drawn["zero"].T.contiguous()
    layer = linear.from_linear(given, 4, group, scales=scales.float(), zeros=zeros.float())
    weight = dequantize(layer.qweight, layer.qzeros, layer.scales, 4, group).T
    tensors = {f"{LAYER}.{key}": getattr(layer, key) for key in ("qweight", "qzeros", "scales", "bias")}
    options = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm", "quant_method": "awq"}
    save(f"awq/group_{group}", options, tensors, {LAYER: {**drawn, "weight": weight}}, tool)


def main() -> None:
    import torch

    for group in (32, K):
        make(*autoawq(Path(sys.argv[1])), group, f"autoawq 0.2.9, torch {torch.__version__}")


if __name__ == "__main__":
    main()
