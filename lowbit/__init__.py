"""lowbit: quantized tensors as stored arrays plus one expression that says how they decode.

Everything public is here, loaded on first use, so that `import lowbit.ir` costs numpy only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from absl import flags as _flags

if TYPE_CHECKING:
    from lowbit import autotuning as autotuning
    from lowbit import models as models
    from lowbit import nn as nn
    from lowbit import testing as testing
    from lowbit import tune as tune
    from lowbit.array import QuantArray as QuantArray
    from lowbit.array import dequantize as dequantize
    from lowbit.autotuning import autotune as autotune
    from lowbit.autotuning import tuned as tuned
    from lowbit.formats import Format as Format
    from lowbit.formats import act_order as act_order
    from lowbit.formats import any_bcq as any_bcq
    from lowbit.formats import any_precision as any_precision
    from lowbit.formats import bcq as bcq
    from lowbit.formats import codebook as codebook
    from lowbit.formats import k_quant as k_quant
    from lowbit.formats import nested_fp as nested_fp
    from lowbit.formats import register_format as register_format
    from lowbit.formats import scaled_fp8 as scaled_fp8
    from lowbit.formats import uniform as uniform
    from lowbit.grouped import grouped_matmul as grouped_matmul
    from lowbit.io import CheckpointError as CheckpointError
    from lowbit.io import convert as convert
    from lowbit.io import export_checkpoint as export_checkpoint
    from lowbit.io import export_gguf as export_gguf
    from lowbit.io import read_checkpoint as read_checkpoint
    from lowbit.nn import Code as Code
    from lowbit.nn import Codebook as Codebook
    from lowbit.nn import Fold as Fold
    from lowbit.nn import Rule as Rule
    from lowbit.nn import Scale as Scale
    from lowbit.nn import Threshold as Threshold
    from lowbit.nn import allocate as allocate
    from lowbit.nn import at_width as at_width
    from lowbit.nn import awq as awq
    from lowbit.nn import calibrate as calibrate
    from lowbit.nn import compare as compare
    from lowbit.nn import explain as explain
    from lowbit.nn import load as load
    from lowbit.nn import lwc as lwc
    from lowbit.nn import prepare as prepare
    from lowbit.nn import q_rater as q_rater
    from lowbit.nn import quantize as quantize
    from lowbit.nn import report as report
    from lowbit.nn import save as save
    from lowbit.ops import matmul as matmul
    from lowbit.planning import plan as plan
    from lowbit.quant_type import QuantType as QuantType
    from lowbit.quantizers import additive_codebooks as additive_codebooks
    from lowbit.quantizers import alternating as alternating
    from lowbit.quantizers import gptq as gptq
    from lowbit.quantizers import greedy as greedy
    from lowbit.quantizers import lnq as lnq
    from lowbit.quantizers import nested_kmeans as nested_kmeans
    from lowbit.quantizers import progressive as progressive
    from lowbit.quantizers import quantize_array as quantize_array
    from lowbit.quantizers import refitted_kmeans as refitted_kmeans
    from lowbit.quantizers import residual_kmeans as residual_kmeans
    from lowbit.quantizers import round_to_nearest as round_to_nearest
    from lowbit.quantizers import set_default_quantizer as set_default_quantizer
    from lowbit.quantizers import to_bcq as to_bcq

__version__ = "0.1.0"

_HOME = {
    "QuantArray": "array", "QuantType": "quant_type", "dequantize": "array",
    "Format": "formats", "act_order": "formats", "any_bcq": "formats", "any_precision": "formats", "bcq": "formats",
    "codebook": "formats", "k_quant": "formats", "nested_fp": "formats", "register_format": "formats",
    "scaled_fp8": "formats", "uniform": "formats",
    "matmul": "ops", "plan": "planning", "grouped_matmul": "grouped",
    "autotune": "autotuning", "tuned": "autotuning",
    "CheckpointError": "io", "convert": "io", "export_checkpoint": "io", "export_gguf": "io", "read_checkpoint": "io",
    "Code": "nn", "Codebook": "nn", "Fold": "nn", "Rule": "nn", "Scale": "nn", "Threshold": "nn",
    "allocate": "nn", "at_width": "nn", "awq": "nn",
    "calibrate": "nn", "compare": "nn", "explain": "nn", "load": "nn", "lwc": "nn", "prepare": "nn",
    "q_rater": "nn", "quantize": "nn", "report": "nn", "save": "nn",
    "additive_codebooks": "quantizers", "alternating": "quantizers", "gptq": "quantizers",
    "greedy": "quantizers", "lnq": "quantizers", "nested_kmeans": "quantizers", "progressive": "quantizers",
    "quantize_array": "quantizers", "refitted_kmeans": "quantizers", "residual_kmeans": "quantizers",
    "round_to_nearest": "quantizers", "set_default_quantizer": "quantizers", "to_bcq": "quantizers",
}  # fmt: skip
_MODULES = ("autotuning", "models", "nn", "testing", "tune")
__all__ = [*_HOME, *_MODULES]

_flags.DEFINE_enum(  # here, so that it is known before a command line is parsed
    "lowbit_on_cache_miss",
    None,
    ["heuristic", "autotune", "error"],
    "What a quantized product does that nobody has timed on this device: take the cheapest way by the cost model, time "
    "them all, or raise. The environment's LOWBIT_ON_CACHE_MISS counts where this is not given.",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lowbit.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"lowbit.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
