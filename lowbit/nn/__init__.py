"""Quantized Flax NNX layers, and the functions that put them into a model."""

from lowbit.nn.calibrate import LayerStats as LayerStats
from lowbit.nn.calibrate import calibrate as calibrate
from lowbit.nn.checkpoint import load as load
from lowbit.nn.checkpoint import save as save
from lowbit.nn.conv import Conv as Conv
from lowbit.nn.einsum import Einsum as Einsum
from lowbit.nn.experts import Experts as Experts
from lowbit.nn.experts import QuantizedExperts as QuantizedExperts
from lowbit.nn.general import LinearGeneral as LinearGeneral
from lowbit.nn.growth import Comparison as Comparison
from lowbit.nn.growth import compare as compare
from lowbit.nn.kernel import Code as Code
from lowbit.nn.kernel import Codebook as Codebook
from lowbit.nn.kernel import Frozen as Frozen
from lowbit.nn.kernel import Kernel as Kernel
from lowbit.nn.kernel import Scale as Scale
from lowbit.nn.kernel import Stats as Stats
from lowbit.nn.kernel import kernels as kernels
from lowbit.nn.layers import Embed as Embed
from lowbit.nn.layers import Linear as Linear
from lowbit.nn.quantize import quantize as quantize
from lowbit.nn.report import Report as Report
from lowbit.nn.report import explain as explain
from lowbit.nn.report import report as report
from lowbit.nn.rules import Rule as Rule
