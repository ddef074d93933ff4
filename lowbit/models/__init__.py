"""Language models: load a checkpoint, quantize it, generate."""

from lowbit.models import kvzip as kvzip
from lowbit.models.cache import CacheKind as CacheKind
from lowbit.models.cache import DenseCache as DenseCache
from lowbit.models.cache import DenseKV as DenseKV
from lowbit.models.config import Config as Config
from lowbit.models.context import Context as Context
from lowbit.models.decoder import Decoder as Decoder
from lowbit.models.encoder import Encoder as Encoder
from lowbit.models.evaluate import Score as Score
from lowbit.models.evaluate import evaluate as evaluate
from lowbit.models.generate import Generation as Generation
from lowbit.models.generate import Step as Step
from lowbit.models.generate import generate as generate
from lowbit.models.generate import read as read
from lowbit.models.generate import stream as stream
from lowbit.models.kv import Fp8KV as Fp8KV
from lowbit.models.kv import Int8KV as Int8KV
from lowbit.models.kv import Kivi as Kivi
from lowbit.models.load import load as load
from lowbit.models.rope import Rope as Rope
from lowbit.models.sampling import Sampling as Sampling
from lowbit.models.save import save as save
from lowbit.models.serving import Batcher as Batcher
from lowbit.models.serving import NewToken as NewToken
from lowbit.models.tokens import stop_tokens as stop_tokens
from lowbit.models.tokens import tokenizer as tokenizer
