"""The log of a training run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any


def tensorboard(folder: str | PathLike[str]) -> Callable[[dict[str, Any]], None]:
    """What `lb.tune.train` takes as `log`, to write each number of a record to TensorBoard files in a folder.

    Raises ImportError without tensorboardX.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as err:
        raise ImportError(
            "lb.tune.tensorboard writes with tensorboardX, which is not installed: pip install tensorboardX, or read "
            "the log.jsonl in the run's folder"
        ) from err
    writer = SummaryWriter(str(folder))

    def write(record: dict[str, Any]) -> None:
        for name in record.keys() - {"step"}:
            writer.add_scalar(name, record[name], record["step"])
        writer.flush()

    return write
