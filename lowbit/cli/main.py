"""From a command line to a command, and from an error to one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from absl import app, flags, logging

from lowbit.cli.command import Command, UsageError

COMMANDS: Mapping[str, str] = {
    "quantize": "Quantize a checkpoint into a folder.",
    "eval": "Bits per byte and perplexity of a model on a text.",
    "generate": "Continue a prompt.",
    "report": "What a model stores, layer by layer.",
    "explain": "Every way to run a layer's product, and which one is taken.",
    "tune": "Adapt a quantized model to a text, or let its layers choose their widths (--dp).",
    "allocate": "Choose a format for each layer, within a budget.",
    "compare": "How the error of quantization grows from layer to layer.",
    "convert": "A checkpoint of another project as a file of lowbit, or a model for another project.",
}
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def run(argv: Sequence[str]) -> int:
    """One command line, the words after `lowbit`; returns the exit code.

    0 is success, 1 an input that cannot be used, 2 a command line that says nothing, 130 Ctrl-C. The last three print
    one line to standard error.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name = argv[0]
    if name not in COMMANDS:
        return _failed("lowbit", f"{name!r} is no command: {', '.join(COMMANDS)}", MISUSED)
    command: Command = import_module(f"lowbit.cli.{name}").COMMAND
    if {"-h", "--help"} & set(argv[1:]):
        print(command.help())
        return 0
    try:
        given, arguments = command.parse(argv[1:])
        command.run(given, *arguments)
    except UsageError as err:
        return _failed(f"lowbit {name}", str(err), MISUSED)
    except (ValueError, TypeError, OSError, KeyError, FloatingPointError, ImportError) as err:
        return _failed(f"lowbit {name}", str(err) or repr(err), FAILED)
    except KeyboardInterrupt as err:
        return _failed(f"lowbit {name}", f"interrupted; {err}" if err.args else "interrupted", INTERRUPTED)
    return 0


def overview() -> str:
    """What `lowbit --help` prints."""
    wide = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{wide}}  {summary}" for name, summary in COMMANDS.items())
    return f"lowbit COMMAND ...\n\n{listed}\n\nlowbit COMMAND --help has an example."


def _failed(who: str, message: str, code: int) -> int:
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """The console script."""

    def later(argv: list[str]) -> list[str]:
        """Flags are those of a command, which parses them itself."""
        flags.FLAGS(argv[:1])
        logging.set_verbosity(logging.WARNING)  # --verbosity says otherwise
        return argv

    app.run(lambda argv: run(argv[1:]), flags_parser=later)
