"""Files that are there whole or not at all, and what JSON others have written."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, for which what is nested too deep is no JSON either.

    Raises:
      ValueError: it is none.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path` and gives it that name once all of it is on the disk.

    Whatever interrupts this, a full disk or a kill, `path` holds what it held before or all that was written. A link
    stays one. What is there and is no file, such as /dev/null, is written to as it is.

    Args:
      write: `(temporary) -> ignored` writes the file at the path that it is given, which has the suffix of `path`.

    Raises:
      OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        write(path)
        return
    path = path.resolve()
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=path.parent, ignore_cleanup_errors=True) as beside:
        temporary = Path(beside) / path.name
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """`replace_file` of what the user asked for, in a directory that is made if it is not there.

    Raises:
      UserError: it cannot be written, and why.
    """
    check_writable(path)
    with _told(path):
        replace_file(path, write)


def check_writable(path: Path) -> None:
    """Refuses, before anything is computed for it, a file that `write_output` could not write.

    Raises:
      UserError: `path` is a directory or lies below a file, or its directory cannot be made or written to.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file in it")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another place for it") from error
