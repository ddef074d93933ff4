"""Makes the golden any-precision-llm checkpoint with its own quantizer and its own packer.

    git clone https://github.com/SNU-ARC/any-precision-llm, at a3257d02740cc5757c78673da534b0630ff3a4ea
    pip install torch==2.13.0 safetensors numba==0.68.1 flash1dkmeans==0.2.5 tqdm
    python tests/golden/checkpoints/make_any_precision_llm.py FOLDER_OF_ANY_PRECISION_LLM

The packer writes pytorch_model.bin, which is converted as the error about it says. Of each layer expected.safetensors
has the codes u8 [n, k] before they were packed. Their meaning is that of the project's kernel, which no CPU runs:
weight[n, k] = lut<b>[n, code >> (hi - b)].
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES = {"mlp.up_proj": (4, 1024 + 96), "self_attn.q_proj": (8, 96)}
"""[n, k]: whole blocks of 1024 inputs and a rest, and a rest alone."""
LO, HI = 2, 4


class Analyzer:
    """What the quantizer and the packer ask the project's own class for, of one layer."""

    num_layers, model_name, layers_name, module_names = 1, "model", "layers", list(SHAPES)
    tokenizer = types.SimpleNamespace(save_pretrained=lambda path: None)

    def __init__(self, weights: dict[str, Any]) -> None:
        import torch

        self.weights, self.state_dict = weights, {"model.norm.weight": torch.ones(96).half()}
        self.config = types.SimpleNamespace(save_pretrained=self.save_config)

    def get_layer_weights(self, layer: int) -> dict[str, Any]:
        return self.weights

    def get_arch_config(self) -> dict[str, Any]:
        return {"model_name": "model", "layers_name": "layers", "module_names": self.module_names}

    def save_config(self, path: str) -> None:
        (Path(path) / "config.json").write_text(json.dumps({"anyprec": self.config.anyprec}, indent=2) + "\n")


def quantization(folder: Path) -> Any:
    """The modules `quantize` and `pack`, without the package's __init__, which wants transformers."""
    for name in ("any_precision", "any_precision.quantization"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    return [importlib.import_module(f"any_precision.quantization.{name}") for name in ("quantize", "pack")]


def main() -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    analyzer, target = Analyzer(weights), HERE / "any_precision_llm"
    target.mkdir(parents=True, exist_ok=True)
    quantize, pack = quantization(Path(sys.argv[1]))
    made_by = {"format": "pt", "made_by": f"any-precision-llm a3257d0, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as temporary:
        found, written = f"{temporary}/found", f"{temporary}/written"
        quantize.seed_and_upscale(
            analyzer, [{name: torch.ones_like(w) for name, w in weights.items()}], found, LO, HI, 1, random_state=0
        )
        pack.pack(analyzer, found, written, LO, HI, cpu_count=1)
        state = torch.load(f"{written}/pytorch_model.bin", weights_only=True)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, target / "model.safetensors", made_by)
        (target / "config.json").write_text((Path(written) / "config.json").read_text())
        codes = torch.load(f"{found}/weights/l0.pt", weights_only=False)
    expected = {f"model.layers.0.{name}": torch.from_numpy(c).reshape(SHAPES[name]) for name, c in codes.items()}
    save_file(expected, target / "expected.safetensors", made_by)


if __name__ == "__main__":
    main()
