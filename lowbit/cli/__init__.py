"""The command `lowbit`: quantize, measure, tune and run language models from a shell."""

from lowbit.cli.main import main as main
from lowbit.cli.main import run as run
