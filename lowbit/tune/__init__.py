"""Fine-tuning what is continuous in a quantized model: codes are frozen.

`alpha_tuning` adapts a model to a task through a handful of scales, `train` runs that, codebook tuning and adapters on
models and texts of any size, and `extract` and `apply` keep many tasks beside one model; `reconstruct` brings a
quantized model's blocks back to what those of the dense model return. `max_widths`, `narrowed`, `blended`, `thresholds`
and `switched` make a model whose layers choose their widths token by token.
"""

from lowbit.tune.alpha import AlphaTuning as AlphaTuning
from lowbit.tune.alpha import alpha_tuning as alpha_tuning
from lowbit.tune.alpha import fold as fold
from lowbit.tune.board import tensorboard as tensorboard
from lowbit.tune.budget import max_widths as max_widths
from lowbit.tune.budget import narrowed as narrowed
from lowbit.tune.by_statistic import switched_by as switched_by
from lowbit.tune.estimators import Estimators as Estimators
from lowbit.tune.precision import Blend as Blend
from lowbit.tune.precision import Toward as Toward
from lowbit.tune.precision import blended as blended
from lowbit.tune.precision import mean_bits as mean_bits
from lowbit.tune.reconstruction import reconstruct as reconstruct
from lowbit.tune.run import Trained as Trained
from lowbit.tune.run import train as train
from lowbit.tune.task import Storage as Storage
from lowbit.tune.task import Task as Task
from lowbit.tune.task import apply as apply
from lowbit.tune.task import extract as extract
from lowbit.tune.task import storage as storage
from lowbit.tune.text import TextBatches as TextBatches
from lowbit.tune.text import next_token_loss as next_token_loss
from lowbit.tune.text import text_batches as text_batches
from lowbit.tune.thresholds import Thresholds as Thresholds
from lowbit.tune.thresholds import switched as switched
from lowbit.tune.thresholds import thresholds as thresholds
