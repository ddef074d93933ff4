"""Makes the golden GGUF file with ggml's own quantizers, compiled alone, and the `gguf` package.

    git clone https://github.com/ggml-org/ggml, at d99724f2b141fed9e1a9f402213506c081433465
    pip install gguf==0.19.0 safetensors numpy, and a C compiler as `cc`
    python tests/golden/checkpoints/make_gguf.py FOLDER_OF_GGML

Of each type expected.safetensors has the float32 weight [n, k] that ggml's decoder makes of the blocks, their floats,
and their codes and integer scales: what the decoder makes of the blocks where everything else is one, or zero.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
N, K = 2, 512
D, DMIN, SIX_BITS = ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12)
STRUCTS: dict[str, list[Any]] = {
    "Q4_0": [D, ("qs", "u1", 16)],
    "Q4_1": [D, DMIN, ("qs", "u1", 16)],
    "Q5_0": [D, ("qh", "u1", 4), ("qs", "u1", 16)],
    "Q5_1": [D, DMIN, ("qh", "u1", 4), ("qs", "u1", 16)],
    "Q8_0": [D, ("qs", "u1", 32)],
    "Q2_K": [("scales", "u1", 16), ("qs", "u1", 64), D, DMIN],
    "Q3_K": [("hmask", "u1", 32), ("qs", "u1", 64), SIX_BITS, D],
    "Q4_K": [D, DMIN, SIX_BITS, ("qs", "u1", 128)],
    "Q5_K": [D, DMIN, SIX_BITS, ("qh", "u1", 32), ("qs", "u1", 128)],
    "Q6_K": [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "u1", 16), D],
}
"""ggml's blocks, with its `m` of Q4_1 and Q5_1 as `dmin`."""
ONE = {"Q2_K": [1] * 16, "Q3_K": [0x11] * 8 + [0xAA] * 4, "Q4_K": [1] * 4 + [0] * 4 + [1] * 4, "Q6_K": [1] * 16}
ONE["Q5_K"] = ONE["Q4_K"]
"""What `scales` holds where every scale is one and every offset zero."""
LARGEST = {"Q2_K": 3, "Q3_K": 3, "Q4_K": 15, "Q5_K": 31, "Q6_K": 31}
"""The code whose bits are all ones, from the middle where there are no offsets."""
UNUSED = "void ggml_abort(void){} void ggml_row_size(void){} void ggml_type_name(void){} void ggml_type_size(void){}"
"""What the quantizers refer to elsewhere and do not call."""


def library(ggml: Path, folder: str) -> Any:
    stub, target = Path(folder) / "stub.c", Path(folder) / "quants.so"
    stub.write_text(UNUSED)
    includes = [f"-I{ggml / name}" for name in ("include", "src", "src/ggml-cpu")]
    flags = ["-O2", "-ffp-contract=off", "-shared", "-fPIC", *includes]
    subprocess.run(["cc", *flags, ggml / "src/ggml-quants.c", stub, "-o", target, "-lm"], check=True)
    return ctypes.CDLL(str(target))


class Type:
    """One of ggml's types: its quantizer and its decoder."""

    def __init__(self, quants: Any, name: str) -> None:
        self.name, self.struct, self.kind = name, np.dtype(STRUCTS[name]), name.replace("Q", "q")
        self.quants = quants

    def call(self, function: str, given: Any, out: Any, count: int) -> Any:
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (given, out)]
        getattr(self.quants, function)(*pointers, ctypes.c_int64(count))
        return out

    def encode(self, weight: Any) -> Any:
        blocks = np.zeros((N, K // (256 if "K" in self.name else 32)), self.struct)
        return self.call(f"quantize_row_{self.kind}_ref", weight, blocks, weight.size)

    def decode(self, blocks: Any, **fields: Any) -> Any:
        """The weight of the blocks with some fields changed."""
        changed = np.ascontiguousarray(blocks).copy()
        for name, value in fields.items():
            if name in self.struct.names:
                changed[name] = value
        return self.call(f"dequantize_row_{self.kind}", changed, np.zeros((N, K), np.float32), N * K)

    def expected(self, blocks: Any) -> dict[str, Any]:
        out = {"weight": self.decode(blocks), "scale": blocks["d"].copy()}
        plain = {"scales": ONE[self.name]} if self.name in ONE else {}
        out["codes"] = self.decode(blocks, d=1, dmin=0, **plain).astype(np.int8)
        group = K // blocks.shape[1] // (8 if self.name in ("Q4_K", "Q5_K") else 16)
        if plain:
            bits = {name: 0xFF for name in ("ql", "qs", "qh", "hmask")}
            scaled = self.decode(blocks, d=1, dmin=0, **bits)[:, ::group]
            out["group_scale"] = (scaled / LARGEST[self.name]).astype(np.int16)
        if "dmin" in self.struct.names:
            out["min"] = blocks["dmin"].copy()
            if plain:
                out["group_min"] = -self.decode(blocks, d=0, dmin=1)[:, ::group].astype(np.int16)
        return out


def main() -> None:
    import gguf
    from safetensors.numpy import save_file

    rng, target = np.random.default_rng(0), HERE / "gguf"
    target.mkdir(parents=True, exist_ok=True)
    weight = (rng.standard_normal((N, K)) * 0.05).astype(np.float32)
    weight[0, :32], weight[1, 256:] = 0, np.abs(weight[1, 256:])  # a group of zeros, and offsets that are zero
    writer = gguf.GGUFWriter(target / "model.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["<unk>", "é"])
    writer.add_array("tokenizer.ggml.token_type", [2, 1])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        quants = library(Path(sys.argv[1]), folder)
        for name in STRUCTS:
            of = Type(quants, name)
            blocks = of.encode(weight)
            stored, tensor = blocks.view(np.uint8), f"blk.0.{name}.weight"
            writer.add_tensor(tensor, stored, raw_dtype=gguf.GGMLQuantizationType[name])
            expected |= {f"{tensor}/{key}": np.ascontiguousarray(a) for key, a in of.expected(blocks).items()}
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(8, dtype=np.float32))
    writer.add_tensor("output.weight", np.arange(8, dtype=np.float16).reshape(2, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, target / "expected.safetensors", {"made_by": "ggml d99724f, gguf 0.19.0"})


if __name__ == "__main__":
    main()
