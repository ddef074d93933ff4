"""Arrays and quantized arrays on disk: one checked safetensors file, and other projects' checkpoints."""

from lowbit.io.checkpoint import convert as convert
from lowbit.io.checkpoint import read_checkpoint as read_checkpoint
from lowbit.io.error import CheckpointError as CheckpointError
from lowbit.io.export import export_checkpoint as export_checkpoint
from lowbit.io.file import read as read
from lowbit.io.file import read_header as read_header
from lowbit.io.file import write as write
from lowbit.io.gguf import export_gguf as export_gguf
from lowbit.io.gguf import gguf_metadata as gguf_metadata
