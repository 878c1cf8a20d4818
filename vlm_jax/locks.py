"""One process at a time, on any file system."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

logger = logging.getLogger(__name__)

_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def exclusive(path: Path, timeout: float) -> Iterator[None]:
    """Holds the lock that a file stands for.

    It is the operating system's, so that it ends with a killed process. On a file system that has none, as many a
    cluster's, the lock is that a second file, of the suffix `.soft`, is there. What a process killed on another
    machine left of that must be deleted by hand: nobody else can tell that it is dead.

    Args:
      timeout: seconds to wait for another process.

    Raises:
      filelock.Timeout: another process holds it; the name of the file that it holds is its `lock_file`.
      OSError: the file cannot be written.
    """
    lock: BaseFileLock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        lock = SoftFileLock(path.with_name(f"{path.name}.soft"))
        logger.warning(f"the file system of {path} has no locks ({error.strerror}): {lock.lock_file} stands for one")
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        lock.release()
