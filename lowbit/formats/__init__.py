"""Formats: one file each, defined by its decode expression."""

from lowbit.formats.act_order import act_order as act_order
from lowbit.formats.any_bcq import any_bcq as any_bcq
from lowbit.formats.any_precision import any_precision as any_precision
from lowbit.formats.bcq import bcq as bcq
from lowbit.formats.codebook import codebook as codebook
from lowbit.formats.format import Format as Format
from lowbit.formats.format import UnknownFormatError as UnknownFormatError
from lowbit.formats.format import register_format as register_format
from lowbit.formats.k_quant import k_quant as k_quant
from lowbit.formats.nested_fp import nested_fp as nested_fp
from lowbit.formats.scaled_fp8 import scaled_fp8 as scaled_fp8
from lowbit.formats.uniform import uniform as uniform
