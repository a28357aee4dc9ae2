"""Files that survive what happens to a process: written whole or not at all, and by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["UserError", "make_folder", "only_one", "write_whole"]

LOCK = ".lock"


class UserError(ValueError):
    """Something that a user can set right. The command line prints it as one sentence, with exit code 2."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Whatever goes wrong, the earlier file stays and no partial one is left.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may be noticed only here
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        _remove(partial)


def make_folder(folder: Path) -> None:
    """Make a folder for results and try to write in it, before there is something to lose.

    Raises:
        UserError: there is a file of that name, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write results into {folder}: a file is in the way") from error
    except OSError as error:
        raise UserError(f"cannot write results into {folder}: {_reason(error)}") from error


@contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a results folder. The system releases it when the process ends, however it ends.

    Args:
        folder: it exists.
        what: is running there, for the message.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another {what} is writing into {folder}: wait for it, or choose another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _remove(path: Path) -> None:
    with suppress(OSError):  # below a file, say: then there is no partial one either
        path.unlink(missing_ok=True)
