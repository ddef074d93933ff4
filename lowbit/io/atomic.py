"""A file, or a folder of files, that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file beside `path`, open for writing; leaving the block syncs it to the disk and renames it to `path`.

    An exception in the block, in the sync or in the rename removes the new file and leaves `path` as it was. A killed
    process leaves `path` as it was too, and the new file beside it: hidden, with a name that ends in `.tmp`.

    Raises OSError (FileNotFoundError, IsADirectoryError, PermissionError, ...) when `path` cannot be written.
    """
    target = Path(path).resolve()  # through a link, so that the link stays one
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is a device or a pipe, not a file; name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(target.parent)!r}; make it first")
    aside = _beside(target)
    try:
        fd = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less the umask, as for any new file
    except OSError as err:
        raise _named(path, err, "; choose a folder in which files may be created") from err
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException as err:
        aside.unlink(missing_ok=True)
        if isinstance(err, OSError):
            raise _named(path, err) from err
        raise
    _sync_folder(target.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path` to make files in, with `replacing`; leaving the block renames it to `path`.

    What is there is moved aside, and removed when the new folder is in its place. An exception in the block removes the
    new folder and leaves `path` as it was. A killed process leaves hidden folders with names that end in `.tmp`, and
    killed in the moment between the two renames, the old folder as one of them.

    Raises OSError when the folder cannot be made.
    """
    target = Path(path).resolve()
    aside, old = _beside(target), _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        _sync_folder(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
    except BaseException as err:
        if old.exists():
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(err, OSError):
            raise _named(path, err.__cause__ if isinstance(err.__cause__, OSError) else err) from err
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def folder_at(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there. Raises NotADirectoryError for a file, OSError when it cannot be made."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(path)!r} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _beside(target: Path) -> Path:
    """A name in the same folder, for a rename is atomic only within a file system; cut, for names have a limit."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")


def _named(path: str | os.PathLike[str], err: OSError, advice: str = "") -> OSError:
    """The same error, of the same class, with the path that the caller knows."""
    return OSError(err.errno, f"cannot write {str(path)!r}: {err.strerror or err}{advice}")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # there a folder cannot be opened
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
