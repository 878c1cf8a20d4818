"""What all commands have in common."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence

import jax

from vlm_jax.errors import UserError
from vlm_jax.paths import cache_directory


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Wraps the `main` of a command: keeps compiled programs between runs, and tells the user's errors in one line.

    A `UserError` ends the process with status 2, a reader that has gone, as in `--help | head`, with 1. Any other
    exception is ours and keeps its traceback.
    """
    if cache := cache_directory():
        jax.config.update("jax_compilation_cache_dir", str(cache / "vlm_jax" / "xla"))
    # Small programs too: by default those that compile within a second do so again at every start, a second in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python's stderr: no sign is worth losing a result
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        for argument in sys.argv[1:]:
            check_text(argument)
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


def gathered(arguments: Sequence[str], *flags: str) -> list[str]:
    """The same, with all values of a flag that stands there several times where it is first.

    `--prompt a --prompt b` is `--prompt a b`.
    """
    found: list[str] = []
    values: dict[str, int] = {}
    """Where the values of each flag end among what was found."""
    current: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            current = argument if argument in flags else None
            if current in values:
                continue
            found.append(argument)
            if current is not None:
                values[current] = len(found)
        elif current is None:
            found.append(argument)
        else:
            place = values[current]
            found.insert(place, argument)
            values = {flag: end + (end >= place) for flag, end in values.items()}
    return found


def check_text(argument: str) -> None:
    """Refuses what was read from the command line without being understood, and could not be written anywhere.

    Raises:
      UserError: it is not text in the encoding of the terminal.
    """
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the argument {argument!a} is not text in the encoding {sys.getfilesystemencoding()} of this terminal: "
            f"set LC_ALL=C.UTF-8 or choose another name"
        ) from error


def require_one_process() -> None:
    """For commands that compute on the devices of one process.

    Raises:
      UserError: this is one of several, which would each do all the work, or wait for each other in vain.
    """
    # Processes that never join do not know of each other: the launchers that `--distributed.coordinator auto` asks do.
    launched = (int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    processes = max(jax.process_count(), *launched)
    if processes > 1:
        raise UserError(
            f"this command was started in {processes} processes and runs in one: start it once, on a machine of one "
            f"host; the run's directory is all that it needs"
        )
