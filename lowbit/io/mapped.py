"""A safetensors file mapped into memory: its tensors are views of the file's pages."""

from __future__ import annotations

import json
import mmap
import os
from typing import Any, BinaryIO

import numpy as np
from safetensors import safe_open

from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.tensors import DTYPES, FOREIGN, NATIVE, Array

DTYPE_OF = {short: DTYPES[name] for name, short in (NATIVE | FOREIGN).items()}


class Mapped:
    """An open file, its structure checked by the safetensors library; it is unmapped when the last view of it is gone.

    Raises CheckpointError for what is no whole safetensors file, OSError when it cannot be opened.

    Attributes:
      names: of the tensors.
      metadata: strings beside them, or None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            # By the descriptor where that can be, so that a save in between does not show two files.
            same = f"/dev/fd/{file.fileno()}" if os.path.exists("/dev/fd") else path
            try:
                with safe_open(same, framework="np") as checked:
                    self.names, self.metadata = list(checked.keys()), checked.metadata()
            except Exception as err:  # whatever the parser makes of arbitrary bytes
                raise CheckpointError(f"{path} {_ailment(file)} ({err})") from err
            # A private mapping: whoever writes to an array gets a page of his own, and the file stays as it is.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = memoryview(self._map)
        self._start = 8 + int.from_bytes(self._bytes[:8], "little")
        self._described: dict[str, Any] = json.loads(bytes(self._bytes[8 : self._start]))

    def array(self, name: str) -> Array:
        """A view of a tensor. Raises ValueError for a dtype that is none of NATIVE's or FOREIGN's."""
        spec = self._described[name]
        if spec["dtype"] not in DTYPE_OF:
            raise ValueError(f"its dtype is {spec['dtype']}")
        begin, end = (self._start + at for at in spec["data_offsets"])
        return np.ndarray(spec["shape"], DTYPE_OF[spec["dtype"]], self._bytes[begin:end])

    def forget(self) -> None:
        """Gives back the memory of pages that were read; they are read again when used. What was written to is lost."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _ailment(file: BinaryIO) -> str:
    """Why a file that safetensors refuses is one, from its length and its first bytes."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(9)
    if size == 0:
        return f"is empty: {AGAIN}"
    length = int.from_bytes(head[:8], "little")
    if head[8:] != b"{":
        return f"is not a safetensors file ({size} bytes, beginning {head[:8]!r}): name the file that lowbit saved"
    if 8 + length > size:
        return f"is truncated or damaged: it has {size} bytes, and states a header of {length}: {AGAIN}"
    try:
        described = json.loads(b"{" + file.read(length - 1))
        ends = [spec["data_offsets"][1] for name, spec in described.items() if name != "__metadata__"]
        stated = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"has a damaged header: {AGAIN}"
    if stated > size:
        return f"is truncated: it has {size} bytes, and its header describes {stated}: {AGAIN}"
    return f"is damaged: it has {size} bytes, and its header describes {stated}: {AGAIN}"
