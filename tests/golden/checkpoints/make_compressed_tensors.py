"""Makes the golden checkpoints of compressed-tensors with the library itself.

pip install torch==2.13.0 safetensors compressed-tensors==0.20.0
python tests/golden/checkpoints/make_compressed_tensors.py
pip install compressed-tensors==0.13.0     which is one of the last that have groups in another order
python tests/golden/checkpoints/make_compressed_tensors.py ordered
"""

from __future__ import annotations

import sys
from typing import Any

N, K, GROUP = 32, 64, 32
ATTENTION, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Schemes = dict[str, tuple[list[str], dict[str, Any]]]


def made_by() -> str:
    import compressed_tensors
    import torch

    return f"compressed-tensors {compressed_tensors.__version__}, torch {torch.__version__}"


def options(
    schemes: Schemes, form: str, ignore: list[str], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`quantization_config` as the library writes it."""
    from compressed_tensors.quantization import QuantizationConfig

    groups = {
        name: {"targets": targets, "weights": weights, "input_activations": activations}
        for name, (targets, weights) in schemes.items()
    }
    config = QuantizationConfig(config_groups=groups, format=form, ignore=ignore, quantization_status="compressed")
    return {**config.model_dump(mode="json"), "quant_method": "compressed-tensors"}


def compressed(form: str, weights: dict[str, Any], state: dict[str, Any], activations: Any = None) -> tuple[Any, Any]:
    """The tensors of a layer, and the weight that the library makes of them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    compressor = BaseCompressor.get_value_from_registry(form)
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(tensors, scheme)["weight"]


def integers(seed: int, form: str, weights: dict[str, Any], activations: Any = None) -> tuple[Any, Any]:
    """A layer of integers: its tensors, and what is expected."""
    import torch
    from golden import dense, draw

    bits, group = weights["num_bits"], weights.get("group_size") or K
    drawn = draw(seed, N, K, bits, group, order=False, symmetric=weights["symmetric"], least_zero=0)
    zero = (drawn["zero"].int() - (1 << bits - 1)).to(torch.int8)
    state = {"weight": dense(drawn), "weight_scale": drawn["scale"].bfloat16(), "weight_zero_point": zero}
    drawn["scale"] = state["weight_scale"]
    tensors, weight = compressed(form, weights, state, activations)
    return tensors, {**drawn, "weight": weight}


def floats(seed: int, weights: dict[str, Any], scale: Any) -> tuple[Any, Any]:
    """A layer in e4m3: its tensors, and what is expected."""
    import torch

    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    tensors, decoded = compressed("float-quantized", weights, {"weight": weight, "weight_scale": scale})
    return tensors, {"codes": tensors["weight"].view(torch.uint8), "scale": scale, "weight": decoded}


def write(name: str, config: dict[str, Any], layers: dict[str, tuple[Any, Any]], more: dict[str, Any]) -> None:
    from golden import save

    tensors = {f"{layer}.{key}": array for layer, (arrays, _) in layers.items() for key, array in arrays.items()}
    expected = {layer: wanted for layer, (_, wanted) in layers.items()}
    save(f"compressed_tensors/{name}", config, tensors | more, expected, made_by())


def packed() -> None:
    """Three schemes, found by the class, a pattern and a name; and a layer that is left dense."""
    import torch

    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    schemes: Schemes = {
        "group_0": (["Linear"], four),
        "group_1": (["re:.*mlp.*"], eight),
        "group_2": ([DOWN], {**four, "symmetric": False}),
    }
    layers = {
        ATTENTION: integers(1, "pack-quantized", four),
        UP: integers(2, "pack-quantized", eight),
        DOWN: integers(3, "pack-quantized", {**four, "symmetric": False}),
    }
    dense = {"lm_head.weight": torch.ones(8, K).bfloat16(), f"{UP}.bias": torch.zeros(N).bfloat16()}
    write("packed", options(schemes, "pack-quantized", ["lm_head"]), layers, dense)


def in_bytes() -> None:
    """int8 weights for int8 activations."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    config = options({"group_0": (["Linear"], weights)}, "int-quantized", [], activations)
    write("int8", config, {UP: integers(4, "int-quantized", weights, activations)}, {})


def in_floats() -> None:
    """e4m3 with a scale for each output, for the weight, and for each block, the last ones cut off."""
    import torch

    common = {"num_bits": 8, "type": "float", "symmetric": True}
    kinds = {
        UP: ({**common, "strategy": "channel"}, torch.linspace(0.004, 0.02, N).bfloat16()[:, None]),
        DOWN: ({**common, "strategy": "tensor"}, torch.tensor([0.0101])),
        ATTENTION: (
            {**common, "strategy": "block", "block_structure": [24, 48]},
            torch.tensor([[0.01, 0.02], [0.03, 0.04]]),
        ),
    }
    schemes: Schemes = {f"group_{i}": ([name], weights) for i, (name, (weights, _)) in enumerate(kinds.items())}
    layers = {name: floats(i, weights, scale) for i, (name, (weights, scale)) in enumerate(kinds.items())}
    write("float", options(schemes, "float-quantized", []), layers, {f"{DOWN}.input_scale": torch.tensor([0.5])})


def ordered() -> None:
    """Groups of inputs that are no neighbours, which newer versions do not have."""
    import torch
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from golden import dense, draw

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False}
    args = QuantizationArgs(**weights, actorder="group")
    drawn = draw(5, N, K, 4, GROUP, order=True, symmetric=False, least_zero=0)
    scale, zero = drawn["scale"], (drawn["zero"].int() - 8).to(torch.int8)
    compressor = PackedQuantizationCompressor()
    tensors = compressor.compress_weight(dense(drawn), scale, args, zero_point=zero, g_idx=drawn["g_idx"])
    tensors |= {"weight_scale": scale, "weight_g_idx": drawn["g_idx"]}
    # What unpacks the zero points in place is given a copy.
    weight = compressor.decompress_weight(dict(tensors), args)
    config = options({"group_0": (["Linear"], {**weights, "actorder": "group"})}, "pack-quantized", [])
    write("ordered", config, {UP: (tensors, {**drawn, "weight": weight})}, {})


if __name__ == "__main__":
    for make in [ordered] if "ordered" in sys.argv else [packed, in_bytes, in_floats]:
        make()
