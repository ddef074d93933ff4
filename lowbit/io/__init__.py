"""Arrays and quantized arrays on disk: one checked safetensors file."""

from lowbit.io.error import CheckpointError as CheckpointError
from lowbit.io.file import read as read
from lowbit.io.file import read_header as read_header
from lowbit.io.file import write as write
