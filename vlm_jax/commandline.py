"""What all commands have in common."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from vlm_jax.errors import UserError


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Wraps the `main` of a command: keeps compiled programs between runs, and tells the user's errors in one line.

    A `UserError` ends the process with status 2. Any other exception is ours and keeps its traceback.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlm_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
