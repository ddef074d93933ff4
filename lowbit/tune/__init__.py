"""Fine-tuning what is continuous in a quantized model: codes are frozen.

`alpha_tuning` adapts a model to a task through a handful of scales; `reconstruct` brings a quantized model's blocks
back to what those of the dense model return.
"""

from lowbit.tune.alpha import AlphaTuning as AlphaTuning
from lowbit.tune.alpha import alpha_tuning as alpha_tuning
from lowbit.tune.alpha import fold as fold
from lowbit.tune.reconstruction import reconstruct as reconstruct
