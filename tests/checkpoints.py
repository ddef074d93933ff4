"""What a checkpoint that another project packed must be read as."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lowbit as lb
from lowbit.io.layout import BESIDE
from lowbit.io.mapped import Mapped

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
Tensors = dict[str, np.ndarray]


def stored(path: Path) -> Tensors:
    """The tensors of a file, e4m3 too."""
    file = Mapped(path)
    return {name: file.array(name) for name in file.names}


def expected(folder: Path) -> dict[str, Tensors]:
    """What went into each layer, as tests/golden/checkpoints/golden.py says it."""
    layers: dict[str, Tensors] = {}
    for tensor, array in stored(folder / "expected.safetensors").items():
        layer, _, key = tensor.rpartition("/")
        layers.setdefault(layer, {})[key] = array
    return layers


def check_read(folder: Path) -> None:
    """Every code, scale and zero point, and whatever is not quantized."""
    read = dict(lb.read_checkpoint(folder))
    for layer, want in expected(folder).items():
        w = read.pop(f"{layer}.weight")
        assert isinstance(w, lb.QuantArray)
        weight = lb.dequantize(w)
        assert weight.dtype == want["weight"].dtype and np.array_equal(weight.T, want["weight"])
        if w.type.format.name == "scaled_fp8":
            assert np.array_equal(w.fields["code"], want["codes"])
            assert np.array_equal(w.fields["scale"], want["scale"].reshape(w.fields["scale"].shape))
        else:
            check_integers(w, want)
    tensors = stored(folder / "model.safetensors")
    beside = {name for name in tensors if name.rpartition(".")[2] in BESIDE or "norm" in name or "lm_" in name}
    assert read.keys() == beside
    assert all(np.array_equal(read[name], tensors[name]) for name in beside)


def check_integers(w: lb.QuantArray, want: Tensors) -> None:
    """Codes, scales and zero points of each weight, looked up by its place in the stored rows."""
    fmt, (k, n) = w.type.format, w.shape
    place = np.asarray(w.fields.get("place", np.arange(k)))
    group = fmt["group"] or k
    bits = np.unpackbits(np.asarray(w.fields["planes"]), axis=-1, count=group, bitorder="little").reshape(-1, n, k)
    codes = (bits.astype(int) << np.arange(fmt["bits"])[:, None, None]).sum(0)
    assert np.array_equal(codes[:, place], want["codes"])
    for field in ("scale", "zero"):
        assert np.array_equal(np.asarray(w.fields[field])[:, place // group], want[field][:, want["g_idx"]])
    ordered = not np.array_equal(want["g_idx"], np.arange(k) // group)
    assert fmt.name == ("act_order" if ordered else "uniform")
    assert w.fields["scale"].dtype == want["scale"].dtype
