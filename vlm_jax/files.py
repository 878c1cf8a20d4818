"""Files that are whole, old or new, whatever happens while they are written."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vlm_jax.errors import UserError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` writes a file beside `path`, which is then renamed: a full disk leaves what was there before.

    Raises:
      UserError: it cannot be written, and why.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuses, before anything is computed for it, a file that `replace_file` could not write.

    Raises:
      UserError: `path` is a directory or lies below a file, or its directory cannot be made or written to.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file in it")
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another place for it") from error
