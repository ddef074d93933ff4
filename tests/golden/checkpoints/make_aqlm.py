"""Makes the golden AQLM checkpoints with its own k-means quantizer, its packer and the `aqlm` package's decoder.

    git clone https://github.com/Vahe1994/AQLM, at e79a896ed6656fe4ed06193d42d004e7d0bbdbb2
    pip install --no-deps aqlm==1.1.7 and torch==2.13.0 safetensors tqdm numpy
    python tests/golden/checkpoints/make_aqlm.py FOLDER_OF_AQLM

Of each layer expected.safetensors has the codes [n, k / v, m] before they were packed, and the float32 weight [n, k].
The packer is read out of `convert_to_hf.py`, whose imports want all of transformers.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
N, K = 32, 64
CASES = {"2x8": (2, 8, 4), "1x8_g8": (1, 8, 8), "1x10": (1, 10, 2), "3x5": (3, 5, 4)}
"""By name: codebooks, bits, inputs of a code."""


def packer(folder: Path) -> Any:
    import torch

    tree = ast.parse((folder / "convert_to_hf.py").read_text())
    tree.body = [
        f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in ("get_int_dtype", "pack_int_data")
    ]
    found: dict[str, Any] = {"torch": torch}
    exec(compile(tree, "convert_to_hf.py", "exec"), found)
    return found["pack_int_data"]


def make(folder: Path, name: str, m: int, bits: int, vec: int) -> None:
    import aqlm.utils
    import torch
    from safetensors.torch import save_file
    from src.aq import QuantizedWeight

    options = {"nbits_per_codebook": bits, "num_codebooks": m, "out_group_size": 1, "in_group_size": vec}
    torch.manual_seed(0)
    given = QuantizedWeight(reference_weight=torch.randn(N, K), max_iter=2, verbose=False, **options)
    codes, layer = given.get_codes().clone(), "model.layers.0.mlp.up_proj"
    half = {"codebooks": given.get_codebooks().half(), "scales": given.get_scales().half()}
    packed = {"codes": packer(folder)(given.get_codes().clone(), bits), **half}
    unpacked = aqlm.utils.unpack_int_data(packed["codes"], bits)
    weight = aqlm.utils._dequantize_weight(unpacked, half["codebooks"].float(), half["scales"].float())
    target = HERE / "aqlm" / name
    target.mkdir(parents=True, exist_ok=True)
    said = {"quant_method": "aqlm", **options, "linear_weights_not_to_quantize": ["model.norm.weight"]}
    (target / "config.json").write_text(json.dumps({"quantization_config": said}, indent=2) + "\n")
    made_by = {"format": "pt", "made_by": f"AQLM e79a896, aqlm 1.1.7, torch {torch.__version__}"}
    tensors = {f"{layer}.{key}": array.detach().contiguous() for key, array in packed.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(K).half()}, target / "model.safetensors", made_by)
    expected = {"codes": codes.to(torch.int32).contiguous(), "weight": weight.detach()}
    save_file(expected, target / "expected.safetensors", made_by)


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder))
    for name, case in CASES.items():
        make(folder, name, *case)


if __name__ == "__main__":
    main()
