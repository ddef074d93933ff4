"""Language models: load a checkpoint, quantize it, generate."""

from lowbit.models.cache import CacheKind as CacheKind
from lowbit.models.cache import DenseCache as DenseCache
from lowbit.models.cache import DenseKV as DenseKV
from lowbit.models.config import Config as Config
from lowbit.models.decoder import Decoder as Decoder
from lowbit.models.rope import Rope as Rope
