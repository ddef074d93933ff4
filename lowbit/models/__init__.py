"""Language models: load a checkpoint, quantize it, generate."""

from lowbit.models import kvzip as kvzip
from lowbit.models.cache import DenseCache as DenseCache
from lowbit.models.config import Config as Config
from lowbit.models.decoder import Decoder as Decoder
from lowbit.models.kv import Fp8KV as Fp8KV
from lowbit.models.kv import Int8KV as Int8KV
from lowbit.models.kv import Kivi as Kivi
from lowbit.models.rope import Rope as Rope
