"""What must hold of a quantizer: `lowbit.testing.kit` runs it beside the checks of arrays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lowbit.array import QuantArray, dequantize
from lowbit.formats.format import Format
from lowbit.ir.dtypes import is_float, numpy_dtype
from lowbit.quant_type import QuantType
from lowbit.quantizers import IneligibleError, Quantizer, quantize_array
from lowbit.testing.checks import count, random_rows
from lowbit.testing.tolerance import Array, expect

DRAWS = 16
"""Random signs that a quantizer is tried on."""


def check_quantizer(fmt: Format, n: int, k: int, quantizer: Quantizer | None = None) -> None:
    """The result is a valid array, also of zero, constant and huge weights, and on N(0, 1) better than all zeros.

    Huge is 1/64 of what the narrowest stored float holds: 5e36 for float32. What the format cannot hold is scaled down.
    """
    normal = random_rows(k, n)
    t = QuantType((("k", k), ("n", n)), "f32", fmt)
    largest = min(
        [float(jnp.finfo(numpy_dtype(f.dtype)).max) for f in t.fields.values() if is_float(f.dtype)], default=64.0
    )
    weights = {
        "normal": normal,
        "zero": np.zeros_like(normal),
        "constant": np.full_like(normal, -0.3),
        "huge": normal * np.float32(largest / 64),
    }
    for kind, w in weights.items():
        try:
            w, array = _quantized(w, fmt, quantizer, f"a weight that is {kind}")
        except ValueError as err:
            raise AssertionError(str(err)) from err
        decoded = np.asarray(dequantize(array))
        bad = ~np.isfinite(decoded)
        expect(not bad.any(), f"{count(bad)} weights that were {kind} come back as NaN or inf")
        if kind == "normal":
            error = float(np.linalg.norm(decoded - w) / np.linalg.norm(w))
            expect(error < 1, f"the relative error on N(0, 1) is {error:.3g}; all zeros have 1")
    check_places(fmt, n, k, quantizer)


def _quantized(w: Array, fmt: Format, quantizer: Quantizer | None, name: str) -> tuple[Array, QuantArray]:
    """The weight, scaled to 1 at most if the format cannot hold it, and its array."""
    try:
        return w, quantize_array(w, fmt, quantizer, name=name)
    except IneligibleError:
        w = w / np.abs(w).max()
        return w, quantize_array(w, fmt, quantizer, name=name)


def check_places(fmt: Format, n: int, k: int, quantizer: Quantizer | None = None) -> None:
    """Codes and scales lie where the decode looks for them, also in the last of a ragged group.

    Weights have random signs, and are 4 times larger in the second half of the inputs, and of the outputs. On average
    over `DRAWS`, none takes the sign of another. A scale that both halves share may make them equal, so only a weight
    of a first half that comes back twice as large as one of the second is wrong. The error of all weights together
    hides such faults: a few weights may be at the wrong place, or every scale, where groups are alike.
    """
    inputs, outputs = np.arange(k)[:, None] >= k // 2, np.arange(n) >= n // 2
    size, mean = 4.0**inputs * 4.0**outputs, np.zeros((k, n))
    for seed in range(DRAWS):
        # Every second draw has the signs of the last one turned: one level of two may be zero, for either sign.
        signs = np.random.default_rng(seed // 2).choice([-1, 1], (k, n)) * (-1) ** seed
        _, array = _quantized((signs * size).astype(np.float32), fmt, quantizer, "a weight in two sizes")
        mean += signs * np.asarray(dequantize(array)) / DRAWS
    at = [int(i) for i in np.unravel_index(mean.argmin(), mean.shape)]
    wrong = f"{count(mean < 0)} weights take the signs of others, the worst at n={at[1]} k={at[0]}"
    expect(mean.min() >= 0, f"{wrong}: does the quantizer put codes where the decode looks for them?")
    for dim, axis in (("k", 0), ("n", 1)):
        first, second = np.split(mean, [mean.shape[axis] // 2], axis)
        larger = first.max(axis, initial=0) > 2 * second.min(axis)
        wrong = f"weights that are 4 times smaller in the first half of {dim} come back larger than in the second"
        expect(not larger.any(), f"{wrong}: does the quantizer put scales where the decode looks for them?")
