"""From dense weights to stored arrays."""

from lowbit.quantizers.additive import AdditiveCodebooks as AdditiveCodebooks
from lowbit.quantizers.additive import additive_codebooks as additive_codebooks
from lowbit.quantizers.codebook import ResidualKMeans as ResidualKMeans
from lowbit.quantizers.codebook import residual_kmeans as residual_kmeans
from lowbit.quantizers.quantizer import BinarySolver as BinarySolver
from lowbit.quantizers.quantizer import Quantizer as Quantizer
from lowbit.quantizers.quantizer import RoundToNearest as RoundToNearest
from lowbit.quantizers.quantizer import alternating as alternating
from lowbit.quantizers.quantizer import greedy as greedy
from lowbit.quantizers.quantizer import quantize_array as quantize_array
from lowbit.quantizers.quantizer import round_to_nearest as round_to_nearest
from lowbit.quantizers.quantizer import set_default_quantizer as set_default_quantizer
from lowbit.quantizers.quantizer import to_bcq as to_bcq
