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

    A `UserError` ends the process with status 2, a reader that has gone, as in `--help | head`, with 1. Any other
    exception is ours and keeps its traceback.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlm_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # Small programs too: by default those that compile within a second do so again at every start, a second in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:
        # Python flushes once more as it ends, and would tell of it there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
