"""What a command of `lowbit` is, and how its flags are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags


class UsageError(Exception):
    """A command line that says nothing that can be done."""


def expect_free(path: str, force: bool) -> None:
    """Raises ValueError for what is there and may not be replaced."""
    if Path(path).exists() and not force:
        raise ValueError(f"{path} exists: give --force to replace it, or another name")


@dataclass(frozen=True)
class Command:
    """One word after `lowbit`.

    Attributes:
      name: that word.
      arguments: names of what follows it; the last ones may be in brackets, and left out.
      summary: what it does, a sentence or two.
      examples: command lines that work in this repository.
      define: adds its flags.
      required: names of those that must be given.
      run: does it, given the flags and the arguments.
    """

    name: str
    arguments: tuple[str, ...]
    summary: str
    examples: tuple[str, ...]
    define: Callable[[flags.FlagValues], None]
    run: Callable[..., None]
    required: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        return " ".join(("lowbit", self.name, *self.arguments, "[--flags]"))

    def help(self) -> str:
        """What `--help` prints."""
        every = self._flags().get_help(include_special_flags=False).splitlines()
        listed = "\n".join(line for line in every if line.startswith("  "))  # the rest names modules
        shown = "\n".join(f"  {example}" for example in self.examples)
        return f"{self.usage}\n\n{self.summary}\n\nFlags:\n{listed}\n\nFor example:\n{shown}"

    def parse(self, argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
        """Flags and arguments. What the command does not define is looked for among the flags of the process.

        Raises UsageError for an unknown flag, a value that does not fit, or another number of arguments,
        or a flag that must be given.
        """
        own = self._flags()
        try:
            rest = own([self.name, *argv], known_only=True)
            flags.FLAGS.set_gnu_getopt()
            given = flags.FLAGS(rest)[1:]
        except flags.Error as err:
            raise UsageError(f"{err}; lowbit {self.name} --help lists the flags") from err
        most, least = len(self.arguments), sum(not name.startswith("[") for name in self.arguments)
        if not least <= len(given) <= most:
            takes = f"{most}" if least == most else f"{least} to {most}"
            raise UsageError(f"takes {takes} arguments, not {len(given)}: {self.usage}")
        if missing := [f"--{name}" for name in self.required if own[name].value is None]:
            raise UsageError(f"give {' and '.join(missing)}; lowbit {self.name} --help says what for")
        return own, given

    def _flags(self) -> flags.FlagValues:
        own = flags.FlagValues()
        own.set_gnu_getopt()
        self.define(own)
        return own
