"""Makes the golden GPTQ checkpoints with the packers of AutoGPTQ (first version) and GPTQModel (second version).

    pip download --no-deps auto-gptq==0.7.1 gptqmodel==7.7.0     and unpack both: their kernels need no building
    pip install torch==2.13.0 transformers==5.23.0 safetensors device_smi logbar pypcre accelerate
    python tests/golden/checkpoints/make_gptq.py FOLDER_OF_AUTO_GPTQ FOLDER_OF_GPTQMODEL

Each folder is the one that holds the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

LAYER, N, K = "model.layers.0.up_proj", 32, 64
# name, bits, group_size, whether inputs are in another order, whether symmetric
FIRST = [
    ("2_asymmetric", 2, 32, False, False),
    ("3_ordered", 3, 32, True, False),
    ("4_symmetric", 4, 32, False, True),
    ("4_ordered", 4, 32, True, False),
    ("4_rows", 4, -1, False, False),
    ("8_ordered", 8, 32, True, True),
]
SECOND = [("2_rows", 2, -1, False, True), ("3_asymmetric", 3, 32, False, False), ("4_ordered", 4, 32, True, False)]


def auto_gptq(folder: Path) -> Any:
    """QuantLinear of AutoGPTQ. Its package imports what it was written for, so the module is loaded alone."""
    file = folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def gptqmodel(folder: Path) -> Any:
    """TorchLinear of GPTQModel, without the packages around it, which import every model that there is."""
    root = folder / "gptqmodel"
    for name in ("", ".models", ".quantization"):
        package = types.ModuleType(f"gptqmodel{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package
    config = importlib.import_module("gptqmodel.quantization.config")
    vars(sys.modules["gptqmodel.quantization"]).update({k: v for k, v in vars(config).items() if k[:2] != "__"})
    return importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear


def first(linear: Any, name: str, bits: int, group: int, order: bool, symmetric: bool, tool: str) -> None:
    import torch
    from golden import dense, draw, save

    drawn = draw(bits, N, K, bits, K if group == -1 else group, order, symmetric)
    bias = torch.arange(N).half() / 8
    given = torch.nn.Linear(K, N)
    given.weight.data, given.bias.data = dense(drawn), bias.float()
    layer = linear(bits, group, K, N, True, weight_dtype=torch.float16)
    layer.pack(given, drawn["scale"].float(), drawn["zero"].float(), drawn["g_idx"])
    layer.scales, layer.bias = layer.scales.half(), layer.bias.half()
    keys = ("qweight", "qzeros", "scales", "g_idx", "bias")
    tensors = {f"{LAYER}.{key}": getattr(layer, key) for key in keys}
    layer.bias = None
    weight = layer(torch.eye(K, dtype=torch.float16)).T  # sums of one weight and zeros: exact
    tensors["model.norm.weight"] = torch.ones(K).half()
    options = {"bits": bits, "group_size": group, "desc_act": order, "sym": symmetric, "quant_method": "gptq"}
    save(f"gptq/{name}", options, tensors, {LAYER: {**drawn, "weight": weight}}, tool)


def second(linear: Any, name: str, bits: int, group: int, order: bool, symmetric: bool, tool: str) -> None:
    import torch
    from golden import dense, draw, save

    drawn = draw(bits + 10, N, K, bits, K if group == -1 else group, order, symmetric, least_zero=0)
    given = torch.nn.Linear(K, N, bias=False)
    given.weight.data = dense(drawn)
    layer = linear(bits=bits, group_size=group, sym=symmetric, desc_act=order, in_features=K, out_features=N)
    layer.pack_block(given, drawn["scale"].float(), drawn["zero"].float(), drawn["g_idx"])
    layer.post_init()
    weight = layer.dequantize_weight().T
    keys = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {f"{LAYER}.{key}": getattr(layer, key) for key in keys}
    options = {"bits": bits, "group_size": group, "desc_act": order, "sym": symmetric, "quant_method": "gptq"}
    options |= {"checkpoint_format": "gptq_v2", "pack_dtype": "int32"}
    save(f"gptq_v2/{name}", options, tensors, {LAYER: {**drawn, "weight": weight}}, tool)


def main() -> None:
    import torch

    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # its packer in C++, which makes the same and would be compiled
    old, new = map(Path, sys.argv[1:])
    for case in FIRST:
        first(auto_gptq(old), *case, f"auto-gptq 0.7.1, torch {torch.__version__}")
    for case in SECOND:
        second(gptqmodel(new), *case, f"gptqmodel 7.7.0, torch {torch.__version__}")


if __name__ == "__main__":
    main()
